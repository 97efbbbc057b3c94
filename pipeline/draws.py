"""Every random number of a training, from a counter instead of a state: any step's draws can be had at any time.

Philox (doi:10.1145/2063384.2063405) keyed by seed and purpose, its counter set to the number of the batch or epoch.
A run that is interrupted and resumed draws what the unbroken run draws, on every device.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """Numbers that are part of a run's identity: never renumber."""

    ORDER = 0
    NOISE = 1
    SIGMA = 2
    POSTERIOR = 3
    LORA_INIT = 4
    EVALUATION = 5
    LORA_DROPOUT = 6
    FLIP = 7
    CROP = 8
    CAPTION_DROPOUT = 9
    CONTROL_POSTERIOR = 10
    SAMPLE = 11
    PRIOR_ORDER = 12
    PRIOR_SIGMA = 13
    PRIOR_NOISE = 14


def generator(seed: int, purpose: Purpose, index: int) -> np.random.Generator:
    """The generator of one purpose at one index; indices are 2**192 draws apart."""
    key = np.array([seed, purpose], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64)))


def normal(seed: int, purpose: Purpose, index: int, shape: tuple) -> np.ndarray:
    """Standard normal numbers, float32."""
    return generator(seed, purpose, index).standard_normal(shape, dtype=np.float32)
