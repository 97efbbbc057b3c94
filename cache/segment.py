"""A segment: an immutable folder that is one zarr v3 array of shape (n, *item), in one shard.

    zarr.json   the array's metadata; attributes hold the real dtype, the kind and the recipe id
    c.0.0...    the shard: per row its little-endian bytes and their crc32c, at the offset that the shard's index at the
                end of the file gives, as the zarr v3 sharding codec says
    keys        the rows' items, 16 bytes each; the shard's size in bytes (8 bytes, little-endian); crc32c of all that

A reader trusts none of them: sizes are checked when a segment is opened, checksums when a row is read.
"""

import errno
import json
import os
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np

from .address import DIGEST_BYTES
from .errors import CorruptEntry, StoreError
from .files import sync_folder, write_durably

STORED = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}  # zarr has no bfloat16
REAL = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
KEY = np.dtype(f"S{DIGEST_BYTES}")
CRC_BYTES = 4
PAGE_BYTES = 4096
LARGE_BYTES = 16 * PAGE_BYTES  # rows from this size on begin at a page, for mapped reads; smaller ones lie side by side


class SegmentWriter:
    """Writes the rows of a new segment into ``folder`` in order. Nothing is promised of it before ``finish``.

    An ``append`` that fails, or is interrupted, leaves the rows before it whole, and another may follow.
    Raises OSError from every method.
    """

    def __init__(self, folder, dtype, shape, attributes):
        self.folder, self.dtype, self.shape = Path(folder), dtype, list(shape)
        self.attributes = {"dtype": dtype, **attributes}
        self.row_bytes = _row_bytes(dtype, shape)
        self.rows = {}  # item -> offset of its row in the shard
        self.num_bytes = 0
        self.folder.mkdir()
        self._shard = os.open(_shard_path(folder, shape), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)

    def append(self, item, array):
        """Add one row. array: of the item's shape, C-contiguous, little-endian, in the stored dtype."""
        data = array.reshape(-1).view(np.uint8)
        align = PAGE_BYTES if self.row_bytes >= LARGE_BYTES else 1
        offset = -(-self.num_bytes // align) * align
        _write_at(self._shard, data, offset)
        _write_at(self._shard, _checksum(data), offset + data.nbytes)
        self.num_bytes = offset + self.row_bytes
        self.rows[item] = offset

    def finish(self):
        """Complete the segment and wait until it is on disk. Doing it again does no harm."""
        index = np.array([(offset, self.row_bytes) for offset in self.rows.values()], "<u8").tobytes()
        index += _checksum(index)
        _write_at(self._shard, index, self.num_bytes)
        size = self.num_bytes + len(index)
        os.ftruncate(self._shard, size)
        os.fsync(self._shard)
        keys = bytes.fromhex("".join(self.rows)) + size.to_bytes(8, "little")
        write_durably(self.folder / "keys", keys + _checksum(keys))
        write_durably(self.folder / "zarr.json", json.dumps(self._metadata(), indent=2))
        sync_folder(self.folder)

    def close(self):
        os.close(self._shard)

    def _metadata(self):
        little, crc = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
        sharding = {
            "chunk_shape": [1, *self.shape],
            "codecs": [little, crc],
            "index_codecs": [little, crc],
            "index_location": "end",
        }
        shape, stored = [len(self.rows), *self.shape], STORED[self.dtype]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": stored.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": self.attributes,
        }


class Segment:
    """A committed segment, for reading. ``keys``: (n,) array of its items, 16 bytes each, in the order of the rows."""

    def __init__(self, folder, dtype, shape):
        """Raises OSError or ValueError where the folder is not a whole segment."""
        self.path, self.dtype, self.shape = _shard_path(folder, shape), dtype, tuple(shape)
        data = (folder / "keys").read_bytes()
        keys, size = data[: -8 - CRC_BYTES], data[-8 - CRC_BYTES : -CRC_BYTES]
        if len(keys) % DIGEST_BYTES or _checksum(keys + size) != data[-CRC_BYTES:]:
            raise ValueError(f"{folder}/keys is damaged")
        self.keys = np.frombuffer(keys, KEY)
        self.size_bytes = int.from_bytes(size, "little")
        self._offsets = None

    def is_whole(self):
        """Whether the shard is there, in its full size; its bytes are checked when they are read."""
        try:
            return os.stat(self.path).st_size == self.size_bytes
        except OSError:
            return False

    def read(self, row):
        """One item, a new array in its real dtype. Raises CorruptEntry, or StoreError where it cannot be read now."""
        item = bytes(self.keys[row]).ljust(DIGEST_BYTES, b"\0").hex()
        array, checksum = np.empty(self.shape, STORED[self.dtype]), bytearray(CRC_BYTES)
        try:
            num_bytes = self._read_into([array.reshape(-1), checksum], row)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise StoreError(f"{self.path}: cannot read item {item}: {error.strerror}") from error
            num_bytes = 0
        if num_bytes != array.nbytes + CRC_BYTES or _checksum(array) != checksum:
            raise CorruptEntry(
                f"{self.path}: item {item} is damaged; run the stage that encodes it again, which "
                "encodes what is damaged and nothing else"
            )
        return array.view(REAL[self.dtype])

    def damaged_rows(self):
        """The rows that cannot be read, found by reading all of them."""
        return [row for row in range(len(self.keys)) if not self._is_sound(row)]

    def _is_sound(self, row):
        try:
            self.read(row)
        except CorruptEntry:
            return False
        return True

    def _read_into(self, buffers, row):
        file = os.open(self.path, os.O_RDONLY)
        try:
            if self._offsets is None:
                self._offsets = self._read_offsets(file)
            return os.preadv(file, buffers, int(self._offsets[row])) if len(self._offsets) else 0
        finally:
            os.close(file)

    def _read_offsets(self, file):
        """The byte offset of each row, or an empty array where the shard's index is damaged."""
        index_bytes = 16 * len(self.keys)
        data = os.pread(file, index_bytes + CRC_BYTES, max(self.size_bytes - index_bytes - CRC_BYTES, 0))
        if len(data) != index_bytes + CRC_BYTES or _checksum(data[:index_bytes]) != data[index_bytes:]:
            return np.empty(0, "<u8")
        return np.frombuffer(data[:index_bytes], "<u8").reshape(-1, 2)[:, 0]


def _shard_path(folder, shape):
    return Path(folder) / ("c.0" + ".0" * len(shape))


def _row_bytes(dtype, shape):
    return int(np.prod(shape, dtype=np.int64)) * STORED[dtype].itemsize + CRC_BYTES


def _checksum(data):
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def _write_at(file, data, offset):
    data = memoryview(data)
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
