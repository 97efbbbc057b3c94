"""A segment: an immutable folder that is one zarr v3 array of shape (n, *item), in one shard.

    zarr.json   the array's metadata; attributes hold the real dtype, the kind, the recipe id, each row's item and name
    c.0.0...    the shard: per row its little-endian bytes and their crc32c, at the offset that the shard's index at the
                end of the file gives, as the zarr v3 sharding codec says
    keys        the rows' items, 16 bytes each; the shard's size in bytes (8 bytes, little-endian); crc32c of all that

A reader trusts none of them: sizes are checked when a segment is opened, checksums when a row is first read.
"""

import errno
import json
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import numpy as np

from cache.core.address import DIGEST_BYTES, item_keys
from cache.core.errors import CorruptEntry, StoreError, UnreadableEntry
from cache.core.files import named, sync_folder, write_all, write_durably
from cache.core.layout import CRC_BYTES, SIZE_BYTES, Layout, checksum
from cache.core.parsing import load_json

PREFETCH_BYTES = 1 << 20
SMALL_ROW_BYTES, VERIFIED_WHOLE_BYTES = 16 << 10, 4 << 20
"""Shards of such rows, up to this size, are verified whole when a first row is read: a system call takes longer."""


class SegmentWriter:
    """Writes the rows of a segment into ``folder`` in order; ``finish`` makes it complete and durable.

    An ``append`` that fails, or is interrupted, leaves the rows before it whole, and another may follow.
    All methods raise OSError. names: of the source of each item so far.
    """

    def __init__(self, folder: str | Path, layout: Layout):
        self.folder, self.layout = Path(folder), layout
        self.names: dict[str, str] = {}
        self.folder.mkdir(exist_ok=True)  # it is there where the rows of a dead writer are taken over
        self._shard = os.open(self.folder / layout.shard_name, os.O_CREAT | os.O_RDWR, 0o666)

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows so far."""
        return self.layout.rows_bytes(len(self.names))

    def append(self, item: str, array: np.ndarray, name: str) -> bytes:
        """Add one row and return its checksum. array: of the item's shape, C-contiguous, in the stored dtype."""
        data = array.reshape(-1).view(np.uint8)
        crc = checksum(data)
        write_all(self._shard, [data, crc], len(self.names) * self.layout.stride_bytes)
        self.names[item] = name
        return crc

    def take_over(self, item: str, name: str, crc: bytes) -> bool:
        """Add the row that a dead writer left next in the shard. Returns whether it is there and has this checksum."""
        data = os.pread(self._shard, self.layout.row_bytes, len(self.names) * self.layout.stride_bytes)
        if len(data) != self.layout.row_bytes or data[-CRC_BYTES:] != crc or checksum(data[:-CRC_BYTES]) != crc:
            return False
        self.names[item] = name
        return True

    def finish(self, attributes: dict) -> None:
        """Complete the segment and wait until it is on disk. Doing it again does no harm."""
        index = self.layout.index(len(self.names))
        write_all(self._shard, [index], self.num_bytes)
        size = self.layout.size_bytes(len(self.names))
        os.ftruncate(self._shard, size)
        os.fsync(self._shard)
        keys = item_keys(list(self.names)) + size.to_bytes(SIZE_BYTES, "little")
        write_durably(self.folder / "keys", keys + checksum(keys))
        rows = {"items": list(self.names), "names": list(self.names.values())}
        metadata = self.layout.metadata(len(self.names), {**attributes, **rows})
        write_durably(self.folder / "zarr.json", json.dumps(metadata, indent=1))
        sync_folder(self.folder)

    def close(self) -> None:
        """Close the shard, finished or not."""
        os.close(self._shard)


