"""LoRAs made up for tests, for transformers of any size."""

import numpy as np

from pipeline.exchange import lora_files
from pipeline.exchange.change import Change
from pipeline.exchange.lora_names import CLIP, TRANSFORMER
from pipeline.exchange.modelspec import About
from pipeline.flux import counts

CLIP_LAYER = "text_model.encoder.layers.1.self_attn.q_proj"


def config(double=2, single=3, heads=2, size=4):
    return {
        **{"num_layers": double, "num_single_layers": single, "num_attention_heads": heads},
        **{"attention_head_dim": size, "in_channels": 16, "joint_attention_dim": 12, "pooled_projection_dim": 6},
        "guidance_embeds": True,
    }


def lora_of(found: dict, wanted=lambda name: True, rank=3, scale=1.0):
    """A LoRA of the layers that are wanted, and of one of CLIP's; ``scale``, alpha / rank, is inside."""
    rng = np.random.default_rng(5)

    def change(inputs, outputs):
        down, up = (rng.standard_normal(shape, np.float32) for shape in ((rank, inputs), (outputs, rank)))
        return Change(down, up * np.float32(scale))

    layers = {name: change(*sizes) for name, sizes in counts.transformer_layers(found).items() if wanted(name)}
    return {TRANSFORMER: layers, CLIP: {CLIP_LAYER: change(8, 8)}}


def write(path, changes, layout, dtype="fp32", found=None, **about):
    lora_files.write(path, changes, layout, dtype, found or config(), About(**{"title": "A LoRA", "date": 0.0} | about))
