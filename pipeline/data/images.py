"""Image files in, arrays in [-1, 1] out.

Whatever decides a pixel on its way to the VAE is in this file, and in `colours`; which part of a photo is taken,
`buckets.crop_box` says.  Of a photo of the largest size, this holds the decoded file and one copy at most.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.data import formats
from pipeline.data.buckets import CENTRE, crop_box
from pipeline.data.colours import AS_THEY_ARE, Colours, colours_of, converted

# Part of the address of every cached latent.  Bump its number whenever any pixel that read_image, fit or to_array
# returns may change; Pillow's version is left out, because its resampling is fixed-point and has kept its results.
# What is done to photos with a colour profile of their own is in the address of these alone: `colours.CONVERSION`.
PREPROCESSING = "exif, rgb on white, lanczos cover, centre crop, [-1, 1]: 1"

# Above any camera's photo; decoding this many takes 0.7 GB, and another 0.7 GB where they have to be turned or are not
# RGB.  Pillow refuses at the same size by itself, but its limit is a setting that other code may lift.
MAX_PIXELS = 178_000_000

BAND_PIXELS = 1 << 22
"""What is not RGB becomes RGB in pieces of so many pixels, each of which takes a few times that in bytes."""

HEAD_BYTES = 256
NOT_AN_IMAGE = "not an image (PNG, JPEG, WEBP, AVIF, HEIC, JPEG XL, BMP, TIFF or GIF)"

# They name no file and would cut through progress bars; whatever makes pixels unusable raises instead.
warnings.filterwarnings("ignore", module=r"PIL\.")

# From the EXIF value to what turns the stored pixels upright (EXIF 2.32, tag 0x0112).
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)
"""Those that swap width and height."""


class BadImage(Exception):
    """A file that cannot be used as an image; the message is the reason, without the file's name."""


class Examined(NamedTuple):
    """What is known of a file that decodes.  width, height: upright.  profile, ignored: as of `colours.Colours`."""

    width: int
    height: int
    profile: str
    ignored: str


class PixelBudget:
    """Lets threads decode at the same time as long as their images have no more than so many pixels together."""

    def __init__(self, pixels: int = MAX_PIXELS):
        self._free, self._all, self._changed = pixels, pixels, threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until there is room, and keep it for a ``with`` block; what is larger than all has it for itself."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def read_image(source: Path | str | bytes, with_profile: bool | None = None) -> Image.Image:
    """Decode an image file, or the bytes of one, completely: upright, mode RGB, 8 bits a channel, in sRGB.

    Transparency becomes white.  Grey of 16 bits is scaled so that 65535 becomes 255.  An animation gives its first
    frame.  Raises BadImage with the reason where that cannot be done.
    with_profile: whether colours are converted to sRGB, as it was said of the file before; None: find out.
    """
    image, colours, orientation = _decode(source if isinstance(source, bytes) else _read_bytes(Path(source)))
    if with_profile is not None and with_profile != bool(colours.profile):
        if with_profile:
            raise BadImage(f"its colour profile could be used when the photo was checked: {colours.ignored or 'sRGB'}")
        colours = AS_THEY_ARE
    image = _to_rgb(image, colours)
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def examine(content: bytes) -> Examined:
    """Decode the bytes of a file, for what is then known of it.  Raises BadImage exactly where `read_image` does."""
    image, colours, orientation = _decode(content)
    width, height = image.size[::-1] if orientation in SIDEWAYS else image.size
    return Examined(width, height, colours.profile, colours.ignored)


def colours_in(path: Path) -> Colours:
    """What becomes of the colours of a file that decodes, from its header alone.  Raises BadImage or OSError."""
    with open(path, "rb") as file, _reasons(file):
        return colours_of(_opened(file))


def num_pixels(content: bytes) -> int:
    """How many pixels a file says that it has, from its header alone; 0 where it cannot be read."""
    file = io.BytesIO(content)
    try:
        with _reasons(file):
            width, height = (
                formats.jxl_size(content) if formats.extra_for(content) is formats.JXL else _opened(file).size
            )
    except BadImage:
        return 0
    return width * height


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


# --- decoding -----------------------------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error


