"""Functions of MindSpore's and mindone's that CPU has no kernel for, or a slow one: see `pipeline.devices.cpu`."""

import mindspore as ms
import numpy as np
from mindspore import ops
from mindspore.ops import operations as P

from pipeline.devices import cpu_gradients
from pipeline.devices.attention import attention

_matmul = P.MatMul()
_matmul_transposed = P.MatMul(transpose_b=True)
_bias_add = P.BiasAdd()


# --- creation -----------------------------------------------------------------------------------------------------


@ms.ops.constexpr
def _host_arange(start, end, step, dtype):
    values = np.arange(start, end, step)
    if dtype is None:
        dtype = ms.float32 if values.dtype.kind == "f" else ms.int64
    return ms.Tensor(values, dtype)


def arange(start=0, end=None, step=1, *, dtype=None):
    if end is None:
        return _host_arange(0, start, step, dtype)
    return _host_arange(start, end, step, dtype)


def zeros_like(input, *, dtype=None):
    return ops.zeros(input.shape, input.dtype if dtype is None else dtype)


def ones_like(input, *, dtype=None):
    return ops.ones(input.shape, input.dtype if dtype is None else dtype)


def full(size, fill_value, *, dtype=None):
    if dtype is None:
        dtype = ms.float32 if isinstance(fill_value, float) else ms.int64
    return ops.full(size, fill_value, dtype=dtype)


# --- shape --------------------------------------------------------------------------------------------------------


def stack(tensors, dim=0):
    return ops.stack(tensors, dim)


def split(tensor, split_size_or_sections, dim=0):
    return ops.split(tensor, split_size_or_sections, dim)


def chunk(input, chunks, dim=0):
    return ops.chunk(input, chunks, dim)


