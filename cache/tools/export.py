"""Cached tensors as one safetensors file, for tools that know nothing of the store."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache.core.entries import Entries
from cache.core.errors import StoreError
from cache.core.files import is_taken
from cache.core.leases import lease
from cache.core.needs import Need
from cache.core.store import Store
from cache.core.tensors import METADATA, write_tensors
from cache.terminal.words import count, quoted

KINDS = {"prompts": "txt", "pooled": "pooled", "latents": "latents", "controls": "controls"}
"""What --kind may say, and the role, or else the recipe's kind, of the needs that it means."""

Tensors = dict[str, tuple[Entries, str]]
"""The entries and the item of each tensor, by its key in the file."""


def export(
    store: Store, needs: Sequence[Need], kind: str, path: Path, force: bool = False, experiment: str = ""
) -> dict:
    """Write the tensors that an experiment needs of a kind (one of ``KINDS``) to ``path``, by caption or file name.

    Tensors are read and written one by one, in the order of their keys; the file appears when it is whole. Returns a
    summary of the file. Raises StoreError where entries are missing or damaged, where the file is there already
    (unless ``force``) or cannot be written; then nothing is written. experiment: its file, to be named in errors.
    """
    path, needs = Path(path), [need for need in needs if (need.role or need.recipe["kind"]) == KINDS[kind]]
    if not needs:
        raise StoreError(f"{path}: not written: the experiment has no {kind}; choose another --kind")
    if is_taken(path) and not force:
        raise StoreError(f"{path}: is there already; choose another name, or --force to replace it")
    with_entries = [(need, store.entries(need.recipe)) for need in needs]
    for need, entries in with_entries:
        _refuse_missing(path, need, entries, experiment)
    tensors = _tensors(path, with_entries)
    recipes = [entries for _, entries in with_entries]
    shapes = {key: (entries.dtype, entries.shape) for key, (entries, _) in tensors.items()}
    rows = (entries.read(item) for entries, item in tensors.values())
    with lease(store.path, needs), _explained(path):
        write_tensors(path, shapes, rows, _metadata(kind, recipes))
    return {
        "path": os.fspath(path),
        "kind": kind,
        "recipes": [entries.id for entries in recipes],
        "num_tensors": len(tensors),
        "num_bytes": path.stat().st_size,
    }


def _refuse_missing(path: Path, need: Need, entries: Entries, experiment: str) -> None:
    option = f" --experiment {experiment}" if experiment else ""
    if missing := entries.missing(need.items):
        wanted = count(len(need.items), "entry", "entries")
        raise StoreError(
            f"{path}: not written: {len(missing):,} of {wanted} of {entries.path.name} missing; first run "
            f"luigi --module tasks {need.stage}{option}"
        )


def _tensors(path: Path, with_entries: Iterable[tuple[Need, Entries]]) -> Tensors:
    found: Tensors = {}
    for need, entries in with_entries:
        for source in need.sources:
            if problem := _problem(source.key, found):
                raise StoreError(f"{path}: not written: the tensor of {quoted(source.name)} {problem}")
            found[source.key] = entries, source.item
    return dict(sorted(found.items()))


def _problem(key: str, found: Tensors) -> str:
    """Why a tensor cannot have this key; empty where it can."""
    if key == METADATA:
        return f"would be called {METADATA}, which the format keeps for itself; rename it"
    if key in found:
        return f"would be called {quoted(key)}, as another one is; rename it"
    try:
        key.encode()
    except UnicodeEncodeError:
        return f"would be called {quoted(key)}, which has no UTF-8 form; rename it"
    return ""


def _metadata(kind: str, several: Sequence[Entries]) -> dict[str, str]:
    """The file's own metadata. Several recipes of the kind are listed, and so are their ids."""
    ids, recipes = [entries.id for entries in several], [entries.recipe for entries in several]
    recipe = json.dumps(recipes[0] if len(recipes) == 1 else recipes, sort_keys=True)
    return {"kind": kind, "recipe_id": ",".join(ids), "recipe": recipe}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: not written: {error.strerror}; choose another place, or make room") from error
