"""Writing entries: rows go to a segment under a temporary name, and one rename commits it."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from cache.core.address import item_key
from cache.core.errors import StoreError, explained
from cache.core.files import make_folder, sync_folder, write_atomically
from cache.core.journal import Journal, read_journal
from cache.core.recipe import recipe_text
from cache.core.segment import SegmentWriter

ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
JOURNAL = ".journal"
BFLOAT16_EXPONENT = 0x7F80  # all of these bits set: infinity or NaN
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
ROW_BYTES = 256  # about what a row takes in the keys, the metadata and the journal


class Writer:
    """Writes entries of one recipe; use it in a ``with`` block.

    What was written becomes visible, and survives a power cut, with ``commit``, which also happens when a segment holds
    ``max_items`` or ``max_bytes`` or is ``max_seconds`` old, and at the end of the block, be it by an exception.
    A killed writer leaves nothing half-written visible; each row whose ``write`` had returned is committed by the next
    writer of the recipe, when its block is entered.
    """

    def __init__(self, entries, max_items=1024, max_bytes=1 << 30, max_seconds=300):
        self._entries, self._limits = entries, (max_items, max_bytes, max_seconds)
        self._workspace = self._lock = self._segment = self._journal = None

    def __enter__(self):
        with explained(self._entries.path, ROW_BYTES):
            salvage(self._entries)
        self._entries.refresh()
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if error is None:
                self.commit()
            else:
                with suppress(StoreError):  # what ended the block matters more
                    self.commit()
        finally:
            self._close()

    def write(self, item: str, array: np.ndarray, name: str = ""):
        """Add one entry. array: of the recipe's shape and dtype (bfloat16 also as its uint16 bits), finite.
        name: of its source, for people who look into the store; it decides nothing.

        An item written twice before a commit keeps its first array. Raises StoreError where the array is not as the
        recipe says or the disk refuses; entries written before it stay, and are committed in the end.
        """
        array = _checked(self._entries, item, array)
        with explained(self._entries.path, array.nbytes):
            self._leave_what_is_lost()
            if self._segment is None:
                self._begin()
            if item not in self._segment.names:
                self._append(item, array, name)
        if self._is_full():
            self.commit()

    def commit(self):
        """Make everything written so far visible to all readers, durably. Does nothing where nothing is new."""
        with explained(self._entries.path, ROW_BYTES):
            self._leave_what_is_lost()
        if self._segment is None:
            return
        segment = self._segment
        with explained(self._entries.path, ROW_BYTES * len(segment.names)):
            try:
                if segment.names:
                    _publish(self._entries, segment)
            finally:
                if not segment.names or not segment.folder.exists():  # it is where readers see it, and ours no more
                    self._drop_segment()
        self._entries.refresh()

    def _leave_what_is_lost(self):
        """Where somebody has removed our lock, others take us for dead and commit our rows, or we do."""
        if self._lock is not None and not _is_in_place(self._lock):
            for file in filter(None, (self._segment, self._journal, self._lock)):
                file.close()
            self._workspace = self._lock = self._segment = self._journal = None
            salvage(self._entries)

    def _append(self, item, array, name):
        try:
            crc = self._segment.append(item, array, name)
            self._journal.append(item, crc, name)
        except BaseException:
            self._segment.names.pop(item, None)  # the next row is written over it
            raise

    def _is_full(self):
        max_items, max_bytes, max_seconds = self._limits
        return (
            len(self._segment.names) >= max_items
            or self._segment.num_bytes >= max_bytes
            or time.monotonic() - self._began >= max_seconds
        )

    def _begin(self):
        entries = self._entries
        if self._workspace is None:
            make_folder(entries.segments_path)
            _write_recipe(entries)
            self._workspace, self._lock = _claim_workspace(entries.path / "writing")
        self._began, name = time.monotonic(), new_id()
        self._journal = Journal(self._workspace / f"{name}{JOURNAL}")
        self._segment = SegmentWriter(self._workspace / name, entries.layout)

    def _drop_segment(self):
        segment, journal, self._segment, self._journal = self._segment, self._journal, None, None
        segment.close()
        journal.close()
        Path(journal.path).unlink(missing_ok=True)

    def _close(self):
        if self._workspace is None:
            return
        is_left = self._segment is not None and bool(self._segment.names)  # the disk was full: for the next writer
        for file in filter(None, (self._segment, self._journal)):
            file.close()
        if not is_left:
            shutil.rmtree(self._workspace, ignore_errors=True)
        self._lock.close()
        self._workspace = self._lock = self._segment = self._journal = None


def salvage(entries) -> int:
    """Commit the rows that dead writers of the recipe left whole, and remove what else they left.

    Returns the number of rows. What is not ours to touch (a colleague's, a read-only disk) is let be. Raises OSError;
    what was not yet committed is then still there for the next call.
    """
    if not _workspaces(entries.path / "writing"):
        return 0
    with _one_at_a_time(entries.path / "writing"):  # who comes second waits, and then finds the rows committed
        return _salvage_all(entries)


def _salvage_all(entries):
    num_rows = 0
    for workspace in _workspaces(entries.path / "writing"):
        try:
            with _if_dead(workspace) as is_dead:
                if is_dead:
                    num_rows += sum(_take_over(entries, journal) for journal in sorted(workspace.glob(f"*{JOURNAL}")))
                    shutil.rmtree(workspace, ignore_errors=True)  # another process may be doing the same
        except FileNotFoundError:  # removed by its writer or by another process this moment
            continue
        except OSError as error:
            if error.errno not in NOT_ALLOWED:
                raise
    return num_rows


@contextmanager
def _one_at_a_time(folder):
    """Lock a folder where it can be locked."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _take_over(entries, journal_path):
    """Commit the longest run of whole rows that a journal names. Returns how many these are."""
    folder = journal_path.with_suffix("")
    if not folder.is_dir():  # it died with its rows committed, or before the first one
        return 0
    segment = SegmentWriter(folder, entries.layout)
    try:
        for item, crc, name in read_journal(journal_path):
            if not segment.take_over(item, name, crc):
                break
        if segment.names:
            _publish(entries, segment)
        return len(segment.names)
    finally:
        segment.close()


def _publish(entries, segment):
    """Complete a segment and move it, by one rename, to where readers see it."""
    segment.finish({"kind": entries.recipe["kind"], "recipe": entries.id})
    make_folder(entries.segments_path)
    os.rename(segment.folder, entries.segments_path / segment.folder.name)
    sync_folder(entries.segments_path)


def _checked(entries, item, array):
    """The array as it is stored: C-contiguous, bfloat16 as its bits. Raises StoreError where it must not be stored."""
    where, array = f"{entries.path.name}: item {item}", np.asarray(array)
    item_key(item)
    if array.dtype not in (entries.layout.real, entries.layout.stored):
        raise StoreError(
            f"{where}: the array is {array.dtype}, the recipe says {entries.dtype}; convert it, or change the recipe"
        )
    if array.shape != entries.shape:
        raise StoreError(f"{where}: the array's shape is {array.shape}, the recipe says {entries.shape}")
    bits = np.ascontiguousarray(array).reshape(array.shape).view(entries.layout.stored)
    num_bad = np.count_nonzero(_is_bad(bits, entries.dtype))
    if num_bad:
        raise StoreError(
            f"{where}: {num_bad} of {array.size} numbers are NaN or infinite, nothing was stored; compute "
            "it in a wider dtype (fp32), and look at this one input"
        )
    return bits


def _is_bad(bits, dtype):
    if dtype == "bfloat16":
        return bits & BFLOAT16_EXPONENT == BFLOAT16_EXPONENT
    return ~np.isfinite(bits)


def _write_recipe(entries):
    """Put the recipe beside its entries; what stands there already is replaced only where it is damaged."""
    path, text = entries.path / "recipe.json", recipe_text(entries.recipe)
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text)


