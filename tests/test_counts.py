"""Counts from configs against models that were really made, and against the published sizes of FLUX.1-dev."""

import numpy as np
import pytest

from pipeline.devices.precision import Policy
from pipeline.flux import counts, models
from pipeline.methods import lora_layers as lora
from pipeline.settings.fields import Lora
from pipeline.settings.values import LORA_TARGETS

FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 49408,
    "max_position_embeddings": 77,
}  # fmt: skip
T5_XXL = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2, "in_channels": 3,
    "out_channels": 3, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


def test_flux_dev_from_its_configs_alone():
    """The sizes were found by making the models; the LoRA is that of diffusers' and mindone's scripts."""
    layers = counts.transformer_layers(FLUX_DEV)
    assert counts.transformer(FLUX_DEV) == 11_901_408_320
    assert counts.lora(layers, 4, LORA_TARGETS["attention"]) == 4_669_440
    assert counts.controlnet(FLUX_DEV, 4, 0) == 1_442_333_696
    assert counts.text_encoder(CLIP_L) == 123_060_480
    assert counts.lora(counts.text_encoder_layers(CLIP_L), 4, lora.TEXT_ENCODER_TARGETS) == 294_912
    assert counts.text_encoder_2(T5_XXL) == 4_762_310_656
    assert counts.vae(VAE) == (34_274_208, 49_545_475)


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_those_of_models_that_are_made(cpu, seed):
    from mindone.diffusers import FluxControlNetModel, FluxTransformer2DModel

    random = np.random.default_rng(seed)
    names = {"num_layers": 3, "num_single_layers": 3, "num_attention_heads": 3}
    config = {name: int(random.integers(1, high + 1)) for name, high in names.items()}
    config |= {"in_channels": 16, "joint_attention_dim": int(random.integers(8, 40)), "attention_head_dim": 16}
    config |= {"pooled_projection_dim": int(random.integers(8, 40)), "guidance_embeds": bool(random.integers(2))}
    axes = {"axes_dims_rope": (4, 6, 6)}
    made = FluxTransformer2DModel(**config | axes)
    assert counts.transformer(config) == size(made.get_parameters())
    double, single = (int(each) for each in random.integers(0, 3, 2))
    depths = {"num_layers": double, "num_single_layers": single}
    controlnet = FluxControlNetModel(**config | depths | axes)
    assert counts.controlnet(config, double, single) == size(controlnet.get_parameters())
    several = [*LORA_TARGETS, ("to_q", "*.ff.net.2"), ("single_transformer_blocks.0.attn.to_*",)]
    targets = several[seed % len(several)]
    rank, wanted = int(random.integers(1, 9)), LORA_TARGETS.get(targets, targets)
    settings = Lora(rank=rank, alpha=float(rank), targets=targets)
    for parameter in made.get_parameters():
        parameter.requires_grad = False
    trained = lora.inject(made, settings, Policy("fp32", "fp32", "fp32"), seed=0)
    assert counts.lora(counts.transformer_layers(config), rank, wanted) == size(trained)


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae"])
def test_counts_of_the_encoders_are_those_of_the_tiny_ones(tiny_model, component):
    from pipeline.flux.pretrained import config

    found = getattr(counts, component)(config(tiny_model, component))
    expected = size(models.load_model(tiny_model, component, "fp32").get_parameters())
    assert (sum(found) if component == "vae" else found) == expected


def test_the_part_of_t5_that_stays_in_fp32_beside_fp16_is_counted(tiny_model):
    from pipeline.devices import dtypes
    from pipeline.flux.pretrained import config

    found = dtypes.parameters_by_dtype(models.load_model(tiny_model, "text_encoder_2", "fp16").get_parameters())
    assert found["float32"] == counts.text_encoder_2_outputs(config(tiny_model, "text_encoder_2"))


def size(parameters) -> int:
    return sum(parameter.size for parameter in parameters)
