"""AdamW with all of its state in named parameters, so that a checkpoint can hold it and a resumed run can go on bit for
bit.

Compiled functions step the parameters: on CPU that is several times faster than one operation after the other.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.devices import device
from pipeline.settings.fields import Train
from pipeline.training.gradients import Norm, make_squares, slices
from pipeline.training.sharding import Shards


class Optimizer:
    """Steps ``trained`` parameters, which are float32, by their gradients.

    ``adamw``: decoupled weight decay with bias correction (arXiv:1711.05101), as PyTorch's AdamW.
    ``adam_weight_decay``: MindSpore's, without the correction, as mindone's own scripts train: its first steps are
    several times smaller.
    groups: of each parameter the number of its learning rate; all 0, unless given.

    shards: where ranks share the state: what this one keeps, and steps.

    ``num_updates`` counts the steps that were taken, which are not always those that were tried (see `LossScale`).
    """

    def __init__(self, trained: list, settings: Train, groups: Sequence[int] = (), shards: Shards | None = None):
        self.trained, self.settings, self.num_updates = trained, settings, 0
        self.groups, self.shards = list(groups) or [0] * len(trained), shards
        self._places = shards.own if shards else range(len(trained))
        self._kept = [trained[place] for place in self._places]
        self.moments = [[_zeros(parameter, prefix) for parameter in self._kept] for prefix in ("m", "v")]
        self.averages = [_copy(parameter, "ema") for parameter in self._kept] if settings.ema_decay else []
        self._norm, self._rule = Norm(), rule_of(settings)
        self._steps = self._make_steps()

    def update(self, gradients: Sequence, learning_rates: Sequence[float], divide_by: float = 1.0):
        """Take one step.  Returns the norm of all gradients before clipping, a tensor.

        learning_rates: by group.
        divide_by: what the gradients were multiplied by: the loss scale times the number of accumulated batches.
        """
        self.num_updates += 1
        number = self.num_updates
        ema_weight = 1 - min(self.settings.ema_decay, (1 + number) / (10 + number))  # as diffusers' EMAModel
        is_one = len(self._steps) == 1 and len(self._kept) == len(self.trained)  # which then takes the norm too
        norm: Any = None if is_one else self._norm.of(gradients)
        kept = [gradients[place] for place in self._places]
        common, stepped = (_scalar(divide_by), _scalar(ema_weight)), None
        for group, part, step in self._steps:
            scalars = map(_scalar, self._rule.scalars(number, learning_rates[group]))
            stepped = step(norm, *common, *scalars, *kept[part])
            device.wait_asleep(stepped)
        if self.shards:
            self.shards.give(self.trained)
        return stepped[0] if stepped else norm / divide_by

    def norm(self, gradients: Sequence, divide_by: float) -> float:
        """The norm of all gradients, waited for: infinite or NaN where any of them is."""
        return float(self._norm.of(gradients).asnumpy()) / divide_by

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

    def _make_steps(self) -> list[tuple]:
        """The number of a learning rate, which parameters have it, and what steps them: SLICE of them at a time."""

        found, start = [], 0
        for group, members in itertools.groupby(self.groups[place] for place in self._places):
            stop = start + len(list(members))
            found += [(group, part, device.compiled(self._make_step(part))) for part in slices(start, stop)]
            start = stop
        return found

    def _make_step(self, part: slice):
        """A cell that steps the parameters of ``part`` and returns a number that it computes last.

        It takes tensors only, as what is compiled may hold nothing that changes, and no tuple of them, which MindSpore
        takes for a constant.  A cell, as MindSpore would warn of each function after the first that it "has been
        compiled again".
        """
        from mindspore import ParameterTuple, nn, ops

        apply, squares, count = self._rule.make(), make_squares(), len(self._rule.scalars(1, 0.0))
        states = [ParameterTuple(kind[part]) for kind in (self._kept, *self.moments)]
        averages, each = ParameterTuple(self.averages[part]), ops.HyperMap()
        last = (self.averages or self._kept)[part][-1]
        max_norm = self.settings.max_grad_norm

        def average(weight, parameter, mean):
            return ops.assign(mean, mean + (parameter - mean) * weight)

        class Step(nn.Cell):
            def __init__(self):
                super().__init__(auto_prefix=False)
                self.trained, self.first, self.second = states
                self.averages, self.last, self.each = averages, last, each

            def construct(self, norm, divide_by, ema_weight, *tensors):
                scalars, gradients = tensors[:count], tensors[count:]
                if norm is None:
                    norm = squares(*gradients).sum().sqrt()
                norm = norm / divide_by
                factor = 1 / divide_by
                if max_norm > 0:  # as torch.nn.utils.clip_grad_norm_ has it
                    factor = factor * ops.minimum(max_norm / (norm + 1e-6), ops.ones_like(norm))
                self.each(ops.partial(apply, factor, scalars), gradients, self.trained, self.first, self.second)
                if self.averages:
                    self.each(ops.partial(average, ema_weight), self.trained, self.averages)
                return norm, self.last.sum()

        return Step()


class AdamWeightDecay:
    """MindSpore's AdamW without bias correction."""

    def __init__(self, settings: Train):
        self.settings = settings

    def scalars(self, number: int, rate: float) -> tuple[float, ...]:
        """Of the update of that number: the rate, epsilon and the weight decay."""
        return rate, self.settings.adam_epsilon, self.settings.weight_decay

    def make(self) -> Callable:
        """The function that steps one parameter."""
        from mindspore import ops

        adam, beta1, beta2 = ops.AdamWeightDecay(), self.settings.adam_beta1, self.settings.adam_beta2

        def apply(factor, scalars, gradient, parameter, first, second):
            rate, epsilon, decay = scalars
            return adam(parameter, first, second, rate, beta1, beta2, epsilon, decay, gradient * factor)

        return apply


