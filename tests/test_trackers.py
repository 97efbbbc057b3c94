"""[train] tracker: a process beside the training sends its numbers, and stops no training whatever happens to it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import environment, wait_until

from pipeline.plan.run_folder import RunFolder
from pipeline.training import trackers
from pipeline.training.trackers import Tracker

STAND_IN = """
import json, os, time
class Settings:
    def __init__(self, **settings): pass
def said(*what):
    with open(os.environ["SAID"], "a") as file: file.write(json.dumps(what) + "\\n")
class Board:
    def log(self, line, step): said("log", step, line)
    def finish(self): said("finish")
def init(id, name, config, resume, **more):
    if os.environ["HOW"] == "fails": raise RuntimeError("no network,\\nbut a key: " + os.environ["WANDB_API_KEY"])
    if os.environ["HOW"] == "hangs": time.sleep(600)
    said("init", id, name, config, resume)
    print("a banner")
    return Board()
"""


@pytest.fixture
def run(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "cat-0123456789ab")
    run.path.mkdir()
    run.experiment.write_text(json.dumps({"name": "cat", "seed": 3, "train": {"learning_rate": 1e-4}}))
    run.metrics.touch()
    return run


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module in wandb's place, which notes what it is told.  Returns where, and how it behaves is in $HOW."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    for name, value in (("SAID", str(tmp_path / "said")), ("HOW", "works"), ("WANDB_API_KEY", "k3y")):
        monkeypatch.setenv(name, value)
    return tmp_path / "said"


def add(run: RunFolder, *steps: int) -> None:
    with open(run.metrics, "a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 1 / step, "step_seconds": 0.5, "grad_norm": None}) + "\n")


def said(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_lines_are_sent_as_they_come_and_a_resumed_training_goes_on_in_the_same_run(run, stand_in):
    add(run, 1, 2)
    tracker = Tracker("wandb", run, 1)
    tracker.open()
    wait_until(lambda: len(said(stand_in)) == 2)
    add(run, 3)
    tracker.close(True)
    begin, *lines, end = said(stand_in)
    assert begin[2:] == [run.path.name, {"seed": 3, "train.learning_rate": 1e-4}, "allow"] and end == ["finish"]
    assert lines == [["log", step, {"train/loss": 1 / step, "train/step_seconds": 0.5}] for step in (2, 3)]
    again = Tracker("wandb", run, 3)
    again.open()
    again.close(True)
    assert said(stand_in)[-2:] == [begin, ["finish"]] and len(begin[1]) == 21


def test_a_service_that_fails_is_one_line_without_the_key(run, stand_in, monkeypatch, capfd):
    monkeypatch.setenv("HOW", "fails")
    tracker = Tracker("wandb", run, 0)
    tracker.open()
    tracker.close(True)
    expected = "wandb: no network, but a key: $WANDB_API_KEY; nothing more is sent there, the training goes on\n"
    assert capfd.readouterr() == ("", expected)


def test_a_service_that_hangs_is_ended(run, stand_in, monkeypatch):
    monkeypatch.setenv("HOW", "hangs")
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1)
    tracker = Tracker("wandb", run, 0)
    tracker.open()
    wait_until(lambda: (run.path / "tracker.id").exists())
    with pytest.raises(OSError, match="took more than 1 seconds to send the rest, and was ended"):
        tracker.close(True)


@pytest.mark.skipif(find_spec("swanlab") is not None, reason="SwanLab is installed")
def test_a_service_that_is_not_installed_stops_no_training_and_changes_no_identity(plainly_trained, tmp_path, capsys):
    lab = plainly_trained.copy(tmp_path / "lab").set("train", tracker="swanlab")
    assert lab.done("TrainLoRA")
    lab.set("train", steps=4).run("TrainLoRA")
    line = "swanlab: not installed; pip install '.[swanlab]' brings it; no more is written there, the training goes on"
    assert line in capsys.readouterr().out and lab.done("TrainLoRA")


# --- the services themselves, where they are installed --------------------------------------------------------------


@pytest.mark.parametrize("service, files", [("wandb", "wandb/offline-run-*"), ("swanlab", "swanlog/run-*")])
def test_a_service_has_settings_and_steps_of_a_run(run, monkeypatch, service, files):
    """Of two trainings, the second of which goes on; without a network."""
    pytest.importorskip(service, reason=f"the extra `{service}` is not installed")
    monkeypatch.setenv(f"{service.upper()}_MODE", "offline")
    for steps in ((1, 2), (3,)):
        add(run, *steps)
        tracker = Tracker(service, run, steps[0] - 1)
        tracker.open()
        tracker.close(True)
        assert tracker._process.returncode == 0
    logs = sorted(run.path.glob(f"{files}/run-*.{service}"))
    assert [path.stem for path in logs] == [f"run-{(run.path / 'tracker.id').read_text().strip()}"] * 2
    kept = b"".join(path.read_bytes() for path in run.path.glob(f"{files}/**/*") if path.is_file())
    found = b"".join(path.read_bytes() for path in logs)
    assert b"train.learning_rate" in kept and found.count(b"train/loss") >= 3
    assert os.fsencode(Path.cwd()) not in found and b"git@" not in found


@pytest.mark.parametrize("service", trackers.SERVICES)
def test_a_service_without_a_key_is_one_line(run, service, tmp_path):
    environ = {name: value for name, value in environment().items() if name not in trackers.SECRETS}
    environ |= {"HOME": str(tmp_path), f"{service.upper()}_MODE": "online"}
    command = [sys.executable, "-m", "pipeline", "track", service, str(run.path), "0"]
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{service}: ")
