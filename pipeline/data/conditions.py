"""What a ControlNet is conditioned on: a file beside each photo, or something computed from the photo itself.

Whatever decides a pixel of a computed condition is in this file and in its place in the photo, `images.fit`.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from cache import digest
from pipeline.data import images
from pipeline.data.buckets import CENTRE, crop_box
from pipeline.data.indexing import IndexedPhoto
from pipeline.data.variants import Variant

FILE = "file"
CANNY_THRESHOLDS = 100, 200
BLUR_PART, TILE_FACTOR = 1 / 64, 8


def canny(pixels: np.ndarray) -> np.ndarray:
    """White edges on black (doi:10.1109/TPAMI.1986.4767851), of the grey image; hysteresis at CANNY_THRESHOLDS."""
    import cv2

    return cv2.Canny(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), *CANNY_THRESHOLDS)


def grey(pixels: np.ndarray) -> np.ndarray:
    """The luma of ITU-R BT.601."""
    import cv2

    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def blur(pixels: np.ndarray) -> np.ndarray:
    """A Gaussian whose deviation is BLUR_PART of the shorter side."""
    import cv2

    return cv2.GaussianBlur(pixels, (0, 0), BLUR_PART * min(pixels.shape[:2]))


def tile(pixels: np.ndarray) -> np.ndarray:
    """Every TILE_FACTOR squared pixels their mean, scaled up again: what an upscaling ControlNet is taught with."""
    import cv2

    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (width // TILE_FACTOR, height // TILE_FACTOR), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


COMPUTED: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "canny": (1, canny),
    "grey": (1, grey),
    "blur": (1, blur),
    "tile": (1, tile),
}
"""By name: a version, to bump whenever any pixel may change, and what makes (height, width, 3) of a photo, uint8, its
condition, grey or of three channels."""


def recipe(condition: str) -> dict:
    """Its part of an entry's address: a file is encoded as any image is, and shares its entry with it."""
    return {} if condition == FILE else {"condition": f"{condition}: {COMPUTED[condition][0]}"}


def item(photo: IndexedPhoto, variant: Variant) -> str:
    """The address of a photo's condition in one of its variants.

    Where a random crop of a file lies is the photo's affair, so both files decide it.
    """
    if photo.condition is None:
        return photo.item
    if variant.crop == CENTRE:
        return photo.condition.item
    return digest(f"{photo.digest} {photo.condition.item}".encode())


def picture(photo: IndexedPhoto, source: Image.Image, variant: Variant, condition: str) -> Image.Image:
    """A photo's condition in one of its variants, pixel by pixel beside the photo in the same variant.

    source: the decoded photo, or the file that is its condition.
    """
    size = variant.width, variant.height
    if condition == FILE:
        box = _box(photo, variant, *source.size)
        return images.fit(source, *size, box, variant.flip)
    box = crop_box(photo.digest, *source.size, *size, variant.crop)
    made = COMPUTED[condition][1](np.asarray(images.fit(source, *size, box)))
    found = Image.fromarray(made).convert("RGB")
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if variant.flip else found


def _box(photo: IndexedPhoto, variant: Variant, width: int, height: int) -> tuple[float, float, float, float]:
    """The part of a file of ``width`` x ``height`` pixels, the photo's size or that scaled, that the variant shows."""
    size = variant.width, variant.height
    if variant.crop == CENTRE:  # the file alone decides, as for any image
        return crop_box("", width, height, *size, CENTRE)
    left, top, right, bottom = crop_box(photo.digest, photo.width, photo.height, *size, variant.crop)
    across, down = width / photo.width, height / photo.height
    return left * across, top * down, min(right * across, width), min(bottom * down, height)
