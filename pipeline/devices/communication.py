"""What the ranks of a training exchange on their devices: by HCCL on Ascend, by MindSpore's own means on CPU."""

import atexit
import os
import sys

from pipeline.errors import UserError
from pipeline.process.ranks import Ranks

BUCKET_BYTES = 64 << 20
"""Of one rank's gradients that are exchanged at a time."""


class Collectives:
    """Operations that all ranks call in the same order with float32 tensors of the same shape.

    On CPU a rank waits for the others before each: MindSpore gives up there when another comes 30 seconds later, as one
    that compiles a step for another size of pictures does.
    """

    def __init__(self, ranks: Ranks, device: str):
        from mindspore import communication, ops

        communication.init()
        if (number := communication.get_rank()) != ranks.rank:
            raise UserError(f"rank {ranks.rank}: MindSpore numbers it {number}; give each host its own --node_rank")
        self.ranks, self._waits = ranks, device == "CPU"
        if self._waits:
            atexit.register(_silence)  # before what MindSpore does at the end, as it was imported before
        self._all_gather, self._all_reduce = ops.AllGather(), ops.AllReduce()

    def meet(self) -> None:
        """Wait for the other ranks, where that has to be done before an operation."""
        if self._waits:
            self.ranks.exchange(None)

    def gathered(self, tensor) -> list:
        """Every rank's tensor, which has one axis, by rank."""
        self.meet()
        every, size = self._all_gather(tensor), tensor.shape[0]
        return [every[rank * size : (rank + 1) * size] for rank in range(self.ranks.size)]

    def summed(self, tensor):
        """The sum of all ranks' tensors, in an order that the library chooses."""
        self.meet()
        return self._all_reduce(tensor)


def _silence() -> None:
    """Show nobody the lines about its connections that MindSpore prints on CPU while the process ends."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