def _decode(content: bytes) -> tuple[Image.Image, Colours, int | None]:
    """The pixels of a file as it has them, what becomes of their colours, and their orientation by EXIF."""
    file = io.BytesIO(content)
    with _reasons(file):
        image = _opened(file)
        colours = colours_of(image)  # before anything is decoded, as `colours_in` has it
        image.load()
        orientation = image.getexif().get(ORIENTATION_TAG)
    # Of JPEG XL, but for a JPEG inside of one, the decoder has turned the pixels already (ISO/IEC 18181-2).
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        orientation = None
    _check_mode(image)
    return image, colours, orientation


def _opened(file: BinaryIO) -> Image.Image:
    """An image of which the header is read; in JPEG XL, all of it."""
    head = _head(file)
    if not head:
        raise BadImage("empty file (0 bytes)")
    known: tuple[str, ...] = formats.FORMATS
    extra = formats.extra_for(head)
    if extra:
        if not extra.is_here:
            raise BadImage(extra.missing)
        extra.register()
        known = (extra.format,)
    if extra is formats.JXL:
        _check_size(*formats.jxl_size(file.read()))
        file.seek(0)
    image = Image.open(file, formats=known)
    _check_size(*image.size)
    return image


def _head(file: BinaryIO) -> bytes:
    """As much of a file as says of what kind it is."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    file.seek(0)
    return head


@contextmanager
def _reasons(file: BinaryIO) -> Iterator[None]:
    """Whatever goes wrong in a ``with`` block that decodes the file is a BadImage with the reason."""
    try:
        yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"too large, more than {MAX_PIXELS // 10**6} million pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise BadImage(_unidentified(_head(file))) from error
    except Exception as error:  # Pillow's parsers raise nearly anything on a damaged file, struct.error to KeyError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"{'' if 'truncated' in reason.lower() else 'damaged or '}truncated: {reason}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"too large, more than {MAX_PIXELS // 10**6} million pixels: {width} x {height}")


def _unidentified(head: bytes) -> str:
    if head.startswith(formats.SIGNATURES) or head[4:8] == b"ftyp" or formats.extra_for(head):
        return "damaged or truncated: its header cannot be read"
    return NOT_AN_IMAGE


def _check_mode(image: Image.Image) -> None:
    """Raise BadImage where pixels have no meaning as colours that is known here."""
    if image.mode == "F":
        raise BadImage("32-bit float pixels, whose range is not known; save it with 8 or 16 bits a channel")
    if image.mode in ("LAB", "HSV"):
        raise BadImage(f"{image.mode} pixels; save it as RGB")
    if image.mode == "I":
        least, most = cast(tuple[int, int], image.getextrema())
        if least < 0 or most > 65535:
            raise BadImage(f"32-bit pixels from {least} to {most}; save it with 8 or 16 bits a channel")


# --- colours ------------------------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image, colours: Colours) -> Image.Image:
    """What is RGB already is not copied: its colours are converted in place."""
    is_transparent = image.has_transparency_data
    if image.mode == "RGB" and not is_transparent:
        return converted(image, colours) if colours.profile else image
    whole = Image.new("RGB", image.size)
    for box in _bands(*image.size):
        whole.paste(_band_to_rgb(image.crop(box), colours, is_transparent), box)
    return whole


def _bands(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of BAND_PIXELS at most, which cover an image."""
    across = min(width, BAND_PIXELS)
    down = max(1, BAND_PIXELS // across)
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield left, top, min(left + across, width), min(top + down, height)


def _band_to_rgb(band: Image.Image, colours: Colours, is_transparent: bool) -> Image.Image:
    if band.mode.startswith("I"):
        band, is_transparent = _grey_of_16_bits(band), False
    if not is_transparent:
        return (converted(band, colours) if colours.profile else band).convert("RGB")
    own = band.convert("RGBA")  # first: a transparent value is one of the file's colours
    if colours.profile:
        alpha, own = own.getchannel("A"), converted(band, colours)
        own.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", own.size, "white"), own).convert("RGB")


def _grey_of_16_bits(band: Image.Image) -> Image.Image:
    """Scale by 1/257, rounding; Pillow's own conversion clips at 255 instead.  A transparent value becomes white."""
    values = np.asarray(band).astype(np.int32)
    values[values == band.info.get("transparency", -1)] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
