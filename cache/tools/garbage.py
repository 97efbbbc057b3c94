"""Garbage collection: removes entries that nobody needs, while other processes read from the store and write to it."""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cache.core.entries import Entries, names_in
from cache.core.errors import CorruptEntry, StoreError, UnreadableEntry, explained
from cache.core.folders import born_ns, names_of
from cache.core.leases import guarded, living_leases
from cache.core.needs import Needs
from cache.core.parsing import load_json
from cache.core.salvage import salvage
from cache.core.segment import Segment
from cache.core.workspace import ID
from cache.core.writer import Writer

REWRITE_SHARE = 0.25
"""A segment of which less than this share is garbage is left as it is: copying the rest costs more than it frees."""

SMALL_BYTES = 1 << 26
MANY_SMALL = 32
"""Where more segments than this are smaller than SMALL_BYTES, they are put together: a store that grows by a few items
a day then opens as fast after years."""


@dataclass
class Garbage:
    """What to remove from one folder of entries. items: rows that nobody needs, that are damaged or held twice.

    young, in_use, left: rows of that kind that stay, as they are young, running processes have leased rows beside them,
    or to copy the rows beside them would cost more than it frees.
    """

    entries: Entries
    items: int = 0
    freed_bytes: int = 0
    young: int = 0
    in_use: int = 0
    left: int = 0
    removed: list[Segment] = field(default_factory=list)
    rewritten: list[tuple[Segment, np.ndarray]] = field(default_factory=list)  # with the rows that are kept
    broken: list[Path] = field(default_factory=list)  # remains of a segment, after a collector was killed or a fault

    def __bool__(self) -> bool:
        return bool(self.removed or self.rewritten or self.broken)

    def summary(self) -> dict:
        """The garbage as names and numbers, for JSON."""
        return {
            "folder": self.entries.path.name,
            "items": self.items,
            "freed_bytes": self.freed_bytes,
            "young": self.young,
            "in_use": self.in_use,
            "left": self.left,
            "removed": [segment.name for segment in self.removed],
            "rewritten": [segment.name for segment, _ in self.rewritten],
            "broken": [folder.name for folder in self.broken],
        }


def find_garbage(store: Path, keep: Needs, min_age_seconds: float) -> list[Garbage]:
    """What ``collect`` would remove now. Raises StoreError as ``collect`` does."""
    with explained(store), guarded(store) as is_guarded:
        _refuse_without_locks(store, is_guarded)
        leased = living_leases(store)
    before = _ns_ago(min_age_seconds)
    return [_find_in(entries, keep, leased, before) for entries in all_entries(store)]


def collect(store: Path, keep: Needs, min_age_seconds: float) -> list[Garbage]:
    """Remove what is not in ``keep`` (items by recipe id), not leased and older than the age; return what was removed.

    What a running process has leased is neither removed nor moved. A process that is killed here leaves the store
    whole: what is kept is committed anew before its old segment goes. Raises StoreError where the store cannot be
    written or locked, where the disk has no room for what must be copied, or where a lease is damaged.
    """
    with explained(store), guarded(store, "another process collects; waiting until it is done") as is_guarded:
        _refuse_without_locks(store, is_guarded)
        found, leased, before = [], living_leases(store), _ns_ago(min_age_seconds)
        for entries in all_entries(store):
            if salvage(entries):  # also what a collector that did not end has copied
                entries.refresh()
            found.append(_find_in(entries, keep, leased, before))
            _remove(found[-1])
        return found


def _refuse_without_locks(store: Path, is_guarded: bool) -> None:
    if not is_guarded:
        raise StoreError(
            f"{store}: nothing is collected where files cannot be written and locked, as it could not be known what "
            "running processes need; collect on a machine that can"
        )


def _ns_ago(seconds: float) -> int:
    return time.time_ns() - int(seconds * 1e9)


def _find_in(entries: Entries, keep: Needs, leased: Needs, before: int) -> Garbage:
    needed = keep.get(entries.id, set()) | leased.get(entries.id, set())
    _prove_what_is_held_twice(entries, needed)
    return _garbage_of(entries, sorted(needed), sorted(leased.get(entries.id, ())), before)