def new_id():
    """A name, matching ``ID``, that no other process gives; later ones sort after earlier ones."""
    return f"{time.time_ns():016x}-{secrets.token_hex(4)}"


def _claim_workspace(parent):
    """A new folder in ``parent`` and its locked lock file; the lock says that this process lives."""
    make_folder(parent)
    while True:
        folder = parent / new_id()
        folder.mkdir()
        with suppress(FileNotFoundError):  # another writer took it for a leftover before it was locked
            lock = open(folder / "lock", "ab")
            with suppress(OSError):  # a file system without locks; no one removes anything there
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_in_place(lock):
                return folder, lock
            lock.close()


def _workspaces(parent):
    try:
        return [parent / name for name in sorted(os.listdir(parent)) if ID.fullmatch(name)]
    except FileNotFoundError:
        return []


@contextmanager
def _if_dead(workspace):
    """Whether the workspace's writer is dead: its lock, which the kernel frees with the process, can be had."""
    try:
        lock = open(workspace / "lock", "ab")
    except (FileNotFoundError, NotADirectoryError):  # removed by another process this moment, or not ours
        yield False
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            yield False
            return
        yield _is_in_place(lock)


def _is_in_place(lock):
    """Whether the open file still has its name: another process may have removed it, and a third one made it anew."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except FileNotFoundError:
        return False
