"""Filled circles on a plain background, and their outlines: a data set for a ControlNet, drawn from a seed alone.

In the manner of fill50k, the example set of the first ControlNets (https://github.com/lllyasviel/ControlNet).
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from pipeline.errors import UserError

SUPERSAMPLING = 4
LINE = 1 / 64
"""Width of an outline, of the picture's side."""

COLOURS = (
    "crimson", "coral", "gold", "olive", "lime", "teal", "turquoise", "navy", "indigo", "plum", "orchid", "salmon",
    "sienna", "khaki", "gray", "ivory",
)  # fmt: skip


def draw_circles(folder: Path, count: int, size: int = 128, seed: int = 0) -> Path:
    """Write ``count`` pairs and their metadata.jsonl to the new folder ``folder``, and return it.

    Pair number i, ``images/i.png`` and ``outlines/i.png``, depends on (seed, i, size) only.  The folder appears
    complete or not at all.  Raises UserError where it exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; delete it, or choose another folder for the drawn pictures")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        part = Path(temporary) / "pairs"
        for name in ("images", "outlines"):
            (part / name).mkdir(parents=True)
        rows = [_write_pair(part, index, size, seed) for index in range(count)]
        (part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        part.rename(folder)
    return folder


def _write_pair(folder: Path, index: int, size: int, seed: int) -> dict:
    random = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    colour, background = random.permutation(COLOURS)[:2]
    radius = size * random.uniform(0.12, 0.4)
    centre = random.uniform(radius, size - radius, 2)
    row = {
        "file_name": f"images/{index:05d}.png",
        "conditioning_image": f"outlines/{index:05d}.png",
        "text": f"{colour} circle with {background} background",
    }
    filled = {"fill": ImageColor.getrgb(colour)}
    outline = {"outline": (255, 255, 255), "width": round(size * LINE * SUPERSAMPLING)}
    _circle(size, centre, radius, ImageColor.getrgb(background), filled).save(folder / row["file_name"])
    _circle(size, centre, radius, (0, 0, 0), outline).save(folder / row["conditioning_image"])
    return row


def _circle(size: int, centre, radius: float, background: tuple, pen: dict) -> Image.Image:
    """A picture of ``size`` x ``size`` pixels with smooth edges.  centre, radius: in pixels, from the top left."""
    (x, y), r = SUPERSAMPLING * np.asarray(centre), SUPERSAMPLING * radius
    canvas = Image.new("RGB", (SUPERSAMPLING * size, SUPERSAMPLING * size), background)
    ImageDraw.Draw(canvas).ellipse((x - r, y - r, x + r, y + r), **pen)
    return canvas.resize((size, size), Image.Resampling.BOX)
