"""The errors of the store. Each says in one line what is wrong, where, and what to do next."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit (ulimit -f) is reached",
}


class StoreError(Exception):
    """The store cannot do what was asked. The message is meant for the user, as it is."""


class MissingEntry(StoreError, KeyError):
    """No committed entry has this address."""

    __str__ = Exception.__str__  # KeyError would print the quoted repr of the message


class CorruptEntry(StoreError):
    """A committed entry is damaged on disk."""


class UnreadableEntry(CorruptEntry):
    """The disk does not give a committed entry. It counts as damaged, but perhaps the disk gives it another time."""


@contextmanager
def explained(path: str | Path, needed_bytes: int = 0, verb: str = "write to") -> Iterator[None]:
    """Turn an OSError of the block, which writes ``needed_bytes`` under ``path``, into a StoreError of one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(_explanation(error, Path(path), needed_bytes, verb)) from error


def _explanation(error: OSError, path: Path, needed_bytes: int, verb: str) -> str:
    if error.errno not in FULL:
        return f"{path}: cannot {verb} the store: {error}; check the path and its permissions"
    return (
        f"{path}: {FULL[error.errno]}: {_lacking(path, needed_bytes)}; make room or choose another place for the "
        "store, then run again (what was committed is kept)"
    )


def _lacking(path: Path, needed_bytes: int) -> str:
    """What is needed and what there is: bytes, or files where no more of them fit (a disk has a number of inodes)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    disk = os.statvfs(path)
    if disk.f_files and not disk.f_favail:
        return "it has no inodes left, so no more files fit"
    return f"{needed_bytes} bytes needed, {disk.f_bavail * disk.f_frsize} free"
