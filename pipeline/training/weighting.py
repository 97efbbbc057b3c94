"""Which noise levels training prefers: by drawing them more often, or by giving them more weight in the loss.

The schemes and their names are those of diffusers' FLUX.1 scripts (``compute_density_for_timestep_sampling`` and
``compute_loss_weighting_for_sd3`` of ``src/diffusers/training_utils.py``), after section 3.1 of arXiv:2403.03206.
``none`` draws uniformly and weighs equally.
"""

import math

import numpy as np

from pipeline import draws
from pipeline.draws import Purpose
from pipeline.settings.fields import Train

DENSITY_SCHEMES = ("logit_normal", "mode")
"""Act through `densities`; every loss then weighs 1."""

WEIGHT_SCHEMES = ("sigma_sqrt", "cosmap")
"""Act through `loss_weights`; levels are then drawn uniformly."""

SCHEMES = ("none", *DENSITY_SCHEMES, *WEIGHT_SCHEMES)

MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""The least and greatest ``mode_scale``: beyond them the map of ``mode`` leaves [0, 1] (arXiv:2403.03206, eq. 20)."""

MIN_SIGMA = 1e-6
"""``sigma_sqrt`` takes smaller levels for this one, which is below any schedule's last: no weight is infinite."""

LARGEST_BELOW_1 = np.nextafter(1.0, 0.0)


def densities(
    scheme: str,
    generator: np.random.Generator,
    size: int,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> np.ndarray:
    """Draw places in the schedule for ``size`` items.

    Returns u, (size,), float64 in [0, 1): 0 is the schedule's first and noisiest level, so that a ``logit_mean`` above
    0 prefers little noise.  logit_normal: u = sigmoid(logit_mean + logit_std * n), n standard normal.
    mode: u = 1 - v - mode_scale * (cos(pi v / 2)**2 - 1 + v), v uniform.  All others: ``generator.random(size)``.
    float64, because in float32 one u of about 50,000 would round up to the next of 1000 levels.
    Raises ValueError for a scheme that is not in SCHEMES, and for a ``mode_scale`` outside MODE_SCALES.
    """
    _check(scheme)
    if scheme == "logit_normal":
        u = _sigmoid(logit_mean + logit_std * generator.standard_normal(size))
    elif scheme == "mode":
        u = _mode(generator.random(size), mode_scale)
    else:
        u = generator.random(size)
    return np.clip(u, 0.0, LARGEST_BELOW_1)  # both formulas reach 1


def level_indices(u: np.ndarray, num_levels: int) -> np.ndarray:
    """The indices into the scheduler's levels, int64 in [0, num_levels), that ``u`` of `densities` stands for."""
    return np.minimum((u * num_levels).astype(np.int64), num_levels - 1)


def drawn_levels(
    settings: Train, seed: int, batch: int, num_levels: int, purpose: Purpose = Purpose.SIGMA
) -> np.ndarray:
    """The places in the scheduler's levels, (batch_size,), int64, that a training draws for the batch of a number."""
    shape = settings.logit_mean, settings.logit_std, settings.mode_scale
    generator = draws.generator(seed, purpose, batch)
    return level_indices(densities(settings.weighting_scheme, generator, settings.batch_size, *shape), num_levels)


def loss_weights(scheme: str, sigmas: np.ndarray) -> np.ndarray:
    """The factor on each item's loss, (batch,), float32; not normalized: its mean over a schedule is not 1.

    sigmas: (batch,), in (0, 1].  sigma_sqrt: sigma**-2, in spite of its name.  cosmap: 2 / (pi (1 - 2 sigma +
    2 sigma**2)).  All others: 1.  Raises ValueError for a scheme that is not in SCHEMES.
    """
    _check(scheme)
    sigmas = np.asarray(sigmas, np.float64)
    if scheme == "sigma_sqrt":
        weights = np.maximum(sigmas, MIN_SIGMA) ** -2.0
    elif scheme == "cosmap":
        weights = 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    else:
        weights = np.ones_like(sigmas)
    return weights.astype(np.float32)


def _check(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"weighting scheme {scheme!r}: must be one of {', '.join(SCHEMES)}")


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # as 1 / (1 + exp(-x)), without its overflow


def _mode(v: np.ndarray, scale: float) -> np.ndarray:
    least, greatest = MODE_SCALES
    if not least <= scale <= greatest:
        raise ValueError(f"mode_scale must be from {least} to {greatest:.4f}, found {scale}")
    return 1 - v - scale * (np.cos(math.pi * v / 2) ** 2 - 1 + v)
