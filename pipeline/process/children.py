"""Child processes of this package's commands, whose lives are tied to that of whoever starts them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

import pipeline
from cache.terminal import log_lines
from pipeline.process.stopping import end_with_parent

GRACE_SECONDS = 120
"""How long a stage that was asked to stop may take to finish its step and keep it, before it is killed; a training
that writes large checkpoints is given longer."""

KILLED = {
    signal.SIGKILL: "perhaps the machine had no memory left: see the kernel's log",
    signal.SIGBUS: "a file shrank while it was read, or its disk failed: look with python -m cache verify",
}

STDERR = 2
"""As the ``stdout`` of a child: what it says is for people, and the parent's output is not mixed with it."""


class Child(Protocol):
    """What is asked of a `subprocess.Popen`."""

    @property
    def returncode(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


def run(
    arguments: Sequence[str],
    stdout: int | IO | None = None,
    stderr: IO | None = None,
    files: Sequence[int] = (),
    seconds: float | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> int:
    """Run ``python -m pipeline ARGUMENTS`` and wait.  Returns its exit code, which is -N where signal N killed it.

    files: descriptors that the child has open too, under the same numbers.  seconds: how long it may take; after that
    it is stopped, and subprocess.TimeoutExpired is raised.  grace_seconds: how long it may take to end when asked to.

    The child ends with this process: signals sent here are passed on and waited for, and if this process is killed,
    the kernel tells the child, where it calls `stopping.end_with_parent` with its ``--parent``.
    """
    return waited_for(start(arguments, stdout, stderr, files), seconds, grace_seconds)


def waited_for(child: Child, seconds: float | None = None, grace_seconds: float = GRACE_SECONDS) -> int:
    """The exit code of a child that was started, as `run` gives it."""
    with interrupted_by_sigterm():
        try:
            return child.wait(seconds)
        except BaseException:
            stop([child], grace_seconds)
            raise


def start(
    arguments: Sequence[str],
    stdout: int | IO | None = None,
    stderr: int | IO | None = None,
    files: Sequence[int] = (),
    variables: Mapping[str, str] | None = None,
    module: str = "pipeline",
) -> subprocess.Popen:
    """Start what `run` waits for.  variables: what its environment has besides ours."""
    # -P: a folder named like one of our packages in the working directory is not taken for it
    command = [sys.executable, "-P", "-m", module, *arguments, "--parent", str(os.getpid())]
    return subprocess.Popen(
        command,
        env=environment() | dict(variables or {}),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
        pass_fds=files,
    )


def reason(code: int) -> str:
    """Why a child ended with ``code``, for people."""
    if code > 0:
        return f"exit code {code}; what it said stands above"
    return "killed by " + signal.Signals(-code).name + "".join(f"; {KILLED[each]}" for each in KILLED if each == -code)


def environment() -> dict[str, str]:
    """The child imports the packages that this process imported, installed or not."""
    here = str(Path(pipeline.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))}


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does here what Ctrl-C does: this process would otherwise end on the spot, and leave what it holds."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop(several: Sequence[Child], grace_seconds: float = GRACE_SECONDS) -> None:
    """Ask children to stop and wait for them; a second interruption, or the end of the grace period, kills them."""
    for child in several:
        child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    try:
        for child in several:
            child.wait(max(0, deadline - time.monotonic()))
    except BaseException:
        for child in several:
            child.kill()
            child.wait()


def begin(parent: int = 0) -> None:
    """What a process does first that others start, or that may run in a terminal's background.

    parent: the number of the process that it ends with; 0 for none.
    """
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else `stty tostop` stops it at its first line, for ever
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own way of it, in the middle of an import, is a fatal error
    log_lines.install()  # libraries draw bars while they load
    if parent:
        end_with_parent(parent)
