"""What a step on CPU spends most of its time on beside matrix products, with gradients written by hand.

MindSpore's own gradients of softmax and normalisations reduce and broadcast along rows, which its CPU kernels do many
times slower than they multiply matrices.  Here a row's sum is a product with a column of ones, and what would be
subtracted from a row is one more term of a product that is taken anyway.  Nothing here is used on Ascend.
"""

import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.ops import operations as P

_matmul = P.MatMul()
_transposed_matmul = P.MatMul(transpose_a=True)
_batch_matmul = P.BatchMatMul()
_batch_matmul_transposed = P.BatchMatMul(transpose_b=True)
_batch_transposed_matmul = P.BatchMatMul(transpose_a=True)


@ms.ops.constexpr
def _filled(shape, value, dtype):
    return ms.Tensor(np.full(shape, value), dtype)


def _mean(rows):
    """(rows, n) to (rows, 1)."""
    return _matmul(rows, _filled((rows.shape[-1], 1), 1 / rows.shape[-1], rows.dtype))


class _Cell(nn.Cell):
    """A cell that lives as long as the interpreter: what nn.Cell does in the end would fail then, and be printed."""

    def __del__(self):
        pass


# --- attention ----------------------------------------------------------------------------------------------------


class _Attention(_Cell):
    """softmax(query key^T / sqrt(size)) value, (batch, tokens, heads, size), and what the gradient needs.

    both: (batch, 2 tokens, heads, size), queries before keys.  value: (batch, tokens, heads, size).
    """

    def construct(self, both, value):
        query, key = ops.split(both.permute(0, 2, 1, 3), value.shape[1], 2)
        query = query * (1.0 / math.sqrt(query.shape[-1]))
        value = value.permute(0, 2, 1, 3)
        weights = ops.softmax(_batch_matmul_transposed(query, key), -1)
        output = _batch_matmul(weights, value)
        return output.permute(0, 2, 1, 3), output, weights, query, key, value

    def bprop(self, both, value, out, dout):
        """As FlashAttention (arXiv:2205.14135) has it: weights * (dout value^T - sum(dout * output))."""
        _, output, weights, query, key, value = out
        towards = dout[0].permute(0, 2, 1, 3)
        size = towards.shape[-1]
        along = _mean((towards * output).reshape(-1, size)).reshape(towards.shape[:-1] + (1,))
        minus = _filled(value.shape[:-1] + (1,), -size, value.dtype)
        scores = weights * _batch_matmul_transposed(ops.cat((towards, along), -1), ops.cat((value, minus), -1))
        dquery = _batch_matmul(scores, key) * (1.0 / math.sqrt(size))
        dkey = _batch_transposed_matmul(query, scores).swapaxes(-1, -2)
        dvalue = _batch_transposed_matmul(towards, weights)  # faster than with weights transposed
        return ops.cat((dquery, dkey), 2).permute(0, 2, 1, 3), dvalue.permute(0, 3, 1, 2)


_attention = _Attention()


def attention(both, value):
    """As `pipeline.devices.attention.attention`, without mask, with queries and keys of one dtype in one tensor."""
    return _attention(both, value.astype(both.dtype))[0]


# --- normalisation ------------------------------------------------------------------------------------------------


class _Scaled(_Cell):
    """rows * inverse * weight, where ``inverse`` is 1 / sqrt(mean(rows * rows) + eps) and has no gradient besides.

    rows: (rows, n).  inverse: (rows, 1).  weight: (1, n).  The latter two are multiplied as matrices, as that takes a
    fraction of what multiplications do that broadcast.  Also returns their product, for the gradient.
    """

    def construct(self, rows, inverse, weight):
        factors = _matmul(inverse, weight)
        return rows * factors, factors

    def bprop(self, rows, inverse, weight, out, dout):
        towards = dout[0]
        along = towards * out[1]
        dweight = _transposed_matmul(inverse, towards * rows)
        return _along_rows(along, rows, inverse), ops.zeros_like(inverse), dweight


def _along_rows(along, rows, inverse):
    """The gradient with respect to ``rows``; along: what it is where ``inverse`` does not depend on them."""
    share = _mean(along * rows) * inverse * inverse
    return along - rows * _across(share, rows.shape[-1])


_scaled = _Scaled()


def normalized(x, eps, weight=None):
    """x / sqrt(mean(x * x) + eps) over the last axis, float32; times ``weight``, (n,), where there is one."""
    rows = x.astype(ms.float32).reshape(-1, x.shape[-1])
    weight = _filled((1, x.shape[-1]), 1.0, ms.float32) if weight is None else weight.astype(ms.float32).reshape(1, -1)
    return _scaled(rows, _inverse(rows, eps), weight)[0].reshape(x.shape)


