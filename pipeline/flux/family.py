"""FLUX.1 as a family: what a stage has to know of the components of FLUX.1.

A second family is a second folder with a class like this one, and a line in `pipeline.plan.families`.  Only what needs
a model imports MindSpore; the scheduler asks here too.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.devices.precision import Policy
from pipeline.flux import counts, flow, models, noise_levels, pretrained
from pipeline.flux.prediction import prediction
from pipeline.settings.fields import Data


class CaptionEncoder(NamedTuple):
    """A text encoder.  kind: what the store calls its outputs.  output: which of the model's outputs is kept."""

    kind: str
    component: str
    tokenizer: str
    output: int
    stage: str
    label: str


class CaptionWork(NamedTuple):
    """What the memory that a text encoder takes for a caption follows from."""

    tokens: int
    inner_width: int
    heads: int


class NetworkSize(NamedTuple):
    """What the memory that the network takes for a batch follows from."""

    blocks: int
    heads: int
    width: int


class Flux:
    """FLUX.1-dev and FLUX.1-schnell, and models of their format."""

    network = "transformer"
    image_encoder = "vae"
    caption_encoders = {
        "pooled": CaptionEncoder("pooled", "text_encoder", "tokenizer", 1, "EncodeCLIP", "CLIP"),
        "txt": CaptionEncoder("txt", "text_encoder_2", "tokenizer_2", 0, "EncodeT5", "T5"),
    }
    trainable_encoder = caption_encoders["pooled"]
    """The text encoder that a LoRA may train too."""

    # --- what the store keeps ---

    def caption_settings(self, kind: str, folder: Path, data: Data) -> dict:
        """What decides the outputs of a caption encoder besides its weights: the length in tokens; and their shape."""
        encoder = self.caption_encoders[kind]
        config = pretrained.config(folder, encoder.component)
        if kind == "pooled":
            return {"max_length": config["max_position_embeddings"], "shape": [config["hidden_size"]]}
        length = data.max_sequence_length
        return {"max_length": length, "shape": [length, config["d_model"]]}

    def posterior_shape(self, config: dict, width: int, height: int) -> list[int]:
        """(2 * latent channels, height, width) of the posterior of a picture of so many pixels: means, log-variances.

        config: of the image encoder, as below.
        """
        scale = self.pixels_per_latent(config)
        return [2 * config["latent_channels"], height // scale, width // scale]

    def pixels_per_latent(self, config: dict) -> int:
        """How many pixels wide a place of the latents is."""
        return 2 ** (len(config["block_out_channels"]) - 1)

    def scaling(self, config: dict) -> dict:
        """What latents are shifted and scaled by between the VAE and the network; part of runs' identities."""
        return {key: config.get(key) for key in ("scaling_factor", "shift_factor")}

    # --- loading ---

    def load(
        self, folder: Path, component: str, policy: Policy | None, variant: str = "", transformer: Path | None = None
    ):
        """A component of the model in ``folder``, frozen, as its policy says; or a tokenizer, which has no policy."""
        return models.load_component(folder, component, policy, variant, transformer)

    def recompute_blocks(self, network) -> None:
        """Keep no activations inside the blocks of a network; see `models.recompute_blocks`."""
        models.recompute_blocks(network)

    def blocks_of(self, network) -> list:
        return models.blocks_of(network)

    def keeps_fp32(self, component: str) -> str:
        """If a component is loaded in this dtype, mindone keeps some of its parameters in float32 even so; "": none."""
        return models.KEEPS_FP32.get(component, "")

    # --- a batch, in NumPy ---

    def packed(self, posterior: np.ndarray, noise: np.ndarray | None, config: dict) -> np.ndarray:
        """What the network sees of pictures: (batch, tokens, channels), drawn from the VAE's posterior, or its mode.

        posterior: (batch, 2 * channels, height, width).  noise: (batch, channels, height, width); None for the mode.
        """
        latents = flow.sample_posterior(posterior, noise)
        return flow.pack(flow.normalized(latents, config["shift_factor"], config["scaling_factor"]))

    def unscaled(self, latents: np.ndarray, config: dict) -> np.ndarray:
        """Latents as the VAE decodes them."""
        return flow.unnormalized(latents, config["shift_factor"], config["scaling_factor"])

    def pack(self, latents: np.ndarray) -> np.ndarray:
        """(batch, channels, height, width) to (batch, tokens, channels of a token)."""
        return flow.pack(latents)

    def unpack(self, tokens: np.ndarray, height: int, width: int) -> np.ndarray:
        """The inverse of `pack`; height and width of the latents."""
        return flow.unpack(tokens, height, width)

    def sequence(
        self, x: np.ndarray, height: int, width: int, photos: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The picture's part of the network's sequence, and the position of each of its tokens, (tokens, 3).

        x: (batch, tokens, channels), noised latents of height x width.  photos: what training noised, in the shape of
        ``x``; None in sampling.  A family that shows the network more pictures puts their tokens behind those of ``x``,
        and its `prediction` takes them off again.
        """
        return x, flow.image_ids(height, width)

    def txt_positions(self, length: int) -> np.ndarray:
        return np.zeros((length, 3), np.float32)

    def timesteps(self, values: np.ndarray) -> np.ndarray:
        """The scheduler's timesteps as the network takes them."""
        return values / np.float32(1000)

    def training_levels(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        """Noise levels and timesteps that training draws from, from high to low."""
        return noise_levels.scheduler_sigmas(folder)

    def training_sigmas(self, folder: Path) -> np.ndarray:
        """The noise levels of `training_levels`; imports no MindSpore."""
        return noise_levels.training_sigmas(pretrained.config(folder, "scheduler"))

    def sampling_levels(self, folder: Path, num_steps: int, height: int, width: int) -> np.ndarray:
        """The noise levels of sampling latents of height x width, (num_steps + 1,), from high to 0."""
        return noise_levels.inference_sigmas(folder, num_steps, height // 2 * (width // 2))

    # --- the network ---

    def prediction(self, **networks) -> Callable:
        """What the networks predict together; see `pipeline.flux.prediction`."""
        return prediction(**networks)

    def is_guided(self, configs: Sequence[dict]) -> bool:
        """Whether any of the networks, by their configs, is told a guidance scale; FLUX.1-schnell is not."""
        return any(config.get("guidance_embeds") for config in configs)

    # --- counts, from configs alone ---

    def num_parameters(self, component: str, config: dict) -> int:
        return counts.component(component, config)

    def network_layers(self, config: dict) -> counts.Layers:
        """The linear layers of the network, which a LoRA may go into."""
        return counts.transformer_layers(config)

    def encoder_layers(self, config: dict) -> counts.Layers:
        """The linear layers of the trainable text encoder that a LoRA goes into."""
        return counts.text_encoder_layers(config)

    def num_kept_fp32(self, component: str, config: dict) -> int:
        """How many parameters `keeps_fp32` is about."""
        return counts.text_encoder_2_outputs(config) if component in models.KEEPS_FP32 else 0

    def caption_work(self, kind: str, config: dict, data: Data) -> CaptionWork:
        if kind == "pooled":
            names = "max_position_embeddings", "intermediate_size", "num_attention_heads"
            return CaptionWork(*(config[name] for name in names))
        return CaptionWork(data.max_sequence_length, config["d_ff"], config["num_heads"])

    def network_size(self, config: dict) -> NetworkSize:
        heads = config["num_attention_heads"]
        return NetworkSize(
            config["num_layers"] + config["num_single_layers"], heads, heads * config["attention_head_dim"]
        )

    def num_tokens(self, config: dict, width: int, height: int) -> int:
        """How many tokens a picture of so many pixels is.  config: of the image encoder."""
        return width * height // (2 * self.pixels_per_latent(config)) ** 2
