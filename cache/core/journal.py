"""The journal of a segment that is being written: one line per row.

By it, the next writer takes over the rows that a killed writer left.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from cache.core.address import item_key
from cache.core.errors import StoreError
from cache.core.files import named, write_all
from cache.core.parsing import load_json


class Journal:
    """One line of text for each row that is whole in the shard: its item, its checksum and its name.

    A line begins with the crc32c of the rest of it, so that a torn line is recognised. All methods raise OSError.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self._file, self._size = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666), 0

    def append(self, item: str, crc: bytes, name: str) -> None:
        """Note a row. Once this has returned, the row outlives the process; a power cut may still take it."""
        text = json.dumps([item, crc.hex(), name]).encode()
        line = b"%08x %s\n" % (google_crc32c.value(text), text)
        write_all(self._file, [line], self._size)
        self._size += len(line)

    def close(self) -> None:
        """Close the file; it stays on disk."""
        os.close(self._file)


def read_journal(path: str | Path) -> Iterator[tuple[str, bytes, str]]:
    """Yield (item, checksum, name) of each line, up to the first that is torn or holds no row. Raises OSError."""
    with named(path), open(path, "rb") as file:
        for line in file:
            crc, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % google_crc32c.value(text):
                return
            try:
                item, row_crc, name = load_json(text)
                item_key(item)
                row = item, bytes.fromhex(row_crc), name
            except (ValueError, TypeError, StoreError):  # another program must have written it
                return
            if not isinstance(name, str):
                return
            yield row
