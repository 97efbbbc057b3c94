"""Drawn pictures with captions that are right by construction: data for a demo or a test, from a seed alone."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.errors import UserError

COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 70), "blue": (40, 80, 210), "yellow": (245, 215, 60),
    "orange": (240, 140, 30), "purple": (130, 60, 170), "black": (20, 20, 20), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
WORDINGS = (
    "{a_colour} {shape} on {a_background} background",
    "a picture of {a_colour} {shape} on {a_background} background",
    "one {shape} in {colour}, drawn on {background}",
    "{a_background} background with {a_colour} {shape}",
)
SUPERSAMPLING = 4  # each pixel is the mean of 4 x 4 drawn ones, which smooths the edges


def draw(
    shape: str, colour: str, background: str, centre: tuple[float, float], radius: float, size: int
) -> Image.Image:
    """Draw one shape on a plain background, as an RGB image of ``size`` x ``size`` pixels with smooth edges.

    centre: (x, y) in pixels from the top left corner.  radius: in pixels; of the circle, and of the circle through the
    corners of the square and of the triangle.  Raises KeyError for a colour, ValueError for a shape that has no name
    here.
    """
    x, y, r = (SUPERSAMPLING * value for value in (*centre, radius))
    canvas = Image.new("RGB", (SUPERSAMPLING * size, SUPERSAMPLING * size), COLOURS[background])
    pen = ImageDraw.Draw(canvas)
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    elif shape == "square":
        half = r / 2**0.5
        pen.rectangle((x - half, y - half, x + half, y + half), fill=COLOURS[colour])
    elif shape == "triangle":
        across = r * 3**0.5 / 2
        pen.polygon([(x, y - r), (x - across, y + r / 2), (x + across, y + r / 2)], fill=COLOURS[colour])
    else:
        raise ValueError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}")
    return canvas.resize((size, size), Image.Resampling.BOX)


def draw_shapes(folder: Path, count: int = 5, size: int = 256, seed: int = 0) -> Path:
    """Write ``count`` PNGs and their metadata.jsonl to the new folder ``folder``, and return it.

    Picture number i depends on (seed, i, size) only, so that more pictures never change the first ones.  The folder
    appears complete or not at all.  seed: 0 or more.  Raises UserError where the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; delete it, or choose another folder for the drawn pictures")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(partial, count, size, seed)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(folder: Path, count: int, size: int, seed: int) -> None:
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index in range(count):
            picture, caption = _picture(seed, index, size)
            name = f"{index:05d}.png"
            picture.save(folder / name)
            metadata.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def _picture(seed: int, index: int, size: int) -> tuple[Image.Image, str]:
    random = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    shape = SHAPES[random.integers(len(SHAPES))]
    colour, background = random.permutation(list(COLOURS))[:2]
    radius = size * random.uniform(0.12, 0.4)
    centre = tuple(random.uniform(radius, size - radius, 2))
    wording = WORDINGS[random.integers(len(WORDINGS))]
    caption = wording.format(
        shape=shape, colour=colour, background=background, a_colour=_article(colour), a_background=_article(background)
    )
    return draw(shape, colour, background, centre, radius, size), caption


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