def pad(input, pad, mode="constant", value=None):
    """Zeros are put beside: that takes a tenth of the kernel's time and less."""
    if mode != "constant" or value or min(pad) < 0:
        return ops.pad(input, pad, mode, value)
    for number in range(len(pad) // 2):
        axis = input.ndim - 1 - number
        if pad[2 * number]:
            input = ops.cat((_zeros_beside(input, axis, pad[2 * number]), input), axis)
        if pad[2 * number + 1]:
            input = ops.cat((input, _zeros_beside(input, axis, pad[2 * number + 1])), axis)
    return input


def _zeros_beside(input, axis, length):
    """What is as large as ``input``, but for ``length`` along an axis."""
    return ops.zeros(input.shape[:axis] + (length,) + input.shape[axis + 1 :], input.dtype)


# --- arithmetic ---------------------------------------------------------------------------------------------------


def outer(input, vec2):
    return input.reshape(-1, 1) * vec2.reshape(1, -1)


def gelu(input, *, approximate="none"):
    """Gaussian error linear unit (arXiv:1606.08415).

    The tanh form is x * sigmoid(2u), which equals x * (1 + tanh u) / 2 and is several times faster here.
    """
    if approximate == "tanh":
        return cpu_gradients.gelu(input)
    return 0.5 * input * (1.0 + ops.erf(input * 0.7071067811865476))


def linear(input, weight, bias=None):
    """input: (..., in).  weight: (out, in).  One 2-D product is three times faster on CPU than the Dense kernel."""
    rows = input.reshape(-1, input.shape[-1])
    output = _matmul_transposed(rows, weight)
    if bias is not None:
        output = _bias_add(output, bias)
    return output.reshape(input.shape[:-1] + (weight.shape[0],))


def layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """Layer normalisation (arXiv:1607.06450) over the last axes, which have ``normalized_shape``."""
    flat = input if len(normalized_shape) == 1 else input.flatten(start_dim=input.ndim - len(normalized_shape))
    output = cpu_gradients.normalized(cpu_gradients.centered(flat), eps).reshape(input.shape)
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    return output.astype(input.dtype)


def embedding(input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False):
    if padding_idx is not None or max_norm is not None or scale_grad_by_freq:
        raise NotImplementedError("embedding on CPU: padding_idx, max_norm and scale_grad_by_freq are not supported")
    return ops.gather(weight, input, 0)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return ops.conv2d(input, weight, bias, stride, "pad", padding, dilation, groups)


# --- mindone functions --------------------------------------------------------------------------------------------


def dispatch_attention_fn(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    attention_kwargs=None,
    *,
    backend=None,
    parallel_config=None,
):
    if is_causal or enable_gqa or dropout_p:
        raise NotImplementedError("attention on CPU: causal, grouped and dropout forms are not supported")
    return attention(query, key, value, attn_mask, scale)


@ms.ops.constexpr
def _quarter_turn(dim, dtype):
    """The (dim, dim) matrix that takes each pair (a, b) of a row to (-b, a)."""
    turn = np.zeros((dim, dim), np.float32)
    first = np.arange(0, dim, 2)
    turn[first + 1, first] = -1
    turn[first, first + 1] = 1
    return ms.Tensor(turn, dtype)


def apply_rotary_emb(x, freqs_cis, use_real=True, use_real_unbind_dim=-1, sequence_dim=2):
    """Rotary position embedding (arXiv:2104.09864) on interleaved pairs, as FLUX.1 uses it.

    x: (batch, tokens, heads, head_dim).  freqs_cis: cosines and sines, (tokens, head_dim) each, float32.
    Each pair is turned by a product with a matrix of 0, 1 and -1, which is exact: the gradient of ``unbind`` fails on
    CPU when one of its outputs is unused.
    """
    if not (use_real and use_real_unbind_dim == -1 and sequence_dim == 1):
        raise NotImplementedError("rotary embedding on CPU: only FLUX.1's form is supported")
    cos, sin = freqs_cis
    return rotated(x, spread_over_heads(cos, x.shape[0], x.shape[2]), spread_over_heads(sin, x.shape[0], x.shape[2]))


def spread_over_heads(angles, copies, heads):
    """Cosines or sines, (tokens, head_dim), of several ``copies`` of the tokens: (copies * tokens, heads, head_dim).

    Products of equal shapes are several times faster, and a graph spreads the angles once for all blocks.
    """
    of_heads = ops.broadcast_to(angles.expand_dims(1), (angles.shape[0], heads, angles.shape[1]))
    return ops.cat([of_heads] * copies)


def rotated(x, cos, sin):
    """Every pair (a, b) of ``x`` as (a cos - b sin, b cos + a sin).

    x: (batch, tokens, heads, head_dim).  cos, sin: as `spread_over_heads` makes them.
    """
    cos, sin, wide = cos.reshape(x.shape), sin.reshape(x.shape), x.astype(ms.float32)
    quarter_turned = _matmul(wide.reshape(-1, x.shape[-1]), _quarter_turn(x.shape[-1], ms.float32)).reshape(x.shape)
    return (wide * cos + quarter_turned * sin).astype(x.dtype)


@ms.ops.constexpr
def _rotary_frequencies(dim, theta, linear_factor, dtype):
    return ms.Tensor(theta ** (-np.arange(0, dim, 2) / dim) / linear_factor, dtype)


def get_1d_rotary_pos_embed(
    dim,
    pos,
    theta=10000.0,
    use_real=False,
    linear_factor=1.0,
    ntk_factor=1.0,
    repeat_interleave_real=True,
    freqs_dtype=ms.float32,
):
    """Cosines and sines of the angles, each (len(pos), dim), float32, every angle twice in a row."""
    if not (use_real and repeat_interleave_real):
        raise NotImplementedError("rotary frequencies on CPU: only FLUX.1's form is supported")
    angles = outer(pos, _rotary_frequencies(dim, theta * ntk_factor, linear_factor, freqs_dtype)).astype(ms.float32)
    twice = stack([angles, angles], -1).reshape(pos.shape[0], dim)
    return ops.cos(twice), ops.sin(twice)


@ms.ops.constexpr
def _timestep_frequencies(num, downscale_freq_shift, max_period):
    exponents = np.arange(num) / (num - downscale_freq_shift)
    return ms.Tensor(np.exp(-np.log(max_period) * exponents), ms.float32)


def get_timestep_embedding(
    timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000
):
    """Sinusoidal embedding (arXiv:2006.11239) of ``timesteps``, (batch,): (batch, embedding_dim), float32.

    The frequencies are constants and come from the host: the CPU's ``exp`` is a little off, and at a timestep of 1000
    the sines are then off by 1e-3.
    """
    if embedding_dim % 2:
        raise NotImplementedError("timestep embedding on CPU: the dimension must be even")
    angles = scale * outer(
        timesteps.astype(ms.float32), _timestep_frequencies(embedding_dim // 2, downscale_freq_shift, max_period)
    )
    if flip_sin_to_cos:
        return ops.cat((ops.cos(angles), ops.sin(angles)), -1)
    return ops.cat((ops.sin(angles), ops.cos(angles)), -1)