class _ScaledByPart(_Cell):
    """rows * inverse * (of_part weights), as `_Scaled`, where rows of several parts have weights of their own.

    rows: (rows, n).  inverse: (rows, 1).  weights: (parts, n).  of_part: (rows, parts), 1 where a row is of a part.
    """

    def construct(self, rows, inverse, weights, of_part):
        factors = _across(inverse, rows.shape[-1]) * _matmul(of_part, weights)
        return rows * factors, factors

    def bprop(self, rows, inverse, weights, of_part, out, dout):
        towards = dout[0]
        drows = _along_rows(towards * out[1], rows, inverse)
        dweights = _transposed_matmul(of_part, towards * rows * _across(inverse, rows.shape[-1]))
        return drows, ops.zeros_like(inverse), dweights, ops.zeros_like(of_part)


_scaled_by_part = _ScaledByPart()


@ms.ops.constexpr
def _part_of_row(batch, lengths, heads):
    """(batch * sum(lengths) * heads, parts), 1 where a row is of a part: parts follow each other along the tokens."""
    parts = np.repeat(np.arange(len(lengths)), lengths)
    of_token = np.eye(len(lengths), dtype=np.float32)[parts]
    return ms.Tensor(np.tile(np.repeat(of_token, heads, 0), (batch, 1)))


def normalized_by_part(x, eps, weights, lengths):
    """As `normalized`; x: (batch, tokens, heads, n), whose tokens are parts of ``lengths``, each with its weight."""
    rows = x.reshape(-1, x.shape[-1])
    of_part = _part_of_row(x.shape[0], lengths, x.shape[2])
    return _scaled_by_part(rows, _inverse(rows, eps), ops.stack(weights), of_part)[0].reshape(x.shape)


def _inverse(rows, eps):
    return ops.stop_gradient(ops.rsqrt(_mean(rows * rows) + eps))


def _across(column, n):
    """(rows, 1) to (rows, n)."""
    return _matmul(column, _filled((1, n), 1.0, column.dtype))


class _Modulated(_Cell):
    """rows * inverse * scale + shift, as `_Scaled`, of several samples.

    rows: (batch, rows, n).  inverse: (batch, rows, 1).  scale, shift: (batch, 1, n).
    """

    def construct(self, rows, inverse, scale, shift):
        factors = _batch_matmul(inverse, scale)
        return rows * factors + _batch_matmul(_filled(inverse.shape, 1.0, inverse.dtype), shift), factors

    def bprop(self, rows, inverse, scale, shift, out, dout):
        towards, n = dout[0], rows.shape[-1]
        along = towards * out[1]
        share = _mean((along * rows).reshape(-1, n)) * inverse.reshape(-1, 1) * inverse.reshape(-1, 1)
        drows = along - rows * _across(share, n).reshape(rows.shape)
        dscale = _batch_transposed_matmul(inverse, towards * rows)
        dshift = _batch_transposed_matmul(_filled(inverse.shape, 1.0, inverse.dtype), towards)
        return drows, ops.zeros_like(inverse), dscale, dshift


_modulated = _Modulated()


def modulated(x, eps, scale, shift):
    """Layer normalisation times ``scale`` plus ``shift``, float32.  x: (batch, tokens, n); the others (batch, 1, n)."""
    rows = centered(x)
    inverse = _inverse(rows.reshape(-1, x.shape[-1]), eps).reshape(x.shape[:-1] + (1,))
    return _modulated(rows, inverse, scale, shift)[0]


def centered(x):
    """x - mean(x) over the last axis, float32."""
    rows = x.astype(ms.float32).reshape(-1, x.shape[-1])
    minus_means = _matmul(_mean(rows), _filled((1, x.shape[-1]), -1.0, ms.float32))
    return (rows + minus_means).reshape(x.shape)


# --- activation ---------------------------------------------------------------------------------------------------

_LINEAR = 1.5957691216057308
_CUBIC = 0.044715 * _LINEAR


class _Gelu(_Cell):
    """x * sigmoid(2u), and that sigmoid, which the gradient needs; u as in `pipeline.devices.cpu.gelu`."""

    def construct(self, x):
        bounded = _bounded(x)
        share = ops.sigmoid(bounded * (bounded * bounded * _CUBIC + _LINEAR))
        return x * share, share

    def bprop(self, x, out, dout):
        output, share = out
        bounded = _bounded(x)
        slope = bounded * bounded * (3 * _CUBIC) + _LINEAR
        return (dout[0] * (share + (output - output * share) * slope),)


def _bounded(x):
    """Where u would overflow float16, and its gradient become NaN, x as far as the sigmoid is not 0 or 1."""
    return ops.clamp(x, -10.0, 10.0) if x.dtype == ms.float16 else x


_gelu = _Gelu()


def gelu(x):
    """The tanh form of the Gaussian error linear unit."""
    return _gelu(x)[0]
