"""How a segment lies on disk: where each row is in the shard, the shard's index, and the metadata for zarr."""

from collections.abc import Sequence

import google_crc32c
import ml_dtypes
import numpy as np

Dtypes = dict[str, np.dtype]
REAL: Dtypes = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
STORED: Dtypes = REAL | {"bfloat16": np.dtype("<u2")}  # zarr has no bfloat16
CRC_BYTES = 4
SIZE_BYTES = 8
PAGE_BYTES = 4096
LARGE_BYTES = 16 * PAGE_BYTES  # rows from this size on begin at a page, for mapped reads; smaller ones lie side by side


class Layout:
    """Where the rows of a segment lie in its shard: row i is at i * ``stride_bytes``."""

    def __init__(self, dtype: str, shape: Sequence[int]):
        self.dtype, self.shape = dtype, tuple(shape)
        self.stored, self.real = STORED[dtype], REAL[dtype]
        self.num_values = int(np.prod(shape, dtype=np.int64))
        self.data_bytes = self.num_values * self.stored.itemsize
        self.row_bytes = self.data_bytes + CRC_BYTES
        align = PAGE_BYTES if self.row_bytes >= LARGE_BYTES else 1
        self.stride_bytes = -(-self.row_bytes // align) * align
        self.shard_name = "c.0" + ".0" * len(self.shape)

    def rows_bytes(self, num_rows: int) -> int:
        """Bytes from the first row's beginning to the last one's end."""
        return (num_rows - 1) * self.stride_bytes + self.row_bytes if num_rows else 0

    def index(self, num_rows: int) -> bytes:
        """The shard's index, as the sharding codec wants it: (offset, length) of each chunk, crc32c."""
        pairs = np.full((num_rows, 2), self.row_bytes, "<u8")
        pairs[:, 0] = np.arange(num_rows, dtype=np.uint64) * np.uint64(self.stride_bytes)
        return pairs.tobytes() + checksum(pairs)

    def size_bytes(self, num_rows: int) -> int:
        """Bytes of a whole shard: its rows and its index."""
        return self.rows_bytes(num_rows) + 2 * SIZE_BYTES * num_rows + CRC_BYTES

    def metadata(self, num_rows: int, attributes: dict) -> dict:
        """The content of zarr.json."""
        little, crc = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
        sharding = {
            "chunk_shape": [1, *self.shape],
            "codecs": [little, crc],
            "index_codecs": [little, crc],
            "index_location": "end",
        }
        shape = [num_rows, *self.shape]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": self.stored.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"dtype": self.dtype, **attributes},
        }


def checksum(data: bytes | np.ndarray) -> bytes:
    """The crc32c of some bytes, as the 4 bytes that stand behind them in the file."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")
