"""Content addresses: the same bytes, caption or recipe has the same name everywhere and forever."""

import functools
import hashlib
import math
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring

from cache.core.errors import StoreError

DIGEST_BYTES = 16
CAPTION = b"caption"


def hasher() -> "hashlib.blake2b":
    """A BLAKE2b hash object, whose result for some bytes is their `digest`."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def digest(data: bytes) -> str:
    """The address of some bytes, such as a whole image file: 32 hexadecimal digits."""
    return _named(data, b"")


def caption_item(text: str) -> str:
    """The address of a caption: its exact characters, never equal to the address of a file."""
    return _named(text.encode(), CAPTION)


def caption_items(texts: Iterable[str]) -> list[str]:
    """The address of each caption, in half the time of calling ``caption_item`` for each."""
    make = functools.partial(hashlib.blake2b, digest_size=DIGEST_BYTES, person=CAPTION)
    return [make(text.encode()).hexdigest() for text in texts]


def recipe_id(recipe: dict) -> str:
    """The address of a recipe, the same for any order of its keys. Raises as ``canonical`` does."""
    return _named(canonical(recipe), b"recipe")


class Spelled(str):
    """Text that is canonical JSON already: ``canonical`` takes it over as it is.

    For callers who know a faster way to spell a list of millions.
    """


def canonical(obj: object) -> bytes:
    """One spelling, as UTF-8 JSON, for all equal values: keys sorted, no spaces, whole floats as integers.

    Raises TypeError for what JSON cannot hold (and for keys that are not text), ValueError for NaN and infinity.
    """
    return _spelled(obj).encode()


def item_key(item: str) -> bytes:
    """The 16 bytes of an item's 32 hexadecimal digits. Raises StoreError for anything else."""
    try:
        key = bytes.fromhex(item)
    except (TypeError, ValueError):
        key = b""
    if len(key) != DIGEST_BYTES or key.hex() != item:
        raise StoreError(
            f"item {item!r} is not {2 * DIGEST_BYTES} hexadecimal digits; take what digest() or caption_item() gives"
        )
    return key


def item_keys(items: Sequence[str]) -> bytes:
    """The keys of many items, one after the other. Raises as ``item_key`` does."""
    try:
        text = "".join(items)
        keys = bytes.fromhex(text)
    except (TypeError, ValueError):
        text, keys = "wrong", b""
    if keys.hex() != text or not {2 * DIGEST_BYTES}.issuperset(map(len, items)):
        keys = b"".join(map(item_key, items))  # says which
    return keys


def _named(data: bytes, domain: bytes) -> str:
    """The address of ``data``; equal data in two domains have two addresses."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=domain).hexdigest()


def _spelled(obj: object) -> str:
    if isinstance(obj, str):
        return obj if isinstance(obj, Spelled) else encode_basestring(obj)
    if isinstance(obj, (list, tuple)):
        return f"[{','.join([_spelled(value) for value in obj])}]"
    if isinstance(obj, dict):
        if wrong := [key for key in obj if not isinstance(key, str)]:
            raise TypeError(f"a recipe's keys are text, found {wrong[0]!r} ({type(wrong[0]).__name__})")
        return f"{{{','.join([f'{encode_basestring(key)}:{_spelled(obj[key])}' for key in sorted(obj)])}}}"
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise ValueError(f"a recipe holds finite numbers, found {obj}")
        return int.__repr__(int(obj)) if obj.is_integer() else float.__repr__(obj)
    if obj is None or isinstance(obj, bool):
        return {None: "null", True: "true", False: "false"}[obj]
    if isinstance(obj, int):
        return int.__repr__(obj)
    raise TypeError(f"a recipe holds text, numbers, lists and tables, found {obj!r} ({type(obj).__name__})")
