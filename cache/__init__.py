"""The store: tensors that were encoded once, addressed by what decided their bytes.

An entry's address is a recipe (everything that decides the bytes besides the input) and an item (the digest of the
input). Entries live in immutable segments, each of them one zarr v3 array that any zarr reader opens. A reader sees
whole, committed entries only; any number of processes may read and write one store at once.
"""

from .address import canonical, caption_item, digest, recipe_id
from .digests import FileFacts
from .entries import Entries
from .errors import CorruptEntry, MissingEntry, StoreError
from .files import write_atomically
from .store import Store
from .writer import Writer

__all__ = [
    "CorruptEntry",
    "Entries",
    "FileFacts",
    "MissingEntry",
    "Store",
    "StoreError",
    "Writer",
    "canonical",
    "caption_item",
    "digest",
    "recipe_id",
    "write_atomically",
]
