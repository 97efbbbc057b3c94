"""Trainings by several ranks: starting them, their processes, and the time until all of these are gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from commands import environment, is_alive, wait_until
from lab import Lab

SCHEDULER = "scheduler"


def start(lab: Lab, stage: str = "TrainLoRA") -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", "run", stage, "--experiment", str(lab.path)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(lab: Lab, stage: str = "TrainLoRA", **parallel) -> str:
    """Run the stage to its end by so many ranks.  Returns what it said."""
    process = start(lab.set("parallel", **parallel), stage)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def processes(lab: Lab) -> dict[int | str, int]:
    """The ids of the processes that train the lab: ranks by number, SCHEDULER, and "runner", which started them."""
    own = os.fsencode(lab.path)
    found: dict[int | str, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if own not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            variables = dict(line.partition("=")[::2] for line in (folder / "environ").read_text().split("\0"))
            children = (folder / "task" / folder.name / "children").read_text().split()
        except OSError:
            continue
        is_rank = variables.get("MS_ROLE") == "MS_WORKER"
        found[int(variables["RANK_ID"]) if is_rank else "runner"] = int(folder.name)
        found |= {SCHEDULER: int(children[0])} if is_rank and children else {}
    return found


def wait_for_steps(run_folder: Path, number: int) -> None:
    metrics = run_folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= number)


def seconds_until_gone(pids) -> float:
    began = time.monotonic()
    wait_until(lambda: not any(map(is_alive, pids)))
    return time.monotonic() - began


def end(process: subprocess.Popen, lab: Lab) -> None:
    """Kill what is left of it."""
    for pid in [process.pid, *processes(lab).values()]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
