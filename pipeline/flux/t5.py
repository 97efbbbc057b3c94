"""T5's relative position buckets, computed on the host: on a device the logarithm in them may come out too low."""

import math

import numpy as np


def use_exact_buckets(t5) -> None:
    """Have a loaded T5 encoder take its position buckets from `position_buckets`."""
    import mindspore as ms

    @ms.ops.constexpr  # for compiled functions
    def buckets(length, *limits):
        return ms.Tensor(position_buckets(length, length, *limits))

    def bias(self, query_length, key_length, cache_position=None):  # an encoder has as many queries as keys
        limits = self.relative_attention_num_buckets, self.relative_attention_max_distance
        values = self.relative_attention_bias(buckets(key_length, *limits))
        return values.permute(2, 0, 1).expand_dims(0)

    for _, cell in t5.cells_and_names():
        if getattr(cell, "has_relative_attention_bias", False):
            cell.compute_bias = bias.__get__(cell)


def position_buckets(num_queries: int, num_keys: int, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """T5's bidirectional relative position buckets (arXiv:1910.10683), (num_queries, num_keys), int32.

    They depend on nothing but shapes.  In float32 on a device ``log(16)`` may come out a hair low and is then cut off
    to the bucket below; here the host computes them in float64.
    """
    distance = np.arange(num_keys)[None, :] - np.arange(num_queries)[:, None]
    half = num_buckets // 2
    exact = half // 2
    length = np.abs(distance)
    growth = np.log(np.maximum(length, 1) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + np.floor(growth * (half - exact) + 1e-9).astype(np.int64), half - 1)
    return (np.where(length < exact, length, far) + half * (distance > 0)).astype(np.int32)
