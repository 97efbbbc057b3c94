"""Verification: reads everything in a store, and notes what is damaged, so that the next run encodes it again.

It can mend files whose correct content is certain: a segment's keys, its metadata, and its shard's index and size. Each
is replaced by one rename, so that a reader sees the old file or the new one, also if the repair is killed.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cache.core.entries import Entries, names_in
from cache.core.errors import StoreError
from cache.core.files import write_atomically
from cache.core.folders import FOLDER, attributes_of, check_store, entries_at, folders, kind_of, names_of
from cache.core.leases import guarded
from cache.core.segment import Segment
from cache.core.workspace import ID
from cache.tools.mending import complete_shard, proven_keys, write_metadata, write_recipe


@dataclass(frozen=True)
class Damaged:
    """An entry whose bytes are not those that were written, or are gone. folder: KIND-ID."""

    store: str
    folder: str
    item: str
    name: str
    segment: str


@dataclass(frozen=True)
class Fault:
    """A file or folder that is not as it should be. mend: what --repair does about it; empty: nothing."""

    path: str
    what: str
    mend: str = ""
    is_mended: bool = False


@dataclass
class Report:
    """What was read, and what was found. num_superseded: damaged rows whose items have another, sound entry.

    leftovers: files that nobody reads, which do no harm. unnoted: segments whose damage could not be noted.
    """

    num_expected: int = 0
    num_segments: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    damaged: list[Damaged] = field(default_factory=list)
    num_superseded: int = 0
    faults: list[Fault] = field(default_factory=list)
    leftovers: list[Fault] = field(default_factory=list)
    unnoted: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether no entry is damaged and no file faulty; leftovers do not count."""
        return not self.damaged and not self.faults


def verify(
    stores: Sequence[Path], kind: str = "", repair: bool = False, progress: Callable[[Report], None] | None = None
) -> Report:
    """Read every row of every segment, and the files beside them. kind: only entries of that kind.

    Only the first store is changed: damage is noted there, notes that are no longer true are removed, files are mended.
    progress: called with the report after each segment. Raises StoreError where a store is not there, or holds nothing
    of the kind.
    """
    stores = [check_store(store) for store in stores]
    names = [name for name in folders(stores) if kind in ("", kind_of(name))]
    if kind and not names:
        kinds = ", ".join(sorted(set(map(kind_of, folders(stores))))) or "nothing"
        raise StoreError(f"{stores[0]}: holds nothing of kind {kind!r}; it holds {kinds}")
    check = _Check(stores, repair, Report())
    check.report.num_expected = sum(1 for name in names for _ in check.segment_folders(name))
    for store in stores:
        check.leftover_names(store / "entries", FOLDER)
    for name in names:
        check.folder(name, progress)
    return check.report


Checked = dict[str, tuple[Segment, list[int] | None]]
"""Segments by folder, each with its damaged rows, or None where the rows could not be read."""


