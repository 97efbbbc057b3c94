"""What will happen to photos and captions that nobody may expect: cut, enlarged, cropped, repeated.  None is an error.

From the index alone: nothing is opened or decoded, so that a million photos take seconds.
"""

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.data import variants
from pipeline.data.buckets import CENTRE, crop_box
from pipeline.data.indexing import IndexedPhoto
from pipeline.settings.fields import Data

MOST_NAMED = 100
"""Photos that a finding names; it counts all of them."""

CROPPED = 0.5
"""Share of a photo: more than that is worth a word where it is cut off."""

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
"""Characters that nobody sees; a tab and all line breaks are not among them."""

LINE_BREAKS = re.compile(r"[\n\r\v\f\x85\u2028\u2029]+")
SHORT_QUOTE = 40


class Worst(NamedTuple):
    """A photo, and what is the matter with it, in a few words."""

    name: str
    what: str


@dataclass(frozen=True)
class Finding:
    """kind: its name for programs.  count: of photos.  worst: the worst first, at most `MOST_NAMED`; advice: a line."""

    kind: str
    title: str
    count: int
    worst: tuple[Worst, ...]
    advice: str


class Cut(NamedTuple):
    """What a text encoder leaves out.  tokens: of each caption that has more than ``limit``, how many.

    is_limit_set: whether [data] max_sequence_length is the limit.
    joins_lines: whether the tokenizer, unlike most, does not take a line break for a space.
    """

    encoder: str
    limit: int
    is_limit_set: bool
    tokens: Mapping[str, int]
    joins_lines: bool


def findings(photos: Sequence[IndexedPhoto], settings: Data, cuts: Iterable[Cut] = ()) -> list[Finding]:
    """All that is found; a kind of which there is nothing is left out.

    cuts: as `caption_lengths.cuts` counts them; none where the model is not here yet.
    """
    cuts = list(cuts)
    several = [*_sizes(photos, settings), _twins(photos), _ignored(photos)]
    several += [] if settings.prompt.strip() else [_repeated(photos)]
    several += [_controls(photos), _lines(photos, cuts), _blank(photos)]
    return cut_captions(photos, cuts) + [finding for finding in several if finding.count]


def cut_captions(photos: Sequence[IndexedPhoto], cuts: Iterable[Cut]) -> list[Finding]:
    """Those of the `findings` that the tokenizers tell."""
    return [_cut(photos, cut) for cut in cuts if cut.tokens]


def _worst(rows: Iterable[tuple[float, str, Any]], what: Callable[[Any], str]) -> tuple[Worst, ...]:
    """rows: how bad, of which photo, and what its words are made of, which are made for the worst alone."""
    worst = heapq.nsmallest(MOST_NAMED, rows, key=lambda row: (-row[0], row[1]))
    return tuple(Worst(name, what(about)) for _, name, about in worst)


def _cut(photos: Sequence[IndexedPhoto], cut: Cut) -> Finding:
    found = [photo for photo in photos if photo.caption in cut.tokens]
    rows = ((cut.tokens[photo.caption], photo.name, cut.tokens[photo.caption]) for photo in found)
    worst = _worst(rows, lambda tokens: f"{cut.limit} of {tokens} tokens used")
    advice = f"{cut.encoder} never reads more than {cut.limit} tokens; say first what matters most"
    if cut.is_limit_set:
        advice = "shorten them, or raise [data] max_sequence_length as far as the model allows"
    return Finding(f"cut-by-{cut.encoder.lower()}", f"captions cut by {cut.encoder}", len(found), worst, advice)


# --- pictures -----------------------------------------------------------------------------------------------------


def _sizes(photos: Sequence[IndexedPhoto], settings: Data) -> Iterator[Finding]:
    """Photos of few different sizes, as cameras make them, are looked at once for each size."""
    of = variants.sizes_of(settings)
    first = {(photo.width, photo.height): photo for photo in photos}
    changes = {size: _change(photo, of(photo)) for size, photo in first.items()}
    enlarged = {size: factor for size, (factor, _) in changes.items() if factor > 1}
    cropped = {size: lost for size, (_, lost) in changes.items() if lost > CROPPED}
    yield _by_size(
        photos,
        enlarged,
        lambda found: f"{found[2]:.2g} x, from {found[0]} x {found[1]} px",
        ("enlarged", "photos enlarged", "use larger files, or lower [data] resolution"),
    )
    advice = "crop them yourself" if settings.buckets else "set [data] buckets = true, or crop them yourself"
    yield _by_size(
        photos,
        cropped,
        lambda found: f"{found[2]:.0%} of {found[0]} x {found[1]} px",
        ("cropped", "more than half cut off", advice),
    )


