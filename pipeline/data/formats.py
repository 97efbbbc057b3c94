"""The kinds of image files that are read: those that Pillow reads by itself, and those that take an extra package."""

import importlib
import importlib.util
from typing import NamedTuple

# Nothing else is tried: some of Pillow's formats run other programs (EPS) or fetch other files.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"GIF8")
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}

HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}
JXL_CODESTREAM, JXL_CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"


class Extra(NamedTuple):
    """What reads a kind of files besides Pillow.  name: for people.  extra: of setup.cfg.  module: what it installs.

    format: as Pillow calls it, once the module is registered.
    """

    name: str
    format: str
    extra: str
    package: str
    module: str

    @property
    def is_here(self) -> bool:
        return importlib.util.find_spec(self.module) is not None

    @property
    def missing(self) -> str:
        """What to do where it is not here."""
        install = f"pip install 'mindspore-flux-finetune[{self.extra}]'"
        return f"{self.name} takes the package {self.package}, which is not installed: {install}, or convert the file"

    def register(self) -> None:
        """Tell Pillow of it."""
        module = importlib.import_module(self.module)  # of JPEG XL, this alone registers it
        if self.format == "HEIF":
            module.register_heif_opener()


HEIC = Extra("HEIC", "HEIF", "heic", "pillow-heif", "pillow_heif")
JXL = Extra("JPEG XL", "JXL", "jxl", "pillow-jxl-plugin", "pillow_jxl")
EXTRAS = {".heic": HEIC, ".heif": HEIC, ".hif": HEIC, ".jxl": JXL}
"""By the suffix of files."""


def is_photo(suffix: str) -> bool:
    """Whether files with this suffix, in lower case, are photos, readable here or not."""
    return suffix in SUFFIXES or suffix in EXTRAS


def missing_for(suffix: str) -> str:
    """Why files with this suffix, in lower case, cannot be read here; "" where they can."""
    extra = EXTRAS.get(suffix)
    return extra.missing if extra and not extra.is_here else ""


def extra_for(content: bytes) -> Extra | None:
    """What it takes besides Pillow to read a file, by its first bytes."""
    if content.startswith((JXL_CODESTREAM, JXL_CONTAINER)):
        return JXL
    return HEIC if content[4:8] == b"ftyp" and _is_heic(content) else None


def _is_heic(content: bytes) -> bool:
    """Of a file in the container that HEIC and AVIF share, by the brands that it names."""
    brands = {content[start : start + 4] for start in range(16, min(int.from_bytes(content[:4], "big"), 256), 4)}
    brands.add(content[8:12])
    return bool(brands & HEIC_BRANDS) and not brands & AVIF_BRANDS


# --- the size of a JPEG XL file, which its decoder says only after it has decoded all of it ------------------------


def jxl_size(content: bytes) -> tuple[int, int]:
    """(width, height) in the header of a JPEG XL file (ISO/IEC 18181-1, SizeHeader).  Raises ValueError."""
    bits = _Bits(_codestream(content))
    is_small = bits.read(1)
    height = _jxl_side(bits, is_small)
    ratio = bits.read(3)
    if ratio:
        across, down = JXL_RATIOS[ratio]
        return height * across // down, height
    return _jxl_side(bits, is_small), height


JXL_RATIOS = (0, 0), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1)


class _Bits:
    """Reads numbers of a codestream, the lowest bit first; 12 bytes hold its SizeHeader."""

    def __init__(self, codestream: bytes):
        if not codestream.startswith(JXL_CODESTREAM):
            raise ValueError("no JPEG XL codestream")
        self._number = int.from_bytes(codestream[2:14], "little")

    def read(self, count: int) -> int:
        value = self._number & ((1 << count) - 1)
        self._number >>= count
        return value


def _jxl_side(bits: _Bits, is_small: int) -> int:
    return 8 * (1 + bits.read(5)) if is_small else 1 + bits.read((9, 13, 18, 30)[bits.read(2)])


def _codestream(content: bytes) -> bytes:
    """The beginning of the codestream in a JPEG XL file, bare or in a container of boxes."""
    if content.startswith(JXL_CODESTREAM):
        return content[:14]
    start = 0
    while start + 8 <= len(content):
        size, kind, header = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8], 8
        if size == 1:
            size, header = int.from_bytes(content[start + 8 : start + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            begin = start + header + (4 if kind == b"jxlp" else 0)  # a part has its number first
            return content[begin : begin + 14]
        if size < header:  # 0: up to the end
            break
        start += size
    raise ValueError("no codestream in the container")