def all_entries(store: Path) -> Iterator[Entries]:
    """The entries of each recipe in a store. A folder whose recipe.json is damaged is left out: nobody can tell what
    its entries are."""
    for name in names_in(Path(store) / "entries"):
        try:
            recipe = load_json((Path(store) / "entries" / name / "recipe.json").read_bytes())
            entries = Entries([Path(store)], recipe)
        except (OSError, ValueError, AttributeError, StoreError):
            continue
        if entries.path.name == name:
            entries.refresh()
            yield entries


def _garbage_of(entries: Entries, needed: list[str], leased: list[str], before: int) -> Garbage:
    """The garbage in one folder of entries. before: segments begun later, in ns since 1970, are kept whole."""
    index, garbage = entries.index(), Garbage(entries, broken=_broken(entries, needed, before))
    kept, in_use = index.rows_by_segment(needed), index.rows_by_segment(leased)
    are_many_small = sum(map(_is_small, index.segments)) > MANY_SMALL
    for segment, rows, leased_rows in zip(index.segments, kept, in_use):
        num_gone = segment.num_rows - len(rows)
        is_worth_it = num_gone >= REWRITE_SHARE * segment.num_rows or (are_many_small and _is_small(segment))
        if born_ns(segment.name) > before:
            garbage.young += num_gone
            continue
        if len(leased_rows):
            garbage.in_use += num_gone
            continue
        if not is_worth_it:
            garbage.left += num_gone
            continue
        garbage.items += num_gone
        garbage.freed_bytes += num_gone * entries.layout.stride_bytes
        if len(rows):
            garbage.rewritten.append((segment, rows))
        else:
            garbage.removed.append(segment)
    return garbage


def _prove_what_is_held_twice(entries: Entries, needed: Iterable[str]) -> None:
    """Read each item that has several rows: if the row to keep is damaged, that is noted and a sound one is kept."""
    index = entries.index()
    for item in [item for item in needed if len(index.all(item)) > 1]:
        with suppress(CorruptEntry):
            entries.read(item)


def _is_small(segment: Segment) -> bool:
    return segment.size_bytes < SMALL_BYTES


def _broken(entries: Entries, needed: list[str], before: int) -> list[Path]:
    """Folders of segments that no reader can use: half removed, or truncated.  One whose shard ``verify --repair``
    could mend stays if it holds an item that is needed and nowhere else."""
    usable = {segment.name for segment in entries.index().segments}
    names = [name for name in names_in(entries.segments_path) if ID.fullmatch(name) and name not in usable]
    folders = [entries.segments_path / name for name in names if born_ns(name) <= before]
    is_there = entries.index().holds(needed)
    missing = {item for item, is_held in zip(needed, is_there) if not is_held}
    return [folder for folder in folders if not _could_be_mended(entries, folder, missing)]


def _could_be_mended(entries: Entries, folder: Path, missing: set[str]) -> bool:
    try:
        items = Segment(folder, entries.layout).items()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:  # what cannot be read is not absent
        return True
    return (folder / entries.layout.shard_name).exists() and not missing.isdisjoint(items)


def _remove(garbage: Garbage) -> None:
    entries = garbage.entries
    with entries.writer() as writer:
        garbage.rewritten = [(segment, rows) for segment, rows in garbage.rewritten if _copy(segment, rows, writer)]
    for segment in [*garbage.removed, *(segment for segment, _ in garbage.rewritten)]:
        _remove_folder(entries, Path(segment.folder))
    for folder in garbage.broken:
        _remove_folder(entries, folder)


def _copy(segment: Segment, rows: np.ndarray, writer: Writer) -> bool:
    """Copy the rows that are sound. Returns False where the disk does not give one of them: the segment must stay."""
    names = names_of(segment)
    items, buffer = segment.items(), np.empty(segment.layout.num_values, segment.layout.stored)
    for row in rows.tolist():
        try:
            segment.read_into(buffer, row)
        except UnreadableEntry:
            return False
        except CorruptEntry:  # to be encoded again by whoever needs it
            continue
        writer.write(items[row], buffer.reshape(segment.layout.shape), names[row])
    return True


def _remove_folder(entries: Entries, folder: Path) -> None:
    """Remove a segment, its keys first: without them it is no segment, and after a kill the rest is collected later."""
    (folder / "keys").unlink(missing_ok=True)
    shutil.rmtree(folder)
    (entries.path / "damaged" / folder.name).unlink(missing_ok=True)
