"""A FLUX.1 transformer in one file: as Black Forest Labs publish it, as ComfyUI keeps it, or under diffusers' names.

ComfyUI's checkpoints have the same names behind a prefix, and perhaps other components beside them.
"""

import re
from collections.abc import Iterator, Mapping

import numpy as np

from pipeline.flux.published import BLOCKS, OUTSIDE, SWAPPED, Layers, swapped

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
NORMS = {
    "double_blocks": {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    },
    "single_blocks": {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"},
}
"""The norms of queries and keys: "scale" where they were published, "weight" in diffusers and in newer ComfyUI."""

KINDS = {published: kind for kind, (published, _) in BLOCKS.items()}
IN_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")
PROJ_MLP, MLP_RATIO = "proj_mlp", 4
"""Of a single block's first layer, proj_mlp has four times as many rows as queries, keys or values."""


def prefix_of(names: Mapping) -> str:
    """What the transformer's tensors begin with in a file that has these."""
    return next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in names)), "")


def is_published(names: Mapping) -> bool:
    """Whether a file with these tensors is in the published layout."""
    prefix = prefix_of(names)
    return any(IN_BLOCK.fullmatch(name.removeprefix(prefix)) for name in names)


def as_diffusers(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The transformer's tensors of a file in any of the layouts, under diffusers' names.

    Queries, keys and values are views of what they were one of; only the last norm's shift and scale are copied, as
    they are in the other order.  Tensors of other components beside the transformer are left out; what FLUX.1 does not
    have keeps its name.
    """
    prefix = prefix_of(arrays)
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    if not is_published(arrays):
        return own
    return {name: part for key, array in own.items() for name, part in _parts(key, array)}


def _parts(key: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    layer, _, ending = key.rpartition(".")
    if norm := _norm(layer):
        yield f"{norm}.weight", array
    elif names := diffusers_names(layer):
        shares = [MLP_RATIO if name.endswith(PROJ_MLP) else 1 for name in names]
        unit, rest = divmod(len(array), sum(shares))
        if rest:
            yield key, array
            return
        rows = swapped(array) if layer == SWAPPED else array
        for name, part in zip(names, np.split(rows, np.cumsum(shares)[:-1] * unit)):
            yield f"{name}.{ending}", part
    else:
        yield key, array


def _norm(layer: str) -> str:
    if match := IN_BLOCK.fullmatch(layer):
        published, number, short = match.groups()
        if own := NORMS[published].get(short):
            return f"{KINDS[published]}.{number}.{own}"
    return ""


def diffusers_names(layer: str) -> tuple[str, ...]:
    """Of a published layer: the layers in diffusers that it is, in order; none where FLUX.1 does not have it."""
    match = IN_BLOCK.fullmatch(layer)
    if not match:
        return OUTSIDE.get(layer, ())
    published, number, short = match.groups()
    table: Layers = BLOCKS[KINDS[published]][1]
    return tuple(f"{KINDS[published]}.{number}.{name}" for name in table.get(short, ()))


def config_of(arrays: Mapping[str, np.ndarray]) -> dict:
    """What shapes say of a transformer's config.  arrays: under diffusers' names.

    Raises KeyError where one that says it is missing.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    width, channels = shapes["x_embedder.weight"]
    size = shapes[next(name for name in sorted(shapes) if name.endswith("attn.norm_q.weight"))][0]
    return {
        "num_layers": _count(shapes, "transformer_blocks."),
        "num_single_layers": _count(shapes, "single_transformer_blocks."),
        "num_attention_heads": width // size,
        "attention_head_dim": size,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _count(names: Mapping, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
