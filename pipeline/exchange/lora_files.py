"""LoRA files in three layouts, read and written: diffusers', kohya's (sd-scripts), and ComfyUI's own.

    diffusers   transformer.LAYER.lora_A.weight, .lora_B.weight; the scale is declared in the metadata
    kohya       lora_unet_PUBLISHED_LAYER.lora_down.weight, .lora_up.weight, .alpha; CLIP's begin with lora_te1_
    comfyui     diffusion_model.PUBLISHED.LAYER.lora_down.weight, ...; CLIP's with text_encoders.clip_l.transformer.

In the last two a layer's change is up @ down * alpha / rank.  What is written has alpha = rank, as what we save has
lora_alpha = r, so that a reader that knows nothing of alpha applies the same.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from cache import opened_tensors, write_tensors
from pipeline.errors import UserError
from pipeline.exchange.fused import fuse, split
from pipeline.exchange.layers import Change, published_name
from pipeline.flux import counts
from pipeline.methods.lora_layers import scale_of

LAYOUTS = ("diffusers", "kohya", "comfyui")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
TRANSFORMER, CLIP = "transformer", "text_encoder"
PREFIXES = {
    "kohya": {TRANSFORMER: "lora_unet_", CLIP: "lora_te1_"},
    "comfyui": {TRANSFORMER: "diffusion_model.", CLIP: "text_encoders.clip_l.transformer."},
}
ENDINGS = {"diffusers": (".lora_A.weight", ".lora_B.weight"), "others": (".lora_down.weight", ".lora_up.weight")}
KOHYA = {
    "ss_base_model_version": "flux1",
    "ss_network_module": "networks.lora_flux",
    "ss_v2": "False",
}
"""What sd-scripts' readers look for; ss_network_dim and ss_network_alpha are added."""

MOST_CLIP_LAYERS = 64
"""CLIP-L has 12."""

Changes = dict[str, dict[str, Change]]
"""By component, "transformer" and "text_encoder", and there by diffusers' name of the layer."""


def read(path: Path, config: Mapping) -> tuple[Changes, dict[str, str]]:
    """A LoRA file of any of the layouts, and its metadata.  config: the transformer's.

    Raises UserError where it cannot be read, is of no layout known here, or does not fit the transformer.
    """
    try:
        with opened_tensors(path) as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
    layout = _layout_of(path, tensors)
    try:
        found = _read_diffusers(path, tensors) if layout == "diffusers" else _read_others(layout, tensors, config)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing; the file is incomplete") from None
    _check_sizes(path, found, config)
    return found, metadata


def _layout_of(path: Path, tensors: Mapping) -> str:
    if any(key.endswith(ENDINGS["diffusers"]) for key in tensors):
        return "diffusers"
    for layout, prefixes in PREFIXES.items():
        if any(key.startswith(prefixes[TRANSFORMER]) for key in tensors):
            return layout
    raise UserError(f"{path}: no LoRA of FLUX.1 in a layout that is known here: {', '.join(LAYOUTS)}")


def _read_diffusers(path: Path, tensors: Mapping[str, np.ndarray]) -> Changes:
    found: Changes = {}
    down_ending, up_ending = ENDINGS["diffusers"]
    for key in tensors:
        if not key.endswith(down_ending):
            continue
        component, _, layer = key.removesuffix(down_ending).partition(".")
        up = _float32(tensors[key.removesuffix(down_ending) + up_ending]) * np.float32(scale_of(path, component))
        found.setdefault(component, {})[layer] = Change(_float32(tensors[key]), up)
    return found


def _read_others(layout: str, tensors: Mapping[str, np.ndarray], config: Mapping) -> Changes:
    prefixes, (down_ending, up_ending) = PREFIXES[layout], ENDINGS["others"]
    layers = counts.transformer_layers(dict(config))
    spelled = {_spelled(layout, name): name for name in _published(layers)}
    spelled_clip = {_spelled(layout, name): name for name in _clip_layers()}
    found: Changes = {TRANSFORMER: {}, CLIP: {}}
    for key in tensors:
        if not key.endswith(down_ending):
            continue
        stem = key.removesuffix(down_ending)
        component = CLIP if stem.startswith(prefixes[CLIP]) else TRANSFORMER
        short = stem.removeprefix(prefixes[component])
        name = (spelled if component == TRANSFORMER else spelled_clip).get(short, short)
        down, up = _float32(tensors[key]), _float32(tensors[stem + up_ending])
        alpha = float(tensors[stem + ".alpha"]) if stem + ".alpha" in tensors else down.shape[0]
        found[component][name] = Change(down, up * np.float32(alpha / down.shape[0]))
    found[TRANSFORMER] = split(found[TRANSFORMER], {name: outputs for name, (_, outputs) in layers.items()})
    return {component: changes for component, changes in found.items() if changes}


