"""A quick look at latents without the VAE: the colour of each position by a linear map, fitted on the run's own photos.

RUN/quick.json lists the looks as samples.json lists pictures, RUN/quick.png shows them side by side, until Sample has
decoded the pictures.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from cache import canonical, digest, load_json, write_atomically
from cache.core.files import make_folder
from pipeline import encode
from pipeline.data import indexing
from pipeline.plan import pictures
from pipeline.plan.pictures import LARGEST_SHOWN, Series
from pipeline.plan.plan import ImageNeed, Plan
from pipeline.plan.run_folder import RunFolder
from pipeline.plan.whole import is_whole
from pipeline.sampling.shown import picture_of_all, write_png

MOST_PHOTOS = 12
RIDGE = 1e-4
"""Added to the diagonal of the normal equations, as a share of its mean: a few flat photos leave them singular."""


def fitted(plan: Plan) -> np.ndarray:
    """(channels + 1, 3): from a position's final latents, and 1, to red, green and blue in [0, 1], by least squares."""
    need = plan.image_needs[-1]  # the largest
    places = range(0, len(need.items), -(-len(need.items) // MOST_PHOTOS))
    seen = [seen_in(plan, need, place) for place in places]
    latents, colours = (np.concatenate(each) for each in zip(*seen))
    product = latents.T @ latents
    return np.linalg.solve(product + RIDGE * product.trace() / len(product) * np.eye(len(product)), latents.T @ colours)


def seen_in(plan: Plan, need: ImageNeed, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a photo: the latents of each position, and 1; and the mean colour of its part of the picture."""
    family, posterior = plan.family, need.entries.read(need.items[place])
    _, height, width = posterior.shape
    tokens = family.packed(posterior[None].astype(np.float32), None, plan.config(family.image_encoder))
    picture = encode.photo_in(need.photos[place], need.variant, indexing.read_photo)
    small = picture.convert("RGB").resize((width, height), Image.Resampling.BOX)
    return _positions(family.unpack(tokens, height, width)[0]), np.asarray(small, np.float64).reshape(-1, 3) / 255


def _positions(latents: np.ndarray) -> np.ndarray:
    """(channels, height, width) to (positions, channels + 1), the last of which is 1."""
    flat = latents.reshape(len(latents), -1).T.astype(np.float64)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def picture(latents: np.ndarray, colours: np.ndarray, side: int) -> Image.Image:
    """What is seen of latents, (channels, height, width), enlarged to the ``side`` of the picture, or what is shown."""
    pixels = (_positions(latents) @ colours).reshape(*latents.shape[1:], 3)
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((min(side, LARGEST_SHOWN),) * 2, Image.Resampling.BICUBIC)


def write(plan: Plan, several: Sequence[Series], colours: np.ndarray) -> Path:
    """Write the looks that are missing, of series that are drawn; then the list of all and, last, one image of all."""
    run, side = plan.run, plan.experiment.sample_resolution
    make_folder(run.samples)
    for series in several:
        for item, name in zip(series.pictures, file_names(plan, series)):
            if not is_whole(run.path / name):
                write_png(run.path / name, picture(series.entries.read(item), colours, side))
    rows = pictures.rows(plan, several, file_names)
    for row in rows:
        row.pop(pictures.CONDITION, None)  # there is no file of it yet
    write_atomically(run.quick_list, json.dumps({"pictures": rows}, indent=2, ensure_ascii=False) + "\n")
    write_png(run.quick_grid, picture_of_all(plan, rows, ", a quick look"))
    return run.quick_grid


def file_names(plan: Plan, series: Series) -> list[str]:
    """The file of each look, in the pictures' order."""
    keys = [digest(canonical({"recipe": series.entries.id, "item": item}))[:12] for item in series.pictures]
    folder = plan.run.samples.name
    return [f"{folder}/{number:03}-{series.name}-quick-{key}.png" for number, key in enumerate(keys)]


def remove(run: RunFolder) -> None:
    """Take away the looks, of which there are pictures now."""
    with suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        rows = load_json(run.quick_list.read_bytes())["pictures"]
        for path in {run.path / name for row in rows for name in pictures.in_order(row, "").values()}:
            if path.parent == run.samples and "-quick-" in path.name:
                path.unlink(missing_ok=True)
    for path in (run.quick_list, run.quick_grid):
        path.unlink(missing_ok=True)
