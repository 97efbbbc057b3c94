"""A training that was interrupted, however often and however, ends as the one that never was, bit for bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from kills import Killed, kill_at, kill_at_random, outcome
from lab import Lab
from nobody import as_nobody, open_folder

from cache import StoreError
from pipeline.errors import UserError
from pipeline.plan.run_folder import RunFolder
from pipeline.process.stopping import Stopped, StopRequest
from pipeline.training import checkpoint as resume
from pipeline.training import loop
from pipeline.training.batches import Batches

pytestmark = pytest.mark.usefixtures("cpu")

VARIANTS = {
    "plain": {},
    "accumulated": {"train": {"accumulate": 2}},
    "averaged": {"train": {"ema_decay": 0.9}},
    "clip": {"lora": {"train_text_encoder": True}, "train": {"text_encoder_lr": 1e-3}},
    "fp16": {"precision": {"preset": "fp16"}},
    "dropout": {"lora": {"dropout": 0.3}, "train": {"caption_dropout": 0.3}},
    "buckets": {"data": {"buckets": True, "flip": True, "crops": 2}, "train": {"batch_size": 1}},
    "scheduled": {"train": {"lr_scheduler": "cosine", "lr_warmup_steps": 3, "weighting_scheme": "logit_normal"}},
    "compiled": {"train": {"mode": "jit"}},
}
TOGETHER = {
    "everything": ("accumulated", "averaged", "clip", "dropout", "buckets", "scheduled"),
    "compiled": ("compiled", "averaged", "dropout"),
}
SLOW = ("compiled", "fp16")
STEPS = 8  # with checkpoints at 2, 4, 6 and 8


@pytest.fixture(scope="module")
def start(cpu, tiny_model, tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("resume") / "lab", tiny_model).set("train", steps=STEPS, checkpoint_every=2)


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> Lab:
    """The plain variant, trained without a break."""
    return lab_of(start, tmp_path_factory.mktemp("finished") / "lab", "plain").run("TrainLoRA")


@pytest.fixture
def plain(finished, tmp_path) -> Lab:
    """The plain variant, encoded and not trained."""
    lab = finished.copy(tmp_path / "plain")
    shutil.rmtree(lab.folder / "runs")
    return lab


def lab_of(start: Lab, folder: Path, variant: str) -> Lab:
    lab = start.copy(folder)
    for name in TOGETHER.get(variant, (variant,)):
        for table, values in VARIANTS[name].items():
            lab.set(table, **values)
    if variant == "everything":
        lab.set("train", steps=5)  # its steps take long
    lab.encode()
    return lab


@pytest.mark.parametrize("variant", ["everything", *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_an_interrupted_run_ends_as_the_unbroken_one(start, tmp_path, monkeypatch, variant):
    lab = lab_of(start, tmp_path / "lab", variant)
    other = lab.copy(tmp_path / "other")
    unbroken = outcome(lab.run("TrainLoRA").run_folder)
    steps = lab.experiment.train.steps
    kills = [steps - 2, steps]  # between two checkpoints, and after the last step
    kill_at(monkeypatch, kills)
    while kills:
        with pytest.raises(Killed):
            other.run("TrainLoRA")
        assert not other.done("TrainLoRA")
    assert outcome(other.run("TrainLoRA").run_folder) == unbroken
    assert [line["step"] for line in unbroken["metrics"]] == list(range(1, steps + 1))


def test_a_run_that_was_asked_to_stop_saves_the_step_it_was_in(finished, plain, monkeypatch):
    other = plain.set("train", checkpoint_every=0)
    advance = loop.Training.advance
    stops = iter((2, 7))

    def advance_and_ask(training, batches):
        result = advance(training, batches)
        if training.step == asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(loop.Training, "advance", advance_and_ask)
    for asked in stops:
        with pytest.raises(Stopped):
            other.run("TrainLoRA")
        assert resume.newest(RunFolder(other.run_folder), STEPS).step == asked
    assert outcome(other.run("TrainLoRA").run_folder) == outcome(finished.run_folder)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(finished, plain, monkeypatch, capsys):
    other = plain
    kill_at(monkeypatch, [7])
    with pytest.raises(Killed):
        other.run("TrainLoRA")
    newest, before = RunFolder(other.run_folder).list_checkpoints()
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(data)
    other.run("TrainLoRA")
    said = capsys.readouterr().out
    assert f"{newest}: the checkpoint is damaged; going back to the one before, and keeping it as" in said
    assert newest.with_name(f"{newest.name}.damaged").read_bytes() == data
    assert f"going on from step 4, {before}" in said
    assert outcome(other.run_folder) == outcome(finished.run_folder)


@pytest.mark.parametrize("offset", [3, 30, 300, -5])
def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(finished, tmp_path, offset):
    (path, *_) = RunFolder(finished.run_folder).list_checkpoints()
    (tmp_path / "checkpoints").mkdir()
    copy = tmp_path / "checkpoints" / path.name
    data = bytearray(path.read_bytes())
    copy.write_bytes(data)
    assert resume.newest(RunFolder(tmp_path), STEPS).step == STEPS
    data[offset] ^= 1
    copy.write_bytes(data)
    assert resume.newest(RunFolder(tmp_path), STEPS) is None


def test_only_the_newest_checkpoints_are_kept(plain):
    plain.set("train", checkpoint_every=1, keep_checkpoints=3).run("TrainLoRA")
    names = [path.name for path in RunFolder(plain.run_folder).list_checkpoints()]
    assert names == ["step-000008.safetensors", "step-000007.safetensors", "step-000006.safetensors"]


def test_a_checkpoint_of_another_configuration_is_refused_with_what_differs(finished, tmp_path):
    lab = finished.copy(tmp_path / "lab")
    (path, *_) = RunFolder(lab.run_folder).list_checkpoints()
    lab.set("train", learning_rate=5e-4, adam_beta2=0.99)
    (lab.run_folder / "checkpoints").mkdir(parents=True)
    (lab.run_folder / "checkpoints" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError) as refused:
        lab.run("TrainLoRA")
    assert str(refused.value).splitlines()[1:] == [
        "  train.adam_beta2: 0.999 there, 0.99 here",
        "  train.learning_rate: 0.001 there, 0.0005 here",
    ]


def test_more_steps_go_on_from_the_finished_run_and_end_as_one_run(finished, plain, capsys):
    other = plain.set("train", steps=4).run("TrainLoRA")
    shorter = other.run_folder
    other.set("train", steps=STEPS)
    capsys.readouterr()
    other.run("TrainLoRA")
    assert "going on from step 4 of a shorter run" in capsys.readouterr().out
    assert outcome(other.run_folder) == outcome(finished.run_folder)
    assert other.run_folder != shorter and (shorter / "pytorch_lora_weights.safetensors").exists()


def test_more_steps_of_a_schedule_that_depends_on_their_number_start_anew_and_say_why(start, tmp_path, capsys):
    lab = lab_of(start, tmp_path / "lab", "scheduled").set("train", steps=4).run("TrainLoRA")
    lab.set("train", steps=6)
    capsys.readouterr()
    lab.run("TrainLoRA")
    assert "with lr_scheduler = cosine the learning rate of each step depends on the number" in capsys.readouterr().out
    assert [line["step"] for line in outcome(lab.run_folder)["metrics"]] == list(range(1, 7))


def test_a_run_of_another_setting_does_not_go_on_from_this_one(finished, tmp_path, capsys):
    lab = finished.copy(tmp_path / "lab").set("train", steps=9, weight_decay=0.5)
    capsys.readouterr()
    lab.run("TrainLoRA")
    assert "going on" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_killed_twice_by_the_kernel_ends_as_the_unbroken_one(plain, tmp_path):
    lab = plain.set("train", steps=14, checkpoint_every=1, mode="pynative")
    other = lab.copy(tmp_path / "other")
    kill_at_random(other, "TrainLoRA", other.run_folder, num_kills=2, steps=14)
    assert outcome(other.run_folder) == outcome(lab.run("TrainLoRA").run_folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_ten_times_by_the_kernel_ends_as_the_unbroken_one(start, tmp_path, variant):
    lab = lab_of(start, tmp_path / "lab", variant).set("train", steps=40, checkpoint_every=1)
    other = lab.copy(tmp_path / "other")
    kill_at_random(other, "TrainLoRA", other.run_folder, num_kills=10, steps=40)
    assert outcome(other.run_folder) == outcome(lab.run("TrainLoRA").run_folder)


# --- what must not end a training, or lose it ---------------------------------------------------------------------


def test_the_checkpoint_just_written_stays_whatever_lies_beside_it(finished, tmp_path):
    from mindspore import Parameter, Tensor

    run, state = RunFolder(tmp_path), {"trained.a": Parameter(Tensor(np.ones(3, np.float32)), name="a")}
    run.checkpoints.mkdir()
    run.checkpoint(9).write_bytes(b"damaged")
    for step in (4, 5):
        resume.save(run, step, state, {}, {}, keep=1)
        assert run.list_checkpoints() == [run.checkpoint(9), run.checkpoint(step)]
    assert resume.newest(run, 10).step == 5 and run.list_checkpoints() == [run.checkpoint(5)]


def test_checkpoints_that_may_not_be_looked_at_are_not_taken_for_none():
    with open_folder() as folder:
        (folder / "checkpoints").mkdir()
        with as_nobody(folder):
            (folder / "checkpoints").chmod(0)
            with pytest.raises(PermissionError):
                RunFolder(folder).list_checkpoints()


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one():
    with open_folder() as folder:
        run = RunFolder(folder)
        run.checkpoints.mkdir()
        for step in (1, 2):
            run.checkpoint(step).touch()
        with as_nobody(folder):
            run.checkpoint(2).chmod(0)
            with pytest.raises(
                UserError, match="step-000002.safetensors: cannot be read: Permission denied; make it readable"
            ):
                resume.newest(run, 9)
        assert run.list_checkpoints() == [run.checkpoint(2), run.checkpoint(1)]


def test_a_colleagues_run_that_may_not_be_looked_at_stops_no_training():
    with open_folder() as folder:
        (folder / "theirs/checkpoints").mkdir(parents=True)
        with as_nobody(folder):
            (folder / "theirs/checkpoints").chmod(0)
            assert resume.find_shorter(RunFolder(folder / "ours"), {}, 9) is None


def test_side_files_that_cannot_be_written_stop_no_training(plain, finished, capsys):
    """A folder in place of metrics.jsonl, and a file in place of TensorBoard's folder."""
    run = RunFolder(plain.run_folder)
    run.metrics.mkdir(parents=True)
    run.tensorboard.write_text("in the way")
    plain.run("TrainLoRA")
    said = capsys.readouterr().out
    assert f"{run.metrics}: Is a directory; no more is written there, the training goes on" in said
    assert f"{run.tensorboard}: File exists; no more is written there, the training goes on" in said
    name = "pytorch_lora_weights.safetensors"
    assert (run.path / name).read_bytes() == (finished.run_folder / name).read_bytes()


