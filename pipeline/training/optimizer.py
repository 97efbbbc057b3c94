"""AdamW with all of its state in named parameters, so that a checkpoint can hold it and a resumed run can go on bit for
bit.

Compiled functions step the parameters: on CPU that is several times faster than one operation after the other.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.devices import device
from pipeline.settings.fields import Train
from pipeline.training.gradients import Norm, slices
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
        self._norm = Norm(settings.max_grad_norm)
        self._steps = self._make_steps()

    def update(self, gradients: Sequence, learning_rates: Sequence[float], divide_by: float = 1.0):
        """Take one step.  Returns the norm of all gradients before clipping, a tensor.

        learning_rates: by group.
        divide_by: what the gradients were multiplied by: the loss scale times the number of accumulated batches.
        """
        self.num_updates += 1
        s, number = self.settings, self.num_updates
        correction = 1 - s.adam_beta2**number
        scalars = {
            "beta1_power": s.adam_beta1**number,
            "beta2_power": 1 - correction,
            # MindSpore's Adam adds epsilon before the correction, PyTorch's after it
            "epsilon": s.adam_epsilon * np.sqrt(correction),
            "ema_weight": 1 - min(s.ema_decay, (1 + number) / (10 + number)),  # as diffusers' EMAModel
        }
        norm, factor = self._norm.clipped(self._norm.of(gradients), _scalar(divide_by))
        common = list(map(_scalar, scalars.values()))
        kept = [gradients[place] for place in self._places]
        for group, part, step in self._steps:
            rate = learning_rates[group]
            own = _scalar(rate), _scalar(1 - rate * s.weight_decay)
            device.wait_asleep([step(factor, *common, *own, *kept[part])])
        if self.shards:
            self.shards.give(self.trained)
        return norm

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

        It takes tensors only, as what is compiled may hold nothing that changes.  A cell, as MindSpore would warn of
        each function after the first that it "has been compiled again".
        """
        from mindspore import ParameterTuple, nn, ops

        apply = MAKERS[self.settings.optimizer](self.settings)
        states = [ParameterTuple(kind[part]) for kind in (self._kept, *self.moments)]
        averages, each = ParameterTuple(self.averages[part]), ops.HyperMap()
        last = (self.averages or self._kept)[part][-1]

        def average(weight, parameter, mean):
            return ops.assign(mean, mean + (parameter - mean) * weight)

        class Step(nn.Cell):
            def __init__(self):
                super().__init__(auto_prefix=False)
                self.trained, self.first, self.second = states
                self.averages, self.last, self.each = averages, last, each

            def construct(self, factor, beta1_power, beta2_power, epsilon, ema_weight, lr, kept, *gradients):
                one = ops.partial(apply, factor, beta1_power, beta2_power, epsilon, lr, kept)
                self.each(one, gradients, self.trained, self.first, self.second)
                if self.averages:
                    self.each(ops.partial(average, ema_weight), self.trained, self.averages)
                return self.last.sum()

        return Step()


def _make_adamw(settings: Train) -> Callable:
    from mindspore import ops

    adam, beta1, beta2 = ops.Adam(), settings.adam_beta1, settings.adam_beta2

    def apply(factor, beta1_power, beta2_power, epsilon, lr, kept, gradient, parameter, first, second):
        ops.assign(parameter, parameter * kept)
        return adam(parameter, first, second, beta1_power, beta2_power, lr, beta1, beta2, epsilon, gradient * factor)

    return apply


def _make_adam_weight_decay(settings: Train) -> Callable:
    from mindspore import ops

    adam, beta1, beta2 = ops.AdamWeightDecay(), settings.adam_beta1, settings.adam_beta2
    plain_epsilon, decay = settings.adam_epsilon, settings.weight_decay

    def apply(factor, beta1_power, beta2_power, epsilon, lr, kept, gradient, parameter, first, second):
        return adam(parameter, first, second, lr, beta1, beta2, plain_epsilon, decay, gradient * factor)

    return apply


MAKERS = {"adamw": _make_adamw, "adam_weight_decay": _make_adam_weight_decay}
"""By the name of an optimizer: what makes the function that steps one parameter."""


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
