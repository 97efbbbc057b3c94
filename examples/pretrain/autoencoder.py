"""The VAE: trained on crops first, which are cheap and mostly edges, then on whole pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pictures
import torch
from checkpoints import Checkpoint
from diffusers import AutoencoderKL

from pipeline.synthetic import shapes

STEPS_ON_CROPS, STEPS_ON_WHOLES = 950, 250
CROP, CROPS, WHOLES = 32, 32, 16  # pixels; batch sizes
LEARNING_RATE, WARMUP = 2e-3, 30
KL_WEIGHT = 5e-4
PICTURES = 20_000


def new() -> AutoencoderKL:
    """FLUX.1's autoencoder in small: factor 8, 16 latent channels, no quantisation convolutions."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=pictures.SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train(out: Path, scratch: Path) -> None:
    """Write the trained VAE to ``out``, with the shift and scale of its latents in its config."""
    torch.manual_seed(0)
    vae, data = new(), pictures.for_autoencoder(PICTURES)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = Checkpoint(scratch / "vae.pt", vae, optimizer)
    total = STEPS_ON_CROPS + STEPS_ON_WHOLES
    for step in range(checkpoint.restore(), total):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / total))
        loss = _loss(vae, _batch(data, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            checkpoint.say(step, loss=loss.item(), psnr=psnr(vae, 64))
            checkpoint.save(step + 1)
    checkpoint.save(total)
    checkpoint.say(total, psnr=psnr(vae, 500))
    _save(vae, data, out)


def _batch(data: np.ndarray, step: int) -> torch.Tensor:
    """(batch, 3, height, width), float32 in [-1, 1]."""
    random = np.random.default_rng([0, step])
    if step >= STEPS_ON_CROPS:
        return _scaled(data[random.integers(len(data), size=WHOLES)])
    crops = []
    while len(crops) < CROPS:
        (x, y), picture = random.integers(pictures.SIZE - CROP + 1, size=2), data[random.integers(len(data))]
        crop = picture[:, y : y + CROP, x : x + CROP]
        if np.ptp(crop, axis=(1, 2)).any() or random.random() < 0.2:  # plain ones teach little
            crops.append(crop)
    return _scaled(np.stack(crops))


def _scaled(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)


def _loss(vae, x: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample()).sample - x
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 4 * error.square().mean() + KL_WEIGHT * kl


@torch.no_grad()
def psnr(vae, count: int) -> float:
    """Mean peak signal-to-noise ratio in dB of ``count`` unseen pictures, each encoded to the posterior's mode."""
    unseen = pictures.pixels(picture.image() for picture in pictures.drawn(shapes.UNSEEN, count))
    found = []
    for x in _scaled(unseen).split(50):
        error = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x
        found += (10 * torch.log10(4 / error.square().mean((1, 2, 3)))).tolist()
    return float(np.mean(found))


@torch.no_grad()
def posteriors(vae, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and deviations of the training pictures' latents, (count, 16, 8, 8) each."""
    data = pictures.pixels(picture.image() for picture in pictures.drawn(shapes.TRAINING, count))
    found = [vae.encode(_scaled(batch)).latent_dist for batch in np.array_split(data, max(1, count // 100))]
    return torch.cat([each.mean for each in found]), torch.cat([each.std for each in found])


def _save(vae, data: np.ndarray, out: Path) -> None:
    mean, std = posteriors(vae, 2000)
    latents = mean + std * torch.randn(std.shape, generator=torch.Generator().manual_seed(0))
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(out)
    print(json.dumps({"shift": vae.config.shift_factor, "scale": vae.config.scaling_factor}), flush=True)