def test_a_line_of_the_metrics_that_cannot_be_read_is_left_out(plain, finished, monkeypatch, capsys):
    kill_at(monkeypatch, [7])
    with pytest.raises(Killed):
        plain.run("TrainLoRA")
    run = RunFolder(plain.run_folder)
    first, second, *others = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join([first, b"\0" * 40 + b"\n", b"\xff{]\n", *others]))
    plain.run("TrainLoRA")
    assert f"{run.metrics}: 2 of its lines cannot be read and are left out" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == [1, *range(3, STEPS + 1)]
    assert outcome(plain.run_folder)["state"] == outcome(finished.run_folder)["state"]


def test_where_a_batch_cannot_be_had_the_steps_before_are_in_a_checkpoint(plain, finished, monkeypatch):
    make = Batches.training

    def made(self, number):
        if number == 3:
            raise StoreError("an entry is corrupt")
        return make(self, number)

    plain.set("train", checkpoint_every=0)
    monkeypatch.setattr(Batches, "training", made)
    with pytest.raises(StoreError):
        plain.run("TrainLoRA")
    assert resume.newest(RunFolder(plain.run_folder), STEPS).step == 3
    monkeypatch.setattr(Batches, "training", make)
    plain.run("TrainLoRA")
    assert outcome(plain.run_folder)["state"] == outcome(finished.run_folder)["state"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_closing_terminal_stops_a_stage_as_any_request_does(number):
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            stop.check()
