"""AdamW with all of its state in named parameters, so that a checkpoint can hold it and a resumed run can go on bit for
bit.

What steps the parameters differs by device: on CPU NumPy (`host_step`), elsewhere compiled functions (`compiled_step`).
"""

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.devices import device
from pipeline.settings.fields import Train
from pipeline.training.compiled_step import CompiledStep
from pipeline.training.host_step import HostStep
from pipeline.training.sharding import Shards


class Optimizer:
    """Steps ``trained`` parameters, which are float32, by their gradients.

    ``adamw``: decoupled weight decay with bias correction (arXiv:1711.05101), as PyTorch's AdamW.
    ``adam_weight_decay``: MindSpore's, without the correction, as mindone's own scripts train: its first steps are
    several times smaller.
    groups: of each parameter the number of its learning rate; all 0, unless given.

    shards: where ranks share the state: what this one keeps, and steps.

    ``num_updates`` counts the steps that were taken, which are not always those that were tried (see `LossScale`).
    What holds the parameters' values may change here: later they are to be changed in place (`ops.assign`).
    """

    def __init__(self, trained: list, settings: Train, groups: Sequence[int] = (), shards: Shards | None = None):
        self.trained, self.settings, self.num_updates = trained, settings, 0
        self.groups, self.shards = list(groups) or [0] * len(trained), shards
        self._places = list(shards.own if shards else range(len(trained)))
        self._kept = [trained[place] for place in self._places]
        self.moments = [[_zeros(parameter, prefix) for parameter in self._kept] for prefix in ("m", "v")]
        self.averages = [_copy(parameter, "ema") for parameter in self._kept] if settings.ema_decay else []
        make: Callable = HostStep if device.steps_on_host() else CompiledStep
        kinds = [self._kept, *self.moments, self.averages]
        self._step = make(trained, self._places, [self.groups[place] for place in self._places], kinds, settings)

    def update(self, gradients: Sequence, learning_rates: Sequence[float], divide_by: float = 1.0):
        """Take one step.  Returns the norm of all gradients before clipping, a number or a tensor.

        learning_rates: by group.
        divide_by: what the gradients were multiplied by: the loss scale times the number of accumulated batches.
        """
        self.num_updates += 1
        number = self.num_updates
        ema_weight = 1 - min(self.settings.ema_decay, (1 + number) / (10 + number))  # as diffusers' EMAModel
        norm = self._step.take(gradients, number, learning_rates, divide_by, ema_weight)
        if self.shards:
            self.shards.give(self.trained)
        return norm

    def norm(self, gradients: Sequence, divide_by: float) -> float:
        """The norm of all gradients, waited for: infinite or NaN where any of them is."""
        return float(self._step.norm(gradients)) / divide_by

    def state(self) -> dict:
        """All that a later step depends on beside the trained parameters, as parameters by name; of this rank."""
        return {parameter.name: parameter for parameter in [*self.moments[0], *self.moments[1], *self.averages]}

    def whole_state(self) -> dict:
        """The state of all ranks, on the first one; all must call it."""
        if not self.shards:
            return self.state()
        found: dict[str, object] = {}
        for prefix, kind in zip(("m", "v", "ema"), (*self.moments, self.averages)):
            if kind:
                every = self.shards.collected(kind)
                found |= {f"{prefix}.{self.trained[place].name}": each for place, each in every.items()}
        return found

    def result(self) -> dict:
        """The parameters by name, or their averages where there are some; of several ranks, on the first one."""
        if not self.settings.ema_decay:
            return {parameter.name: parameter for parameter in self.trained}
        every = self.shards.collected(self.averages) if self.shards else dict(enumerate(self.averages))
        return {self.trained[place].name: average for place, average in every.items()}

    def kept_elsewhere(self) -> set[str]:
        """The names of what other ranks keep."""
        kept = set(self._places)
        prefixes = ("m", "v", "ema") if self.settings.ema_decay else ("m", "v")
        others = [parameter.name for place, parameter in enumerate(self.trained) if place not in kept]
        return {f"{prefix}.{name}" for prefix in prefixes for name in others}


def _zeros(parameter, prefix: str):
    import mindspore as ms

    data = ms.Tensor(np.zeros(parameter.shape, np.float32))
    return ms.Parameter(data, name=f"{prefix}.{parameter.name}", requires_grad=False)


def _copy(parameter, prefix: str):
    import mindspore as ms

    return ms.Parameter(ms.Tensor(parameter.asnumpy().copy()), name=f"{prefix}.{parameter.name}", requires_grad=False)
