"""Writing entries: rows go to a segment under a temporary name, and one rename commits it."""

import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from cache.core.address import item_key
from cache.core.errors import StoreError, explained
from cache.core.files import make_folder, write_atomically
from cache.core.journal import Journal
from cache.core.layout import Layout
from cache.core.recipe import recipe_text
from cache.core.salvage import publish, salvage
from cache.core.segment import SegmentWriter
from cache.core.workspace import JOURNAL, Workspace, claim_workspace, new_id, remove_workspace

if TYPE_CHECKING:
    from cache.core.entries import Entries

BFLOAT16_EXPONENT = 0x7F80  # all of these bits set: infinity or NaN
ROW_BYTES = 256  # about what a row takes in the keys, the metadata and the journal


class Writer:
    """Writes entries of one recipe; use it in a ``with`` block.

    ``commit`` makes what was written visible, and safe from a power cut. It is called when a segment holds
    ``max_items`` or ``max_bytes`` or is ``max_seconds`` old, and at the end of the block, also after an exception.
    A killed writer leaves nothing half-written visible; each row whose ``write`` had returned is committed by the next
    writer of the recipe, when its block is entered.
    """

    def __init__(
        self, entries: "Entries", max_items: float = 1024, max_bytes: float = 1 << 30, max_seconds: float = 300
    ):
        self._entries, self._limits = entries, (max_items, max_bytes, max_seconds)
        self._workspace: Workspace | None = None
        self._pending: _Pending | None = None

    def __enter__(self) -> "Writer":
        with explained(self._entries.path, ROW_BYTES):
            salvage(self._entries)
        self._entries.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.commit()
            else:
                with suppress(StoreError):  # what ended the block matters more
                    self.commit()
        finally:
            self._close()

    def write(self, item: str, array: np.ndarray, name: str = "") -> None:
        """Add one entry. array: of the recipe's shape and dtype (bfloat16 also as its uint16 bits), finite.
        name: of its source, for people who look into the store; it decides nothing.

        An item written twice before a commit keeps its first array. Raises StoreError where the array is not as the
        recipe says or the disk refuses; entries written before it stay, and are committed in the end.
        """
        array = _checked(self._entries, item, array)
        with explained(self._entries.path, array.nbytes):
            self._leave_what_is_lost()
            pending = self._pending or self._begin()
            if item not in pending.segment.names:
                pending.append(item, array, name)
        if self._is_full(pending):
            self.commit()

    def commit(self) -> None:
        """Make everything written so far visible to all readers, durably. Does nothing where nothing is new."""
        with explained(self._entries.path, ROW_BYTES):
            self._leave_what_is_lost()
        if self._pending is None:
            return
        segment = self._pending.segment
        with explained(self._entries.path, ROW_BYTES * len(segment.names)):
            try:
                if segment.names:
                    publish(self._entries, segment)
            finally:
                if not segment.names or not segment.folder.exists():  # it is where readers see it, and ours no more
                    pending, self._pending = self._pending, None
                    pending.drop()
        self._entries.refresh()

    def _leave_what_is_lost(self) -> None:
        """Begin anew where somebody has removed our lock: others take us for dead and commit our rows, or we do."""
        if self._workspace is not None and not self._workspace.is_in_place():
            if self._pending is not None:
                self._pending.close()
            self._workspace.lock.close()
            self._workspace = self._pending = None
            salvage(self._entries)

    def _is_full(self, pending: "_Pending") -> bool:
        max_items, max_bytes, max_seconds = self._limits
        return (
            len(pending.segment.names) >= max_items
            or pending.segment.num_bytes >= max_bytes
            or time.monotonic() - pending.began >= max_seconds
        )

    def _begin(self) -> "_Pending":
        entries = self._entries
        if self._workspace is None:
            make_folder(entries.segments_path)
            _write_recipe(entries)
            self._workspace = claim_workspace(entries.path / "writing")
        self._pending = _Pending(self._workspace.folder / new_id(), entries.layout)
        return self._pending

    def _close(self) -> None:
        if self._workspace is None:
            return
        is_left = self._pending is not None and bool(self._pending.segment.names)  # the disk was full: for the next one
        if self._pending is not None:
            self._pending.close()
        if not is_left:
            remove_workspace(self._workspace.folder)
        self._workspace.lock.close()
        self._workspace = self._pending = None


class _Pending:
    """A segment that is not committed yet, and its journal."""

    def __init__(self, folder: Path, layout: Layout):
        self.began = time.monotonic()
        self.journal = Journal(folder.with_name(f"{folder.name}{JOURNAL}"))
        try:
            self.segment = SegmentWriter(folder, layout)
        except BaseException:
            self.journal.close()
            raise

    def append(self, item: str, array: np.ndarray, name: str) -> None:
        """Add a row and note it."""
        try:
            crc = self.segment.append(item, array, name)
            self.journal.append(item, crc, name)
        except BaseException:
            self.segment.names.pop(item, None)  # the next row is written over it
            raise

    def drop(self) -> None:
        """Close both and remove the journal, as there are no rows left to take over."""
        self.close()
        Path(self.journal.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Close both; what they hold on disk stays, for the next writer to take over."""
        self.segment.close()
        self.journal.close()


def _checked(entries: "Entries", item: str, array: np.ndarray) -> np.ndarray:
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


def _is_bad(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return bits & BFLOAT16_EXPONENT == BFLOAT16_EXPONENT
    return ~np.isfinite(bits)


def _write_recipe(entries: "Entries") -> None:
    """Put the recipe beside its entries; a file that is there already is replaced only where it is damaged."""
    path, text = entries.path / "recipe.json", recipe_text(entries.recipe)
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text)
