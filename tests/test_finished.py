"""What is finished stays as it is, also where nothing is remembered of the files: another machine, a moved store."""

import re

import pytest
from commands import run_luigi
from lab import Lab
from pairs import plan_of

from pipeline.flux import models

pytestmark = pytest.mark.usefixtures("cpu")

ENCODERS = ["EncodeCLIP", "EncodeT5", "EncodeImages"]
STAGES = {
    "TrainLoRA": ["CheckData", *ENCODERS, "TrainLoRA", "SampleLatents", "Sample"],
    "TrainControlNet": ["CheckData", "CheckControls", *ENCODERS, "EncodeControls", "TrainControlNet"],
}


def finished_lora(request) -> Lab:
    return request.getfixturevalue("lora_sampled")


def finished_controlnet(request) -> Lab:
    lab = request.getfixturevalue("encoded_pairs").copy(request.getfixturevalue("tmp_path") / "trained")
    return lab.run("CheckControls", "TrainControlNet")


@pytest.mark.parametrize("train, finished", [("TrainLoRA", finished_lora), ("TrainControlNet", finished_controlnet)])
def test_stages_run_by_hand_load_no_model_and_write_nothing(request, tmp_path, monkeypatch, capsys, train, finished):
    lab = finished(request).copy(tmp_path / "lab").forget_files()
    made = lab.made()
    monkeypatch.setattr(models, "load_model", None)
    lab.run(*STAGES[train])
    assert lab.made() == made
    assert f"{train}: done already, in {lab.folder}/runs/" in capsys.readouterr().out


def test_luigi_checks_photos_and_starts_no_other_stage(lora_sampled, tmp_path):
    lab = lora_sampled.copy(tmp_path / "lab").forget_files()
    made = lab.made()
    result = run_luigi("Sample", lab)
    assert result.returncode == 0, result.stderr
    there = re.findall(r"its output is there already: (\w+)", result.stderr)
    assert sorted(there) == sorted(set(STAGES["TrainLoRA"]) - {"CheckData"} | {"CheckRoom"})
    assert lab.made() == made


def test_a_controlnet_without_its_config_is_made_again_without_a_step(encoded_pairs, tmp_path, monkeypatch):
    from pipeline.training import loop

    lab = encoded_pairs.copy(tmp_path / "lab").run("CheckControls", "TrainControlNet")
    plan = plan_of(lab)
    config = plan.run.path / "controlnet" / "config.json"
    text = config.read_text()
    config.unlink()
    monkeypatch.setattr(loop.Training, "advance", None)
    lab.run("TrainControlNet")
    assert config.read_text() == text
