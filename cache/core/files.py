"""Writing files so that each is whole or absent, even after a kill or a power cut."""

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Give an OSError of the block the file's name, which Python leaves out where reading, writing or syncing fails."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def is_taken(path: str | Path) -> bool:
    """Whether there is a file, a folder or a link of this name. Raises OSError where this cannot be told."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Put ``data`` (bytes, or text as UTF-8) at ``path``, so that a reader sees the old file or the new one, whole.

    Durable on return; the mode follows the umask. The folder of ``path`` must exist. Raises OSError, and then
    leaves the old file untouched and no temporary one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == os.fspath(temporary):
            error.filename = os.fspath(path)  # a name that people know
        raise
    sync_folder(path.parent)


def write_durably(path: str | Path, data: bytes | str) -> None:
    """Write a file (bytes, or text as UTF-8) and wait until its bytes are on disk; its name may not be yet."""
    with named(path), open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def write_all(file: int, parts: Sequence, offset: int) -> None:
    """Write buffers one after the other at ``offset`` of an open file. Raises OSError, perhaps after a part of them."""
    left = [memoryview(part) for part in parts]
    while left:
        written = os.pwritev(file, left, offset)
        offset += written
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if left:
            left[0] = left[0][written:]


def sync_folder(path: str | Path) -> None:
    """Wait until the names in a folder are on disk. Does nothing on a file system that offers no way to."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with named(path):
            os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def make_folder(path: str | Path) -> None:
    """Make a folder and its parents, durably; nothing happens where it exists."""
    path = Path(path)
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