def _change(photo: IndexedPhoto, sizes: Iterable[variants.Size]) -> tuple[float, float]:
    """By how much a photo is enlarged at most, and the largest share of it that is cut off, over all its sizes."""
    factors, lost = [], []
    for width, height in sizes:
        left, top, right, bottom = crop_box(photo.digest, photo.width, photo.height, width, height, CENTRE)
        factors.append(max(width / photo.width, height / photo.height))
        lost.append(1 - (right - left) * (bottom - top) / (photo.width * photo.height))
    return max(factors), max(lost)


def _by_size(photos: Sequence[IndexedPhoto], found: Mapping, what: Callable, words: tuple[str, str, str]) -> Finding:
    kind, title, advice = words
    those = [photo for photo in photos if (photo.width, photo.height) in found] if found else []
    values = (found[photo.width, photo.height] for photo in those)
    rows = ((value, photo.name, (photo.width, photo.height, value)) for photo, value in zip(those, values))
    return Finding(kind, title, len(those), _worst(rows, what), advice)


def _twins(photos: Sequence[IndexedPhoto]) -> Finding:
    """Several files of the same bytes."""
    counts = Counter(photo.digest for photo in photos)
    names: dict[str, list[str]] = {digest: [] for digest, count in counts.items() if count > 1}
    for photo in photos if names else ():
        if photo.digest in names:
            names[photo.digest].append(photo.name)
    groups = [sorted(group) for group in names.values()]
    worst = _worst(((len(group), group[0], group) for group in groups), _same_as)
    count = sum(map(len, groups))
    return Finding("twice", "photos more than once", count, worst, "delete all but one, or train with [data] repeats")


def _same_as(group) -> str:
    more = f" and {len(group) - 2:,} more" if len(group) > 2 else ""
    return f"same as {group[1]}{more}"


def _ignored(photos: Sequence[IndexedPhoto]) -> Finding:
    found = [photo for photo in photos if photo.ignored]
    worst = _worst(((1, photo.name, photo.ignored) for photo in found), str)
    advice = "save them as sRGB in a photo editor if their colours are wrong without the profile"
    return Finding("profile-ignored", "colour profiles ignored", len(found), worst, advice)


# --- captions -----------------------------------------------------------------------------------------------------


def _repeated(photos: Sequence[IndexedPhoto]) -> Finding:
    """Captions of several photos that are not the same photo."""
    counts = Counter(photo.caption for photo in photos)
    first: dict[str, IndexedPhoto] = {}
    differ = set()
    for photo in photos:
        if counts[photo.caption] > 1 and first.setdefault(photo.caption, photo).digest != photo.digest:
            differ.add(photo.caption)
    rows = ((counts[caption], first[caption].name, (counts[caption], caption)) for caption in differ)
    worst = _worst(rows, lambda found: f"{found[0]:,} photos: {_quoted(found[1])}")
    count, advice = sum(counts[caption] for caption in differ), "say what tells the photos apart, unless that is meant"
    return Finding("caption-repeated", "captions more than once", count, worst, advice)


def _quoted(text: str) -> str:
    return f'"{text if len(text) <= SHORT_QUOTE else text[: SHORT_QUOTE - 3] + "..."}"'


def _controls(photos: Sequence[IndexedPhoto]) -> Finding:
    found = [photo for photo in photos if not photo.caption.isprintable() and CONTROL.search(photo.caption)]
    rows = ((len(CONTROL.findall(photo.caption)), photo.name, photo.caption) for photo in found)
    worst = _worst(rows, lambda caption: ", ".join(map(_code, dict.fromkeys(CONTROL.findall(caption)))))
    advice = "take them out: tokenizers make words of them that no model has learnt"
    return Finding("control-characters", "control characters", len(found), worst, advice)


def _code(character: str) -> str:
    return "NUL" if character == "\0" else f"U+{ord(character):04X}"


def _lines(photos: Sequence[IndexedPhoto], cuts: Sequence[Cut]) -> Finding:
    found = [photo for photo in photos if not photo.caption.isprintable() and LINE_BREAKS.search(photo.caption)]
    rows = ((len(LINE_BREAKS.findall(photo.caption)), photo.name, photo.caption) for photo in found)
    worst = _worst(rows, lambda caption: f"{len(LINE_BREAKS.findall(caption)) + 1} lines")
    advice = "all lines of a file are one caption"
    if joining := [cut.encoder for cut in cuts if cut.joins_lines]:
        advice += f"; {' and '.join(joining)}'s tokenizer does not take a line break for a space, so put spaces there"
    return Finding("several-lines", "several lines", len(found), worst, advice)


def _blank(photos: Sequence[IndexedPhoto]) -> Finding:
    """A caption that is empty, or white space alone, is an error before; this one only looks empty."""
    found = [photo for photo in photos if not any(map(_is_seen, photo.caption))]
    worst = _worst(((1, photo.name, photo.caption) for photo in found), lambda caption: ascii(caption)[1:-1])
    return Finding("blank", "blank captions", len(found), worst, "write a caption: nothing in it can be seen")


def _is_seen(character: str) -> bool:
    return character.isprintable() and not character.isspace()
