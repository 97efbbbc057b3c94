"""Which examples a training step sees, where every batch must be of one bucket (one shape of latents).

The definition: an endless stream of epochs, each of them a permutation of all examples.  Each example goes to its
bucket's queue; whenever a queue holds ``batch_size`` examples, they are the next batch.  So no epoch drops or repeats
an example, and what is left in the queues at its end comes first in the next.  Any step's batch is computed from its
number, without those before it.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import draws
from pipeline.draws import Purpose

NUM_CACHED = 4  # epochs: the one at hand, those before it whose examples its first batches take, and one more


@dataclass(frozen=True)
class _Epoch:
    """examples: (n,), all examples, bucket by bucket, in a bucket by arrival.

    buckets, numbers: the batches that this epoch completes, in order, as bucket and number within the bucket.
    """

    examples: np.ndarray
    buckets: np.ndarray
    numbers: np.ndarray


class Order:
    """The batches of every step, from 0, for ``len(bucket_of)`` examples; the same step always gives the same batch.

    bucket_of: the bucket of every example, any whole numbers.  A bucket with fewer than ``batch_size`` examples gives a
    batch only every few epochs, which then has some of them more than once.
    Raises ValueError where there is no example or ``batch_size`` is below 1.
    """

    def __init__(
        self, seed: int, bucket_of: Sequence[int] | np.ndarray, batch_size: int, purpose: Purpose = Purpose.ORDER
    ):
        if not len(bucket_of) or batch_size < 1:
            raise ValueError(f"order: {len(bucket_of)} examples in batches of {batch_size}; both must be at least 1")
        self.seed, self.batch_size, self._purpose = seed, batch_size, purpose
        _, self._bucket_of, self._sizes = np.unique(bucket_of, return_inverse=True, return_counts=True)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._epochs = functools.lru_cache(maxsize=NUM_CACHED)(self._arrange)

    def batch(self, step: int) -> list[int]:
        """The examples of step ``step``, in the order of their arrival; all of one bucket."""
        epoch = self.epoch(step)
        arranged, index = self._epochs(epoch), step - self.steps_in_epochs(epoch)
        bucket, first = int(arranged.buckets[index]), int(arranged.numbers[index]) * self.batch_size
        return [self._example(bucket, position) for position in range(first, first + self.batch_size)]

    def epoch(self, step: int) -> int:
        """The epoch, from 0, in which the step's batch is complete.  Raises ValueError for a step below 0."""
        if step < 0:
            raise ValueError(f"steps count from 0, found {step}")
        # Of what has arrived when an epoch begins, each queue holds less than a batch: there is no later epoch to try.
        latest = (step + len(self._sizes)) * self.batch_size // len(self._bucket_of)
        return bisect.bisect_right(range(latest + 1), step, key=self.steps_in_epochs) - 1

    def steps_in_epochs(self, num_epochs: int) -> int:
        """How many batches the first ``num_epochs`` epochs complete; those left in the queues are not in them."""
        return int((num_epochs * self._sizes // self.batch_size).sum())

    def _example(self, bucket: int, position: int) -> int:
        """The example at a position of a bucket's own endless stream."""
        epoch, rank = divmod(position, int(self._sizes[bucket]))
        return int(self._epochs(epoch).examples[self._starts[bucket] + rank])

    def _arrange(self, epoch: int) -> _Epoch:
        permutation = draws.generator(self.seed, self._purpose, epoch).permutation(len(self._bucket_of))
        arrivals = np.argsort(self._bucket_of[permutation], kind="stable")  # places in the permutation, by bucket
        first, beyond = (each * self._sizes // self.batch_size for each in (epoch, epoch + 1))
        buckets = np.repeat(np.arange(len(self._sizes)), beyond - first)
        numbers = np.concatenate([np.arange(*each) for each in zip(first, beyond)])
        last_ranks = (numbers + 1) * self.batch_size - 1 - epoch * self._sizes[buckets]
        order = np.argsort(arrivals[self._starts[buckets] + last_ranks])
        return _Epoch(permutation[arrivals], buckets[order], numbers[order])
