"""What a LoRA file in diffusers' layout declares of its scale: the settings of PEFT's LoraConfig, in its metadata."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress

from cache import load_json
from pipeline.exchange.change import Changes

ADAPTER_METADATA = "lora_adapter_metadata"
"""Where in a file's metadata diffusers looks for the adapters' settings."""


def scale(text: str | None, component: str, layer: str = "") -> float:
    """What lora_B @ lora_A is multiplied by in a layer: lora_alpha / r, as the metadata's ``text`` says.

    Without a text it is 1, as in diffusers and ComfyUI.  A layer that rank_pattern or alpha_pattern names has its own.
    Raises ValueError where the text is damaged.
    """
    if not text:
        return 1.0
    with suppress(ValueError, TypeError, KeyError, ArithmeticError, AttributeError):
        declared = load_json(text)
        rank = _of(layer, declared.get(f"{component}.rank_pattern"), declared[f"{component}.r"])
        alpha = _of(layer, declared.get(f"{component}.alpha_pattern"), declared[f"{component}.lora_alpha"])
        found = alpha / (math.sqrt(rank) if declared.get(f"{component}.use_rslora") else rank)
        if math.isfinite(found):
            return found
    raise ValueError(f"{ADAPTER_METADATA} has no usable {component}.lora_alpha and {component}.r")


def _of(layer: str, pattern: Mapping | None, default):
    """PEFT takes a layer's own value where a name in the pattern is the layer's, or the end of it."""
    for name, value in (pattern or {}).items():
        if layer == name or layer.endswith(f".{name}"):
            return value
    return default


def metadata(changes: Changes) -> dict[str, str]:
    """The declaration with which PEFT applies the changes as they are: alpha = r, by layer where ranks differ."""
    found: dict[str, object] = {}
    for component, layers in changes.items():
        ranks = {name: change.rank for name, change in layers.items()}
        rank = max(ranks.values(), default=1)
        others = {name: ranks[name] for name in sorted(layers, key=_longest_first) if ranks[name] != rank}
        values = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "peft_type": "LORA"}
        values |= {"target_modules": sorted(layers), "rank_pattern": others, "alpha_pattern": others}
        values |= {"init_lora_weights": "gaussian", "use_dora": False, "use_rslora": False}
        found |= {f"{component}.{key}": value for key, value in values.items()}
    return {ADAPTER_METADATA: json.dumps(dict(sorted(found.items())), indent=2)}


def _longest_first(name: str) -> tuple[int, str]:
    """PEFT takes the first name that fits, and proj_out, of the model, also fits proj_out of a block."""
    return -len(name), name
