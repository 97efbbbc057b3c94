"""Repair: writes files of a segment anew whose correct content is certain. All functions raise OSError."""

import json
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from cache.core.address import item_keys
from cache.core.entries import Entries
from cache.core.errors import StoreError
from cache.core.files import sync_folder, write_all, write_atomically
from cache.core.folders import attributes_of, names_of
from cache.core.layout import CRC_BYTES, SIZE_BYTES, Layout, checksum
from cache.core.recipe import recipe_text
from cache.core.segment import Segment


def complete_shard(segment: Segment) -> None:
    """Give a shard its index and its size. Rows that it had lost are then a hole, whose checksums do not hold.

    A copy takes the shard's place: a process that has mapped the old one must see that it is not whole, and not read
    the hole.
    """
    temporary, index = f"{segment.shard_path}.{secrets.token_hex(4)}.tmp", segment.layout.index(segment.num_rows)
    try:
        shutil.copyfile(segment.shard_path, temporary)
        with open(temporary, "r+b", buffering=0) as file:
            write_all(file.fileno(), [index], segment.layout.rows_bytes(segment.num_rows))
            file.truncate(segment.size_bytes)
            os.fsync(file.fileno())
        os.replace(temporary, segment.shard_path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(segment.folder)


def write_metadata(entries: Entries, segment: Segment) -> None:
    """Write a segment's zarr.json, with the names of its rows if those in the old one are sound."""
    says = {"kind": entries.recipe["kind"], "recipe": entries.id, "items": segment.items(), "names": names_of(segment)}
    text = json.dumps(segment.layout.metadata(segment.num_rows, says), indent=1)
    write_atomically(Path(segment.folder, "zarr.json"), text)


def proven_keys(folder: str, layout: Layout) -> bytes | None:
    """The correct content of a damaged file ``keys``, made of the items in zarr.json; None where it is not proven.

    It is proven if the damaged file has the same checksum, or equals it but for the checksum.
    """
    with suppress(OSError, TypeError, StoreError):
        found, items = Path(folder, "keys").read_bytes(), attributes_of(folder).get("items") or []
        keys = item_keys(items) + layout.size_bytes(len(items)).to_bytes(SIZE_BYTES, "little")
        if items and (found[-CRC_BYTES:] == checksum(keys) or found[:-CRC_BYTES] == keys):
            return keys + checksum(keys)
    return None


def write_recipe(entries: Entries, path: Path) -> None:
    """Write a recipe.json as a writer does."""
    write_atomically(path, recipe_text(entries.recipe))
