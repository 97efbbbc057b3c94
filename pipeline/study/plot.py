"""A study of two precisions as one picture: how the items' errors are spread, and the image that differs most."""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cache import write_atomically
from cache.core.files import make_folder
from pipeline.study.figures import Component
from pipeline.study.report import short
from pipeline.study.study import Study, WorstImage
from pipeline.study.subject import AGAINST, COMPONENTS, IMAGE_ENCODER, OWN

MARGIN, HEAD = 24, 72
PANEL = 590, 270
"""Width and height of a component's histogram with its title and axes; there are two by two."""

TILE, TILE_HEAD = 384, 56
"""An image's longer side, and the room above it for what it is."""

WIDTH = 3 * MARGIN + 2 * PANEL[0]
INK, FAINT, BAR, PAPER = (30, 30, 30), (200, 200, 200), (70, 110, 180), (255, 255, 255)
BINS_A_DECADE = 12


def save(study: Study, path: Path) -> None:
    """Write the picture as PNG; its folder is made where it is not there."""
    content = io.BytesIO()
    draw(study).save(content, "PNG")
    make_folder(Path(path).resolve().parent)
    write_atomically(path, content.getvalue())


def draw(study: Study) -> Image.Image:
    """WIDTH wide; as high as its parts: the images are there only where two were decoded."""
    report, top = study.report, HEAD + 2 * (PANEL[1] + MARGIN)
    images = 0 if study.worst_image is None else TILE_HEAD + _tile(study.worst_image[1]).height + MARGIN
    canvas = Image.new("RGB", (WIDTH, top + images), PAPER)
    pen, presets = ImageDraw.Draw(canvas), report["presets"]
    title = f"{report['experiment']} on {report['device']}: {presets[OWN]} beside {presets[AGAINST]}, the reference"
    _text(pen, (MARGIN, 14), title, 20)
    _text(pen, (MARGIN, 42), "relative error of each item: L2 norm of the difference over that of the reference", 14)
    limits = _limits(report["components"])
    for place, name in enumerate(COMPONENTS):
        corner = MARGIN + place % 2 * (PANEL[0] + MARGIN), HEAD + place // 2 * (PANEL[1] + MARGIN)
        _panel(pen, corner, name, report["components"][name], limits)
    if study.worst_image is not None:
        _images(canvas, pen, top, report["components"][IMAGE_ENCODER]["policies"], study.worst_image)
    return canvas


def _errors(row: Component) -> np.ndarray:
    """log10 of the errors that have one."""
    errors = [item["relative_error"] for item in row.get("by_item", ())]
    return np.log10([error for error in errors if math.isfinite(error) and error > 0])


def _limits(rows: Mapping[str, Component]) -> tuple[int, int]:
    """The decades that hold all components' errors, so that one axis serves them all."""
    known = np.concatenate([_errors(row) for row in rows.values()])
    if not len(known):
        return -4, -2
    low, high = math.floor(known.min()), math.ceil(known.max())
    return low, max(high, low + 1)


def _panel(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], name: str, row: Component, limits: tuple[int, int]
) -> None:
    """A component's histogram, its axes labelled."""
    (left, top), (width, height) = corner, PANEL
    errors, items = _errors(row), len(row.get("by_item", ()))
    _text(pen, (left, top), f"{name}, {row['compared']}: {row['policies'][OWN]} beside {row['policies'][AGAINST]}", 15)
    x0, x1, y0, y1 = left + 40, left + width - 20, top + 48, top + height - 46
    if len(errors):
        _axis(pen, (x0, x1, y0, y1), limits)
        _bars(pen, (x0, x1, y0, y1), errors, limits)
    else:
        found = "same policy" if row["same_policy"] else "nothing to compare"
        _text(pen, ((x0 + x1) // 2, (y0 + y1) // 2), found, 16, "mm")
    if items > len(errors):
        equal = sum(item["relative_error"] == 0 for item in row["by_item"])
        others = {"equal": equal, "not finite": items - len(errors) - equal}
        text = ", ".join(f"{count} {what}" for what, count in others.items() if count)
        _text(pen, (left, top + 22), f"of {items} items not drawn: {text}", 13)


def _axis(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], limits: tuple[int, int]) -> None:
    x0, x1, y0, y1 = box
    low, high = limits
    for decade in range(low, high + 1):
        x = x0 + (x1 - x0) * (decade - low) / (high - low)
        pen.line([(x, y0), (x, y1 + 5)], FAINT)
        _text(pen, (x, y1 + 7), f"1e{decade}", 13, "ma")
        for tick in range(2, 10) if decade < high else ():
            x = x0 + (x1 - x0) * (decade + math.log10(tick) - low) / (high - low)
            pen.line([(x, y1), (x, y1 + 3)], INK)
    pen.line([(x0, y1), (x1, y1)], INK)
    _text(pen, ((x0 + x1) // 2, y1 + 26), "relative error (log scale)", 13, "ma")


def _bars(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], errors: np.ndarray, limits: tuple[int, int]
) -> None:
    """Bars of so many items each, and what the highest counts."""
    x0, x1, y0, y1 = box
    low, high = limits
    counts, edges = np.histogram(errors, bins=(high - low) * BINS_A_DECADE, range=limits)
    across = x0 + (x1 - x0) * (edges - low) / (high - low)
    for count, begin, end in zip(counts, across, across[1:]):
        if count:
            pen.rectangle([begin + 1, y1 - (y1 - y0) * count / counts.max(), end - 1, y1], BAR)
    pen.line([(x0 - 4, y0), (x0, y0)], INK)
    _text(pen, (x0 - 8, y0), str(counts.max()), 13, "rm")
    _text(pen, (x0 - 8, y1), "0", 13, "rm")
    _text(pen, (x0 - 8, (y0 + y1) // 2), "items", 13, "rm")


def _images(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, top: int, policies: dict[str, str], worst: WorstImage
) -> None:
    """The image that differs most, decoded from both posteriors, and the difference."""
    row, reference, own = worst
    factor = amplification(own - reference)
    tiles = {
        f"encoded in {policies[AGAINST]}, the reference": reference,
        f"encoded in {policies[OWN]}, PSNR {row['psnr_db']:.1f} dB": own,
        f"the difference x {factor:,}; grey is none": 128 + factor * (own - reference),
    }
    _text(pen, (MARGIN, top), f"largest difference after decoding: {short(row['item'], 90)}", 15)
    for place, (text, pixels) in enumerate(tiles.items()):
        left = MARGIN + place * (WIDTH - 2 * MARGIN - TILE) // 2
        _text(pen, (left, top + 28), text, 14)
        canvas.paste(_tile(pixels), (left, top + TILE_HEAD))


def amplification(difference: np.ndarray) -> int:
    """The largest of 1, 2, 5, 10, 20, ... that keeps the difference within 127 of grey."""
    largest = float(np.abs(difference).max())
    steps = [step * 10**power for power in range(8) for step in (1, 2, 5)]
    return max([step for step in steps if step * largest <= 127], default=1)


def _tile(pixels: np.ndarray) -> Image.Image:
    """Scaled to TILE; where that is larger, each pixel stays a square."""
    image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0))
    scale = TILE / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _text(pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, anchor: str = "la") -> None:
    pen.text(place, text, INK, ImageFont.load_default(size), anchor)
