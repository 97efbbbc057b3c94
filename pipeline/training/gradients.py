"""What happens to gradients between the backward pass and the optimizer: summed, measured, clipped, and scaled.

Compiled functions take SLICE tensors at a time: MindSpore compiles no loop over several hundred ("Exceed function call
depth limit"), and the time that it takes grows faster than the number of operations.  FLUX.1 has 380 to 836.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.devices import device

SLICE = 64
"""How many tensors a compiled function takes at a time."""


def slices(start: int, stop: int) -> list[slice]:
    """The places from ``start`` to ``stop``, SLICE at a time."""
    return [slice(first, min(first + SLICE, stop)) for first in range(start, stop, SLICE)]


class Accumulator:
    """The sum of the gradients of several batches."""

    def __init__(self):
        self._sums: Sequence = ()
        self._add = device.compiled(_make_add())

    def add(self, gradients: Sequence, is_first: bool) -> None:
        """Add one batch's gradients; the first one's replace what is there."""
        self._sums = gradients if is_first else self._sum_with(gradients)

    def total(self) -> Sequence:
        """The sum of what was added since the first, which the next first may overwrite."""
        return self._sums

    def _sum_with(self, gradients: Sequence) -> list:
        sums = []
        for part in slices(0, len(gradients)):
            sums += self._add(*self._sums[part], *gradients[part])
        return sums


class HostAccumulator:
    """The same in NumPy, in memory of its own: see `host_step`."""

    def __init__(self):
        self._sums: list[np.ndarray] = []
        self._tensors: list = []

    def add(self, gradients: Sequence, is_first: bool) -> None:
        import mindspore as ms

        if not self._sums:
            self._sums = [np.empty(gradient.shape, np.float32) for gradient in gradients]
            self._tensors = [ms.Tensor.from_numpy(each) for each in self._sums]
        for each, gradient in zip(self._sums, gradients):
            if is_first:
                np.copyto(each, gradient.asnumpy())
            else:
                each += gradient.asnumpy()

    def total(self) -> Sequence:
        return self._tensors


def make_accumulator() -> Accumulator | HostAccumulator:
    """For the device of this process."""
    return HostAccumulator() if device.steps_on_host() else Accumulator()


def _make_add():
    from mindspore import ops

    each = ops.HyperMap()

    def add(*sums_and_gradients):
        count = len(sums_and_gradients) // 2
        return each(_plus, sums_and_gradients[:count], sums_and_gradients[count:])

    return add


def _plus(one, other):
    return one + other


class Norm:
    """The norm of all gradients together: a float32 scalar, infinite or NaN where any of the gradients is."""

    def __init__(self):
        self._squares, self._norm = device.compiled(make_squares()), device.compiled(_make_norm())

    def of(self, gradients: Sequence):
        squares = []
        for part in slices(0, len(gradients)):
            squares.append(self._squares(*gradients[part]))
        return self._norm(*squares)


def make_squares():
    """A function of some gradients: the sums of their squares, (gradients,)."""
    from mindspore import ops

    def squares(*gradients):
        return ops.cat([ops.sum(gradient * gradient).reshape(1) for gradient in gradients])

    return squares


def _make_norm():
    from mindspore import ops

    def norm(*squares):
        return ops.cat(squares).sum().sqrt()

    return norm


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
