"""A ControlNet as one file for ComfyUI.

ComfyUI reads the tensors of diffusers' layout as they are, from one file: `load_controlnet_state_dict` in its
comfy/controlnet.py takes a file with controlnet_blocks.0 and controlnet_x_embedder for InstantX's, encodes the picture
with the VAE, and spreads the outputs over the transformer's blocks as diffusers does.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cache import write_tensors
from pipeline.errors import UserError
from pipeline.exchange import modelspec
from pipeline.exchange.modelspec import About
from pipeline.exchange.rounding import in_dtype
from pipeline.flux import model_configs, pretrained, weights
from pipeline.flux.weights import NAMES

CLASS = model_configs.CONFIGS[pretrained.CONTROLNET][0]


def folder_of(source: Path) -> Path:
    """A ControlNet's folder: a run's, or the source itself."""
    return source / pretrained.CONTROLNET if (source / pretrained.CONTROLNET).is_dir() else source


def is_here(source: Path) -> bool:
    path = folder_of(source) / "config.json"
    return path.is_file() and model_configs.class_of(pretrained.config(path.parent, pretrained.CONTROLNET)) == CLASS


def weights_of(source: Path) -> Path:
    """The first file of its weights.  Raises UserError where there is none."""
    return pretrained.weight_files(folder_of(source), pretrained.CONTROLNET)[0]


def metadata_of(source: Path) -> dict[str, str]:
    return weights.metadata_of(weights_of(source))


def write(source: Path, target: Path, layout: str, dtype: str, about: About) -> str:
    """Write the ControlNet as one file.  Returns what it is, for people.

    Raises UserError where the layout is another, or ComfyUI would not take it for a ControlNet.
    """
    folder = folder_of(source)
    if layout != "comfyui":
        raise UserError(f"{folder}: a ControlNet is in diffusers' layout as it is; --format comfyui makes it one file")
    config = pretrained.checked_config(folder, pretrained.CONTROLNET)
    if not config["num_layers"]:
        raise UserError(f"{folder}: has no double blocks, by which ComfyUI knows a ControlNet; train one with some")
    arrays: dict[str, np.ndarray] = {}
    for path in pretrained.weight_files(folder, pretrained.CONTROLNET):
        arrays |= weights.mapped(path)
    shapes = {name: (NAMES[dtype].name, arrays[name].shape) for name in sorted(arrays)}

    def values() -> Iterator[np.ndarray]:
        for name in shapes:
            yield in_dtype(target, name, arrays.pop(name), dtype)

    write_tensors(target, shapes, values(), dict(about.kept) | modelspec.of_file(about, config, pretrained.CONTROLNET))
    return f"ControlNet of {config['num_layers']} double and {config['num_single_layers']} single blocks"
