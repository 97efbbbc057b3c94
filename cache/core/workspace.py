"""A writer's workspace: a folder for what is not committed yet, with a lock that says whether its writer lives."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cache.core.files import make_folder

ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
JOURNAL = ".journal"  # the suffix of a segment's journal, which lies beside the segment's folder
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def new_id() -> str:
    """A name, matching ``ID``, that no other process gives; later ones sort after earlier ones."""
    return f"{time.time_ns():016x}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class Workspace:
    """A folder and its lock file, which the kernel unlocks when the writer's process ends, however that ends."""

    folder: Path
    lock: IO[bytes]

    def is_in_place(self) -> bool:
        """Whether the lock file still has its name: another process may have removed it, a third one made it anew."""
        try:
            return os.path.samestat(os.fstat(self.lock.fileno()), os.stat(self.lock.name))
        except FileNotFoundError:
            return False


def claim_workspace(parent: Path) -> Workspace:
    """Make a new workspace in ``parent`` and lock it. Raises OSError."""
    make_folder(parent)
    while True:
        folder = parent / new_id()
        folder.mkdir()
        with suppress(FileNotFoundError):  # another writer took it for a leftover before it was locked
            workspace = Workspace(folder, open(folder / "lock", "ab"))
            with suppress(OSError):  # a file system without locks; no one removes anything there
                fcntl.flock(workspace.lock, fcntl.LOCK_EX)
            if workspace.is_in_place():
                return workspace
            workspace.lock.close()


def workspaces_in(parent: Path) -> list[Path]:
    """The folders of all workspaces in ``parent``, of living and of dead writers, oldest first."""
    try:
        return [parent / name for name in sorted(os.listdir(parent)) if ID.fullmatch(name)]
    except FileNotFoundError:
        return []


def remove_workspace(folder: Path) -> None:
    """Remove a workspace, of which nothing is needed any more. What cannot be removed now, a later writer removes."""
    with suppress(OSError):  # another process may be doing the same; of some errors rmtree would say so all the same
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked_if_dead(folder: Path) -> Iterator[bool]:
    """Whether a workspace's writer is dead; it is if the lock can be had, which is held during the block."""
    try:
        lock = open(folder / "lock", "ab")
    except (FileNotFoundError, NotADirectoryError):  # removed by another process this moment, or not ours
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            yield False
            return
        yield Workspace(folder, lock).is_in_place()
