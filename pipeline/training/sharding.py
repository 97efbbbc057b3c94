"""Optimizer state of which each rank keeps a share: ZeRO stage 1 (arXiv:1910.02054), by whole parameters.

Each rank steps its own parameters and the ranks share what they have stepped, so that the bits are those of one rank.
A checkpoint has all of the state, whoever kept it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.devices.communication import BUCKET_BYTES, Collectives


def owners(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank that keeps each parameter: the largest first, each to the rank that has least."""
    loads, found = [0] * num_ranks, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        found[place] = loads.index(min(loads))
        loads[found[place]] += sizes[place]
    return found


@dataclass(frozen=True)
class Gathered:
    """What another rank may have kept, on the host; it is asked as a parameter is."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def asnumpy(self) -> np.ndarray:
        return self.array


class Shards:
    """Which of the trained parameters each rank keeps.  own: the places of this rank's."""

    def __init__(self, collectives: Collectives, trained: Sequence):
        self._collectives, ranks = collectives, collectives.ranks
        self._shapes = [tuple(parameter.shape) for parameter in trained]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        of = owners(self._sizes, ranks.size)
        places = [[place for place, owner in enumerate(of) if owner == rank] for rank in range(ranks.size)]
        self.own = places[ranks.rank]
        self._rounds = list(itertools.zip_longest(*map(self._filled, places), fillvalue=()))

    def _filled(self, places: Sequence[int]) -> Iterator[list[int]]:
        """A rank's places in order, as many at a time as BUCKET_BYTES have room for, and at least one."""
        found: list[int] = []
        for place in places:
            if found and 4 * sum(self._sizes[each] for each in [*found, place]) > BUCKET_BYTES:
                yield found
                found = []
            found.append(place)
        if found:
            yield found

    def shared(self, own: Sequence) -> Iterator[tuple[int, Any]]:
        """What all ranks keep, as place and tensor; ``own`` is this rank's, by `own`.  All of it must be taken."""
        mine = dict(zip(self.own, own))
        for several in self._rounds:
            length = max(sum(self._sizes[place] for place in places) for places in several)
            flat = self._packed([mine[place] for place in several[self._collectives.ranks.rank]], length)
            for places, row in zip(several, self._collectives.gathered(flat)):
                start = 0
                for place in places:
                    end = start + self._sizes[place]
                    yield place, row[start:end].reshape(self._shapes[place])
                    start = end

    def _packed(self, tensors: Sequence, length: int):
        """End to end, with zeros after it up to ``length``."""
        from mindspore import Tensor, ops

        rest = length - sum(math.prod(tensor.shape) for tensor in tensors)
        padding = [Tensor(np.zeros(rest, np.float32))] if rest else []
        return ops.cat([*(tensor.reshape(-1) for tensor in tensors), *padding])

    def give(self, trained: Sequence) -> None:
        """Set all parameters to what the ranks that keep them have made of them."""
        from mindspore import ops

        kept = set(self.own)
        for place, tensor in self.shared([trained[place] for place in self.own]):
            if place not in kept:
                ops.assign(trained[place], tensor)  # a compiled graph would not see set_data

    def collected(self, own: Sequence) -> dict[int, Gathered]:
        """What all ranks keep, by place, on the first rank's host; nothing on the others."""
        is_first, found = self._collectives.ranks.is_first, {}
        for place, tensor in self.shared(own):
            if is_first:
                found[place] = Gathered(tensor.asnumpy())
        return found
