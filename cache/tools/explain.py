"""Why entries that an experiment needs are not in the store."""

import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from cache.core.entries import Entries, names_in
from cache.core.folders import all_of_kind, names_of, short_id, store_of
from cache.core.needs import Need, Source
from cache.core.segment import Segment
from cache.core.store import Store
from cache.core.text import printable
from cache.core.workspace import ID
from cache.terminal.words import quoted
from cache.tools.compare import SHORT, Difference, differences


@dataclass(frozen=True)
class Missing:
    """An item that is not in the store. text: what people are told about it."""

    item: str
    name: str
    key: str
    text: str


@dataclass(frozen=True)
class Reason:
    """Why some items are missing. reason: damaged, changed, recipe or new.

    nearest: KIND-ID of the other recipe that holds the items or, where none does, of the most similar one.
    differences: from that recipe to the wanted one.
    """

    reason: str
    text: str
    items: list[Missing]
    nearest: str = ""
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """How much of one need is in the store. present: how many items are read from each store."""

    stage: str
    folder: str
    wanted: int
    present: dict[str, int]
    reasons: list[Reason]

    @property
    def num_missing(self) -> int:
        """How many items are in no store."""
        return self.wanted - sum(self.present.values())


def why(store: Store, needs: Sequence[Need]) -> list[Answer]:
    """For each need, how many entries are there and why the others are not. Raises StoreError where a store cannot
    be read.

    An entry whose damage nobody has noticed yet counts as there: ``verify`` finds it.
    """
    return [_answer(store, need, [each for each in needs if each is not need]) for need in needs]


def _answer(store: Store, need: Need, others: list[Need]) -> Answer:
    entries = store.entries(need.recipe)
    missing = set(entries.missing(need.items))
    present = {os.fspath(path): 0 for path in store.paths}
    for segment, rows in zip(entries.index().segments, entries.index().rows_by_segment(need.items)):
        present[os.fspath(store_of(segment))] += len(rows)
    left = [source for source in need.sources if source.item in missing]
    reasons = list(_reasons(store, entries, need, left, others)) if left else []
    return Answer(need.stage, entries.path.name, len(need.sources), present, reasons)


def _reasons(store: Store, entries: Entries, need: Need, left: list[Source], others: list[Need]) -> Iterator[Reason]:
    """Each reason takes what it explains out of ``left``. others: the other needs of the experiment. Photos and their
    conditions may have one recipe, and have one name: neither is older content of the other."""
    segments = list(_segments(entries))
    lost = {item: segment for segment in segments for item in _lost_items(entries, segment)}
    if found := _taken(left, lost):
        texts = [f"{_about(source)}, in {_place(lost[source.item])}" for source in found]
        yield Reason("damaged", "damaged on disk", _all_missing(found, texts))
    rows = [row for segment in segments for row in zip(names_of(segment), segment.items())]
    of_others = {item for other in others if other.recipe == need.recipe for item in other.items}
    older = {name: item for name, item in rows if name and item not in of_others}
    if found := _taken(left, older, lambda source: source.name):
        texts = [_change(source, older[source.name]) for source in found]
        yield Reason("changed", "other content was encoded under this file name", _all_missing(found, texts))
    yield from _of_other_recipes(store, entries, need, left, is_first=not segments)
    if left:
        yield Reason("new", "new", _all_missing(left, map(_about, left)))


def _of_other_recipes(
    store: Store, entries: Entries, need: Need, left: list[Source], is_first: bool
) -> Iterator[Reason]:
    """The other recipes of the kind that hold some of the items, the nearest first.

    is_first: nothing is encoded with the wanted recipe yet; the nearest is then named even if it holds none of them.
    """
    others = [other for other in all_of_kind(store.paths, need.recipe["kind"]) if other.id != entries.id]
    while others:
        held = {other.id: other.index().holds([source.item for source in left]) for other in others}
        others = [other for other in others if held[other.id].any()] or (others if is_first else [])
        if not others:
            return
        nearest = min(others, key=lambda other: _distance(other, entries, held[other.id].sum()))
        holds = {source.item for source, is_held in zip(left, held[nearest.id]) if is_held}
        found, parts = _taken(left, holds), differences(nearest.recipe, entries.recipe, need.component)
        others, is_first = [other for other in others if other is not nearest], False
        what = "encoded with another recipe" if found else "nothing is encoded with this recipe yet; the nearest is"
        text = f"{what}, {nearest.recipe['kind']}-{short_id(nearest.id)}"
        yield Reason("recipe", text, _all_missing(found, map(_about, found)), nearest.path.name, parts)


def _distance(other: Entries, entries: Entries, num_held: int) -> tuple[int, int, str]:
    return len(differences(other.recipe, entries.recipe)), -int(num_held), other.id


def _segments(entries: Entries) -> Iterator[Segment]:
    """All segments with sound keys, oldest first, also those whose shard no reader can use."""
    names = [(name, path) for path in entries.paths for name in names_in(path / "segments") if ID.fullmatch(name)]
    for name, path in sorted(names):
        try:
            yield Segment(os.path.join(path, "segments", name), entries.layout)
        except (OSError, ValueError):  # half removed, or its keys are damaged
            continue


def _lost_items(entries: Entries, segment: Segment) -> list[str]:
    """The items of a segment that are known to be damaged: all of them where its shard is not whole."""
    if not segment.is_whole():
        return segment.items()
    damaged = entries.damaged_rows(segment)
    items = segment.items() if damaged else []
    return [items[row] for row in damaged if row < len(items)]


def _place(segment: Segment) -> str:
    hint = "" if segment.is_whole() else ", which is not whole: verify --repair saves what is left of it"
    return f"segment {segment.name}{hint}"


def _taken(
    left: list[Source], explained: Container, key: Callable[[Source], str] = lambda source: source.item
) -> list[Source]:
    """Take those sources out of ``left`` whose key is among what is explained."""
    found = [source for source in left if key(source) in explained]
    left[:] = [source for source in left if key(source) not in explained]
    return found


def _all_missing(sources: Iterable[Source], texts: Iterable[str]) -> list[Missing]:
    return [Missing(source.item, source.name, source.key, text) for source, text in zip(sources, texts)]


def _about(source: Source) -> str:
    if not source.name:
        return "the empty caption"
    return printable(source.key) if _is_of_a_file(source) else f"{printable(source.name)}: {quoted(source.key)}"


def _change(source: Source, old_item: str) -> str:
    if not _is_of_a_file(source):
        return f"the caption of {printable(source.name)} changed, now {quoted(source.key)}"
    return f"{printable(source.name)} changed since it was encoded ({old_item[:SHORT]} -> {source.item[:SHORT]})"


def _is_of_a_file(source: Source) -> bool:
    """Whether it is a picture and not a caption: its key begins with the file's name."""
    return source.key.startswith(source.name)
