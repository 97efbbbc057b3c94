"""Claims: of the processes that would do the same work, one does it and the others wait."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache import StoreError
from cache.core.files import make_folder
from cache.core.leases import NO_LOCKS
from pipeline.process.progress import say

SIGN_SECONDS = 2
"""How often the holder of a claim shows that it lives: it touches the claim's file."""

STILL_SECONDS = 120
"""A holder that has shown nothing for so long is paused, or its host is gone: others wait no longer."""


@contextmanager
def claimed(path: Path, work: str) -> Iterator[None]:
    """A block that one process at a time works in, as long as it lives.  work: what it does, for those who wait.

    path: a file to lock, which stays.  On a file system without locks nobody waits.  Raises StoreError where the file
    cannot be written.
    """
    try:
        make_folder(path.parent)
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; check the disk and the permissions, then run again") from None
    ended = threading.Event()
    try:
        _lock(file, f"{work}: another process is at it")
        threading.Thread(target=_show_life, args=(file, ended), name="claim", daemon=True).start()
        yield
    finally:
        ended.set()
        os.close(file)


def _show_life(file: int, ended: threading.Event) -> None:
    while not ended.wait(SIGN_SECONDS):
        with suppress(OSError):
            os.utime(file)


def _lock(file: int, reason: str) -> None:
    """Lock an open file; waits for its holder, and gives up where that shows no sign of life."""
    sign, since = 0, time.monotonic()
    while not _is_locked_now(file):
        if not sign:
            say(f"{reason}; waiting until it ends", to_stderr=True)
        if (found := os.fstat(file).st_mtime_ns) != sign:
            sign, since = found, time.monotonic()
        elif time.monotonic() - since > STILL_SECONDS:
            say(f"{reason}, and has shown no sign of life for {STILL_SECONDS} s; going on without it", to_stderr=True)
            return
        time.sleep(SIGN_SECONDS / 4)


def _is_locked_now(file: int) -> bool:
    """Whether the file is ours, or cannot be locked at all."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
