"""For whom the collector keeps what it keeps: the experiments that are named, and each run in the folders of runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.core.needs import Needs, union
from cache.tools.garbage import all_entries

Keepers = Sequence[tuple[str, Needs]]
"""What needs something, as it is shown to people, and what it needs."""


@dataclass
class Kept:
    """What of a store is kept for one of them. alone_bytes: of what no other of them needs."""

    name: str
    items: int = 0
    num_bytes: int = 0
    alone_bytes: int = 0


def union_of(keepers: Keepers) -> Needs:
    """All that any of them needs."""
    return union([needs for _, needs in keepers])


def kept(store: Path, keepers: Keepers) -> list[Kept]:
    """What is in the store for each of them, in their order."""
    found = [Kept(name) for name, _ in keepers]
    for entries in all_entries(store):
        index, size = entries.index(), entries.layout.stride_bytes
        shares = [sorted(needs.get(entries.id, ())) for _, needs in keepers]
        there = [[item for item, is_held in zip(items, index.holds(items)) if is_held] for items in shares]
        times = Counter(item for items in there for item in items)
        for each, items in zip(found, there):
            each.items += len(items)
            each.num_bytes += len(items) * size
            each.alone_bytes += sum(times[item] == 1 for item in items) * size
    return found
