"""FLUX.1's layers under both their names: diffusers', and those of the model as it was published.

diffusers has a layer for each of queries, keys and values; the model as it was published has them in one, and in single
blocks the feed-forward's first too.  ComfyUI and sd-scripts use the published layout.
"""

import re
from collections.abc import Iterable

import numpy as np

Layers = dict[str, tuple[str, ...]]
"""Published layers, and those of diffusers that each is made of, in order."""

DOUBLE: Layers = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE: Layers = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE: Layers = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""Its outputs are shift, scale where it was published, and scale, shift in diffusers."""

BLOCKS = {"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)}
IN_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)")


def published_name(layer: str) -> tuple[str, int, tuple[str, ...]]:
    """Of diffusers' layer: the published one that it is in, which of its parts it is, and the names of all its parts.

    Raises KeyError where FLUX.1 has no such layer.
    """
    match = IN_BLOCK.fullmatch(layer)
    prefix, short, table, own = "", layer, OUTSIDE, ""
    if match:
        kind, number, short = match.groups()
        published, table = BLOCKS[kind]
        prefix, own = f"{published}.{number}.", f"{kind}.{number}."
    for name, parts in table.items():
        if short in parts:
            return prefix + name, parts.index(short), tuple(own + part for part in parts)
    raise KeyError(layer)


def names(layers: Iterable[str]) -> Layers:
    """The published layers of a transformer that has these layers in diffusers, each with its parts.

    Layers that FLUX.1 does not have are left out.
    """
    present = set(layers)
    found: Layers = {name: parts for name, parts in OUTSIDE.items() if parts[0] in present}
    for kind, (published, table) in BLOCKS.items():
        for number in sorted({int(layer.split(".")[1]) for layer in present if layer.startswith(f"{kind}.")}):
            for name, parts in table.items():
                found[f"{published}.{number}.{name}"] = tuple(f"{kind}.{number}.{part}" for part in parts)
    return found


def swapped(array: np.ndarray) -> np.ndarray:
    """With the halves of its rows exchanged, as `SWAPPED` needs it: a copy."""
    first, second = np.split(array, 2)
    return np.concatenate([second, first])
