"""A ControlNet as one file, which ComfyUI takes for InstantX's."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline import commands
from pipeline.flux import counts, weights

CONFIG = {
    **{"_class_name": "FluxControlNetModel", "num_layers": 1, "num_single_layers": 0, "num_attention_heads": 2},
    **{"attention_head_dim": 4, "in_channels": 16, "joint_attention_dim": 12, "pooled_projection_dim": 6},
    "guidance_embeds": True,
}


def tensors() -> dict:
    layers = counts.transformer_layers(CONFIG) | {"controlnet_x_embedder": (16, 8), "controlnet_blocks.0": (8, 8)}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.standard_normal(sizes[::-1], np.float32) for name, sizes in layers.items()}


@pytest.fixture
def run(tmp_path):
    """A run's folder with the ControlNet in two shards."""
    folder, found = tmp_path / "run" / "controlnet", tensors()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, shards = sorted(found), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: found[name] for name in part}, folder / file, {"format": "pt", "run_id": "abc"})
        shards |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder.parent


def test_shards_become_the_one_file_that_comfyui_knows(run, capsys):
    """`load_controlnet_state_dict` in comfy/controlnet.py looks for the first two names, and for none of the others."""
    assert commands.main(["export", str(run), "--title", "Outlines"]) == 0
    path, _, said = capsys.readouterr().out.strip().partition(": ")
    assert path == str(run / "controlnet-comfyui-bf16.safetensors")
    assert said.startswith("ControlNet of 1 double and 0 single blocks, ")
    found = weights.mapped(run / "controlnet-comfyui-bf16.safetensors")
    assert {"controlnet_blocks.0.weight", "controlnet_x_embedder.weight"} <= found.keys()
    for other in ("double_blocks.0.img_attn.norm.key_norm.scale", "pos_embed_input.proj.weight", "lora_controlnet"):
        assert other not in found
    for name, array in tensors().items():
        np.testing.assert_array_equal(found[name], array.astype(ml_dtypes.bfloat16), name)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "flux-1-dev/controlnet"
    assert metadata["modelspec.title"] == "Outlines" and metadata["run_id"] == "abc"


def test_what_no_program_reads_is_refused(run, capsys):
    assert commands.main(["export", str(run), "--format", "kohya"]) == 1
    assert "a ControlNet is in diffusers' layout as it is; --format comfyui" in capsys.readouterr().err
    (run / "controlnet/config.json").write_text(json.dumps(CONFIG | {"num_layers": 0}))
    assert commands.main(["export", str(run)]) == 1
    assert "has no double blocks, by which ComfyUI knows a ControlNet" in capsys.readouterr().err
    assert not list(run.glob("*.safetensors"))
