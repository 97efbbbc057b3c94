"""The files of a checkpoint, changed for tests."""

import json

import pytest
from safetensors.numpy import load_file, save_file

COMPONENTS = ("text_encoder", "text_encoder_2", "vae", "transformer")
STEMS = dict.fromkeys(COMPONENTS[:2], "model") | dict.fromkeys(COMPONENTS[2:], "diffusion_pytorch_model")
each_component = pytest.mark.parametrize("component", COMPONENTS)


def single_file(folder, component, variant=""):
    return folder / component / f"{STEMS[component]}{variant and '.' + variant}.safetensors"


def edit(folder, component, change):
    """Rewrite the weights after ``change(tensors)``."""
    path = single_file(folder, component)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, component, **settings):
    path = folder / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def shard(folder, component, variant="", transform=lambda tensor: tensor):
    """Replace the single file by two shards and their index, named as diffusers and transformers name them."""
    tensors = load_file(single_file(folder, component))
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard_name = f"{STEMS[component]}{variant and '.' + variant}-0000{number}-of-00002.safetensors"
        save_file({name: transform(tensors[name]) for name in part}, folder / component / shard_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard_name)
    index = folder / component / f"{STEMS[component]}.safetensors.index{variant and '.' + variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index
