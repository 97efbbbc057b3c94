"""Running a stage as a child process, whose life is tied to the scheduler's."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pipeline
from pipeline.stopping import end_with_parent

GRACE_SECONDS = 120
"""How long a stage that was asked to stop may take to finish its step and keep it, before it is killed."""


class StageFailed(Exception):
    """A stage's process ended with an error, which it has said itself, or without its output."""


def run_stage(stage: str, experiment: str) -> None:
    """Run the stage and wait.  Raises StageFailed where it does not end well.

    The stage ends with this process: signals sent here are passed on and waited for, and if this process is killed,
    the kernel tells the stage.
    """
    if (luigi := multiprocessing.parent_process()) is not None:  # one of several workers: end with Luigi too
        end_with_parent(luigi.pid)
    child = subprocess.Popen(_command(stage, experiment), env=_environment(), stdin=subprocess.DEVNULL, process_group=0)
    with _interrupted_by_sigterm():
        try:
            code = child.wait()
        except BaseException:
            _stop(child)
            sys.excepthook = _without_traceback_of_interruption
            raise
    if code:
        raise StageFailed(f"{stage} failed ({_reason(code)}); the same luigi command tries it again")


KILLED = {
    signal.SIGKILL: "perhaps the machine had no memory left: see the kernel's log",
    signal.SIGBUS: "a file shrank while it was read, or its disk failed: look with python -m cache verify",
}


def _reason(code: int) -> str:
    if code > 0:
        return f"exit code {code}; what it said stands above"
    return "killed by " + signal.Signals(-code).name + "".join(f"; {KILLED[each]}" for each in KILLED if each == -code)


def _command(stage: str, experiment: str) -> list[str]:
    # -P: a folder named like one of our packages in the working directory is not taken for it
    command = [sys.executable, "-P", "-m", "pipeline", "run", stage, "--parent", str(os.getpid())]
    return command + (["--experiment", experiment] if experiment else [])


def _environment() -> dict[str, str]:
    """The stage imports the packages that this process imported, installed or not."""
    here = str(Path(pipeline.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))}


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does here what Ctrl-C does: Luigi would otherwise end on the spot and leave the stage to the kernel."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _without_traceback_of_interruption(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(
            "interrupted, and the running stage with it; what was done is kept, the same command goes on from there",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


def _stop(child: subprocess.Popen) -> None:
    """Ask the stage to stop and wait; a second interruption, or the end of the grace period, kills it."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(GRACE_SECONDS)
    except BaseException:
        child.kill()
        child.wait()
