"""`import pipeline` as a library, and the notebook that shows it."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.process.stopping import StopRequest
from pipeline.settings.experiment import settings_of
from pipeline.synthetic import shapes

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples/notebook.ipynb"


def test_importing_the_package_imports_nothing_else_and_its_api_no_mindspore():
    said = (
        "import sys; before = set(sys.modules); import pipeline; new = set(sys.modules) - before; "
        "assert {name for name in new if '.' in name and name.startswith('pipeline')} == set(), new; "
        "assert set(pipeline.__all__) <= set(dir(pipeline)); "
        "pipeline.load(); pipeline.run; assert not {'mindspore', 'mindone', 'luigi'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        pipeline.trian  # noqa: B018


def test_a_change_keeps_what_it_does_not_name(encoded):
    experiment = pipeline.load(encoded.path)
    other = pipeline.change(experiment, seed=7, train={"steps": 9})
    assert (other.seed, other.train.steps) == (7, 9)
    assert other.train == dataclasses.replace(experiment.train, steps=9)
    assert other.stores == experiment.stores and other.images == experiment.images
    assert settings_of(pipeline.change(other, seed=0, train={"steps": 3})) == settings_of(experiment)


def test_a_change_is_checked_as_a_file_is(encoded):
    with pytest.raises(pipeline.UserError) as refusal:
        pipeline.change(pipeline.load(encoded.path), train={"stpes": 3}, lora={"rank": 0}, name="a/b", data=3)
    heading, *lines = str(refusal.value).splitlines()
    assert heading == "lab, changed: 4 problems in the experiment file"
    assert {line.strip().partition(":")[0] for line in lines} == {"train.stpes", "lora.rank", "name", "data"}


def test_only_a_change_of_its_table_makes_it_a_controlnets(encoded):
    experiment = pipeline.load(encoded.path)
    assert "controlnet" not in pipeline.change(experiment, seed=1).tables
    assert "controlnet" in pipeline.change(experiment, controlnet={"condition": "canny"}).tables


def test_tensors_are_those_of_the_store_by_caption_and_by_file(encoded):
    experiment, captions = pipeline.load(encoded.path), encoded.captions()
    latents, prompts = (pipeline.tensors(experiment, kind) for kind in ("latents", "prompts"))
    assert set(latents) == {row["file_name"] for row in captions}
    assert set(prompts) == {row["text"] for row in captions}
    photo = encoded.plan.photos[0]
    np.testing.assert_array_equal(latents[photo.name], encoded.latents.read(photo.digest))
    assert len(pipeline.tensors(experiment, "controls")) == 0


def test_ctrl_c_is_a_keyboard_interrupt_and_the_same_call_goes_on(cpu, encoded, tmp_path, monkeypatch):
    experiment, enter = pipeline.load(encoded.copy(tmp_path / "lab").path), StopRequest.__enter__

    def interrupted(request):
        enter(request)
        signal.raise_signal(signal.SIGINT)
        return request

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="TrainLoRA was stopped"):
        patched.setattr(StopRequest, "__enter__", interrupted)
        pipeline.run(experiment, "TrainLoRA")
    assert not pipeline.open_run(experiment).is_trained
    pipeline.run(experiment, "TrainLoRA")
    assert pipeline.open_run(experiment).is_trained


def test_a_tensor_that_is_not_encoded_yet_is_listed_and_refused(encoded):
    latents = pipeline.tensors(pipeline.change(pipeline.load(encoded.path), data={"resolution": 48}), "latents")
    assert len(latents) == 3
    with pytest.raises(pipeline.StoreError):
        latents[next(iter(latents))]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda experiment: pipeline.run(experiment, "TrainLora"), "stage: must be one of GetModel"),
        (lambda experiment: pipeline.tensors(experiment, "images"), "kind: must be one of prompts"),
        (lambda experiment: pipeline.open_run(experiment), "no run; train first"),
        (lambda experiment: pipeline.open_run("nowhere"), "nowhere: no run; train first"),
        (lambda experiment: pipeline.load("nowhere.toml"), "nowhere.toml: cannot read the experiment file"),
        (
            lambda experiment: pipeline.run(
                pipeline.change(experiment, parallel={"ranks": 2}, train={"accumulate": 2}), "TrainLoRA"
            ),
            "parallel.ranks = 2: needs 2 processes",
        ),
    ],
)
def test_what_cannot_be_done_is_said_as_the_command_line_says_it(encoded, call, said):
    with pytest.raises(pipeline.UserError, match=said):
        call(pipeline.load(encoded.path))


def test_a_run_reads_what_its_training_wrote(plainly_trained):
    run = pipeline.open_run(pipeline.load(plainly_trained.path))
    assert run.path == plainly_trained.run_folder and run.is_trained
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    assert run.result["loss"] == pytest.approx(run.metrics[-1]["loss"])
    assert run.settings["train"]["steps"] == 3
    assert [record["stage"] for record in run.records] == ["TrainLoRA"]
    assert all(np.isfinite(value).all() for value in run.weights().values()) and len(run.weights()) > 10
    assert run.pictures == []


def test_the_notebook_has_no_outputs_and_says_how_long_it_takes():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells)


def _cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_cell_by_cell(cpu, tmp_path, monkeypatch, capsys):
    """All of it in this process: with two pictures, two steps and one prompt instead of minutes."""
    monkeypatch.chdir(tmp_path)
    shapes.draw_teaching(tmp_path / "notebook/blickets", "cross", count=2)
    names: dict = {"quick": _quick}
    for cell in _cells():
        cell = cell.replace("steps = 150", "steps = 2").replace("pipeline.load()", "quick()")
        exec(compile(cell, NOTEBOOK.name, "exec"), names)
    run, losses = names["run"], names["losses"]
    assert run.is_trained and len(run.pictures) == 2
    assert set(losses) == {2e-3, 1e-3}
    assert "did you mean learning_rate?" in capsys.readouterr().out


def _quick():
    """The embedded default with little to draw, and without the minute that compiling takes."""
    few = {"prompts": ["a red blicket on a white background"], "num_inference_steps": 2}
    prior = {"num_images": 2, "num_inference_steps": 2}
    return pipeline.change(pipeline.load(), train={"mode": "pynative", "batch_size": 1}, prior=prior, sample=few)
