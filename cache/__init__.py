"""The store: tensors that were encoded once, addressed by what decided their bytes.

An entry's address is a recipe (everything that decides the bytes besides the input) and an item (the digest of the
input). Entries live in immutable segments, each of them one zarr v3 array that any zarr reader opens. A reader sees
whole, committed entries only; any number of processes may read and write one store at once.
"""

from cache.core.address import Spelled, canonical, caption_item, caption_items, digest, recipe_id
from cache.core.digests import FileFacts
from cache.core.entries import Entries
from cache.core.errors import CorruptEntry, MissingEntry, StoreError
from cache.core.files import write_atomically
from cache.core.leases import lease
from cache.core.needs import NEEDS_NAME, Need, Needs, Source, as_needs, needs_text, read_needs, union
from cache.core.parsing import load_json
from cache.core.store import Store
from cache.core.tensors import header_of, opened_tensors, write_tensors
from cache.core.text import print_anything, printable, printable_lines
from cache.core.writer import Writer
from cache.tools.garbage import collect, find_garbage

__all__ = [
    "CorruptEntry",
    "Entries",
    "FileFacts",
    "MissingEntry",
    "NEEDS_NAME",
    "Need",
    "Needs",
    "Source",
    "Spelled",
    "Store",
    "StoreError",
    "Writer",
    "as_needs",
    "canonical",
    "caption_item",
    "caption_items",
    "collect",
    "digest",
    "find_garbage",
    "header_of",
    "lease",
    "load_json",
    "needs_text",
    "opened_tensors",
    "print_anything",
    "printable",
    "printable_lines",
    "read_needs",
    "recipe_id",
    "union",
    "write_atomically",
    "write_tensors",
]
