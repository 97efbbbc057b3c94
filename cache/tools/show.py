"""The results of the tools, as lines of text for people."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from cache.core.entries import Entries
from cache.core.folders import kind_of, short_id
from cache.core.text import printable
from cache.terminal.output import bad, good, heading, quiet, warning
from cache.terminal.table import Table
from cache.terminal.words import count, human_bytes, local_time
from cache.tools.compare import Pair, flat
from cache.tools.explain import Answer
from cache.tools.garbage import Garbage
from cache.tools.keepers import Kept
from cache.tools.listing import Held, Row
from cache.tools.verify import Report

EXAMPLES = 10
GARBAGE = "entries", ">items", ">frees", ">segments removed", ">put together", ">half-removed"
KEPT = "kept for", ">entries", ">size", ">for it alone"
HELD = "entries", ">items", ">size", ">damaged", ">unusable", ">uncommitted", "shape", "dtype", "last written"
ITEMS = "item", "name", "state", "in segment"
TOTALS = (
    "kind", ">recipes", ">items", ">tensors", ">on disk", ">overhead", ">damaged", ">duplicates", ">uncommitted",
    ">segments", ">small",
)  # fmt: skip
FAULTS = ">damaged", ">unusable", ">duplicates", ">uncommitted", ">small", ">put together", ">half-removed"
"""Columns that are shown where there is something of the kind."""

Part = str | Table


def stores(found: dict[Path, list[Held]]) -> Iterator[Part]:
    """What each store holds, by recipe."""
    for store, all_held in found.items():
        if not all_held:
            yield f"{store}: nothing is stored here yet"
            continue
        if len(found) > 1:
            yield heading(f"{store}:")
        yield Table(HELD, map(_held, all_held), hides=FAULTS)
        yield from (bad(each.problem) for each in all_held if each.problem)


def _held(held: Held) -> tuple[str, ...]:
    faults = _fault(held.num_damaged), _fault(held.num_unusable), f"{held.num_uncommitted:,}"
    what = " x ".join(map(str, held.shape)) or "-", held.dtype or "-", local_time(held.last_written_ns)
    name = f"{held.kind}-{short_id(held.id)}"
    return name, f"{held.num_items:,}", human_bytes(held.disk_bytes), *faults, *what


def items(entries: Entries, rows: list[Row]) -> Iterator[Part]:
    """A recipe, and all that is stored of it."""
    yield heading(f"{entries.path.name}:")
    for key, value in flat(entries.recipe):
        yield f"  {key} = {json.dumps(value, ensure_ascii=False)}"
    yield Table(ITEMS, map(_item, rows), hides=ITEMS) if rows else "nothing is stored of it"


def _item(row: Row) -> tuple[str, ...]:
    state = bad(row.state) if row.state == "damaged" else quiet(row.state)
    return row.item, row.name, state, row.segment if row.state else ""


def stats(found: list[dict]) -> Iterator[Part]:
    """The totals of each store."""
    for each in found:
        nothing = "" if each["kinds"] else "nothing is stored here yet; "
        free, facts = human_bytes(each["free_bytes"]), human_bytes(each["facts_bytes"])
        yield f"{each['store']}: {nothing}{free} free on its disk; facts.sqlite takes {facts}"
        if each["kinds"]:
            rows = [_total(kind, total) for kind, total in sorted(each["kinds"].items())]
            yield Table(TOTALS, rows, hides=FAULTS)


def _total(kind: str, total: dict) -> tuple:
    overhead = 1 - total["tensor_bytes"] / total["disk_bytes"] if total["disk_bytes"] else 0
    sizes = human_bytes(total["tensor_bytes"]), human_bytes(total["disk_bytes"]), f"{max(overhead, 0):.1%}"
    names = "num_duplicates", "num_uncommitted", "num_segments", "num_small_segments"
    numbers = _fault(total["num_damaged"]), *(f"{total[name]:,}" for name in names)
    return kind, total["num_recipes"], f"{total['num_items']:,}", *sizes, *numbers


def _fault(number: int) -> str:
    return bad(f"{number:,}") if number else "0"


def progress(report: Report) -> str:
    """What a verification has seen so far, beside its segments."""
    return f"{human_bytes(report.num_bytes)} read, {len(report.damaged):,} damaged"


def report(store: Path, found: Report) -> Iterator[str]:
    """What a verification found; the last line is the verdict."""
    for each in found.damaged:
        name = f" ({printable(each.name)})" if each.name else ""
        yield bad(f"damaged: {each.folder} item {each.item}{name} in {each.store}, segment {each.segment}")
    for fault in [*found.faults, *found.leftovers]:
        mend = "; mended" if fault.is_mended else f"; --repair {fault.mend}" if fault.mend else ""
        yield f"{printable(fault.path)}: {fault.what}{mend}"
    for folder in found.unnoted:
        yield f"{printable(folder)}: what is noted of its damage cannot be changed; a run finds it when it reads it"
    if found.num_superseded:
        yield f"{count(found.num_superseded, 'damaged entry', 'damaged entries')}: encoded again since, nothing is lost"
    read = f"{count(found.num_segments, 'segment')}, {count(found.num_rows, 'entry', 'entries')}"
    mark = good if found.is_sound else bad
    yield mark(f"{store}: {read}, {human_bytes(found.num_bytes)} read: {_verdict(found)}")


def _verdict(found: Report) -> str:
    parts = []
    if found.damaged:
        entries = count(len(found.damaged), "entry is", "entries are")
        parts.append(f"{entries} damaged; the next run that needs them encodes them again")
    if found.faults:
        num_mended = sum(each.is_mended for each in found.faults)
        parts.append(f"{count(len(found.faults), 'file is', 'files are')} not as it should be, {num_mended} mended")
    return "; ".join(parts) or "all sound"


def why(answers: Iterable[Answer], limit: int | None) -> Iterator[str]:
    """How many entries each stage has, and why the others are missing. limit: examples of each reason, None for all."""
    for answer in answers:
        mark = warning if answer.num_missing else good
        yield mark(f"{answer.stage} ({_short(answer.folder)}): {_presence(answer)}")
        for reason in answer.reasons:
            number = f"{len(reason.items):,} " if reason.items else ""
            yield f"  {number}{reason.text}:"
            yield from (f"    {difference.text}" for difference in reason.differences)
            yield from (f"    {missing.text}" for missing in reason.items[:limit])
            if limit and len(reason.items) > limit:
                yield f"    and {len(reason.items) - limit:,} more (--all names them)"


def _short(folder: str) -> str:
    kind = kind_of(folder)
    return f"{kind}-{short_id(folder[len(kind) + 1 :])}"


def _presence(answer: Answer) -> str:
    num_there = answer.wanted - answer.num_missing
    by_store = ", ".join(f"{num:,} from {store}" for store, num in answer.present.items())
    where = f" ({by_store})" if len(answer.present) > 1 and num_there else ""
    if not answer.num_missing:
        return f"all {answer.wanted:,} are there{where}"
    return f"{num_there:,} of {answer.wanted:,} are there{where}, {answer.num_missing:,} missing"


def diff(pairs: Iterable[Pair]) -> Iterator[str]:
    """How two sides differ, by kind."""
    for pair in pairs:
        yield heading(f"{pair.kind}: {_recipes(pair)}")
        yield from (f"  {each.text}" for each in pair.differences)
        only_in_a, only_in_b = f"{len(pair.only_in_a):,}", f"{len(pair.only_in_b):,}"
        yield f"  {count(len(pair.in_both), 'item')} in both, {only_in_a} only in A, {only_in_b} only in B"


def _recipes(pair: Pair) -> str:
    a, b = (short_id(each) if each else "" for each in pair.ids)
    if not (a and b):
        return f"only in {'A' if a else 'B'} ({a or b})"
    return f"the same recipe ({a})" if a == b else f"other recipes ({a} -> {b})"


def exported(found: dict) -> Iterator[str]:
    """Which file was written, with how much in it."""
    what = f"{count(found['num_tensors'], 'tensor')} of {found['kind']}"
    yield f"{found['path']}: {what}, {human_bytes(found['num_bytes'])}"


def kept(found: list[Kept], several: list[Garbage]) -> Iterator[Part]:
    """For whom the collector keeps what it keeps, and what stays though nobody needs it."""
    rows = [
        (each.name, f"{each.items:,}", human_bytes(each.num_bytes), human_bytes(each.alone_bytes)) for each in found
    ]
    yield Table(KEPT, rows)
    reasons = (("young", "too young to go"), ("in_use", "beside what running stages need"), ("left", "too few to move"))
    numbers = [(sum(getattr(each, name) for each in several), words) for name, words in reasons]
    if also := "; ".join(f"{number:,} {words}" for number, words in numbers if number):
        yield f"kept for now, though nobody needs them: {also}"


def garbage(store: Path, found: list[Garbage], is_removed: bool) -> Iterator[Part]:
    """What the collector removes, or has removed."""
    found = [each for each in found if each]
    if not found:
        yield f"{store}: there is nothing to remove"
        return
    yield Table(GARBAGE, map(_garbage, found), hides=FAULTS)
    items, freed = sum(each.items for each in found), human_bytes(sum(each.freed_bytes for each in found))
    done = "removed" if is_removed else "would be removed; nothing is yet: add --yes"
    yield f"{store}: {count(items, 'entry', 'entries')}, {freed}, {done}"


def _garbage(each: Garbage) -> tuple:
    folder, _, recipe = each.entries.path.name.rpartition("-")
    numbers = len(each.removed), len(each.rewritten), len(each.broken)
    return f"{folder}-{short_id(recipe)}", f"{each.items:,}", human_bytes(each.freed_bytes), *numbers
