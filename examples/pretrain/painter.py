"""The FLUX.1 transformer, and CLIP and T5 that are trained with it from scratch, on the trained VAE's latents."""

import json
import math
import shutil
from pathlib import Path

import autoencoder
import captions
import numpy as np
import pictures
import torch
from checkpoints import Checkpoint
from diffusers import AutoencoderKL, FluxTransformer2DModel
from muon import Muon
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipeline.flux import flow, models, tiny
from pipeline.synthetic import shapes

CYCLES = ((4000, 1.5e-3), (2000, 1e-3), (3000, 1e-3), (2500, 1e-3))
"""Steps, and the learning rate from which it falls to zero in them."""

BATCH, WARMUP = 64, 100
LOGIT_MEAN, LOGIT_STD = 0.3, 1.4  # of logit(sigma): above 0 prefers much noise; [train] logit_mean has the other sign
AVERAGE = 0.998  # decay of the weights' moving average, which is what is saved
PICTURES = 12_000
LENGTHS = (16, 24)  # tokens that T5 pads captions to; 24 is the one to use
GUIDANCE = 3.5


class Painter(torch.nn.Module):
    """What is trained together: both text encoders and the transformer."""

    def __init__(self, clip_size: int, clip_end: int, t5_size: int):
        super().__init__()
        self.clip, self.t5, self.transformer = _clip(clip_size, clip_end), _t5(t5_size), _transformer()

    def forward(self, x, sigma, clip_tokens, t5_tokens, img_ids):
        """The velocity at ``x``, (batch, tokens, 64), as FluxPipeline asks the models for it."""
        txt, pooled = self.t5(t5_tokens).last_hidden_state, self.clip(clip_tokens).pooler_output
        return self.transformer(
            hidden_states=x,
            timestep=sigma,
            guidance=torch.full_like(sigma, GUIDANCE),
            pooled_projections=pooled,
            encoder_hidden_states=txt,
            txt_ids=torch.zeros(txt.shape[1], 3),
            img_ids=img_ids,
            return_dict=False,
        )[0]


def _clip(vocab_size: int, end: int) -> CLIPTextModel:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocab_size, max_position_embeddings=77, **sizes, **tokens))


def _t5(vocab_size: int) -> T5EncoderModel:
    sizes = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5EncoderModel(T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", **sizes))


def _transformer() -> FluxTransformer2DModel:
    """3.6 million parameters; each block begins as the identity (adaLN-Zero, arXiv:2212.09748)."""
    model = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    for name, parameter in model.named_parameters():
        if ("norm" in name and ".linear." in name) or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return model


class Batches:
    """Latents in memory, and batches of them that depend on the step only."""

    def __init__(self, vae_folder: Path, tokenizers: Path):
        vae = AutoencoderKL.from_pretrained(vae_folder)
        self.pictures = pictures.drawn(shapes.TRAINING, PICTURES)
        self.mean, self.std = (each.numpy() for each in autoencoder.posteriors(vae, PICTURES))
        self.shift, self.scale = vae.config.shift_factor, vae.config.scaling_factor
        self.clip, self.t5 = (models.load_tokenizer(tokenizers, name) for name in ("tokenizer", "tokenizer_2"))
        self.img_ids = torch.from_numpy(flow.image_ids(*self.mean.shape[2:]))

    def make(self, step: int) -> tuple[tuple, torch.Tensor]:
        """The model's inputs, and the velocity that it should give; noise levels are logit-normal."""
        random = np.random.default_rng([1, step])
        chosen = random.integers(PICTURES, size=BATCH)
        latents = self.mean[chosen] + self.std[chosen] * random.standard_normal(self.mean[chosen].shape, np.float32)
        latents = flow.pack(flow.normalized(latents, self.shift, self.scale))
        noise = random.standard_normal(latents.shape, np.float32)
        sigma = (1 / (1 + np.exp(-LOGIT_MEAN - LOGIT_STD * random.standard_normal(BATCH)))).astype(np.float32)
        texts = [captions.varied(self.pictures[index], random) for index in chosen]
        tokens = self.tokens(texts, int(random.choice(LENGTHS)))
        x = flow.noised(latents, noise, sigma)
        return (torch.from_numpy(x), torch.from_numpy(sigma), *tokens, self.img_ids), torch.from_numpy(noise - latents)

    def tokens(self, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's tokens, as long as the longest needs (later ones change nothing), and T5's, padded to ``length``."""
        clip = self.clip(texts, padding="longest", return_tensors="pt").input_ids
        t5 = self.t5(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return clip, t5


def train(out: Path, scratch: Path) -> None:
    """Write both text encoders and the transformer beside the VAE and the tokenizers in ``out``."""
    torch.manual_seed(0)
    painter, batches = Painter(*captions.write_tokenizers(_emptied(out))), Batches(out / "vae", out)
    average = AveragedModel(painter, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimizers = _optimizers(painter)
    checkpoint = Checkpoint(scratch / "painter.pt", painter, average, *optimizers)
    losses = []
    for step in range(checkpoint.restore(), sum(steps for steps, _ in CYCLES)):
        inputs, target = batches.make(step)
        loss = (painter(*inputs) - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = _learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(painter)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            checkpoint.say(step + 1, loss=float(np.mean(losses[-100:])))
            checkpoint.save(step + 1)
    save(average.module, out)


def _optimizers(painter: Painter) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the models, AdamW for all else."""
    at_the_ends = "embed", "shared", "transformer.proj_out", "relative_attention_bias"
    inner = {n for n, p in painter.named_parameters() if p.ndim == 2 and not any(end in n for end in at_the_ends)}
    matrices = [parameter for name, parameter in painter.named_parameters() if name in inner]
    others = [parameter for name, parameter in painter.named_parameters() if name not in inner]
    return Muon(matrices, 0.0), torch.optim.AdamW(others, 0.0, betas=(0.9, 0.99), weight_decay=0.01)


def _learning_rate(step: int) -> float:
    """In each cycle a warm-up, then a cosine down to zero."""
    (steps, peak), *later = CYCLES
    while step >= steps:
        step -= steps
        (steps, peak), *later = later
    return peak * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _emptied(out: Path) -> Path:
    for component in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(out / component, ignore_errors=True)
    return out


def save(painter: Painter, out: Path) -> None:
    """A checkpoint in diffusers layout, in half precision."""
    parts = {"text_encoder": painter.clip, "text_encoder_2": painter.t5, "transformer": painter.transformer}
    parts["vae"] = AutoencoderKL.from_pretrained(out / "vae")
    for component, model in parts.items():
        model.half().save_pretrained(out / component)
        _forget_paths(out / component / "config.json")
    tiny.write_scheduler(out, dynamic=False)
    tiny.write_index(out)
    tiny.follow_umask(out)


def _forget_paths(config: Path) -> None:
    """What was loaded from a folder names it in its config."""
    kept = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
