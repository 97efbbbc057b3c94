"""Leases: a running process says what it needs from a store, so that the collector does not remove it.

leases/<id>    what one process needs, as ``needs_text`` says it, locked for as long as the process lives
lock           held while a lease is put down, and by the collector while it removes
"""

import errno
import fcntl
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.core.entries import names_in
from cache.core.errors import explained
from cache.core.files import make_folder, write_all
from cache.core.needs import Need, Needs, needs_text, read_needs, union
from cache.core.workspace import ID, NOT_ALLOWED, new_id

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)


@contextmanager
def lease(store: Path, needs: Iterable[Need]) -> Iterator[None]:
    """Keep the collector from removing what is needed while the block runs; waits while a collector is at work.

    A store that this process cannot write or lock gets no lease. Without locks it is never collected; where it is only
    read-only here, another process may collect it, and reading what that removed raises MissingEntry.
    Raises StoreError where the disk is full.
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
    """What all living processes need; removes the leases of dead ones. Call it in a ``guarded`` block.

    Raises StoreError where a lease is damaged.
    """
    folder = Path(store) / "leases"
    return union([_read_living(folder / name) for name in names_in(folder) if ID.fullmatch(name)])


@contextmanager
def guarded(store: Path, reason: str = "leases are being read") -> Iterator[bool]:
    """Keep other processes from putting down a lease or collecting during the block.

    Yields False where that cannot be had, as the store cannot be written or locked. Where another process is in such a
    block, prints the reason and waits.
    """
    file = _open_guard(store)
    try:
        yield file is not None and _lock(file, store, reason)
    finally:
        if file is not None:
            os.close(file)


def _open_guard(store: Path) -> int | None:
    try:
        make_folder(store)
        return os.open(Path(store) / "lock", os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno not in NOT_ALLOWED:
            raise
        return None


def _lock(file: int, store: Path, reason: str) -> bool:
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


def _put_down(path: Path, needs: Iterable[Need]) -> int:
    """Write a lease. Returns its open, locked file."""
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


def _read_living(path: Path) -> Needs:
    """What the lease says; nothing where its process has ended, and then it is removed."""
    with suppress(FileNotFoundError), open(path, "r+b") as file:  # not found: it ended this moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return read_needs(path)
        path.unlink()
    return {}
