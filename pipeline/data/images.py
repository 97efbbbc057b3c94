"""Image files in, arrays in [-1, 1] out.

Whatever decides a pixel on its way to the VAE is in this file; which part of a photo is taken, `buckets.crop_box` says.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data.buckets import CENTRE, crop_box

# Part of the address of every cached latent.  Bump its number whenever any pixel that read_image, fit or to_array
# returns may change; Pillow's version is left out, because its resampling is fixed-point and has kept its results.
PREPROCESSING = "exif, rgb on white, lanczos cover, centre crop, [-1, 1]: 1"

# Nothing else is tried: some of Pillow's formats run other programs (EPS) or fetch other files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")

# Above any camera's photo; decoding this many takes about 1 GB.  Pillow refuses at the same size by itself, but its
# limit is a setting that other code may lift.
MAX_PIXELS = 178_000_000

# They name no file and would cut through progress bars; whatever makes pixels unusable raises instead.
warnings.filterwarnings("ignore", module=r"PIL\.")

# From the EXIF value to what turns the stored pixels upright (EXIF 2.32, tag 0x0112).
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class BadImage(Exception):
    """A file that cannot be used as an image; the message is the reason, without the file's name."""


def read_image(source: Path | str | bytes) -> Image.Image:
    """Decode an image file, or the bytes of one, completely: upright, mode RGB, 8 bits a channel.

    Transparency becomes white.  Grey of 16 bits is scaled so that 65535 becomes 255.  An animation gives its first
    frame.  Colour profiles are not applied.  Raises BadImage with the reason where that cannot be done.
    """
    content = source if isinstance(source, bytes) else _read_bytes(Path(source))
    if not content:
        raise BadImage("empty file (0 bytes)")
    image = _decode(content)
    orientation = image.getexif().get(ORIENTATION_TAG)
    image = _to_rgb(image)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def fit(image: Image.Image, width: int, height: int, box: tuple | None = None, flip: bool = False) -> Image.Image:
    """Scale ``image``, keeping its aspect, until it just covers ``width`` x ``height`` pixels; keep the centre.

    box: the part to scale instead, from `buckets.crop_box`.  flip: mirror the result, left to right.
    The crop and the Lanczos resampling are one step, so that even a 1 x 10000 strip needs no large intermediate.
    """
    box = box or crop_box("", image.width, image.height, width, height, CENTRE)
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return fitted.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else fitted


def to_array(image: Image.Image) -> np.ndarray:
    """Return an RGB image as (3, height, width), float32 in [-1, 1], as the VAE takes it.

    Raises ValueError for another mode.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an image of mode RGB, found {image.mode}")
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1.0
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error


def _decode(content: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        _check_size(*image.size)
        image.load()
        image.getexif()
        return image
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"too large, more than {MAX_PIXELS // 10**6} million pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImage(_unidentified(content)) from error
    except Exception as error:  # Pillow's parsers raise nearly anything on a damaged file, struct.error to KeyError
        kind = "truncated" if "truncated" in str(error).lower() else "damaged or truncated"
        raise BadImage(f"{kind}: {error or type(error).__name__}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"too large, more than {MAX_PIXELS // 10**6} million pixels: {width} x {height}")


def _unidentified(content: bytes) -> str:
    if content.startswith(SIGNATURES):
        return "damaged or truncated: its header cannot be read"
    return "not an image (PNG, JPEG, WEBP, BMP, TIFF or GIF)"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("32-bit float pixels, whose range is not known; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = _grey_of_16_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """Scale by 1/257, rounding; Pillow's own conversion clips at 255 instead.  A transparent value becomes white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(f"32-bit pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits a channel")
    values[values == image.info.get("transparency", -1)] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
