"""What a measurement gives `python -m benchmarks`: figures, each our cost by that of a yardstick in the same run."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True)
class Figure:
    """How many times as much as ``yardstick`` something costs: more is slower, or larger.

    low, high: the middle half of the rounds lies between them, so that one disturbed round moves neither far.
    """

    name: str
    yardstick: str
    ratio: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, name: str, yardstick: str, ours: Iterable[float], theirs: Iterable[float]) -> "Figure":
        """From the costs of rounds: those of one round were measured close to one another, and are compared."""
        ratios = [own / other for own, other in zip(ours, theirs)]
        low, high = np.quantile(ratios, (0.25, 0.75)).tolist()
        return cls(name, yardstick, median(ratios), low, high, len(ratios))


def in_child(function: Callable, *arguments):
    """The function's result, computed by a fresh process, which begins with neither MindSpore nor warm caches."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
