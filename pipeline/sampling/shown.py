"""Pixels as files: single pictures, and all of a run's in one image."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cache import write_atomically
from pipeline.plan import pictures
from pipeline.plan.plan import Plan
from pipeline.sampling.grid import grid

MOST_STEPS = 8
"""In the image of all."""


def to_picture(pixels: np.ndarray) -> Image.Image:
    """(3, height, width) in [-1, 1], what is outside cut off, as an image of 8 bits."""
    scaled = np.clip(pixels.transpose(1, 2, 0) * 0.5 + 0.5, 0, 1) * 255
    return Image.fromarray(scaled.round().astype(np.uint8))


def write_png(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def picture_of_all(plan: Plan, rows: Sequence[dict], remark: str = "") -> Image.Image:
    """The pictures that rows of samples.json name, side by side; of many steps some, the last one among them.

    remark: what stands behind what each of them is.
    """
    several = [pictures.in_order(_with_few_steps(row), plan.method.label) for row in rows]
    columns = []
    for row, files in zip(rows, several):
        text = f"seed {row['seed']}: {row['prompt']}"
        columns.append((text, [Image.open(plan.run.path / name) for name in files.values()]))
    return grid([f"{name}{remark}" for name in several[0]], columns)


def _with_few_steps(row: dict) -> dict:
    steps = list(row.get(pictures.STEPS, {}).items())
    number = min(MOST_STEPS, len(steps))
    kept = [steps[(place + 1) * len(steps) // number - 1] for place in range(number)]
    return row | ({pictures.STEPS: dict(kept)} if steps else {})
