"""Writing entries: rows go to a segment under a temporary name, and one rename commits it."""

import fcntl
import json
import os
import re
import secrets
import shutil
import time
from contextlib import suppress

import numpy as np

from .address import item_key
from .errors import StoreError, explained
from .files import make_folder, sync_folder, write_atomically
from .segment import REAL, STORED, SegmentWriter

ID = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}")
BFLOAT16_EXPONENT = 0x7F80  # all of these bits set: infinity or NaN


class Writer:
    """Writes entries of one recipe; use it in a ``with`` block.

    What was written becomes visible, and survives a power cut, with ``commit``, which also happens when a segment holds
    ``max_items`` or ``max_bytes`` or is ``max_seconds`` old, and at the end of the block, be it by an exception.
    A killed writer loses what it had not committed and leaves nothing visible; the next writer tidies up after it.
    """

    def __init__(self, entries, max_items=1024, max_bytes=1 << 28, max_seconds=60):
        self._entries, self._limits = entries, (max_items, max_bytes, max_seconds)
        self._workspace = self._lock = self._segment = None

    def __enter__(self):
        with suppress(OSError):  # a store that can only be read
            _remove_leftovers(self._entries.path / "writing")
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

    def write(self, item: str, array: np.ndarray):
        """Add one entry. array: of the recipe's shape and dtype (bfloat16 also as its uint16 bits), finite.

        An item written twice before a commit keeps its first array. Raises StoreError where the array is not as the
        recipe says or the disk refuses; entries written before it stay, and are committed in the end.
        """
        array = _checked(self._entries, item, array)
        with explained(self._entries.path, array.nbytes):
            if self._segment is None:
                self._segment = self._begin()
            if item not in self._segment.rows:
                self._segment.append(item, array)
        if self._is_full():
            self.commit()

    def commit(self):
        """Make everything written so far visible to all readers, durably. Does nothing where nothing is new."""
        if self._segment is None:
            return
        segment, target = self._segment, self._entries.segments_path / self._segment.folder.name
        if segment.rows:
            with explained(self._entries.path, 64 * len(segment.rows)):
                segment.finish()
                os.rename(segment.folder, target)
                sync_folder(target.parent)
        self._segment = None
        segment.close()
        self._entries.refresh()

    def _is_full(self):
        max_items, max_bytes, max_seconds = self._limits
        return (
            len(self._segment.rows) >= max_items
            or self._segment.num_bytes >= max_bytes
            or time.monotonic() - self._began >= max_seconds
        )

    def _begin(self):
        entries = self._entries
        if self._workspace is None:
            make_folder(entries.segments_path)
            _write_recipe(entries)
            self._workspace, self._lock = _claim_workspace(entries.path / "writing")
        self._began = time.monotonic()
        attributes = {"kind": entries.recipe["kind"], "recipe": entries.id}
        return SegmentWriter(self._workspace / new_id(), entries.dtype, entries.shape, attributes)

    def _close(self):
        if self._segment is not None:
            self._segment.close()
        if self._workspace is not None:
            shutil.rmtree(self._workspace, ignore_errors=True)
            self._lock.close()
        self._workspace = self._lock = self._segment = None


def _checked(entries, item, array):
    """The array as it is stored: C-contiguous, bfloat16 as its bits. Raises StoreError where it must not be stored."""
    where, array = f"{entries.path.name}: item {item}", np.asarray(array)
    item_key(item)
    if array.dtype not in (REAL[entries.dtype], STORED[entries.dtype]):
        raise StoreError(
            f"{where}: the array is {array.dtype}, the recipe says {entries.dtype}; convert it, or change the recipe"
        )
    if array.shape != entries.shape:
        raise StoreError(f"{where}: the array's shape is {array.shape}, the recipe says {entries.shape}")
    bits = np.ascontiguousarray(array).reshape(array.shape).view(STORED[entries.dtype])
    num_bad = np.count_nonzero(_is_bad(bits))
    if num_bad:
        raise StoreError(
            f"{where}: {num_bad} of {array.size} numbers are NaN or infinite, nothing was stored; compute "
            "it in a wider dtype (fp32), and look at this one input"
        )
    return bits


def _is_bad(bits):
    if bits.dtype == STORED["bfloat16"]:
        return bits & BFLOAT16_EXPONENT == BFLOAT16_EXPONENT
    return ~np.isfinite(bits)


def _write_recipe(entries):
    """Put the recipe beside its entries; what stands there already is replaced only where it is damaged."""
    path, text = entries.path / "recipe.json", json.dumps(entries.recipe, indent=2, sort_keys=True)
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
            if os.path.exists(lock.name):
                return folder, lock
            lock.close()


def _remove_leftovers(parent):
    """Remove the workspaces of dead writers: those whose lock can be had, which the kernel frees with the process."""
    for folder in parent.iterdir() if parent.is_dir() else ():
        if not ID.fullmatch(folder.name):
            continue
        with suppress(OSError), open(folder / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
