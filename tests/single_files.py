"""A transformer's tensors renamed as Black Forest Labs publish them: `Flux` in flux/model.py of black-forest-labs/flux.

Written out here by hand, so that the table in pipeline/flux/published.py is compared with another.
"""

import numpy as np
from safetensors.numpy import load_file, save_file

STEMS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
DOUBLE_NORMS = {"norm_q": "img_attn.norm.query_norm", "norm_k": "img_attn.norm.key_norm"}
DOUBLE_NORMS |= {"norm_added_q": "txt_attn.norm.query_norm", "norm_added_k": "txt_attn.norm.key_norm"}


def published(tensors: dict) -> dict:
    found = {}
    for ending in ("weight", "bias"):
        for theirs, own in STEMS.items():
            if f"{theirs}.{ending}" in tensors:
                found[f"{own}.{ending}"] = tensors[f"{theirs}.{ending}"]
        scale, shift = np.split(tensors[f"norm_out.linear.{ending}"], 2)
        found[f"final_layer.adaLN_modulation.1.{ending}"] = np.concatenate([shift, scale])
        for number in numbers(tensors, "transformer_blocks."):
            own, block = f"double_blocks.{number}", f"transformer_blocks.{number}"
            for theirs, name in DOUBLE.items():
                found[f"{own}.{name}.{ending}"] = tensors[f"{block}.{theirs}.{ending}"]
            for side, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
                rows = [tensors[f"{block}.attn.{name}.{ending}"] for name in names]
                found[f"{own}.{side}_attn.qkv.{ending}"] = np.concatenate(rows)
        for number in numbers(tensors, "single_transformer_blocks."):
            own, block = f"single_blocks.{number}", f"single_transformer_blocks.{number}"
            names = "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"
            found[f"{own}.linear1.{ending}"] = np.concatenate([tensors[f"{block}.{name}.{ending}"] for name in names])
            found[f"{own}.linear2.{ending}"] = tensors[f"{block}.proj_out.{ending}"]
            found[f"{own}.modulation.lin.{ending}"] = tensors[f"{block}.norm.linear.{ending}"]
    for number in numbers(tensors, "transformer_blocks."):
        for theirs, name in DOUBLE_NORMS.items():
            found[f"double_blocks.{number}.{name}.scale"] = tensors[f"transformer_blocks.{number}.attn.{theirs}.weight"]
    for number in numbers(tensors, "single_transformer_blocks."):
        for theirs, name in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
            key = f"single_transformer_blocks.{number}.attn.{theirs}.weight"
            found[f"single_blocks.{number}.norm.{name}.scale"] = tensors[key]
    return found


def numbers(tensors: dict, prefix: str) -> set[int]:
    return {int(key.removeprefix(prefix).split(".")[0]) for key in tensors if key.startswith(prefix)}


def write_single_file(path, model, layout="bfl"):
    """The transformer of a model's folder as one file; "comfyui" has another component beside it."""
    tensors = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = tensors if layout == "diffusers" else published(tensors)
    if layout == "comfyui":
        tensors = {f"model.diffusion_model.{key}": array for key, array in tensors.items()}
        tensors["vae.decoder.conv_in.bias"] = np.zeros(3, np.float32)
    save_file(tensors, path, {"format": "pt", "modelspec.title": "The base"})
    return path
