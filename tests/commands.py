"""The ``luigi`` command, run for real: starting it, its stages' processes, and what it said."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from lab import Lab

ROOT = Path(__file__).resolve().parent.parent
TASK_FAILED = 30


def command(task: str, lab: Lab) -> list[str]:
    return [sys.executable, "-m", "luigi", "--module", "tasks", task, "--experiment", str(lab.path)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_luigi(task: str, lab: Lab, *arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command(task, lab), *arguments], env=environment(), capture_output=True, text=True, timeout=300, **options
    )


def ran(output: str) -> list[str]:
    """The tasks whose stages Luigi started, in order."""
    there = re.findall(r"its output is there already: (\w+)\(", output)
    return [name for name in re.findall(r"running +(\w+)\(", output) if name not in ("EncodePrompts", *there)]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def stages_under(pid: int, is_template: bool = False) -> list[int]:
    """The stage processes below ``pid``, at any depth: with several workers, Luigi forks one for each task.

    is_template: whether ``pid`` is the process that stages are forks of, which is none itself.
    """
    found = []
    for child in children(pid):
        words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        is_own = b"template" in words and not is_template
        found += [child] if b"pipeline" in words and not is_own else []
        found += stages_under(child, is_own)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 240):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value
