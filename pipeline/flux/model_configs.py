"""What the configs of FLUX.1's models must say, in diffusers' and transformers' names, for us to plan with them.

A config has more fields than are named here, and may: those are the classes' own business.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from pipeline.settings.schema import Flag, Number, Text, Whole, between, checked

Size = Annotated[Whole, between(1, 262_144)]
Depth = Annotated[Whole, between(0, 1000)]
Vocabulary = Annotated[Whole, between(1, 10_000_000)]
Epsilon = Annotated[Number, Field(gt=0, le=1)]


@dataclass(frozen=True)
class CLIPConfig:
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    vocab_size: Vocabulary
    max_position_embeddings: Annotated[Whole, between(1, 4096)]
    hidden_act: Text = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    def __post_init__(self):
        _must_divide(self.hidden_size, "hidden_size", num_attention_heads=self.num_attention_heads)


@dataclass(frozen=True)
class T5Config:
    d_model: Size
    d_ff: Size
    d_kv: Size
    num_heads: Size
    num_layers: Depth
    vocab_size: Vocabulary
    feed_forward_proj: Text = "relu"
    relative_attention_num_buckets: Annotated[Whole, between(4, 65_536)] = 32
    relative_attention_max_distance: Annotated[Whole, between(4, 65_536)] = 128
    layer_norm_epsilon: Epsilon = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    block_out_channels: Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)]
    layers_per_block: Annotated[Whole, between(1, 100)]
    latent_channels: Size
    scaling_factor: Annotated[Number, Field(gt=0, le=1_000_000)]
    shift_factor: Annotated[Number, Field(ge=-1_000_000, le=1_000_000)]
    in_channels: Annotated[Whole, between(3, 3)] = 3
    out_channels: Annotated[Whole, between(3, 3)] = 3
    norm_num_groups: Size = 32
    mid_block_add_attention: Flag = True

    def __post_init__(self):
        for channels in self.block_out_channels:
            _must_divide(channels, "block_out_channels", norm_num_groups=self.norm_num_groups)


@dataclass(frozen=True)
class TransformerConfig:
    num_layers: Depth
    num_single_layers: Depth
    num_attention_heads: Size
    attention_head_dim: Size
    in_channels: Size
    joint_attention_dim: Size
    pooled_projection_dim: Size
    out_channels: Size | None = None
    patch_size: Annotated[Whole, between(1, 64)] = 1
    guidance_embeds: Flag = False
    axes_dims_rope: Annotated[tuple[Annotated[Whole, between(2, 65_536, multiple_of=2)], ...], Field(max_length=3)] = (
        *(16, 56, 56),
    )

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            found = f"found {list(self.axes_dims_rope)} and {self.attention_head_dim}"
            raise ValueError(f"axes_dims_rope: must add up to attention_head_dim, {found}")


@dataclass(frozen=True)
class ControlNetConfig:
    num_layers: Depth
    num_single_layers: Depth


@dataclass(frozen=True)
class SchedulerConfig:
    num_train_timesteps: Annotated[Whole, between(1, 1_000_000)] = 1000
    use_dynamic_shifting: Flag = False
    shift: Annotated[Number, Field(gt=0, le=1_000_000)] = 1.0
    base_shift: Annotated[Number, Field(ge=-100, le=100)] = 0.5
    max_shift: Annotated[Number, Field(ge=-100, le=100)] = 1.15
    base_image_seq_len: Annotated[Whole, between(1, 1_000_000)] = 256
    max_image_seq_len: Annotated[Whole, between(1, 1_000_000)] = 4096

    def __post_init__(self):
        if self.base_image_seq_len == self.max_image_seq_len:
            raise ValueError("base_image_seq_len: must differ from max_image_seq_len")


def _must_divide(number: int, name: str, **divisor: int) -> None:
    ((divisor_name, value),) = divisor.items()
    if number % value:
        raise ValueError(f"{name}: must be a multiple of {divisor_name}, found {number} and {value}")


CONFIGS: dict[str, tuple[str, type]] = {
    "text_encoder": ("CLIPTextModel", CLIPConfig),
    "text_encoder_2": ("T5EncoderModel", T5Config),
    "vae": ("AutoencoderKL", VAEConfig),
    "transformer": ("FluxTransformer2DModel", TransformerConfig),
    "controlnet": ("FluxControlNetModel", ControlNetConfig),
    "scheduler": ("FlowMatchEulerDiscreteScheduler", SchedulerConfig),
}
"""Of each component the class of its model, and what its config must say."""


def class_of(config: dict) -> str:
    """The class that a config names, as diffusers or as transformers does; "none" where it names none."""
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else "none"
    return str(config.get("_class_name") or first)


def problems(component: str, config: dict) -> list[str]:
    """What is wrong with a component's config, each by its field; nothing where we can plan with it."""
    return checked(CONFIGS[component][1], config)[1]


def misfits(configs: dict[str, dict[str, Any]]) -> list[str]:
    """What of the components' configs, by component, does not fit together."""
    transformer, found = configs["transformer"], []
    for name, (component, key, factor) in {
        "in_channels": ("vae", "latent_channels", 4),
        "joint_attention_dim": ("text_encoder_2", "d_model", 1),
        "pooled_projection_dim": ("text_encoder", "hidden_size", 1),
    }.items():
        wanted = factor * configs[component][key]
        if transformer[name] != wanted:
            times = f"{factor} times " if factor > 1 else ""
            found.append(f"{name} is {transformer[name]}, but {times}{key} of {component} is {wanted}")
    return found