class Segment:
    """A committed segment, for reading. A row is verified before it is first read; later reads copy from the mapped
    shard.

    keys: the rows' items, 16 bytes each, in order.
    Reading from several threads at once is safe.
    """

    _map: mmap.mmap
    _rows: np.ndarray

    def __init__(self, folder: str | Path, layout: Layout):
        """Raises OSError or ValueError where the folder is not a whole segment."""
        self.folder, self.layout = os.fspath(folder), layout
        self.name = os.path.basename(self.folder)
        self.shard_path = os.path.join(self.folder, layout.shard_name)
        self.keys, self.size_bytes = self._read_keys()
        self.num_rows = len(self.keys) // DIGEST_BYTES
        self._verified: np.ndarray | None = None  # which rows' checksums held; None until ``_open`` maps the shard

    def items(self) -> list[str]:
        """The rows' items, in order."""
        text = self.keys.hex()
        return [text[start : start + 2 * DIGEST_BYTES] for start in range(0, len(text), 2 * DIGEST_BYTES)]

    def metadata(self) -> dict:
        """The content of zarr.json. Raises OSError, or ValueError where it is damaged."""
        metadata = load_json(Path(self.folder, "zarr.json").read_bytes())
        attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
        rest = {key: attributes[key] for key in attributes if key != "dtype"} if isinstance(attributes, dict) else {}
        if metadata != self.layout.metadata(self.num_rows, rest):
            raise ValueError(f"{self.folder}/zarr.json is damaged")
        return metadata

    def is_whole(self) -> bool:
        """Whether the shard is there, in its full size; its bytes are checked when they are read.

        Raises OSError where this cannot be told.
        """
        try:
            return os.stat(self.shard_path).st_size == self.size_bytes
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read_into(self, out: np.ndarray, row: int) -> None:
        """Copy one item into ``out``, flat, in the stored dtype, C-contiguous.

        Raises CorruptEntry where it is damaged, StoreError where it cannot be read now.
        """
        verified = self._verified
        if verified is None:
            verified = self._open(row)
        if verified[row]:
            self._check_size(row)
            out[:] = self._rows[row]
        else:
            self._read_and_verify(out, row)
            verified[row] = True

    def prefetch(self, rows: np.ndarray) -> None:
        """Ask the kernel to read some rows, ascending, into its page cache, in requests that it does not cut short."""
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        with _opened(self.shard_path) as file:
            for run in np.split(rows, breaks):
                offset, num_bytes = int(run[0]) * self.layout.stride_bytes, len(run) * self.layout.stride_bytes
                for start in range(offset, offset + num_bytes, PREFETCH_BYTES):
                    os.posix_fadvise(file, start, PREFETCH_BYTES, os.POSIX_FADV_WILLNEED)

    def damaged_rows(self) -> list[int]:
        """The rows whose bytes on disk are not those that were written, found by reading all of them."""
        buffer, damaged = np.empty(self.layout.num_values, self.layout.stored), []
        for row in range(self.num_rows):
            try:
                self._read_and_verify(buffer, row)
            except CorruptEntry:
                damaged.append(row)
        return damaged

    def index_is_sound(self) -> bool:
        """Whether the shard's index, by which other zarr readers find the rows, is as it was written."""
        index = self.layout.index(self.num_rows)
        with open(self.shard_path, "rb") as file:
            file.seek(self.layout.rows_bytes(self.num_rows))
            return file.read() == index

    def _read_keys(self) -> tuple[bytes, int]:
        path = os.path.join(self.folder, "keys")
        with named(path), open(path, "rb") as file:
            data = file.read()
        keys, size = data[: -SIZE_BYTES - CRC_BYTES], data[-SIZE_BYTES - CRC_BYTES : -CRC_BYTES]
        if not keys or len(keys) % DIGEST_BYTES or checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
            raise ValueError(f"{path} is damaged")
        size_bytes = int.from_bytes(size, "little")
        if size_bytes != self.layout.size_bytes(len(keys) // DIGEST_BYTES):
            raise ValueError(f"{path} is damaged")
        return keys, size_bytes

    def _open(self, row: int) -> np.ndarray:
        """Map the shard, to read a row, and return the new list of verified rows. Raises as ``read_into`` does."""
        _allow_many_files()
        layout, verified = self.layout, np.zeros(self.num_rows, bool)
        try:
            with _opened(self.shard_path) as file:
                self._map = mmap.mmap(file, self.size_bytes, prot=mmap.PROT_READ)
                if layout.stride_bytes <= SMALL_ROW_BYTES and self.size_bytes <= VERIFIED_WHOLE_BYTES:
                    verified = self._sound_rows(file)
        except (OSError, ValueError) as error:  # ValueError: shorter than it should be
            self._fail(row, error)
        strides = (layout.stride_bytes, layout.stored.itemsize)
        self._rows = np.ndarray((self.num_rows, layout.num_values), layout.stored, self._map, 0, strides)
        self._verified = verified
        return verified

    def _sound_rows(self, file: int) -> np.ndarray:
        """Which rows can be read and have their checksum. Others are read again alone, which says what is wrong."""
        data, layout = b"", self.layout
        with suppress(OSError):
            data = os.pread(file, layout.rows_bytes(self.num_rows), 0)
        rows = (data[start : start + layout.row_bytes] for start in range(0, len(data), layout.stride_bytes))
        sound = [len(row) == layout.row_bytes and checksum(row[:-CRC_BYTES]) == row[-CRC_BYTES:] for row in rows]
        return np.array(sound + [False] * (self.num_rows - len(sound)))

    def _check_size(self, row: int) -> None:
        """Raise CorruptEntry where the mapped shard was truncated: its end would read as zeros, or end the process
        (SIGBUS)."""
        if self._map.size() != self.size_bytes:
            self._verified = None  # so that what may replace the shard is mapped anew
            self._fail(row, None)

    def _read_and_verify(self, out: np.ndarray, row: int) -> None:
        """Read by a system call, not through the map: a bad disk is then an error and not the end of the process."""
        crc = bytearray(CRC_BYTES)
        try:
            with _opened(self.shard_path) as file:
                num_bytes = os.preadv(file, [out.data, crc], row * self.layout.stride_bytes)
        except OSError as error:
            self._fail(row, error)
        if num_bytes != self.layout.row_bytes or checksum(out) != crc:
            self._fail(row, None)

    def _fail(self, row: int, error: Exception | None) -> NoReturn:
        item = self.items()[row]
        if error is not None and getattr(error, "errno", None) not in (None, errno.ENOENT, errno.EIO):
            what = error.strerror if isinstance(error, OSError) else error
            raise StoreError(f"{self.shard_path}: cannot read item {item}: {what}") from error
        kind = UnreadableEntry if getattr(error, "errno", None) == errno.EIO else CorruptEntry
        raise kind(
            f"{self.shard_path}: item {item} is damaged; run the stage that encodes it again, which encodes what is "
            "damaged and nothing else"
        ) from error


def _allow_many_files() -> None:
    """Raise the soft limit of open files, usually 1024: each mapped segment keeps one open, a big store has more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A file for reading."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)
