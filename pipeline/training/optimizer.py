"""AdamW with all of its state in named parameters, so that a checkpoint can hold it and a resumed run can go on bit for
bit.

One compiled function steps all parameters: on CPU that is several times faster than one operation after the other.
"""

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.settings import Train


class Optimizer:
    """Steps ``trained`` parameters, which are float32, by their gradients.

    ``adamw``: decoupled weight decay with bias correction (arXiv:1711.05101), as PyTorch's AdamW.
    ``adam_weight_decay``: MindSpore's, without the correction, as mindone's own scripts train: its first steps are
    several times smaller.
    groups: of each parameter the number of its learning rate; all 0, unless given.

    ``num_updates`` counts the steps that were taken, which are not always those that were tried (see `LossScale`).
    """

    def __init__(self, trained: list, settings: Train, groups: Sequence[int] = ()):
        import mindspore as ms

        self.trained, self.settings, self.num_updates = trained, settings, 0
        self.groups = list(groups) or [0] * len(trained)
        self.moments = [[_zeros(parameter, prefix) for parameter in trained] for prefix in ("m", "v")]
        self.averages = [_copy(parameter, "ema") for parameter in trained] if settings.ema_decay else []
        self._norm = ms.jit(_make_norm())
        self._update = ms.jit(self._make_update())

    def update(self, gradients, learning_rates: Sequence[float], divide_by: float = 1.0):
        """Take one step.  Returns the norm of all gradients before clipping, a tensor that may still be computed.

        learning_rates: by group.
        divide_by: what the gradients were multiplied by: the loss scale times the number of accumulated batches.
        """
        self.num_updates += 1
        s, number = self.settings, self.num_updates
        correction = 1 - s.adam_beta2**number
        scalars = {
            "divide_by": divide_by,
            "beta1_power": s.adam_beta1**number,
            "beta2_power": 1 - correction,
            # MindSpore's Adam adds epsilon before the correction, PyTorch's after it
            "epsilon": s.adam_epsilon * np.sqrt(correction),
            "ema_weight": 1 - min(s.ema_decay, (1 + number) / (10 + number)),  # as diffusers' EMAModel
        }
        rates = [rate for rate in learning_rates for rate in (rate, 1 - rate * s.weight_decay)]
        return self._update(*map(_scalar, [*scalars.values(), *rates]), *gradients)

    def norm(self, gradients, divide_by: float) -> float:
        """The norm of all gradients, waited for: infinite or NaN where any of them is."""
        return float(self._norm(*gradients).asnumpy()) / divide_by

    def state(self) -> dict:
        """All that a later step depends on beside the trained parameters, as parameters by name."""
        return {parameter.name: parameter for parameter in [*self.moments[0], *self.moments[1], *self.averages]}

    def _make_update(self) -> Callable:
        """The step as a function of tensors only, for the graph compiler: no dictionary, no attribute that changes."""
        from mindspore import ops

        s, trained, averages = self.settings, self.trained, self.averages
        first, second = self.moments
        beta1, beta2, count = s.adam_beta1, s.adam_beta2, len(trained)
        groups, num_rates = self.groups, 2 * (max(self.groups) + 1)
        adam, adam_weight_decay = ops.Adam(), ops.AdamWeightDecay()
        norm_of = _make_norm()
        is_adamw, has_decay, has_average = s.optimizer == "adamw", s.weight_decay > 0, bool(averages)
        max_norm, decay, plain_epsilon = s.max_grad_norm, s.weight_decay, s.adam_epsilon

        def update(divide_by, beta1_power, beta2_power, epsilon, ema_weight, *rates_and_gradients):
            rates, gradients = rates_and_gradients[:num_rates], rates_and_gradients[num_rates:]
            norm = norm_of(*gradients) / divide_by
            factor = 1 / divide_by
            if max_norm > 0:  # as torch.nn.utils.clip_grad_norm_
                factor = factor * ops.minimum(max_norm / (norm + 1e-6), ops.ones_like(norm))
            for i in range(count):
                gradient, lr, kept = gradients[i] * factor, rates[2 * groups[i]], rates[2 * groups[i] + 1]
                if is_adamw:
                    if has_decay:
                        ops.assign(trained[i], trained[i] * kept)
                    adam(trained[i], first[i], second[i], beta1_power, beta2_power, lr, beta1, beta2, epsilon, gradient)
                else:
                    adam_weight_decay(trained[i], first[i], second[i], lr, beta1, beta2, plain_epsilon, decay, gradient)
                if has_average:
                    ops.assign(averages[i], averages[i] + (trained[i] - averages[i]) * ema_weight)
            return norm

        return update


class Accumulator:
    """The sum of the gradients of several batches."""

    def __init__(self, trained: list):
        import mindspore as ms
        from mindspore import ops

        sums = [_zeros(parameter, "sum") for parameter in trained]
        count = len(trained)

        def add(*gradients):
            for i in range(count):
                ops.assign(sums[i], sums[i] + gradients[i])

        def start(*gradients):
            for i in range(count):
                ops.assign(sums[i], gradients[i])

        self.sums, self._add, self._start = sums, ms.jit(add), ms.jit(start)

    def add(self, gradients, is_first: bool):
        """Add one batch's gradients; the first one's replace what is there."""
        (self._start if is_first else self._add)(*gradients)


class LossScale:
    """Dynamic loss scaling for float16 (arXiv:1710.03740), by the rule of PyTorch's GradScaler.

    Gradients that are too small for float16 are multiplied before they are computed.  After an overflow the step is
    skipped and the scale halved; after ``interval`` steps without one it is doubled.
    """

    def __init__(self, scale: float, interval: int = 2000):
        self.scale, self.interval, self.good_steps = scale, interval, 0

    def adjust(self, is_finite: bool):
        """Note whether the gradients of a step were finite."""
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite:
            self.scale /= 2
        elif self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * 2, 0


def _make_norm() -> Callable:
    from mindspore import ops

    def norm(*gradients):
        total = ops.sum(gradients[0] * gradients[0])
        for gradient in gradients[1:]:
            total = total + ops.sum(gradient * gradient)
        return ops.sqrt(total)

    return norm


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
