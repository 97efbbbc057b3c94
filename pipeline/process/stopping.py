"""Ending a stage: on request at the next safe point, and always when whoever started it is gone."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1

INTERRUPTED_EXIT = 130
"""What a shell reports for a process ended by SIGINT."""

STOPPED_EXIT = 143
"""Of a process that has stopped as asked: what a shell reports for one ended by SIGTERM."""


class Stopped(Exception):
    """The stage was asked to stop and did so at a safe point; what it had finished is kept."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A ``with`` block in which SIGTERM, SIGINT and SIGHUP, of a terminal that closes, wait for the next `check`.

    Outside such a block they end the process at once, as they do by default: there is nothing to keep while a model is
    loaded or compiled.
    """

    def __enter__(self):
        self.requested = False
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number, frame):
        self.requested = True

    def check(self) -> None:
        """Raise Stopped if a signal has come.  Call it where everything finished is safe."""
        if self.requested:
            raise Stopped

    def __exit__(self, *error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def end_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when ``parent``, its parent's process id, ends, however it ends.

    prctl(2), PR_SET_PDEATHSIG; Linux only.  Without it a stage lives on when its scheduler is killed.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the request was in place
        os.kill(os.getpid(), number)
