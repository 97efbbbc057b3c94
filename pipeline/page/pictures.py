"""Pictures inside a page, as data URIs of bounded size."""

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data.images import BadImage, read_image

SIDES = 512, 384, 256, 192, 128, 96
"""Longest sides, in pixels: the largest with which all pictures of a page keep to its budget is taken."""

BUDGET_BYTES = 9_000_000
"""Of some pictures of a page together, before they are spelled in base64, which takes a third more."""

QUALITY = 82
SMALL = 128
"""Pictures up to this size, in pixels, are kept without loss and shown with square pixels."""


@dataclass(frozen=True)
class Embedded:
    """A picture in a page.  width, height: its own, in pixels, of the file."""

    uri: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) <= SMALL


@dataclass(frozen=True)
class Unreadable:
    """What stands where a picture cannot be shown."""

    reason: str


Shown = Embedded | Unreadable


def embed(paths: Iterable[Path], budget_bytes: int = BUDGET_BYTES, largest: int = SIDES[0]) -> Mapping[Path, Shown]:
    """Each file as a picture of at most ``largest`` pixels, or less where all together would go beyond the budget."""
    several, sides = list(dict.fromkeys(paths)), [side for side in SIDES if side <= largest]
    while True:
        side, *smaller = sides
        found = {path: _encoded(path, side) for path in several}
        total = sum(len(each.content) for each in found.values() if isinstance(each, _Encoded))
        if total <= budget_bytes or not smaller:
            return {path: each if isinstance(each, Unreadable) else each.shown() for path, each in found.items()}
        fitting = side * (budget_bytes / total) ** 0.5
        sides = [other for other in smaller if other <= fitting] or smaller[-1:]


@dataclass(frozen=True)
class _Encoded:
    """A WebP file, and the width and height of the picture that it was made of."""

    content: bytes
    width: int
    height: int

    def shown(self) -> Embedded:
        return Embedded(uri_of(self.content), self.width, self.height)


def _encoded(path: Path, side: int) -> _Encoded | Unreadable:
    try:
        image = read_image(path)
    except BadImage as error:
        return Unreadable(str(error))
    return _Encoded(encoded(image, side), *image.size)


def embedded(image: Image.Image, side: int) -> Embedded:
    """A picture of at most ``side`` pixels, without loss."""
    return Embedded(uri_of(encoded(image, side, lossless=True)), *image.size)


def encoded(image: Image.Image, side: int, lossless: bool = False) -> bytes:
    """WebP of at most ``side`` pixels; small pictures without loss, so that every pixel can be seen."""
    lossless = lossless or max(image.size) <= SMALL
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=QUALITY, lossless=lossless, method=4)
    return content.getvalue()


def uri_of(webp: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(webp).decode()
