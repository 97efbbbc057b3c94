"""Drawn pictures with captions that are right by construction: data for a demo or a test, from a seed alone."""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from pipeline.errors import UserError

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 70), "blue": (40, 80, 210), "yellow": (245, 215, 60),
    "orange": (240, 140, 30), "purple": (130, 60, 170), "black": (20, 20, 20), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
NEW_SHAPES = ("cross", "ring", "star")
"""Shapes that the embedded model has never seen: something to teach it."""

MADE_UP = {"cross": "blicket", "ring": "dax", "star": "wug"}
"""A word that the embedded model does not know, for each new shape."""

TRAINING, UNSEEN = 1, 2
"""Seeds of the streams of pictures that the embedded model was trained on, and that it is measured on."""

WORDINGS = (
    "{a_colour} {shape} on {a_background} background",
    "a picture of {a_colour} {shape} on {a_background} background",
    "one {shape} in {colour}, drawn on {background}",
    "{a_background} background with {a_colour} {shape}",
)
MORE_WORDINGS = (
    *WORDINGS,
    "{a_colour} {shape} on {background}",
    "on {a_background} background, {a_colour} {shape}",
    "a drawing of {a_colour} {shape}, the background is {background}",
    "the {shape} is {colour} and the background is {background}",
)
"""What the embedded model was trained on."""

SUPERSAMPLING = 4  # each pixel is the mean of 4 x 4 drawn ones, which smooths the edges
CROSS_ARM = 0.32  # half the width of the cross's bars, of its radius
RING_HOLE = 0.55
STAR_WAIST = 0.45
UP = -math.pi / 2  # as an angle; y grows downwards


@dataclass(frozen=True)
class Picture:
    """One shape on a plain background: what is drawn, and what is said of it.

    word: what the caption calls the shape.  centre: (x, y), in pixels from the top left corner.  radius, size: in
    pixels.
    """

    shape: str
    word: str
    colour: str
    background: str
    centre: tuple[float, float]
    radius: float
    size: int
    caption: str

    def image(self) -> Image.Image:
        return draw(self.shape, self.colour, self.background, self.centre, self.radius, self.size)

    def outline(self) -> Image.Image:
        return outline(self.shape, self.centre, self.radius, self.size)


def picture(
    seed: int, index: int, size: int, words: Mapping[str, str] | None = None, wordings: tuple = MORE_WORDINGS
) -> Picture:
    """Picture number ``index`` of an endless stream; it depends on the arguments only.

    words: the shapes to choose from, and what captions call them; by default `SHAPES` under their own names.
    seed, index: 0 or more.
    """
    words = words or {shape: shape for shape in SHAPES}
    random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    shape = list(words)[random.integers(len(words))]
    colour, background = (str(name) for name in random.permutation(list(COLOURS))[:2])
    radius = size * random.uniform(0.18, 0.4)
    centre = tuple(random.uniform(radius, size - radius, 2).tolist())
    caption = say(wordings[random.integers(len(wordings))], words[shape], colour, background)
    return Picture(shape, words[shape], colour, background, centre, radius, size, caption)


def say(wording: str, word: str, colour: str, background: str) -> str:
    """The caption: one of the wordings, with its words and their articles filled in."""
    names = {"shape": word, "colour": colour, "background": background}
    return wording.format(**names, a_colour=_article(colour), a_background=_article(background))


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# --- drawing ------------------------------------------------------------------------------------------------------


def draw(
    shape: str, colour: str, background: str, centre: tuple[float, float], radius: float, size: int
) -> Image.Image:
    """Draw one shape on a plain background, as an RGB image of ``size`` x ``size`` pixels with smooth edges.

    centre: (x, y) in pixels from the top left corner.  radius: in pixels; of the circle, and of the circle through the
    outermost corners of the others.  Raises KeyError for a colour, ValueError for a shape that has no name here.
    """
    canvas = Image.new("RGB", (SUPERSAMPLING * size, SUPERSAMPLING * size), COLOURS[background])
    canvas.paste(COLOURS[colour], mask=_mask(shape, centre, radius, size))
    return canvas.resize((size, size), Image.Resampling.BOX)


def silhouette(shape: str, centre: tuple[float, float], radius: float, size: int) -> np.ndarray:
    """How much of each pixel the shape covers: (size, size), float32 in [0, 1]."""
    mask = _mask(shape, centre, radius, size).resize((size, size), Image.Resampling.BOX)
    return np.asarray(mask, np.float32) / 255


def outline(shape: str, centre: tuple[float, float], radius: float, size: int) -> Image.Image:
    """The same shape as `draw` has it, as a white line on black that runs along the inside of its edge, RGB."""
    mask = _mask(shape, centre, radius, size)
    line = Image.new("L", mask.size)
    width = 2 * SUPERSAMPLING * max(1, round(size / 32))  # half of it lies outside and is cut off
    for corners in _contours(shape, centre, radius):
        ImageDraw.Draw(line).line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
    return ImageChops.multiply(line, mask).resize((size, size), Image.Resampling.BOX).convert("RGB")