def _published(layers: counts.Layers) -> Iterator[str]:
    for layer in layers:
        yield published_name(layer)[0]


def _clip_layers() -> Iterator[str]:
    for number in range(MOST_CLIP_LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"text_model.encoder.layers.{number}.self_attn.{name}"


def _spelled(layout: str, name: str) -> str:
    return name.replace(".", "_") if layout == "kohya" else name


def _check_sizes(path: Path, changes: Changes, config: Mapping) -> None:
    layers = counts.transformer_layers(dict(config))
    for name, change in changes.get(TRANSFORMER, {}).items():
        inputs, outputs = layers.get(name, (0, 0))
        if (change.down.shape[1], change.up.shape[0]) != (inputs, outputs):
            raise UserError(
                f"{path}: {name} changes {change.up.shape[0]} x {change.down.shape[1]}, the model's layer is "
                f"{outputs} x {inputs}: it is a LoRA of another model"
            )


def write(path: Path, changes: Changes, layout: str, dtype: str, config: Mapping, metadata: Mapping[str, str]) -> None:
    """Write a LoRA in a layout.  dtype: "fp32", "fp16" or "bf16".  config: the transformer's.

    Raises UserError where a number is too large for the dtype.
    """
    tensors = dict(_as_diffusers(changes) if layout == "diffusers" else _as_others(layout, changes, config))
    arrays = {key: _in_dtype(path, key, array, dtype) for key, array in sorted(tensors.items())}
    shapes = {key: (array.dtype.name, array.shape) for key, array in arrays.items()}
    write_tensors(path, shapes, arrays.values(), dict(metadata) | _declared(layout, changes))


def _as_diffusers(changes: Changes) -> Iterator[tuple[str, np.ndarray]]:
    down_ending, up_ending = ENDINGS["diffusers"]
    for component, layers in changes.items():
        for name, change in layers.items():
            yield f"{component}.{name}{down_ending}", change.down
            yield f"{component}.{name}{up_ending}", change.up


def _as_others(layout: str, changes: Changes, config: Mapping) -> Iterator[tuple[str, np.ndarray]]:
    outputs = {name: size for name, (_, size) in counts.transformer_layers(dict(config)).items()}
    down_ending, up_ending = ENDINGS["others"]
    for component, layers in changes.items():
        fused = fuse(layers, outputs) if component == TRANSFORMER else layers
        for name, change in fused.items():
            stem = PREFIXES[layout][component] + _spelled(layout, name)
            yield stem + down_ending, change.down
            yield stem + up_ending, change.up
            yield stem + ".alpha", np.array(change.rank, np.float32)


def _declared(layout: str, changes: Changes) -> dict[str, str]:
    """What the file says of itself; ranks differ by layer where a file was made of another layout."""
    if layout == "diffusers":
        return {"format": "pt", "lora_adapter_metadata": json.dumps(_adapters(changes), indent=2, sort_keys=True)}
    ranks = {change.rank for change in changes[TRANSFORMER].values()}
    rank = str(max(ranks, default=0))
    return {"format": "pt"} | (KOHYA | {"ss_network_dim": rank, "ss_network_alpha": rank} if layout == "kohya" else {})


def _adapters(changes: Changes) -> dict[str, object]:
    """The settings of PEFT's LoraConfig that give these changes: alpha = r, by layer where ranks differ."""
    found: dict[str, object] = {}
    for component, layers in changes.items():
        ranks = {name: change.rank for name, change in layers.items()}
        rank = max(ranks.values(), default=1)
        others = {name: own for name, own in ranks.items() if own != rank}
        values = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "peft_type": "LORA"}
        values |= {"target_modules": sorted(layers), "rank_pattern": others, "alpha_pattern": others}
        values |= {"init_lora_weights": "gaussian", "use_dora": False, "use_rslora": False}
        found |= {f"{component}.{key}": value for key, value in values.items()}
    return found


def _float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def _in_dtype(path: Path, key: str, array: np.ndarray, dtype: str) -> np.ndarray:
    import ml_dtypes

    target = np.dtype(ml_dtypes.bfloat16) if dtype == "bf16" else np.dtype(DTYPES[dtype])
    with np.errstate(over="ignore"):  # said below
        found = np.asarray(array, order="C").astype(target)
    if not np.isfinite(found.astype(np.float32)).all() and math.isfinite(float(np.abs(array).max(initial=0))):
        raise UserError(f"{path}: {key} has numbers that {dtype} does not hold; choose another dtype")
    return found