class FusedAdamW(AdamWeightDecay):
    """PyTorch's AdamW as MindSpore's AdamWeightDecay, with the corrections of both moments in its scalars."""

    def scalars(self, number: int, rate: float) -> tuple[float, ...]:
        s = self.settings
        first, second = 1 - s.adam_beta1**number, np.sqrt(1 - s.adam_beta2**number)
        # AdamWeightDecay adds epsilon before the correction, PyTorch after it; and it multiplies the decay by its rate
        return rate * second / first, s.adam_epsilon * second, s.weight_decay * first / second


class AdamW(AdamWeightDecay):
    """PyTorch's AdamW as MindSpore's Adam after the decay."""

    def scalars(self, number: int, rate: float) -> tuple[float, ...]:
        s = self.settings
        correction = 1 - s.adam_beta2**number
        epsilon = s.adam_epsilon * np.sqrt(correction)  # MindSpore adds it before the correction, PyTorch after it
        return s.adam_beta1**number, 1 - correction, epsilon, rate, 1 - rate * s.weight_decay

    def make(self) -> Callable:
        from mindspore import ops

        adam, beta1, beta2 = ops.Adam(), self.settings.adam_beta1, self.settings.adam_beta2

        def apply(factor, scalars, gradient, parameter, first, second):
            beta1_power, beta2_power, epsilon, rate, kept = scalars
            ops.assign(parameter, parameter * kept)
            scaled = gradient * factor
            return adam(parameter, first, second, beta1_power, beta2_power, rate, beta1, beta2, epsilon, scaled)

        return apply


MAKERS = {"adamw": AdamW, "adam_weight_decay": AdamWeightDecay}
"""By the name of an optimizer: what steps one parameter."""


def rule_of(settings: Train) -> AdamWeightDecay:
    if settings.optimizer == "adamw" and device.has_fused_adamw():
        return FusedAdamW(settings)
    return MAKERS[settings.optimizer](settings)


def _zeros(parameter, prefix: str):
    import mindspore as ms

    data = ms.Tensor(np.zeros(parameter.shape, np.float32))
    return ms.Parameter(data, name=f"{prefix}.{parameter.name}", requires_grad=False)


def _copy(parameter, prefix: str):
    import mindspore as ms

    return ms.Parameter(ms.Tensor(parameter.asnumpy().copy()), name=f"{prefix}.{parameter.name}", requires_grad=False)


def _scalar(value: float):
    import mindspore as ms

    return ms.Tensor(value, ms.float32)
