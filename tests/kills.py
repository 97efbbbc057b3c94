"""Killing a training's process with SIGKILL at random moments, until it was killed often enough."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab import Lab


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
