"""A step of the optimizer in NumPy, in the memory that MindSpore computes with on CPU.

An operation costs MindSpore there what some ten thousand numbers do, and a LoRA's tensors are small and many.  So they
lie end to end here, and are stepped CHUNK numbers at a time, which stay in the processor's cache.  Nothing is compiled,
and the bits depend on neither the number of threads nor on how ranks share the state.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.settings.fields import Train

CHUNK = 1 << 15


class Run(NamedTuple):
    """Neighbours that are stepped alike.

    group: the number of their learning rate.  gradients, kept: where they lie, among all gradients and among what is
    stepped.
    """

    group: int
    gradients: slice
    kept: slice


class Scalars(NamedTuple):
    """Of one step with one learning rate.  factor: what gradients are multiplied by."""

    factor: float
    rate: float
    correction1: float
    correction2: float
    ema_weight: float


class HostStep:
    """Steps parameters, which become views of this object's memory; to be used as `compiled_step.CompiledStep` is."""

    def __init__(
        self, trained: Sequence, places: Sequence[int], groups: Sequence[int], kinds: Sequence[list], settings: Train
    ):
        self._settings = settings
        self._kinds = [end_to_end(kind) for kind in kinds if kind]
        self._gradients = np.empty(sum(parameter.size for parameter in trained), np.float32)
        self._runs = list(_runs([parameter.size for parameter in trained], places, groups))
        self._scratch = np.empty((2, CHUNK), np.float32)

    def norm(self, gradients: Sequence) -> float:
        """Of all gradients together."""
        np.concatenate([gradient.asnumpy().reshape(-1) for gradient in gradients], out=self._gradients)
        total = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, self._gradients.size, CHUNK):
                part = self._gradients[start : start + CHUNK]
                total += float(np.multiply(part, part, out=self._scratch[0, : part.size]).sum())
        return math.sqrt(total)

    def take(
        self, gradients: Sequence, number: int, rates: Sequence[float], divide_by: float, ema_weight: float
    ) -> float:
        """Take the step of a number, counted from 1.  Returns the norm of ``gradients / divide_by``."""
        s = self._settings
        norm = self.norm(gradients) / divide_by
        factor = 1 / divide_by
        if s.max_grad_norm > 0:  # as torch.nn.utils.clip_grad_norm_ has it; what is NaN remains so
            factor *= float(np.minimum(s.max_grad_norm / (norm + 1e-6), 1.0))
        is_corrected = s.optimizer == "adamw"
        first, second = (1 - beta**number if is_corrected else 1.0 for beta in (s.adam_beta1, s.adam_beta2))
        with np.errstate(all="ignore"):
            for run in self._runs:
                scalars = Scalars(factor, rates[run.group], first, second, ema_weight)
                for start in range(0, run.kept.stop - run.kept.start, CHUNK):
                    self._advance(run, start, scalars)
        return norm

    def _advance(self, run: Run, start: int, scalars: Scalars) -> None:
        """Step CHUNK numbers of a run, from the ``start``-th on, as torch.optim.AdamW does (arXiv:1711.05101)."""
        s = self._settings
        gradient = self._gradients[run.gradients][start : start + CHUNK]
        parameter, first, second, *average = (kind[run.kept][start : start + CHUNK] for kind in self._kinds)
        scaled, other = self._scratch[:, : gradient.size]
        np.multiply(gradient, scalars.factor, out=scaled)
        first *= s.adam_beta1
        first += np.multiply(scaled, 1 - s.adam_beta1, out=other)
        second *= s.adam_beta2
        scaled *= scaled
        second += np.multiply(scaled, 1 - s.adam_beta2, out=other)
        np.sqrt(second, out=other)
        other /= math.sqrt(scalars.correction2)
        other += s.adam_epsilon
        np.divide(first, other, out=other)
        other *= scalars.rate / scalars.correction1
        parameter *= 1 - scalars.rate * s.weight_decay
        parameter -= other
        for mean in average:
            mean += np.multiply(np.subtract(parameter, mean, out=other), scalars.ema_weight, out=other)


def end_to_end(parameters: Sequence) -> np.ndarray:
    """Move float32 parameters into one array, of which they become views.  Returns it: it must live as long as they."""
    import mindspore as ms

    flat, start = np.empty(sum(parameter.size for parameter in parameters), np.float32), 0
    for parameter in parameters:
        view = flat[start : start + parameter.size].reshape(parameter.shape)
        np.copyto(view, parameter.asnumpy())
        parameter.set_data(ms.Tensor.from_numpy(view))
        start += parameter.size
    return flat


def _runs(sizes: Sequence[int], places: Sequence[int], groups: Sequence[int]) -> Iterator[Run]:
    """Those of all parameters, of which some, at ``places``, are stepped.  groups: of these."""
    begins, kept = [0, *itertools.accumulate(sizes)], 0
    numbered = list(zip(itertools.count(), places, groups))
    for (group, _), members in itertools.groupby(numbered, lambda each: (each[2], each[1] - each[0])):
        own = [place for _, place, _ in members]
        begin, end = begins[own[0]], begins[own[-1] + 1]
        yield Run(group, slice(begin, end), slice(kept, kept + end - begin))
        kept += end - begin
