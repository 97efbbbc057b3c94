"""Whether a file that a run made is there and whole, by its format; one that is not is made again.  No MindSpore.

Told from the file's length and its two ends, so that asking costs nothing: not whether a disk has turned bits inside.
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cache import load_json

PNG_BEGINS, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def is_whole(path: Path) -> bool:
    """Whether it is there, and no copy or disk has cut it short.  Raises OSError where nobody may look."""
    try:
        with open(path, "rb") as file:
            return KINDS.get(path.suffix, _has_bytes)(file, path.stat().st_size)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):  # a header of another shape
        return False


def _is_json(file: BinaryIO, size: int) -> bool:
    return isinstance(load_json(file.read()), dict)


def _is_png(file: BinaryIO, size: int) -> bool:
    begins = file.read(len(PNG_BEGINS))
    file.seek(max(0, size - len(PNG_ENDS)))
    return begins == PNG_BEGINS and file.read() == PNG_ENDS


def _is_safetensors(file: BinaryIO, size: int) -> bool:
    """As long as its header says, which the format asks for."""
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        return False
    header = load_json(file.read(length))
    header.pop("__metadata__", None)
    return size == 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)


def _has_bytes(file: BinaryIO, size: int) -> bool:
    return size > 0


KINDS: dict[str, Callable[[BinaryIO, int], bool]] = {
    ".json": _is_json,
    ".png": _is_png,
    ".safetensors": _is_safetensors,
}
