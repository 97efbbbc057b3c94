"""How many parameters FLUX.1's models have, from their configs alone: no weights are read, no model is made."""

import fnmatch
from collections.abc import Iterable

Layers = dict[str, tuple[int, int]]
"""Linear layers by name: inputs and outputs.  All have a bias."""


def transformer(config: dict) -> int:
    """All parameters of a FLUX.1 transformer with this config."""
    return sum(map(_linear, transformer_layers(config).values())) + _head_norms(config)


def controlnet(config: dict, num_double_layers: int, num_single_layers: int) -> int:
    """All parameters, which all train, of a ControlNet made from a transformer with this config."""
    own = config | {"num_layers": num_double_layers, "num_single_layers": num_single_layers}
    width = _width(config)
    layers = transformer_layers(own)
    del layers["norm_out.linear"], layers["proj_out"]
    layers["controlnet_x_embedder"] = config["in_channels"], width
    layers |= {f"controlnet_blocks.{i}": (width, width) for i in range(num_double_layers + num_single_layers)}
    return sum(map(_linear, layers.values())) + _head_norms(own)


def lora(layers: Layers, rank: int, targets: Iterable[str]) -> int:
    """The parameters that a LoRA trains on those of the layers that the targets mean."""
    names = {name for target in targets for name in layers if is_meant(name, target)}
    return rank * sum(sum(layers[name]) for name in names)


def is_pattern(target: str) -> bool:
    """Whether a target is a pattern, as of `fnmatch`, and no plain ending of a name."""
    return any(sign in target for sign in "*?[")


def is_meant(name: str, target: str) -> bool:
    """Whether a target, the ending of a module's name or a pattern for it, means this module."""
    return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")


def transformer_layers(config: dict) -> Layers:
    """All linear layers of a FLUX.1 transformer with this config."""
    width, channels = _width(config), config["in_channels"]
    outputs = config.get("patch_size", 1) ** 2 * (config.get("out_channels") or channels)
    inputs = {"timestep": 256, "guidance": 256, "text": config["pooled_projection_dim"]}
    if not config.get("guidance_embeds"):
        del inputs["guidance"]
    layers: Layers = {}
    for name, size in inputs.items():
        layers |= _named(f"time_text_embed.{name}_embedder.", linear_1=(size, width), linear_2=(width, width))
    layers |= {"context_embedder": (config["joint_attention_dim"], width), "x_embedder": (channels, width)}
    for i in range(config["num_layers"]):
        layers |= _double_block(f"transformer_blocks.{i}.", width)
    for i in range(config["num_single_layers"]):
        layers |= _single_block(f"single_transformer_blocks.{i}.", width)
    return layers | {"norm_out.linear": (width, 2 * width), "proj_out": (width, outputs)}


def _double_block(prefix: str, width: int) -> Layers:
    names = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    layers = {f"{prefix}attn.{name}": (width, width) for name in names}
    for norm in ("norm1", "norm1_context"):
        layers[f"{prefix}{norm}.linear"] = width, 6 * width
    for part in ("ff", "ff_context"):
        layers |= {f"{prefix}{part}.net.0.proj": (width, 4 * width), f"{prefix}{part}.net.2": (4 * width, width)}
    return layers


def _single_block(prefix: str, width: int) -> Layers:
    layers = {f"{prefix}attn.{name}": (width, width) for name in ("to_q", "to_k", "to_v")}
    layers[f"{prefix}norm.linear"] = width, 3 * width
    return layers | {f"{prefix}proj_mlp": (width, 4 * width), f"{prefix}proj_out": (5 * width, width)}


def _named(prefix: str, **layers) -> Layers:
    return {prefix + name: shape for name, shape in layers.items()}


def _width(config: dict) -> int:
    return config["attention_head_dim"] * config["num_attention_heads"]


def _head_norms(config: dict) -> int:
    """Of queries and keys: four vectors a double block, two a single one."""
    return config["attention_head_dim"] * (4 * config["num_layers"] + 2 * config["num_single_layers"])


def _linear(shape: tuple[int, int]) -> int:
    inputs, outputs = shape
    return inputs * outputs + outputs


def component(name: str, config: dict) -> int:
    """All parameters of a component; of the VAE, of encoder and decoder."""
    if name == "vae":
        return sum(vae(config))
    return {"transformer": transformer, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}[name](config)


# --- the encoders -------------------------------------------------------------------------------------------------


def text_encoder(config: dict) -> int:
    """All parameters of CLIP's text model."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    layer = 4 * _linear((width, width)) + _linear((width, inner)) + _linear((inner, width)) + 4 * width
    tables = (config["vocab_size"] + config["max_position_embeddings"]) * width
    return tables + config["num_hidden_layers"] * layer + 2 * width


def text_encoder_layers(config: dict) -> Layers:
    """Those linear layers of CLIP's text model that a LoRA goes into."""
    width, names = config["hidden_size"], ("q_proj", "k_proj", "v_proj", "out_proj")
    return {
        f"text_model.encoder.layers.{i}.self_attn.{name}": (width, width)
        for i in range(config["num_hidden_layers"])
        for name in names
    }


def text_encoder_2(config: dict) -> int:
    """All parameters of T5's encoder, whose feed-forward is gated where the config says so (T5 v1.1)."""
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    is_gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    layer = 4 * width * heads * config["d_kv"] + (2 + is_gated) * width * inner + 2 * width
    buckets = config.get("relative_attention_num_buckets", 32) * heads
    return config["vocab_size"] * width + config["num_layers"] * layer + buckets + width


def text_encoder_2_outputs(config: dict) -> int:
    """Those of them that are the feed-forwards' last projections; see `dtypes.KEEPS_FP32`."""
    return config["num_layers"] * config["d_ff"] * config["d_model"]


def vae(config: dict) -> tuple[int, int]:
    """All parameters of the VAE's encoder and of its decoder."""
    channels, latent = config["block_out_channels"], config["latent_channels"]
    per_block, deepest = config["layers_per_block"], config["block_out_channels"][-1]
    middle = 2 * _resnet(deepest, deepest)
    if config.get("mid_block_add_attention", True):
        middle += 4 * _linear((deepest, deepest)) + 2 * deepest
    down = [(before, after, per_block) for before, after in zip((channels[0], *channels), channels)]
    reverse = channels[::-1]
    up = [(before, after, per_block + 1) for before, after in zip((reverse[0], *reverse), reverse)]
    samplers = [_conv(each, each) for each in channels[:-1]], [_conv(each, each) for each in reverse[:-1]]
    quant = config.get("use_quant_conv", True), config.get("use_post_quant_conv", True)
    encoder = _conv(config.get("in_channels", 3), channels[0]) + sum(map(_block, down)) + sum(samplers[0]) + middle
    encoder += 2 * deepest + _conv(deepest, 2 * latent) + quant[0] * _conv(2 * latent, 2 * latent, 1)
    decoder = _conv(latent, deepest) + middle + sum(map(_block, up)) + sum(samplers[1])
    decoder += 2 * channels[0] + _conv(channels[0], config.get("out_channels", 3)) + quant[1] * _conv(latent, latent, 1)
    return encoder, decoder


def _block(shape: tuple[int, int, int]) -> int:
    before, after, count = shape
    return _resnet(before, after) + (count - 1) * _resnet(after, after)


def _resnet(before: int, after: int) -> int:
    shortcut = _conv(before, after, 1) if before != after else 0
    return 2 * before + _conv(before, after) + 2 * after + _conv(after, after) + shortcut


def _conv(before: int, after: int, size: int = 3) -> int:
    return before * after * size * size + after