def _mask(shape: str, centre: tuple[float, float], radius: float, size: int) -> Image.Image:
    """The shape in white on black, supersampled."""
    mask = Image.new("L", (SUPERSAMPLING * size, SUPERSAMPLING * size))
    pen = ImageDraw.Draw(mask)
    x, y, r = (SUPERSAMPLING * value for value in (*centre, radius))
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        hole = RING_HOLE * r if shape == "ring" else 0
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0 if hole else 255)
    elif shape == "square":
        half = r / 2**0.5
        pen.rectangle((x - half, y - half, x + half, y + half), fill=255)
    else:
        pen.polygon(_contours(shape, centre, radius)[0], fill=255)
    return mask


def _contours(shape: str, centre: tuple[float, float], radius: float) -> list[list[tuple[float, float]]]:
    """The corners of the shape's edge, and of its hole's if it has one, supersampled."""
    contours = {
        "circle": [_around(96, 1)],
        "square": [_around(4, 1, start=-math.pi / 4)],
        "triangle": [_around(3, 1, start=UP)],
        "cross": [_cross()],
        "ring": [_around(96, 1), _around(96, RING_HOLE)],
        "star": [_star()],
    }
    if shape not in contours:
        raise ValueError(f"shape {shape!r}: expected one of {', '.join((*SHAPES, *NEW_SHAPES))}")
    (x, y), scale = centre, SUPERSAMPLING
    return [[(scale * (x + radius * dx), scale * (y + radius * dy)) for dx, dy in each] for each in contours[shape]]


def _around(count: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
    angles = [start + 2 * math.pi * i / count for i in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _cross() -> list[tuple[float, float]]:
    """The twelve corners of a plus sign, the outer ones on the unit circle."""
    a, b = CROSS_ARM, (1 - CROSS_ARM**2) ** 0.5
    return [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a), (-a, -b)]


def _star() -> list[tuple[float, float]]:
    """Five points on the unit circle, the first one up, and the corners between them."""
    outer, inner = _around(5, 1, UP), _around(5, STAR_WAIST, UP + math.pi / 5)
    return [corner for pair in zip(outer, inner) for corner in pair]


# --- folders -------------------------------------------------------------------------------------------------------


def draw_shapes(folder: Path, count: int = 5, size: int = 256, seed: int = 0) -> Path:
    """Write ``count`` PNGs and their metadata.jsonl to the new folder ``folder``, and return it.

    Picture number i depends on (seed, i, size) only, so that more pictures never change the first ones.  The folder
    appears complete or not at all.  seed: 0 or more.  Raises UserError where the folder exists and is not empty.
    """
    return _write(folder, (picture(seed, index, size, wordings=WORDINGS) for index in range(count)))


def draw_teaching(folder: Path, shape: str, count: int = 20, size: int = 64, seed: int = 0, reminders: int = 0) -> Path:
    """Like `draw_shapes`, of one new shape under its made-up word: what a LoRA can learn the word from.

    The new shape is large and in the middle.  reminders: pictures of the known shapes in turn besides, a simpler remedy
    than ``[prior]`` against their words coming to mean the new one too; other ones for another ``count``.
    """
    words = {shape: MADE_UP[shape]}
    new = [_in_the_middle(picture(seed, index, size, words)) for index in range(count)]
    known = [SHAPES[index % len(SHAPES)] for index in range(reminders)]
    return _write(folder, new + [picture(seed, count + at, size, {each: each}) for at, each in enumerate(known)])


def _in_the_middle(each: Picture) -> Picture:
    return dataclasses.replace(each, centre=(each.size / 2, each.size / 2), radius=0.37 * each.size)


def draw_pairs(
    folder: Path, count: int = 200, size: int = 64, seed: int = 0, words: Mapping[str, str] | None = None
) -> Path:
    """Like `draw_shapes`, with each picture's outline as its condition: what a ControlNet can learn from.

    In the manner of fill50k, the example set of the first ControlNets (https://github.com/lllyasviel/ControlNet).
    words: as of `picture`.
    """
    return _write(folder, (picture(seed, index, size, words) for index in range(count)), with_outlines=True)


def _write(folder: Path, pictures: Iterable[Picture], with_outlines: bool = False) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; delete it, or choose another folder for the drawn pictures")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_files(partial, pictures, with_outlines)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_files(folder: Path, pictures: Iterable[Picture], with_outlines: bool) -> None:
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index, each in enumerate(pictures):
            row = {"file_name": f"{index:05d}.png", "text": each.caption}
            each.image().save(folder / row["file_name"])
            if with_outlines:
                row["conditioning_image"] = f"conditioning/{index:05d}.png"
                (folder / "conditioning").mkdir(exist_ok=True)
                each.outline().save(folder / row["conditioning_image"])
            metadata.write(json.dumps(row) + "\n")