@dataclass
class _Check:
    stores: list[Path]
    repair: bool
    report: Report

    def folder(self, name: str, progress: Callable[[Report], None] | None) -> None:
        """Check all that the stores hold of one recipe."""
        entries = self.recipe(name)
        if entries is None:
            return
        rows_before = len(self.report.damaged)
        found: Checked = {}
        for path in entries.paths:
            self.leftover_names(path / "segments", ID)
        for folder in self.segment_folders(name):
            self.report.num_segments += 1
            if segment := self.segment(entries, folder):
                found[segment.folder] = segment, self.rows(entries, segment)
            if progress:
                progress(self.report)
        self.forget_lost_notes(entries)
        self.settle(entries, found, rows_before)

    def segment_folders(self, name: str) -> Iterator[str]:
        """The folders of the recipe's segments in all stores."""
        for store in self.stores:
            parent = os.path.join(store, "entries", name, "segments")
            yield from (os.path.join(parent, each) for each in names_in(parent) if ID.fullmatch(each))

    def recipe(self, name: str) -> Entries | None:
        """The entries of a recipe, if any store has a sound recipe.json for it. Reports those that are damaged."""
        found, faulty = None, []
        for path in (store / "entries" / name for store in self.stores if (store / "entries" / name).is_dir()):
            try:
                found = entries_at(path, self.stores)
            except StoreError as error:
                if names_in(path / "segments"):  # else a writer has just begun
                    faulty.append((path / "recipe.json", str(error).partition(": ")[2]))
        for path, what in faulty:
            if found:
                self.fault(path, what, "writes it anew as in another store", partial(write_recipe, found, path))
            else:
                what += "; its entries are not checked; the next run that encodes with this recipe writes it anew"
                self.fault(path, what)
        if found:
            found.refresh()
        return found

    def segment(self, entries: Entries, folder: str) -> Segment | None:
        """Open a segment. Returns None, and reports why, where that is not possible."""
        path = Path(folder, "keys")
        try:
            return Segment(folder, entries.layout)
        except (FileNotFoundError, NotADirectoryError):
            self.report.leftovers.append(Fault(folder, "has no keys: half removed; gc removes the rest"))
        except OSError as error:
            self.fault(path, f"cannot be read: {error.strerror}")
        except ValueError:
            if keys := proven_keys(folder, entries.layout):
                mend = "writes it anew", partial(write_atomically, path, keys)
                is_mended = self.fault(path, "damaged; its entries are not read", *mend)
                return Segment(folder, entries.layout) if is_mended else None
            self.fault(path, "damaged; its entries count as missing, and are encoded again where they are needed")
        return None

    def rows(self, entries: Entries, segment: Segment) -> list[int] | None:
        """Check a segment's rows and files. Returns its damaged rows, None where they cannot be read now."""
        try:
            rows = segment.damaged_rows()
            size = _size_of(segment.shard_path)
            has_index = size == segment.size_bytes and segment.index_is_sound()
            if _size_of(os.path.join(segment.folder, "keys")) < 0:  # the collector has removed it meanwhile
                return None
        except (OSError, StoreError) as error:
            self.fault(segment.shard_path, f"cannot be read: {error}")
            return None
        self.report.num_rows += segment.num_rows
        self.report.num_bytes += max(size, 0)
        self.damaged_items(segment, rows)
        if rows != entries.damaged_rows(segment) and size >= 0:
            entries.note_damage(segment, rows)
        self.shard(segment, size, has_index, segment.num_rows - len(rows))
        if not _metadata_is_sound(entries, segment):
            path = os.path.join(segment.folder, "zarr.json")
            self.fault(path, "damaged", "writes it anew", partial(write_metadata, entries, segment))
        return rows

    def damaged_items(self, segment: Segment, rows: list[int]) -> None:
        """Report damaged rows by their items."""
        path, items, names = Path(segment.folder).parents[1], segment.items(), names_of(segment)
        store = os.fspath(path.parents[1])
        self.report.damaged += [Damaged(store, path.name, items[row], names[row], segment.name) for row in rows]

    def shard(self, segment: Segment, size: int, has_index: bool, num_sound: int) -> None:
        """Report a shard whose file is not as it should be. size: in bytes, -1 where there is no file."""
        mend = "completes it", partial(complete_shard, segment)
        if size < 0:
            self.fault(segment.shard_path, "is not there")
        elif size != segment.size_bytes:
            what = f"{size} bytes long, expected {segment.size_bytes}; its {num_sound} sound entries are not read"
            self.fault(segment.shard_path, what, *mend)
        elif not has_index:
            self.fault(segment.shard_path, "its index is damaged, so that other zarr readers cannot use it", *mend)

    def fault(self, path: str | Path, what: str, mend: str = "", action: Callable[[], None] | None = None) -> bool:
        """Report a fault; mend it by ``action`` where that is wanted and ``path`` is in the first store.

        Returns whether it was mended.
        """
        is_mended = False
        if mend and self.stores[0] not in Path(path).parents:
            what, mend = f"{what}; only read from here: verify that store by itself", ""
        elif mend and action and self.repair:
            try:
                with guarded(self.stores[0], "its garbage is being collected; waiting until that is done"):
                    action()
                is_mended = True
            except OSError as error:
                what, mend = f"{what}; cannot be mended: {error.strerror}", ""
        self.report.faults.append(Fault(os.fspath(path), what, mend, is_mended))
        return is_mended

    def leftover_names(self, parent: Path, pattern: re.Pattern) -> None:
        """Report files in a folder whose names are not of the store."""
        foreign = [name for name in names_in(parent) if not pattern.fullmatch(name)]
        self.report.leftovers += [Fault(os.fspath(parent / name), "foreign; not of the store") for name in foreign]

    def forget_lost_notes(self, entries: Entries) -> None:
        """Remove the notes about segments that are gone."""
        for name in names_in(entries.path / "damaged"):
            if ID.fullmatch(name) and not (entries.segments_path / name).exists():
                with suppress(OSError):
                    (entries.path / "damaged" / name).unlink()

    def settle(self, entries: Entries, found: Checked, rows_before: int) -> None:
        """Take out of the report what has been encoded again since, and report damage that could not be noted.

        rows_before: how many damaged rows the report had before this folder.
        """
        report, later = self.report, Entries(entries.stores, entries.recipe)
        missing = set(entries.missing(each.item for each in report.damaged[rows_before:]))
        kept = [each for each in report.damaged[rows_before:] if each.item in missing]
        report.num_superseded += len(report.damaged) - rows_before - len(kept)
        report.damaged[rows_before:] = kept
        later.refresh()
        for segment, rows in found.values():
            if rows is not None and segment.is_whole() and later.damaged_rows(segment) != rows:
                report.unnoted.append(segment.folder)


def _size_of(path: str) -> int:
    """The size of a file in bytes, -1 where there is none. Raises OSError where this cannot be told."""
    try:
        return os.stat(path).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1


def _metadata_is_sound(entries: Entries, segment: Segment) -> bool:
    with suppress(OSError, ValueError, KeyError, AttributeError):
        segment.metadata()
        expected = {"kind": entries.recipe["kind"], "recipe": entries.id, "items": segment.items()}
        found = attributes_of(segment.folder)
        names_are_sound = names_of(segment) == found.get("names")
        return names_are_sound and all(found.get(key) == value for key, value in expected.items())
    return False
