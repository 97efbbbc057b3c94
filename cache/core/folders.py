"""Finding the folders of a store on disk, for tools that do not know its recipes."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cache.core.entries import Entries, names_in
from cache.core.errors import StoreError
from cache.core.parsing import load_json
from cache.core.segment import Segment

FOLDER = re.compile(r"[a-z0-9][a-z0-9_]*-[0-9a-f]{32}")


def check_store(store: Path) -> Path:
    """The store's folder. Raises StoreError where there is none."""
    store = Path(store)
    if not store.is_dir():
        raise StoreError(f"{store}: there is no such store; name its folder, or an experiment file that uses it")
    return store


def folders(stores: Sequence[Path]) -> list[str]:
    """The names, KIND-ID, of all folders of entries in some stores, each once."""
    names = [name for store in stores for name in names_in(Path(store) / "entries")]
    return sorted({name for name in names if FOLDER.fullmatch(name)})


def entries_called(prefix: str, stores: Sequence[Path]) -> Entries:
    """The entries, from all stores together, of the only folder whose name begins with ``prefix``.

    Raises StoreError where there is none, or more than one, and as ``entries_at`` does.
    """
    found = [name for name in folders(stores) if name.startswith(prefix)]
    if len(found) != 1:
        what = f"{len(found)} entries begin so: {', '.join(found[:5])}" if found else "no entries begin so"
        raise StoreError(f"{prefix!r}: {what}; python -m cache ls {stores[0]} shows them by kind and id")
    paths = [Path(store) / "entries" / found[0] for store in stores]
    return entries_at(next(path for path in paths if path.is_dir()), stores)


def kind_of(folder: str) -> str:
    """The kind in a folder's name KIND-ID."""
    return folder.rpartition("-")[0]


def short_id(recipe_id: str) -> str:
    """The beginning of a recipe's id, which is what people are shown."""
    return recipe_id[:12]


def entries_at(folder: Path, stores: Sequence[Path] = ()) -> Entries:
    """The entries of the recipe in a folder STORE/entries/KIND-ID: those in ``stores``, or in that store alone.

    Raises StoreError where recipe.json is damaged or belongs to another folder.
    """
    path = Path(folder) / "recipe.json"
    try:
        entries = Entries(list(stores) or [path.parents[2]], load_json(path.read_bytes()))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, StoreError) as error:
        raise StoreError(f"{path}: damaged: it holds no recipe") from error
    if entries.path.name != path.parent.name:
        raise StoreError(f"{path}: damaged: the recipe in it is that of {entries.path.name}")
    return entries


def all_of_kind(stores: Sequence[Path], kind: str) -> list[Entries]:
    """The entries of each recipe of a kind, in all stores together; recipes that are damaged are left out."""
    found = []
    for name in folders(stores):
        paths = [Path(store) / "entries" / name for store in stores] if kind_of(name) == kind else []
        for path in paths:
            with suppress(StoreError):
                found.append(entries_at(path, stores))
                break
    return found


def store_of(segment: Segment) -> Path:
    """The store in which a segment lies: STORE/entries/KIND-ID/segments/NAME."""
    return Path(segment.folder).parents[3]


def born_ns(segment_name: str) -> int:
    """When a segment was begun, in ns since 1970, by its name."""
    return int(segment_name.partition("-")[0], 16)


def names_of(segment: Segment) -> list[str]:
    """The name of each row of a segment, by its zarr.json; all empty where that is damaged."""
    names = attributes_of(segment.folder).get("names")
    if isinstance(names, list) and len(names) == segment.num_rows and all(isinstance(name, str) for name in names):
        return names
    return [""] * segment.num_rows


def attributes_of(segment_folder: str) -> dict:
    """The attributes in a segment's zarr.json, unchecked; none where it cannot be read."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        attributes = load_json(Path(segment_folder, "zarr.json").read_bytes())["attributes"]
        return attributes if isinstance(attributes, dict) else {}
    return {}
