"""The entries of one recipe, in one store or several."""

import errno
import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from cache.core.address import canonical, digest, recipe_id
from cache.core.errors import CorruptEntry, MissingEntry, StoreError, explained
from cache.core.files import make_folder, write_atomically
from cache.core.index import Index
from cache.core.layout import Layout
from cache.core.parsing import load_json
from cache.core.recipe import check_recipe
from cache.core.segment import Segment
from cache.core.workspace import ID
from cache.core.writer import Writer

NOT_OURS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)  # a foreign file, or a damaged one


Missed = tuple[tuple[str, ...] | None, Index | None, list[str]]
"""Items, the index that was asked about them, and which of them it has not."""


class Entries:
    """The committed entries of one recipe, as they were at the last ``refresh`` or ``missing``.

    Where several processes or stores hold one item, the first store's is read, and in a store the oldest sound one.
    stores: their folders; new entries go to the first one, nothing is written to the others.
    broken: folders of segments that are damaged as a whole, or whose shard is not there in its full size; what they
    hold is missing, and `cache.tools.verify` may save some of it.
    """

    def __init__(self, stores: Sequence[Path], recipe: dict):
        try:
            self.recipe, self.id = json.loads(canonical(recipe)), recipe_id(recipe)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{stores[0]}: cannot use this recipe: {error}") from error
        check_recipe(stores[0], self.recipe)
        self.dtype: str = self.recipe["dtype"]
        self.shape: tuple[int, ...] = tuple(self.recipe["shape"])
        self.layout = Layout(self.dtype, self.shape)
        self.stores = tuple(stores)
        self.paths = tuple(store / "entries" / f"{self.recipe['kind']}-{self.id}" for store in stores)
        self.path = self.paths[0]
        self.segments_path = self.path / "segments"
        self._segments: list[Segment] = []  # of all stores, best first
        self._damaged: dict[str, list[int]] = {}  # damaged rows by the segment's folder, as noted
        self.broken: list[str] = []
        self._unnoted: dict[str, list[int]] = {}  # the same, where no note could be left
        self._index: Index | None = None
        self._missed: Missed = (None, None, [])
        self._lock = threading.RLock()  # the segments, the damage and the index are of one moment

    def refresh(self) -> None:
        """See what was committed, removed or found damaged since the last look. Costs one look at each segment's file.

        Raises StoreError where a store is there but cannot be read, or one of those that are only read is not there.
        """
        with self._lock:
            known = {segment.folder: segment for segment in self._segments}
            index, before = self._index, (self._segments, self._damaged)
            segments: list[Segment] = []
            self._index, self._damaged, self.broken = None, dict(self._unnoted), []
            for store, path in zip(self.stores, self.paths):
                with explained(path, verb="read"):
                    if store != self.stores[0] and not store.is_dir():
                        raise StoreError(f"{store}: this store is not there; mount it, or take it out of [paths] store")
                    segments += self._segments_in(path, known)
                    self._read_notes(path)
            self._segments = segments
            if (segments, self._damaged) == before:
                self._index = index  # to sort millions of keys takes longer than to look at their segments' files

    def missing(self, items: Iterable[str]) -> list[str]:
        """The items, in order and each once, that have no entry or one that is known to be damaged."""
        self.refresh()
        index, (asked, of, found) = self.index(), self._missed
        if asked is not items or of is not index:
            several = list(dict.fromkeys(items))
            found = [several[number] for number in np.flatnonzero(~index.holds(several))]
            self._missed = (items, index, found) if isinstance(items, tuple) else (None, None, [])
        return list(found)

    def read(self, item: str) -> np.ndarray:
        """One committed entry, a new array of the recipe's shape and dtype (bfloat16 as ml_dtypes has it).

        Its checksum is verified the first time that this object reads it. Raises MissingEntry where there is none,
        CorruptEntry where its checksum does not hold; then all damaged rows of that segment are noted in the store, and
        count as missing from there on.
        """
        return self.read_many([item])[0]

    def read_many(self, items: Sequence[str], out: np.ndarray | None = None) -> np.ndarray:
        """As ``read`` for a batch: (len(items), *shape). An item may stand in it more than once.

        out: an array of that shape and dtype, C-contiguous, to be filled and returned instead of a new one.
        """
        shape = (len(items), *self.shape)
        if out is None:
            out = np.empty(shape, self.layout.real)
        elif out.shape != shape or out.dtype != self.layout.real or not out.flags.c_contiguous:
            raise ValueError(f"out: {out.dtype} {out.shape}, expected {self.layout.real} {shape}, C-contiguous")
        rows = out.reshape(len(items), self.layout.num_values).view(self.layout.stored)
        for row, item, (segment, place) in zip(rows, items, self.index().best(items)):
            try:
                if segment is None:
                    raise MissingEntry(item)
                segment.read_into(row, place)
            except (MissingEntry, CorruptEntry):
                self._read_where_it_is_sound(row, item)
        return out

    def prefetch(self, items: Sequence[str]) -> None:
        """Start reading entries from the disk into the page cache, in the order in which they lie there, and return.

        A disk gives single rows in random order several times more slowly. Does nothing where the entries would not fit
        into half of the free memory: the first of them would be gone before they are used.
        """
        if len(items) * self.layout.stride_bytes < available_bytes() / 2:
            index = self.index()
            work = zip(index.segments, index.rows_by_segment(items))
            threading.Thread(target=_prefetch, args=(list(work),), name="prefetch", daemon=True).start()

    def writer(self, **limits: float) -> Writer:
        """A writer of new entries, for a ``with`` block. limits: see ``Writer``."""
        return Writer(self, **limits)

    def index(self) -> Index:
        """Where each entry is, as of the last ``refresh``.

        Where that is known no lock is taken, which threads that read could keep from one that wants to refresh.
        """
        index = self._index
        return self._made_index() if index is None else index

    def _made_index(self) -> Index:
        with self._lock:
            if self._index is None:
                if not self._segments:
                    self.refresh()
                damaged = {
                    place: self._damaged[segment.folder]
                    for place, segment in enumerate(self._segments)
                    if segment.folder in self._damaged
                }
                self._index = Index(self._segments, damaged)
            return self._index

    def damaged_rows(self, segment: Segment) -> list[int]:
        """The rows of a segment that are known to be damaged."""
        return self._damaged.get(segment.folder, [])

    def note_damage(self, segment: Segment, rows: Sequence[int]) -> None:
        """Remember which rows of a segment are damaged, also for later runs if the first store can be written."""
        path = self._note_paths(Path(segment.folder))[-1]
        with self._lock:
            self._index, self._damaged[segment.folder] = None, list(rows)
            self._unnoted.pop(segment.folder, None)
        try:
            if rows:
                make_folder(path.parent)
                write_atomically(path, json.dumps(list(rows)))
            else:
                path.unlink(missing_ok=True)
        except OSError:
            self._unnoted[segment.folder] = list(rows)

    def _read_where_it_is_sound(self, row: np.ndarray, item: str) -> None:
        error: StoreError = MissingEntry(f"{self.path}: item {item} is not there; run the stage that encodes it")
        for _ in range(2):  # the collector may have moved it since the last look
            for segment, place in self.index().all(item):
                try:
                    return segment.read_into(row, place)
                except CorruptEntry as damage:
                    error = damage
                    if segment.is_whole():
                        self.note_damage(segment, segment.damaged_rows())
            self.refresh()
        raise error

    def _segments_in(self, path: Path, known: dict[str, Segment]) -> Iterator[Segment]:
        for name in filter(ID.fullmatch, names_in(path / "segments")):
            folder = os.path.join(path, "segments", name)
            try:
                segment = known.get(folder) or Segment(folder, self.layout)
                is_whole = segment.is_whole()
            except NOT_OURS as error:
                self.broken += [folder] if isinstance(error, ValueError) else []
                continue
            except OSError as error:
                if error.errno != errno.EIO:  # a bad disk under one segment leaves the others readable
                    raise
                continue
            if is_whole:
                yield segment
            else:
                self.broken.append(folder)

    def _read_notes(self, path: Path) -> None:
        """Read the notes about damaged rows of the segments in ``path``: those beside them, and those in the first
        store."""
        for folder, suffix in ((path, ""), (self.path, self._suffix(path))):
            for name in names_in(folder / "damaged"):
                if ID.fullmatch(name.removesuffix(suffix)) and name.endswith(suffix):
                    with suppress(*NOT_OURS):
                        rows = load_json((folder / "damaged" / name).read_bytes())
                        if not isinstance(rows, list) or not all(type(row) is int for row in rows):
                            continue
                        segment = os.path.join(path, "segments", name.removesuffix(suffix))
                        self._damaged[segment] = sorted({*self._damaged.get(segment, []), *rows})

    def _note_paths(self, segment_folder: Path) -> tuple[Path, Path]:
        """Where the damage of a segment is noted: in its store, and in ours where that is another one."""
        path, name = segment_folder.parent.parent, segment_folder.name
        return path / "damaged" / name, self.path / "damaged" / f"{name}{self._suffix(path)}"

    def _suffix(self, path: Path) -> str:
        return "" if path == self.path else f".{digest(os.fsencode(os.path.abspath(path)))[:8]}"


def _prefetch(work: list[tuple[Segment, np.ndarray]]) -> None:
    for segment, rows in work:
        if len(rows):
            with suppress(OSError):  # whoever reads it will say so
                segment.prefetch(rows)


def available_bytes() -> int:
    """Memory that could be used without swapping, as the kernel estimates it; 0 where it does not say."""
    with suppress(OSError, ValueError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def names_in(folder: str | Path) -> list[str]:
    """The names in a folder, sorted; none where it is not there."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []  # nothing was written yet
