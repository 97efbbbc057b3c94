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


def cut(path, data: bytes) -> None:
    """As ``path``, beside which the whole ones stay, in another inode."""
    path.unlink()
    path.write_bytes(data)


def test_what_is_cut_short_is_not_done_and_is_made_again(lora_sampled, tmp_path, monkeypatch):
    """A copy over a network that broke, a disk that was full for another program: at its old name, but not whole."""
    from pipeline.training import loop

    lab = lora_sampled.copy(tmp_path / "lab")
    run, wanted = lab.plan.run, {path: data for path, (data, _) in lab.made().items()}
    files = {run.result: "TrainLoRA", run.path / "pytorch_lora_weights.safetensors": "TrainLoRA"}
    files |= {run.samples_grid: "Sample", run.samples_list: "Sample"}
    files |= dict.fromkeys(list(run.samples.glob("*.png"))[:2], "Sample")
    monkeypatch.setattr(loop.Training, "advance", None)
    for path, stage in files.items():
        whole = wanted[path]
        for data in (b"", whole[:4], whole[: len(whole) // 2], whole[:-2], bytes(len(whole)), b"[]", b"\xff" + whole):
            cut(path, data)
            assert not lab.done(stage), (path.name, data[:10])
        lab.run(stage)
        assert lab.done(stage)
        if path != run.result:  # which has times in it
            assert path.read_bytes() == whole


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
