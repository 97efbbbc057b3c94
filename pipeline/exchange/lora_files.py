"""LoRA files in the layouts of `lora_names`, read and written.

A layer's change is up @ down, times alpha / rank where the file has an alpha, or declares one in its metadata.  What is
written has alpha = rank, so that a reader that knows nothing of alpha applies the same.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from cache import opened_tensors, write_tensors
from pipeline.errors import UserError
from pipeline.exchange import declared, lora_names, modelspec
from pipeline.exchange.change import Change, Changes
from pipeline.exchange.fused import fuse, split
from pipeline.exchange.lora_names import CLIP, DOWN, TRANSFORMER, UP
from pipeline.exchange.modelspec import About
from pipeline.exchange.rounding import in_dtype
from pipeline.flux import counts, weights

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file."""

KOHYA = {
    "ss_base_model_version": "flux1",
    "ss_network_module": "networks.lora_flux",
    "ss_v2": "False",
}
"""What sd-scripts' readers look for; ss_network_dim and ss_network_alpha are added."""


def read(path: Path, config: Mapping) -> tuple[Changes, dict[str, str]]:
    """A LoRA file of any of the layouts, and its metadata.  config: the transformer's.

    Raises UserError where it cannot be read, holds more than a LoRA of FLUX.1, or does not fit the transformer.
    """
    tensors, metadata = _read_tensors(path)
    layers = counts.transformer_layers(dict(config))
    places, pieces = lora_names.Places(layers), _pieces(path, tensors)
    found: Changes = {}
    fused: dict[str, Change] = {}
    for stem, piece in pieces.items():
        place = places.find(stem)
        if place is None:
            raise UserError(f"{path}: FLUX.1 has no such layer as {stem}, or this model has fewer blocks")
        if missing := {"down", "up"} - piece.keys():
            raise UserError(f"{path}: {stem} has no {missing.pop()}; the file is incomplete")
        change = _change(path, piece, place, metadata)
        if place.is_published:
            fused[place.layer] = change
        else:
            found.setdefault(place.component, {})[place.layer] = change
    try:
        parts = split(fused, {name: outputs for name, (_, outputs) in layers.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}; it is a LoRA of another model") from None
    if parts:
        found[TRANSFORMER] = found.get(TRANSFORMER, {}) | parts
    _check_sizes(path, found, layers)
    return found, metadata


def metadata_of(path: Path) -> dict[str, str]:
    """What a file says of itself.  Raises UserError where it cannot be read."""
    return weights.metadata_of(_there(path))


def _there(path: Path) -> Path:
    if not path.is_file():
        what = "a folder; name a file in it" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}")
    return path


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with opened_tensors(_there(path)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None


def _pieces(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """By stem: "down", "up" and perhaps "alpha"."""
    pieces: dict[str, dict[str, np.ndarray]] = {}
    others = []
    for key, array in tensors.items():
        if parts := lora_names.parts_of(key):
            pieces.setdefault(parts[0], {})[parts[1]] = array
        else:
            others.append(key)
    if not pieces:
        raise UserError(f"{path}: no LoRA of FLUX.1 in a layout that is known here: {', '.join(lora_names.LAYOUTS)}")
    if others:
        raise UserError(
            f"{path}: no plain LoRA: it has {others[0]}" + (f" and {len(others) - 1} more" if others[1:] else "")
        )
    return pieces


def _change(path: Path, piece: Mapping[str, np.ndarray], place: lora_names.Place, metadata: Mapping) -> Change:
    down, up = piece["down"].astype(np.float32), piece["up"].astype(np.float32)
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] or up.shape[1] != down.shape[0]:
        raise UserError(f"{path}: {place.layer}: up {up.shape} and down {down.shape} are no LoRA of a linear layer")
    if "alpha" in piece:
        scale = float(piece["alpha"].reshape(-1)[0]) / down.shape[0]
    else:
        try:
            scale = declared.scale(metadata.get(declared.ADAPTER_METADATA), place.component, place.layer)
        except ValueError as error:
            raise UserError(f"{path}: its metadata is damaged: {error}") from None
    return Change(down, up * np.float32(scale))


def _check_sizes(path: Path, changes: Changes, layers: counts.Layers) -> None:
    for name, change in changes.get(TRANSFORMER, {}).items():
        inputs, outputs = layers[name]
        if (change.down.shape[1], change.up.shape[0]) != (inputs, outputs):
            raise UserError(
                f"{path}: {name} changes {change.up.shape[0]} x {change.down.shape[1]}, the model's layer is "
                f"{outputs} x {inputs}: it is a LoRA of another model"
            )


def write(path: Path, changes: Changes, layout: str, dtype: str, config: Mapping, about: About) -> None:
    """Write a LoRA in a layout.  dtype: "fp32", "fp16" or "bf16".  config: the transformer's.

    Raises UserError where a number is too large for the dtype, or where there is no folder to write to.
    """
    named = dict(_as_diffusers(changes) if layout == "diffusers" else _as_others(layout, changes, config))
    arrays = {key: in_dtype(path, key, array, dtype) for key, array in named.items()}
    arrays = {key: arrays[key] for key in sorted(arrays, key=lambda key: (-arrays[key].itemsize, key))}
    shapes = {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
    metadata = dict(about.kept) | modelspec.of_lora(about, config, arrays.values()) | _of_layout(layout, changes)
    if layout == "kohya":
        metadata |= modelspec.sshs_hashes(path, shapes, arrays.values(), metadata)
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder; make it first")
    write_tensors(path, shapes, arrays.values(), metadata)


def _as_diffusers(changes: Changes) -> Iterator[tuple[str, np.ndarray]]:
    for component, layers in changes.items():
        for name, change in layers.items():
            stem = lora_names.stem("diffusers", component, name)
            yield stem + DOWN["diffusers"], change.down
            yield stem + UP["diffusers"], change.up


def _as_others(layout: str, changes: Changes, config: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    outputs = {name: size for name, (_, size) in counts.transformer_layers(dict(config)).items()}
    for component, layers in changes.items():
        published = fuse(layers, outputs) if component == TRANSFORMER else layers
        for name, change in published.items():
            stem = lora_names.stem(layout, component, name)
            yield stem + DOWN[layout], change.down
            yield stem + UP[layout], change.up
            yield stem + lora_names.ALPHA, np.array(change.rank, np.float32)


def _of_layout(layout: str, changes: Changes) -> dict[str, str]:
    """What readers of the layout look for; kohya's says the largest rank of a layer."""
    if layout == "diffusers":
        return declared.metadata(changes)
    ranks = {change.rank for layers in changes.values() for change in layers.values()}
    rank = str(max(ranks, default=0))
    return KOHYA | {"ss_network_dim": rank, "ss_network_alpha": rank} if layout == "kohya" else {}


def described(changes: Changes) -> str:
    """For people: how many layers, of which ranks."""
    parts = []
    for component, label in ((TRANSFORMER, "layers"), (CLIP, "of CLIP")):
        if layers := changes.get(component):
            ranks = sorted({change.rank for change in layers.values()})
            said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
            parts.append(f"{len(layers)} {label}, {said}")
    return "; ".join(parts)
