"""Training pictures in memory: what the autoencoder and the transformer learn from, drawn from a seed."""

import numpy as np
from PIL import Image, ImageDraw

from pipeline.synthetic import shapes

SIZE = 64


def drawn(seed: int, count: int) -> list[shapes.Picture]:
    return [shapes.picture(seed, index, SIZE) for index in range(count)]


def pixels(images) -> np.ndarray:
    """(count, 3, height, width), uint8."""
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)


def for_autoencoder(count: int) -> np.ndarray:
    """Pictures, and for every eight one outline and one random polygon, so that it also copes with what is new."""
    pictures = drawn(shapes.TRAINING, count)
    images = [picture.image() for picture in pictures]
    images += [picture.outline() for picture in pictures[::8]]
    images += [_polygon(index) for index in range(0, count, 8)]
    return pixels(images)


def _polygon(index: int) -> Image.Image:
    random = np.random.default_rng([shapes.TRAINING, index])
    scale = shapes.SUPERSAMPLING
    colour, background = random.permutation(list(shapes.COLOURS.values()))[:2].tolist()
    canvas = Image.new("RGB", (scale * SIZE, scale * SIZE), tuple(background))
    corners = [tuple(each) for each in random.uniform(0, scale * SIZE, (random.integers(3, 9), 2)).tolist()]
    ImageDraw.Draw(canvas).polygon(corners, fill=tuple(colour))
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
