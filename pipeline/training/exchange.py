"""The sum of the gradients of a step's batches, which several ranks have computed: the same on all of them.

Batch n of a step is that of rank n modulo their number, so that all ranks are at neighbouring batches at a time.
Gradients are laid end to end in buckets, as a collective operation on each of several hundred would mostly wait.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from pipeline.devices.communication import BUCKET_BYTES, Collectives
from pipeline.training.gradients import make_accumulator


class Sum(Protocol):
    """What adds up a step's gradients."""

    def add(self, gradients: Sequence, is_first: bool) -> None:
        """Add one batch's gradients; the first one's replace what is there."""

    def total(self) -> Sequence:
        """The sum of what was added since the first."""


def sum_of(collectives: Collectives, reduce: str, trained: Sequence) -> Sum:
    """reduce: as ``[parallel] reduce`` has it."""
    return OrderedSum(collectives, trained) if reduce == "ordered" else FastSum(collectives, trained)


class OrderedSum:
    """Adds in the order of the batches, as one rank does: the bits do not depend on the number of ranks.

    All ranks gather the gradients of all after each batch.  A rank receives, for each batch that it computes, the
    gradients of ``size - 1`` others.
    """

    def __init__(self, collectives: Collectives, trained: Sequence):
        self._collectives, self._buckets = collectives, _buckets(trained)
        self._sums: list = []

    def add(self, gradients: Sequence, is_first: bool) -> None:
        sums = [None] * len(self._buckets) if is_first else self._sums
        self._sums = [self._added(before, bucket.packed(gradients)) for before, bucket in zip(sums, self._buckets)]

    def _added(self, before, own):
        for each in self._collectives.gathered(own):
            before = each if before is None else before + each
        return before

    def total(self) -> list:
        return _unpacked(self._buckets, self._sums)


class FastSum:
    """Adds a rank's own batches, then what the ranks have, as the communication library does.

    A rank receives about twice its gradients at each step, however many batches and ranks there are.
    """

    def __init__(self, collectives: Collectives, trained: Sequence):
        self._collectives, self._buckets, self._own = collectives, _buckets(trained), make_accumulator()

    def add(self, gradients: Sequence, is_first: bool) -> None:
        self._own.add(gradients, is_first)

    def total(self) -> list:
        own = self._own.total()
        return _unpacked(self._buckets, [self._collectives.summed(bucket.packed(own)) for bucket in self._buckets])


class Bucket:
    """Neighbouring gradients, laid end to end.  start: the place of the first among all."""

    def __init__(self, start: int, shapes: Sequence[tuple]):
        self._part, self._shapes = slice(start, start + len(shapes)), shapes

    def packed(self, gradients: Sequence):
        from mindspore import ops

        return ops.cat([gradient.reshape(-1) for gradient in gradients[self._part]])

    def unpacked(self, flat) -> list:
        found, start = [], 0
        for shape in self._shapes:
            end = start + math.prod(shape)
            found.append(flat[start:end].reshape(shape))
            start = end
        return found


def _buckets(trained: Sequence) -> list[Bucket]:
    """Of as many tensors as there is room for in BUCKET_BYTES, and at least one."""
    shapes = [tuple(parameter.shape) for parameter in trained]
    found, start, taken = [], 0, 0
    for place, shape in enumerate(shapes):
        if place > start and 4 * (taken + math.prod(shape)) > BUCKET_BYTES:
            found.append(Bucket(start, shapes[start:place]))
            start, taken = place, 0
        taken += math.prod(shape)
    return [*found, Bucket(start, shapes[start:])]


def _unpacked(buckets: Sequence[Bucket], several: Sequence) -> list:
    return [gradient for bucket, flat in zip(buckets, several) for gradient in bucket.unpacked(flat)]
