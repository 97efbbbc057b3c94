"""Tying a stage's process to Luigi's, and saying how it failed."""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator

from cache.terminal.output import say_below
from pipeline.process import children
from pipeline.process.stopping import INTERRUPTED_EXIT, end_with_parent

KEPT = "what was done is kept, the same command goes on from there"


class StageFailed(Exception):
    """A stage's process ended with an error, which it has said itself, or without its output."""

    @classmethod
    def with_code(cls, stage: str, code: int) -> "StageFailed":
        return cls(f"{stage} failed ({children.reason(code)}); the same command tries it again")


@contextlib.contextmanager
def tied_to_luigi() -> Iterator[None]:
    """A block that waits for a stage's process, which ends with this one, however that ends: see `children.run`."""
    if (luigi := multiprocessing.parent_process()) and luigi.pid:  # one of several workers: end with Luigi too
        end_with_parent(luigi.pid)
    try:
        yield
    except BaseException as error:
        if luigi and isinstance(error, KeyboardInterrupt):  # multiprocessing would print a traceback
            os._exit(INTERRUPTED_EXIT)
        sys.excepthook = _without_traceback_of_interruption
        raise


def _without_traceback_of_interruption(kind, error, traceback) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say_below(f"interrupted, and the running stage with it; {KEPT}")
    else:
        sys.__excepthook__(kind, error, traceback)
