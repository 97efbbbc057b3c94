"""Embedded colour profiles: the pixels of phones (Display P3) and cameras (Adobe RGB) are converted to sRGB.

FLUX.1 has learnt from sRGB.  A profile only says what the numbers in a file mean; without the conversion colours shift.
LittleCMS, which comes with Pillow, converts: relative colorimetric, black onto black, as photo editors do.
"""

import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, features

CONVERSION = "sRGB by LittleCMS, relative colorimetric, black point compensation: 1"
"""Part of the address of what is encoded of a converted photo.  Bump its number whenever any such pixel may change."""

UNSEEN = 2
"""Steps of 255 by which a profile may move a colour and yet count as sRGB: so much do profiles of that name differ."""

MAX_PROFILE_BYTES = 4_000_000
"""Above any printer's; LittleCMS is given nothing larger."""

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""The mode in which Pillow has the pixels that a profile of a colour space is about."""

CLASSES = "scnr", "mntr", "prtr", "spac"
"""Of profiles that say what pixels mean: of cameras, screens, printers and colour spaces.  Others link or alter."""

INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
EXACT = FLAGS | ImageCms.Flags.NOOPTIMIZE
"""Of grey and CMYK: LittleCMS is ten times as fast with tables, which are off by ten steps of 255 in dark grey.  Of RGB
it is fast and off by less than one."""


class Colours(NamedTuple):
    """What becomes of a file's colours.

    profile: the name of the profile that pixels are converted from; "" where they are taken as they are.
    ignored: why a profile in the file is not used; "" where there is none such.
    transform, mode: of Pillow, what converts pixels of this mode to RGB; None and "" where nothing is converted.
    """

    profile: str = ""
    ignored: str = ""
    transform: ImageCms.ImageCmsTransform | None = None
    mode: str = ""


AS_THEY_ARE = Colours()


def colours_of(image: Image.Image) -> Colours:
    """What becomes of the colours of an opened image; its pixels are not looked at."""
    content = image.info.get("icc_profile")
    if not content:
        return AS_THEY_ARE
    own = "CMYK" if image.mode == "CMYK" else "L" if _is_grey(image.mode) else "RGB"
    return _colours(bytes(content), own)


def converted(image: Image.Image, colours: Colours) -> Image.Image:
    """The colours of an image in sRGB, without its transparency, mode RGB; of mode RGB, the very image."""
    assert colours.transform is not None
    own = image if image.mode == colours.mode else image.convert(colours.mode)
    found = ImageCms.applyTransform(own, colours.transform, inPlace=colours.mode == "RGB")
    return found or own


def _is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "La") or mode.startswith("I")


@functools.lru_cache(maxsize=16)  # photos of one camera have the same
def _colours(content: bytes, own: str) -> Colours:
    """own: the mode of the pixels, without transparency: RGB, L or CMYK."""
    if not features.check("littlecms2"):
        return Colours(
            ignored="this Pillow comes without LittleCMS, which reads colour profiles; install Pillow's wheel"
        )
    try:
        name, mode, transform = _transform(content, own)
    except _Unusable as reason:
        return Colours(ignored=str(reason))
    except Exception as error:  # of a damaged profile Pillow's parser raises OSError, PyCMSError, ValueError and others
        return Colours(ignored=f"cannot be used: {' '.join(str(error).split())[:200] or type(error).__name__}")
    if _moved(mode, transform) <= UNSEEN:
        return AS_THEY_ARE
    return Colours(name, "", transform, mode)


class _Unusable(Exception):
    """Why a profile cannot be used."""


def _transform(content: bytes, own: str) -> tuple[str, str, ImageCms.ImageCmsTransform]:
    """The name of a profile, the mode that it is about, and what converts that to RGB."""
    if len(content) > MAX_PROFILE_BYTES:
        raise _Unusable(f"{len(content) / 1e6:.0f} MB, more than any that is meant seriously")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
    name = ImageCms.getProfileDescription(profile).strip()[:80] or "without a name"
    space, kind = profile.profile.xcolor_space.strip(), profile.profile.device_class
    if kind not in CLASSES:
        raise _Unusable(f"{name}: of class {kind!r}, which does not say what pixels mean")
    mode = MODES.get(space, "")
    if mode != own and (mode, own) != ("RGB", "L"):  # grey as three equal channels is what an RGB profile can read
        raise _Unusable(f"{name}: about {space}, but the pixels are {'grey' if own == 'L' else own}")
    flags = FLAGS if mode == "RGB" else EXACT
    return name, mode, ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", INTENT, flags)


def _moved(mode: str, transform: ImageCms.ImageCmsTransform) -> int:
    """By how many steps of 255 the conversion moves the colour that it moves most, of a grid of colours."""
    if mode == "CMYK":
        return 255  # there is no other way to read these than by the profile
    steps = np.arange(0, 256, 1 if mode == "L" else 15, np.uint8)
    grid = steps[:, None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 1, 3)
    before = Image.fromarray(np.ascontiguousarray(grid))
    after = ImageCms.applyTransform(before, transform)
    return int(np.abs(np.asarray(before.convert("RGB"), np.int16) - np.asarray(after, np.int16)).max())
