"""What a picture of one shape on a plain background shows, by plain image analysis: no model judges a model."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.synthetic.shapes import COLOURS, NEW_SHAPES, SHAPES, Picture, silhouette

NEAR = 90.0
"""A colour that lies further than this in RGB from all that have a name has none."""

CONTRAST = 45.0
"""Pixels nearer than this in RGB to the background belong to it."""

LIKENESS = 0.72
"""What overlaps less than this with every shape is none of them; a circle and a square of one area overlap by 0.83."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a picture shows; None for what has no name.

    mask: (height, width), bool, where the shape is.  likeness: its overlap with the ideal shape, in [0, 1].
    """

    colour: str | None
    background: str | None
    shape: str | None
    mask: np.ndarray
    likeness: float


def look(image: Image.Image) -> Seen:
    """Name the colours and the shape.  The picture is square; a little blur or noise does no harm."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    background = np.median(_border(pixels), axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    if np.count_nonzero(distance > CONTRAST) < 4:
        return Seen(None, name(background), None, np.zeros(distance.shape, bool), 0.0)
    colour = _colour_of_core(pixels, distance)
    cover = _cover(pixels, background, colour)
    shape, likeness = recognize(cover)
    return Seen(name(colour), name(background), shape, cover > 0.5, likeness)


def shares(images: Sequence[Image.Image], asked: Sequence[Picture]) -> dict[str, float]:
    """How often the colour, the background and the shape that were asked for are what is seen, each in [0, 1]."""
    pairs = [(look(image), picture) for image, picture in zip(images, asked, strict=True)]
    parts = "colour", "background", "shape"
    return {part: float(np.mean([getattr(s, part) == getattr(a, part) for s, a in pairs])) for part in parts}


def name(colour: np.ndarray) -> str | None:
    """The nearest of `COLOURS`, or None where none is near."""
    distances = {each: float(np.linalg.norm(colour - np.array(rgb))) for each, rgb in COLOURS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < NEAR else None


def recognize(cover: np.ndarray) -> tuple[str | None, float]:
    """The shape that overlaps most with ``cover``, at the same centre and of the same area, and by how much."""
    likeness = {shape: overlap(cover, _ideal(shape, cover)) for shape in (*SHAPES, *NEW_SHAPES)}
    best = max(likeness, key=likeness.__getitem__)
    return best if likeness[best] > LIKENESS else None, likeness[best]


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union; of masks, or of covers with values in [0, 1].  0 where both are empty."""
    union = np.maximum(one, other).sum(dtype=np.float64)
    return float(np.minimum(one, other).sum(dtype=np.float64) / union) if union else 0.0


def enclosed(outline: Image.Image) -> np.ndarray:
    """The condition image's outline, filled: (height, width), bool."""
    line = np.pad(np.asarray(outline.convert("L")) >= 128, 1)
    return ~_flooded(line, (0, 0))[1:-1, 1:-1]


def _border(pixels: np.ndarray) -> np.ndarray:
    """The pixels of the frame, two wide: (count, 3).  A shape touches it in a few places at most."""
    inside = np.zeros(pixels.shape[:2], bool)
    inside[2:-2, 2:-2] = True
    return pixels[~inside]


def _colour_of_core(pixels: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The shape's colour: of what differs most from the background, so that blurred edges do not count."""
    most = np.quantile(distance[distance > CONTRAST], 0.9)
    return np.median(pixels[distance > 0.8 * most], axis=0)


def _cover(pixels: np.ndarray, background: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How far each pixel is on the way from the background to the colour, of the largest connected part only."""
    way = colour - background
    cover = np.clip((pixels - background) @ way / (way @ way), 0, 1)
    return np.where(_grown(_largest_part(cover > 0.5)), cover, 0)


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest part whose pixels touch by their sides."""
    best, left = np.zeros_like(mask), mask
    while np.count_nonzero(left) > np.count_nonzero(best):
        down, across = np.argwhere(left)[0].tolist()
        part = _flooded(left, (across, down))
        best = max(best, part, key=np.count_nonzero)
        left = left & ~part
    return best


def _flooded(mask: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """What can be reached from ``start``, (x, y), without a change of value."""
    picture = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).copy()  # Pillow cannot write to NumPy's memory
    ImageDraw.floodfill(picture, start, 128)
    return np.asarray(picture) == 128


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and all that is one pixel away from it: the smooth edge."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def _ideal(shape: str, cover: np.ndarray) -> np.ndarray:
    """The shape as it would be drawn with the centre and the area of ``cover``."""
    size, area = len(cover), cover.sum(dtype=np.float64)
    down, across = ((cover.sum(axis) * (np.arange(size) + 0.5)).sum() / area for axis in (1, 0))
    return silhouette(shape, (across, down), (area / _unit_area(shape)) ** 0.5, size)


@functools.cache
def _unit_area(shape: str) -> float:
    """The area of the shape of radius 1."""
    return silhouette(shape, (64, 64), 60, 128).sum(dtype=np.float64) / 60**2
