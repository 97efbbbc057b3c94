"""Cached tensors as one safetensors file, for tools that know nothing of the store.

The format, from https://github.com/huggingface/safetensors: the header's length (8 bytes, little-endian), the header (a
JSON table of dtype, shape and place of each tensor, padded with spaces), then the tensors' bytes, one after the other.
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .entries import Entries
from .errors import StoreError
from .files import sync_folder
from .leases import lease
from .needs import Need
from .store import Store
from .tables import count, quoted

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
KINDS = {"prompts": "txt", "pooled": "pooled", "latents": "latents", "controls": "controls"}
METADATA = "__metadata__"
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # what readers of the format accept

Tensors = dict[str, tuple[Entries, str]]
"""The entries and the item of each tensor, by its key in the file."""


def export(store: Store, needs: Sequence[Need], kind: str, path: Path, force=False, experiment: str = "") -> dict:
    """Write what an experiment needs of a kind (one of ``KINDS``) to ``path``, by caption or by file name.

    Tensors are read and written one by one, in the order of their keys; the file appears when it is whole. Returns
    what it holds. Raises StoreError where entries are missing or damaged, where the file is there already (unless
    ``force``) or cannot be written; then nothing is written. experiment: the name of its file, for that error.
    """
    path, needs = Path(path), [need for need in needs if need.recipe["kind"] == KINDS[kind]]
    if not needs:
        raise StoreError(f"{path}: not written: the experiment has no {kind}; choose another --kind")
    if os.path.lexists(path) and not force:
        raise StoreError(f"{path}: is there already; choose another name, or --force to replace it")
    with_entries = [(need, store.entries(need.recipe)) for need in needs]
    for need, entries in with_entries:
        _refuse_missing(path, need, entries, experiment)
    tensors = _tensors(path, with_entries)
    header = _header(path, tensors, _metadata(kind, [entries for _, entries in with_entries]))
    with lease(store.path, needs), _appearing(path) as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for entries, item in tensors.values():
            file.write(entries.read(item).reshape(-1).view(np.uint8))
    recipes = [entries.id for _, entries in with_entries]
    return {
        "path": os.fspath(path),
        "kind": kind,
        "recipes": recipes,
        "num_tensors": len(tensors),
        "num_bytes": path.stat().st_size,
    }


def _refuse_missing(path, need, entries, experiment):
    option = f" --experiment {experiment}" if experiment else ""
    if missing := entries.missing(need.items):
        wanted = count(len(need.items), "entry", "entries")
        raise StoreError(
            f"{path}: not written: {len(missing):,} of {wanted} of {entries.path.name} missing; first run "
            f"luigi --module tasks {need.stage} --local-scheduler{option}"
        )


def _tensors(path, with_entries) -> Tensors:
    found: Tensors = {}
    for need, entries in with_entries:
        for source in need.sources:
            if problem := _problem(source.key, found):
                raise StoreError(f"{path}: not written: the tensor of {quoted(source.name)} {problem}")
            found[source.key] = entries, source.item
    return dict(sorted(found.items()))


def _problem(key, found):
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


def _metadata(kind, several: Sequence[Entries]) -> dict[str, str]:
    """What the file says of itself. With several recipes of the kind, their ids and recipes stand in one list each."""
    ids, recipes = [entries.id for entries in several], [entries.recipe for entries in several]
    recipe = json.dumps(recipes[0] if len(recipes) == 1 else recipes, sort_keys=True)
    return {"kind": kind, "recipe_id": ",".join(ids), "recipe": recipe}


def _header(path, tensors: Tensors, metadata) -> bytes:
    table, end = {METADATA: metadata}, 0
    for key, (entries, _) in tensors.items():
        begin, end = end, end + entries.layout.data_bytes
        table[key] = {"dtype": DTYPES[entries.dtype], "shape": entries.shape, "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise StoreError(
            f"{path}: not written: {count(len(tensors), 'tensor')} need a header of {len(text)} bytes, and readers of "
            f"safetensors accept {MAX_HEADER_BYTES}; export fewer at a time"
        )
    return text + b" " * (-len(text) % LENGTH_BYTES)


@contextmanager
def _appearing(path) -> Iterator:
    """A file to write to that gets its name, durably, at the end of the block, or leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StoreError(f"{path}: not written: {error.strerror}; choose another place, or make room") from error
