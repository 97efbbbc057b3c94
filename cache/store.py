"""The store of a folder and the entries of one recipe in it."""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from .address import canonical, item_key, recipe_id
from .digests import FileFacts
from .errors import CorruptEntry, MissingEntry, StoreError, explained
from .files import make_folder, write_atomically
from .segment import KEY, STORED, Segment
from .writer import ID, Writer

NOT_OURS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)  # a foreign file, or a damaged one
KIND = re.compile(r"[a-z0-9][a-z0-9_]*")


class Store:
    """A folder of entries, shared by any number of processes and experiments. Created by the first write."""

    def __init__(self, path):
        self.path = Path(path)
        self.facts = FileFacts(self.path / "facts.sqlite")

    def entries(self, recipe: dict) -> "Entries":
        """All entries of one recipe: a JSON-able dict of everything that decides the bytes, among it ``kind``,
        ``dtype`` (float32, float16 or bfloat16) and ``shape`` (of one item). Raises StoreError where these are not."""
        return Entries(self.path, recipe)


class Entries:
    """The committed entries of one recipe, as they were at the last ``refresh`` or ``missing``.

    Where several processes wrote one item, everyone reads the oldest sound one.
    """

    def __init__(self, store_path, recipe):
        try:
            self.recipe, self.id = json.loads(canonical(recipe)), recipe_id(recipe)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{store_path}: cannot use this recipe: {error}") from error
        _check_recipe(store_path, self.recipe)
        self.dtype, self.shape = self.recipe["dtype"], tuple(self.recipe["shape"])
        self.path = store_path / "entries" / f"{self.recipe['kind']}-{self.id}"
        self.segments_path, self._damaged_path = self.path / "segments", self.path / "damaged"
        self._segments = {}  # name -> Segment, in the order of the names
        self._damaged = {}  # name of a segment -> its damaged rows
        self._index = None  # sorted keys (n,), and for each its segment and its row

    def refresh(self):
        """See what was committed, removed or found damaged since. Costs one look at each segment's file.

        Raises StoreError where the store is there but cannot be read.
        """
        known, self._segments, self._index = self._segments, {}, None
        with explained(self.path, verb="read"):
            for name in filter(ID.fullmatch, _names(self.segments_path)):
                with suppress(*NOT_OURS):
                    segment = known.get(name) or Segment(self.segments_path / name, self.dtype, self.shape)
                    if segment.is_whole():
                        self._segments[name] = segment
            for name in filter(ID.fullmatch, _names(self._damaged_path)):
                with suppress(*NOT_OURS):
                    self._damaged[name] = json.loads((self._damaged_path / name).read_text())

    def missing(self, items: Iterable[str]) -> list[str]:
        """Those of the items that have no entry, in order, each once: what is not committed or known to be damaged."""
        items = list(dict.fromkeys(items))
        self.refresh()
        keys = self._look_up()[0]
        wanted = np.array([item_key(item) for item in items], KEY)
        places = np.searchsorted(keys, wanted)
        found = places < len(keys)
        found[found] = keys[places[found]] == wanted[found]
        return [item for item, is_found in zip(items, found) if not is_found]

    def read(self, item: str) -> np.ndarray:
        """One committed entry, a new array of the recipe's shape and dtype (bfloat16 as ml_dtypes has it).

        Raises MissingEntry where there is none, CorruptEntry where its checksum does not hold. What else is damaged in
        that segment is then noted in the store, and counts as missing from there on.
        """
        keys, segments, rows = self._look_up()
        places = range(*(int(np.searchsorted(keys, item_key(item), side)) for side in ("left", "right")))
        error = MissingEntry(f"{self.path}: item {item} is not there; run the stage that encodes it")
        for place in places:
            try:
                return segments[place].read(rows[place])
            except CorruptEntry as damage:
                error = damage
                self._note_damage(segments[place])
        raise error

    def writer(self, **limits) -> Writer:
        """A writer of new entries, for a ``with`` block. limits: see ``Writer``."""
        return Writer(self, **limits)

    def _look_up(self):
        if self._index is None:
            if not self._segments:
                self.refresh()
            parts = [(np.empty(0, KEY), [], [])]
            for name, segment in self._segments.items():
                rows = np.setdiff1d(np.arange(len(segment.keys)), self._damaged.get(name, []))
                parts.append((segment.keys[rows], np.full(len(rows), segment), rows))
            keys, segments, rows = (np.concatenate(part) for part in zip(*parts))
            order = np.argsort(keys, kind="stable")
            self._index = keys[order], segments[order], rows[order].astype(int)
        return self._index

    def _note_damage(self, segment):
        """Remember all damaged rows of a segment, for later runs too where the store can be written."""
        if not segment.is_whole():
            return  # as good as removed, which every refresh sees
        name, self._index = segment.path.parent.name, None
        self._damaged[name] = segment.damaged_rows()
        with suppress(OSError):
            make_folder(self._damaged_path)
            write_atomically(self._damaged_path / name, json.dumps(self._damaged[name]))


def _check_recipe(store_path, recipe):
    shape = recipe.get("shape")
    problems = [
        text
        for text, is_wrong in [
            (
                f"kind = {recipe.get('kind')!r}, expected lower-case letters, digits and _",
                not KIND.fullmatch(str(recipe.get("kind"))),
            ),
            (
                f"dtype = {recipe.get('dtype')!r}, expected one of {', '.join(STORED)}",
                recipe.get("dtype") not in STORED,
            ),
            (
                f"shape = {shape!r}, expected a list of positive integers",
                not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape),
            ),
        ]
        if is_wrong
    ]
    if problems:
        raise StoreError(f"{store_path}: cannot use this recipe: {'; '.join(problems)}")


def _names(folder):
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []  # nothing was written yet
