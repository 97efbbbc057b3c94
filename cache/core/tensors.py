"""Writing safetensors files, with one tensor in memory at a time; equal contents give equal files.

The format, from https://github.com/huggingface/safetensors: the header's length (8 bytes, little-endian), the header (a
JSON table of dtype, shape and place of each tensor, padded with spaces), then the tensors' bytes, one after the other.
"""

import errno
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from cache.core.errors import StoreError
from cache.core.files import named, sync_folder

DTYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
METADATA = "__metadata__"
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # what readers of the format accept


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    arrays: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file; it appears, durably, when it is whole. The folder must exist.

    tensors: dtype (of ``DTYPES``) and shape by key.  arrays: their numbers, C-contiguous, in the same order; each is
    asked for when its turn comes. Raises StoreError where readers would not accept the header; OSError, or whatever
    ``arrays`` raises, and then nothing is left behind.
    """
    header = header_of(path, tensors, metadata)
    with _appearing(Path(path)) as file:
        file.write(header)
        for array in arrays:
            file.write(array.reshape(-1).view(np.uint8).data)


@contextmanager
def opened_tensors(path: Path) -> Iterator:
    """A safetensors file, to read NumPy arrays from.

    Raises SafetensorError where it is damaged, OSError where it cannot be read.
    """
    from safetensors import safe_open

    os.close(os.open(path, os.O_RDONLY))  # safetensors says of any file that it cannot open that there is none
    try:
        file = safe_open(path, "numpy")
    except (OSError, MemoryError) as error:
        raise OSError(errno.EIO, f"cannot be opened or mapped ({error})", os.fspath(path)) from error
    with file:
        yield file


def header_of(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """What such a file begins with, its length first; see `write_tensors`."""
    table: dict[str, dict] = {METADATA: dict(sorted(metadata.items()))}
    end = 0
    for key, (dtype, shape) in tensors.items():
        code, size = DTYPES[dtype]
        begin, end = end, end + math.prod(shape) * size
        table[key] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise StoreError(
            f"{path}: not written: {len(tensors):,} tensors need a header of {len(text)} bytes, and readers of "
            f"safetensors accept {MAX_HEADER_BYTES}; write fewer at a time"
        )
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that gets its name, durably, at the end of the block, or leaves nothing behind."""
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with named(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
