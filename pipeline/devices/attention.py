"""Attention in plain steps, for what a device has no fused kernel for: all of it on CPU, float32 on Ascend."""

import math

import mindspore as ms
from mindspore import ops
from mindspore.ops import operations as P

_batch_matmul = P.BatchMatMul()
_batch_matmul_transposed = P.BatchMatMul(transpose_b=True)


def attention(query, key, value, attn_mask=None, scale=None):
    """Scaled dot-product attention (arXiv:1706.03762), in the dtype of ``query``, to which all else is cast.

    query, key, value: (batch, tokens, heads, head_dim).  attn_mask: None, boolean (True attends), or additive;
    broadcastable to (batch, heads, tokens, tokens).  Returns (batch, tokens, heads, head_dim).
    """
    query = query.permute(0, 2, 1, 3)
    key = key.astype(query.dtype).permute(0, 2, 1, 3)
    value = value.astype(query.dtype).permute(0, 2, 1, 3)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    weights = _batch_matmul_transposed(query * scale, key)
    if attn_mask is not None:
        if attn_mask.dtype == ms.bool_:
            weights = ops.masked_fill(weights, ops.logical_not(attn_mask), float("-inf"))
        else:
            weights = weights + attn_mask.astype(weights.dtype)
    weights = ops.softmax(weights, -1)
    return _batch_matmul(weights, value).permute(0, 2, 1, 3)
