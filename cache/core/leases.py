"""Leases: what running processes need from a store, so that the collector leaves it where it is.

leases/<id>    what one process needs, as ``needs_text`` says it, locked for as long as the process lives
lock           held while a lease is put down, and by the collector while it removes
"""

import errno
import fcntl
import os
import sys
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.core.entries import names_in
from cache.core.errors import explained
from cache.core.files import make_folder, write_all
from cache.core.needs import Need, Needs, needs_text, read_needs, union
from cache.core.writer import ID, NOT_ALLOWED, new_id

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def lease(store: Path, needs: Iterable[Need]):
    """Keep what is needed from the collector while the block runs; waits while a collector is at work.

    Nothing is put down in a store that cannot be written or has no locks: the latter is never collected, and whoever
    collects the former may take what a running process reads, which then says so. Raises StoreError where the disk
    is full.
    """
    path = Path(store) / "leases" / new_id()
    with explained(store), guarded(store, "its garbage is being collected; waiting until that is done") as is_guarded:
        held = _put_down(path, needs) if is_guarded else None
    try:
        yield
    finally:
        if held is not None:
            with suppress(OSError):
                path.unlink()
            os.close(held)


def living_leases(store: Path) -> Needs:
    """What all living processes need; the leases of dead ones are removed. To be called in a ``guarded`` block.

    Raises StoreError where a lease is damaged.
    """
    folder = Path(store) / "leases"
    return union([_read_living(folder / name) for name in names_in(folder) if ID.fullmatch(name)])


@contextmanager
def guarded(store: Path, reason: str = "leases are being read"):
    """Let no other process put down a lease or collect during the block; yields whether that can be had here.

    Where another one does so already, it says the reason and waits.
    """
    file = _open_guard(store)
    try:
        yield file is not None and _lock(file, store, reason)
    finally:
        if file is not None:
            os.close(file)


def _open_guard(store):
    try:
        make_folder(store)
        return os.open(Path(store) / "lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
        return None


def _lock(file, store, reason):
    """Lock the guard, waiting for it. Returns whether there are locks."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{store}: {reason}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _put_down(path, needs):
    make_folder(path.parent)
    held = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_all(held, [needs_text(needs).encode()], 0)
    except BaseException:
        os.close(held)
        path.unlink()
        raise
    return held


def _read_living(path) -> Needs:
    """What the lease says; nothing where its process has ended, and then it is removed."""
    with suppress(FileNotFoundError), open(path, "r+b") as file:  # not found: it ended this moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_needs(path)
        path.unlink()
    return {}
