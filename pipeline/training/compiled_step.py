"""A step of the optimizer in compiled functions, a slice of the parameters at a time."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.devices import device
from pipeline.settings.fields import Train
from pipeline.training.gradients import Norm, make_squares, slices


class CompiledStep:
    """Steps parameters, and keeps nothing itself.

    trained: all that have a gradient.  places: of those that are stepped.  groups: of each of the latter the number of
    its learning rate.  kinds: these parameters, their first and second moments, and their averages, if there are any.
    """

    def __init__(
        self, trained: Sequence, places: Sequence[int], groups: Sequence[int], kinds: Sequence[list], settings: Train
    ):
        self._places, self._kinds, self._settings = places, kinds, settings
        self._takes_all = len(places) == len(trained)
        self._norm, self._rule = Norm(), RULES[settings.optimizer](settings)
        self._steps = self._make_steps(groups)

    def norm(self, gradients: Sequence):
        """Of all gradients together: a tensor."""
        return self._norm.of(gradients)

    def take(self, gradients: Sequence, number: int, rates: Sequence[float], divide_by: float, ema_weight: float):
        """Take the step of a number, counted from 1.  Returns the norm of ``gradients / divide_by``, a tensor."""
        is_one = len(self._steps) == 1 and self._takes_all  # then it takes the norm too
        norm: Any = None if is_one else self._norm.of(gradients)
        kept = [gradients[place] for place in self._places]
        common, stepped = (_scalar(divide_by), _scalar(ema_weight)), None
        for group, part, step in self._steps:
            scalars = map(_scalar, self._rule.scalars(number, rates[group]))
            stepped = step(norm, *common, *scalars, *kept[part])
        return stepped[0] if stepped else norm / divide_by

    def _make_steps(self, groups: Sequence[int]) -> list[tuple]:
        """The number of a learning rate, which parameters have it, and what steps them: SLICE of them at a time."""
        found, start = [], 0
        for group, members in itertools.groupby(groups):
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
        states = [ParameterTuple(kind[part]) for kind in self._kinds[:3]]
        averages, each = ParameterTuple(self._kinds[3][part]), ops.HyperMap()
        last = (self._kinds[3] or self._kinds[0])[part][-1]
        max_norm = self._settings.max_grad_norm

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


RULES = {"adamw": AdamW, "adam_weight_decay": AdamWeightDecay}
"""By the name of an optimizer."""


def _scalar(value: float):
    import mindspore as ms

    return ms.Tensor(value, ms.float32)
