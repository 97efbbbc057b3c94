"""The store: tensors that were encoded once, addressed by what decided their bytes.

An entry's address is a recipe (everything that decides the bytes besides the input) and an item (the digest of the
input). Entries live in immutable segments, each of them one zarr v3 array that any zarr reader opens. A reader sees
whole, committed entries only; any number of processes may read and write one store at once.
"""

from .address import Spelled, canonical, caption_item, caption_items, digest, recipe_id
from .digests import FileFacts
from .entries import Entries
from .errors import CorruptEntry, MissingEntry, StoreError
from .files import write_atomically
from .garbage import collect, find_garbage
from .leases import lease
from .needs import NEEDS_NAME, Need, Needs, Source, as_needs, needs_text, read_needs, union
from .store import Store
from .tensors import write_tensors
from .writer import Writer

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
    "lease",
    "needs_text",
    "read_needs",
    "recipe_id",
    "union",
    "write_atomically",
    "write_tensors",
]
