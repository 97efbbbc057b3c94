"""What a store holds: by recipe, by kind and by item."""

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.core.address import DIGEST_BYTES
from cache.core.entries import Entries, names_in
from cache.core.errors import StoreError, explained
from cache.core.folders import born_ns, check_store, entries_at, folders, kind_of, names_of, store_of
from cache.core.journal import read_journal
from cache.core.segment import Segment
from cache.core.workspace import ID, JOURNAL
from cache.tools.garbage import SMALL_BYTES

BLOCK_BYTES = 512  # what st_blocks counts


@dataclass(frozen=True)
class Held:
    """What a store holds of one recipe. problem: empty, or how recipe.json is damaged; then the numbers are not known.

    num_items: entries that can be read, each once. num_duplicates: sound rows beyond these. num_damaged: rows noted as
    damaged. num_unusable: segments that no reader opens. num_uncommitted: rows of writers that run or were killed.
    """

    store: str
    folder: str
    kind: str
    id: str
    shape: tuple = ()
    dtype: str = ""
    num_items: int = 0
    num_duplicates: int = 0
    num_damaged: int = 0
    num_segments: int = 0
    num_small_segments: int = 0
    num_unusable: int = 0
    num_uncommitted: int = 0
    uncommitted_bytes: int = 0
    tensor_bytes: int = 0
    disk_bytes: int = 0
    last_written_ns: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Row:
    """One committed row of a recipe. state: empty, "damaged", or "duplicate" where another row is read instead."""

    item: str
    name: str
    segment: str
    store: str
    state: str = ""


def held(store: Path) -> list[Held]:
    """What a store holds, recipe by recipe, sorted by kind and age. Raises StoreError where there is no such store."""
    with explained(check_store(store), verb="read"):
        found = [_held(Path(store) / "entries" / name) for name in folders([store])]
    return sorted(found, key=lambda each: (each.kind, each.last_written_ns))


def rows(entries: Entries) -> Iterator[Row]:
    """Every committed row of a recipe, in the order in which readers look for them."""
    entries.refresh()
    seen = set()
    for segment in entries.index().segments:
        damaged, store = set(entries.damaged_rows(segment)), os.fspath(store_of(segment))
        for row, (item, name) in enumerate(zip(segment.items(), names_of(segment))):
            state = "damaged" if row in damaged else "duplicate" if item in seen else ""
            if not state:
                seen.add(item)
            yield Row(item, name, segment.name, store, state)


def stats(store: Path) -> dict:
    """Totals of a store by kind, and the free room on its disk. Raises StoreError where there is no such store."""
    kinds: dict[str, dict] = {}
    for each in held(store):
        total = kinds.setdefault(each.kind, {"num_recipes": 0})
        total["num_recipes"] += 1
        for name, value in vars(each).items():
            if name.startswith("num_") or name.endswith("_bytes"):
                total[name] = total.get(name, 0) + value
    facts = Path(store) / "facts.sqlite"
    return {
        "store": os.fspath(store),
        "kinds": kinds,
        "free_bytes": shutil.disk_usage(store).free,
        "facts_bytes": facts.stat().st_size if facts.exists() else 0,
    }


def _held(path: Path) -> Held:
    kind = kind_of(path.name)
    what: dict[str, Any] = {
        "store": os.fspath(path.parents[1]),
        "folder": path.name,
        "kind": kind,
        "id": path.name[len(kind) + 1 :],
        "disk_bytes": _disk_bytes(path),
        "uncommitted_bytes": _disk_bytes(path / "writing"),
        "num_uncommitted": _num_uncommitted(path),
    }
    try:
        entries = entries_at(path)
    except StoreError as error:
        return Held(**what, problem=str(error))
    entries.refresh()
    segments = entries.index().segments
    num_sound, num_items = len(entries.index()), _num_items(entries, segments)
    return Held(
        **what,
        shape=entries.shape,
        dtype=entries.dtype,
        num_items=num_items,
        num_duplicates=num_sound - num_items,
        num_damaged=sum(len(entries.damaged_rows(segment)) for segment in segments),
        num_segments=len(segments),
        num_small_segments=sum(segment.size_bytes < SMALL_BYTES for segment in segments),
        num_unusable=sum(bool(ID.fullmatch(name)) for name in names_in(entries.segments_path)) - len(segments),
        tensor_bytes=sum(segment.num_rows for segment in segments) * entries.layout.data_bytes,
        last_written_ns=max((born_ns(segment.name) for segment in segments), default=0),
    )


def _num_items(entries: Entries, segments: list[Segment]) -> int:
    sound = []
    for segment in segments:
        keys = np.frombuffer(segment.keys, f"V{DIGEST_BYTES}")
        sound.append(keys[~np.isin(np.arange(len(keys)), entries.damaged_rows(segment))])
    return len(np.unique(np.concatenate(sound))) if sound else 0


def _num_uncommitted(path: Path) -> int:
    num_rows = 0
    for journal in (path / "writing").glob(f"*/*{JOURNAL}"):
        with suppress(OSError):  # committed this moment
            num_rows += sum(1 for _ in read_journal(journal))
    return num_rows


def _disk_bytes(folder: Path) -> int:
    """What the files below a folder take on its disk; those that go away meanwhile do not count."""
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                num_bytes += os.lstat(os.path.join(parent, name)).st_blocks * BLOCK_BYTES
    return num_bytes
