"""The processor's cores, shared among processes: MindSpore's threads wait in loops, on cores that others need."""

import os


def keep_to_own(number: int, count: int) -> None:
    """Let this process, the ``number``-th of ``count`` from 0, use its share of the cores; of too few, all of them."""
    cores = sorted(os.sched_getaffinity(0))
    if 1 < count <= len(cores):
        share = len(cores) // count
        os.sched_setaffinity(0, cores[share * number : share * (number + 1)])
