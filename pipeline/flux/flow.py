"""The arithmetic of FLUX.1 outside the model: latents, packing, noising, target, sampling.  NumPy, float32.

Flow matching as rectified flow (arXiv:2209.03003) with the scheduler's own noise levels, the way diffusers'
FLUX.1 training scripts do it.
"""

import itertools
from collections.abc import Callable

import numpy as np

MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0
"""The limits that AutoencoderKL's posterior keeps its log-variance in."""


def sample_posterior(posterior: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    """Draw latents from the VAE's diagonal Gaussian, or take its mode where ``noise`` is None.

    posterior: (batch, 2 * channels, height, width), means then log-variances.
    noise: (batch, channels, height, width), standard normal.  Returns the shape of ``noise``.
    """
    mean, log_variance = np.split(np.asarray(posterior, np.float32), 2, axis=1)
    if noise is None:
        return mean
    return mean + np.exp(0.5 * np.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)) * noise


def normalized(latents: np.ndarray, shift_factor: float, scaling_factor: float) -> np.ndarray:
    """The VAE's latents as the transformer expects them, about unit variance."""
    return (latents - np.float32(shift_factor)) * np.float32(scaling_factor)


def unnormalized(latents: np.ndarray, shift_factor: float, scaling_factor: float) -> np.ndarray:
    """The inverse of `normalized`: latents as the VAE decodes them."""
    return latents / np.float32(scaling_factor) + np.float32(shift_factor)


def pack(latents: np.ndarray) -> np.ndarray:
    """(batch, channels, height, width) to (batch, height/2 * width/2, channels * 4): each token a 2x2 patch."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(patches.reshape(batch, height // 2 * (width // 2), channels * 4))


def unpack(tokens: np.ndarray, height: int, width: int) -> np.ndarray:
    """The inverse of `pack`; height and width of the latents."""
    batch, _, channels = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(patches.reshape(batch, channels // 4, height, width))


def image_ids(height: int, width: int) -> np.ndarray:
    """Position ids (0, row, column) of the packed tokens of latents of ``height`` x ``width``: (tokens, 3)."""
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)


def noised(latents: np.ndarray, noise: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Move ``latents`` along the straight path towards ``noise``.

    latents, noise: (batch, tokens, channels), packed.  sigma: (batch,), float32 in [0, 1]; 1 is pure noise.
    Returns x_sigma; its velocity, the training target, is ``noise - latents``.  Raises ValueError where shapes differ.
    """
    if latents.shape != noise.shape or sigma.shape != latents.shape[:1]:
        raise ValueError(f"noised: latents {latents.shape}, noise {noise.shape}, sigma {sigma.shape}")
    sigma = sigma[:, None, None]
    return (1 - sigma) * latents + sigma * noise


def denoised(
    noise: np.ndarray, sigmas: np.ndarray, velocity: Callable[[np.ndarray, np.float32], np.ndarray]
) -> np.ndarray:
    """Follow a velocity from pure noise to latents by Euler's method, one step from each of ``sigmas`` to the next.

    noise: (batch, tokens, channels), packed.  sigmas: (steps + 1,), from high to 0.
    velocity: of x and its noise level, in the shape of x.
    """
    x = noise
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * velocity(x, sigma)
    return x
