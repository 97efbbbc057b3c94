"""Interrupting trainings, by SIGKILL or after a step in the test's own process; and what came out of them."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import Lab
from safetensors.numpy import load_file

from pipeline.plan.run_folder import RunFolder
from pipeline.training import checkpoint as resume
from pipeline.training import loop

TIMES = ("step_seconds", "data_wait_seconds", "peak_memory_bytes")


class Killed(BaseException):
    """Ends a step at once, as SIGKILL would, so that a test can do it in its own process."""


def kill_at_random(lab: Lab, stage: str, run_folder: Path, num_kills: int, steps: int) -> None:
    """Start the stage, and kill its process around steps that are spread over the run; at last let it finish."""
    random.seed(0)
    killed = 0
    metrics = run_folder / "metrics.jsonl"
    while True:
        process = _start(lab, stage)
        reached = steps if killed == num_kills else 1 + (killed + 1) * (steps - 1) // (num_kills + 1)
        if _wait_for_steps(process, metrics, reached) and killed < num_kills:
            time.sleep(random.uniform(0, 0.3))
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        elif process.wait() == 0:
            break
        else:
            raise AssertionError(process.stderr.read().decode())
    assert killed == num_kills


def _start(lab: Lab, stage: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", "run", stage, "--experiment", str(lab.path)]
    root = Path(__file__).parent.parent
    return subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _wait_for_steps(process: subprocess.Popen, metrics: Path, step: int) -> bool:
    """Wait until the run has written this step.  Returns whether it still runs."""
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            return True
        time.sleep(0.002)
    return False


def kill_at(monkeypatch, steps: list[int]) -> None:
    """Let the step with each of these numbers, as they come, end the run after it changed all it changes."""
    advance = loop.Training.advance

    def advance_or_die(training, batches):
        result = advance(training, batches)
        if steps and training.step == steps[0]:
            steps.pop(0)
            raise Killed
        return result

    monkeypatch.setattr(loop.Training, "advance", advance_or_die)


def outcome(folder: Path) -> dict:
    """All that must be equal: the result's bytes, the last checkpoint's tensors and counters, the metrics but times."""
    (newest, *_) = RunFolder(folder).list_checkpoints()
    results = [path for path in folder.rglob("*.safetensors") if path.parent.name != "checkpoints"]
    return {
        "result": {path.name: path.read_bytes() for path in results},
        "state": {name: array.tobytes() for name, array in load_file(newest).items()},
        "counters": resume.newest(RunFolder(folder), 10**9).counters,
        "metrics": metrics_of(folder),
    }


def metrics_of(folder: Path) -> list[dict]:
    """The lines of the metrics without what time decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
