"""FLUX.1's noise levels: those that training draws from, and those that sampling goes through."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.flux.pretrained import config


def inference_sigmas(folder: Path, num_steps: int, num_tokens: int) -> np.ndarray:
    """The noise levels of sampling, (num_steps + 1,) float32, from high to 0, as diffusers' FluxPipeline has them.

    Evenly spaced from 1 to 1 / num_steps, then shifted: by the number of an image's tokens where the model's
    scheduler shifts dynamically, by its constant elsewhere.  Raises UserError for a scheduler that draws noise at
    every step.
    """
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler

    settings = config(folder, "scheduler")
    if settings.get("stochastic_sampling"):
        raise UserError(f"{folder / 'scheduler'}: stochastic_sampling is not supported; set it to false")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings)
    even = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=even, mu=resolution_shift(num_tokens, scheduler.config))
    return scheduler.sigmas.asnumpy()


def resolution_shift(num_tokens: int, settings: Mapping) -> float:
    """mu of arXiv:2403.03206's shift by resolution: on the line through both ends of the scheduler's config."""
    first, last = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    low, high = settings.get("base_shift", 0.5), settings.get("max_shift", 1.15)
    slope = (high - low) / (last - first)
    return num_tokens * slope + (low - slope * first)


def training_sigmas(settings: Mapping) -> np.ndarray:
    """The noise levels of `scheduler_sigmas`, float64, from a scheduler's config, without importing MindSpore."""
    number = settings.get("num_train_timesteps", 1000)
    sigmas = np.linspace(1, number, number)[::-1] / number
    shift = 1.0 if settings.get("use_dynamic_shifting") else settings.get("shift", 1.0)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def scheduler_sigmas(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The scheduler's own noise levels and timesteps, (num_train_timesteps,) float32 each, from high to low."""
    from mindone.diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config(folder, "scheduler"))
    return scheduler.sigmas.asnumpy(), scheduler.timesteps.asnumpy()
