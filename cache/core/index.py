"""Finds the row of an item among many segments, by sorted keys in memory.

It takes 20 bytes an item, besides the 16 that the segments hold, and remembers where up to 65,536 items are, in 15 MB.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from cache.core.address import DIGEST_BYTES, item_key, item_keys

HALF = np.dtype(">u8")
KEPT_ITEMS = 1 << 16
"""How many items' rows are remembered: each epoch reads the same ones again."""


class Index:
    """Finds the rows of items. Where several segments hold an item, it prefers the one that was given first.

    segments: in the order of preference, each with ``keys`` (16 bytes a row) and ``num_rows``.
    damaged: per segment, rows that are left out, by the segment's position.
    """

    def __init__(self, segments: Sequence, damaged: Mapping[int, Sequence[int]]):
        self.segments = list(segments)
        self._starts = np.cumsum([0] + [segment.num_rows for segment in self.segments]).tolist()
        keys = np.empty((self._starts[-1], 2), np.uint64)
        for start, segment in zip(self._starts, self.segments):
            keys[start : start + segment.num_rows] = _halves(segment.keys)
        order = np.argsort(keys[:, 0], kind="stable").astype(np.uint32)
        if gone := [
            self._starts[place] + row
            for place, rows in damaged.items()
            for row in rows
            if 0 <= row < self.segments[place].num_rows
        ]:
            order = order[~np.isin(order, gone)]
        self._rows = order  # row numbers, counted through all segments, in the order of the keys
        self._first, self._second = keys[order, 0], keys[order, 1]
        self._found: dict[str, tuple] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def best(self, items: Sequence[str]) -> list[tuple]:
        """For each item the (segment, row in it) to read, or (None, 0) where there is none."""
        found = self._found
        known = [found[item] for item in items if item in found]
        if len(known) == len(items):
            return known
        places = self._places(items)
        rows = self._rows[places].tolist() if len(self._rows) else [0] * len(items)
        best = [self._locate(row) if place >= 0 else (None, 0) for place, row in zip(places.tolist(), rows)]
        if len(found) + len(items) > KEPT_ITEMS:
            self._found = found = {}
        found.update(zip(items[:KEPT_ITEMS], best))
        return best

    def all(self, item: str) -> list[tuple]:
        """Each (segment, row in it) that holds the item, best first."""
        key = _halves(item_key(item))[0]
        places = range(*(int(self._first.searchsorted(key[0], side)) for side in ("left", "right")))
        return [self._locate(int(self._rows[place])) for place in places if self._second[place] == key[1]]

    def holds(self, items: Sequence[str]) -> np.ndarray:
        """Whether each of the items is there, (len(items),) booleans."""
        return self._places(items) >= 0

    def rows_by_segment(self, items: Sequence[str]) -> list[np.ndarray]:
        """For each segment, the rows that a reader of the items would read there, ascending."""
        places = self._places(items)
        rows = np.unique(self._rows[places[places >= 0]]).astype(np.int64)
        ends = np.searchsorted(rows, self._starts)
        return [rows[a:b] - start for a, b, start in zip(ends[:-1], ends[1:], self._starts)]

    def _places(self, items: Sequence[str]) -> np.ndarray:
        """Where in the sorted keys each item is first met, -1 where it is not."""
        keys = _halves(item_keys(items))
        order, places = np.argsort(keys[:, 0]), np.empty(len(keys), np.int64)
        places[order] = self._first.searchsorted(keys[order, 0])  # in order, the processor's caches serve
        places[places == len(self._first)] = -1
        inside = np.flatnonzero(places >= 0)
        places[inside[self._first[places[inside]] != keys[inside, 0]]] = -1
        inside = np.flatnonzero(places >= 0)
        for number in inside[self._second[places[inside]] != keys[inside, 1]]:  # two keys with one first half
            while 0 <= places[number] and self._second[places[number]] != keys[number, 1]:
                following = places[number] + 1
                is_same = following < len(self._first) and self._first[following] == keys[number, 0]
                places[number] = following if is_same else -1
        return places

    def _locate(self, row: int) -> tuple:
        place = bisect_right(self._starts, row) - 1
        return self.segments[place], row - self._starts[place]


def _halves(keys: bytes) -> np.ndarray:
    """Keys of 16 bytes, one after the other, as (n, 2) numbers in the same order of size."""
    return np.frombuffer(keys, HALF).reshape(-1, DIGEST_BYTES // HALF.itemsize).astype(np.uint64)
