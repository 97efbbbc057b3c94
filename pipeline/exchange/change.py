"""A LoRA as the change of each layer's weight, whatever file it comes from."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Change:
    """What is added to a layer's weight, up @ down: up is (outputs, rank), down is (rank, inputs), any scale inside."""

    down: np.ndarray
    up: np.ndarray

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def delta(self) -> np.ndarray:
        """(outputs, inputs), in float64."""
        return self.up.astype(np.float64) @ self.down.astype(np.float64)


Changes = dict[str, dict[str, Change]]
"""By component, "transformer" and "text_encoder", and there by diffusers' name of the layer."""
