"""Substitutes for the kernels that MindSpore lacks on CPU, so that mindone's models run there unchanged.

mindone's models are written on ``mindspore.mint``, and several of its primitives have an Ascend kernel only.  Each
function below computes the same from primitives that have a CPU kernel and a CPU gradient.  They are plain functions of
the original's signature, put in the original's place by `install`, and serve PyNative and ``ms.jit`` alike: the graph
compiler parses them as it would the originals.  Nothing here is installed on Ascend.

Two kinds of places need more than a function.  A cell that calls a primitive directly gets another ``construct``.
Tensor methods inside a compiled ``construct`` cannot be replaced from Python at all, so the few mindone constructs that
call one without a CPU kernel get a version of their own.

`substitutes` lists them all with the reason for each; the tests ask MindSpore whether the reason still holds.  Dropout
with p > 0 in training (DropoutExt) has no substitute: it would draw from device state that no checkpoint can restore.
"""

from collections.abc import Callable
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import mint, ops
from mindspore.ops import operations as P

from pipeline.devices import cpu_gradients
from pipeline.devices.attention import attention
from pipeline.devices.replacing import replace_everywhere

_matmul = P.MatMul()
_matmul_transposed = P.MatMul(transpose_b=True)
_bias_add = P.BiasAdd()
_as_it_is = P.Identity()


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
    if attn_mask is None and scale is None:
        return cpu_gradients.attention(query, key, value)
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
    # Products of equal shapes are several times faster, and a graph spreads cosines and sines once for all blocks.
    cos = ops.broadcast_to(cos.reshape(1, cos.shape[0], 1, cos.shape[1]), x.shape)
    sin = ops.broadcast_to(sin.reshape(1, sin.shape[0], 1, sin.shape[1]), x.shape)
    wide = x.astype(ms.float32)
    turned = _matmul(wide.reshape(-1, x.shape[-1]), _quarter_turn(x.shape[-1], ms.float32)).reshape(x.shape)
    return (wide * cos + turned * sin).astype(x.dtype)


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
    freqs = 1.0 / ((theta * ntk_factor) ** (arange(0, dim, 2, dtype=freqs_dtype) / dim)) / linear_factor
    angles = outer(pos, freqs).astype(ms.float32)
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


# --- constructs ---------------------------------------------------------------------------------------------------
#
# Where `to_float` sets a cell's compute dtype, ``ms.jit`` casts the cell's inputs, and of its parameters those that the
# construct itself hands to a primitive, but not those that it passes to a function.


def _linear_construct(self, x):
    output = _matmul_transposed(x.reshape(-1, x.shape[-1]), self.weight)
    if self.bias is not None:
        output = _bias_add(output, self.bias)
    return output.reshape(x.shape[:-1] + (self.out_features,))


def _conv2d_construct(self, input):
    if self.padding_mode != "zeros":
        raise NotImplementedError("convolution on CPU: padding_mode must be 'zeros'")
    bias = None if self.bias is None else _as_it_is(self.bias)
    return conv2d(input, _as_it_is(self.weight), bias, self.stride, self.padding, self.dilation, self.groups)


def _rms_norm_construct(self, hidden_states):
    """Root mean square normalisation (arXiv:1910.07467); x * x instead of a power, whose gradient is a float64 one."""
    if self.weight is None:
        return cpu_gradients.normalized(hidden_states, self.eps).astype(hidden_states.dtype)
    if self.weight.dtype == ms.float16:
        normal = cpu_gradients.normalized(hidden_states, self.eps).astype(ms.float16) * self.weight
    else:
        normal = cpu_gradients.normalized(hidden_states, self.eps, _as_it_is(self.weight))
    return normal if self.bias is None else normal + self.bias


def _t5_norm_construct(self, hidden_states):
    if self.weight.dtype != ms.float32:
        return cpu_gradients.normalized(hidden_states, self.variance_epsilon).astype(self.weight.dtype) * self.weight
    return cpu_gradients.normalized(hidden_states, self.variance_epsilon, _as_it_is(self.weight))


def _new_gelu_construct(self, input):
    return cpu_gradients.gelu(input)


def _resnet_construct(self, input_tensor, temb):
    """The original divides by its scale, which in the VAE is 1, and a division takes 30 times an addition."""
    hidden_states = self.nonlinearity(self.norm1(input_tensor))
    if self.upsample is not None:
        input_tensor, hidden_states = self.upsample(input_tensor), self.upsample(hidden_states)
    elif self.downsample is not None:
        input_tensor, hidden_states = self.downsample(input_tensor), self.downsample(hidden_states)
    hidden_states = self.conv1(hidden_states)
    if self.time_emb_proj is not None:
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb)).expand_dims(2).expand_dims(3)
    if self.time_embedding_norm == "default" and temb is not None:
        hidden_states = hidden_states + temb
    hidden_states = self.norm2(hidden_states)
    if self.time_embedding_norm == "scale_shift":
        time_scale, time_shift = chunk(temb, 2, 1)
        hidden_states = hidden_states * (1 + time_scale) + time_shift
    hidden_states = self.conv2(self.dropout(self.nonlinearity(hidden_states)))
    if self.conv_shortcut is not None:
        input_tensor = self.conv_shortcut(input_tensor)
    hidden_states = input_tensor + hidden_states
    return hidden_states if self.output_scale_factor == 1 else hidden_states / self.output_scale_factor


def _modulated(norm, x, scale, shift):
    """``norm(x) * (1 + scale) + shift``; x: (batch, tokens, channels), ``scale`` and ``shift``: (batch, channels)."""
    if x.dtype == ms.float32:
        return cpu_gradients.modulated(x, norm.eps, 1 + scale.expand_dims(1), shift.expand_dims(1))
    return norm(x) * (1 + scale.expand_dims(1)) + shift.expand_dims(1)


def _ada_zero_construct(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunk(self.linear(self.silu(emb)), 6, 1)
    return _modulated(self.norm, x, scale_msa, shift_msa), gate_msa, shift_mlp, scale_mlp, gate_mlp


def _ada_zero_single_construct(self, x, emb=None):
    shift_msa, scale_msa, gate_msa = chunk(self.linear(self.silu(emb)), 3, 1)
    return _modulated(self.norm, x, scale_msa, shift_msa), gate_msa


def _heads(attn, x):
    """(batch, tokens, channels) to (batch, tokens, heads, head_dim)."""
    return x.reshape(x.shape[0], x.shape[1], attn.heads, -1)


def _flux_attention_call(
    self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
):
    """FLUX.1 attention; where text comes apart from the image, as one sequence with the text tokens first."""
    query = attn.norm_q(_heads(attn, attn.to_q(hidden_states)))
    key = attn.norm_k(_heads(attn, attn.to_k(hidden_states)))
    value = _heads(attn, attn.to_v(hidden_states))
    if encoder_hidden_states is not None:
        query = ops.cat((attn.norm_added_q(_heads(attn, attn.add_q_proj(encoder_hidden_states))), query), 1)
        key = ops.cat((attn.norm_added_k(_heads(attn, attn.add_k_proj(encoder_hidden_states))), key), 1)
        value = ops.cat((_heads(attn, attn.add_v_proj(encoder_hidden_states)), value), 1)
    if image_rotary_emb is not None:
        query = apply_rotary_emb(query, image_rotary_emb, True, -1, 1)
        key = apply_rotary_emb(key, image_rotary_emb, True, -1, 1)
    output = dispatch_attention_fn(query, key, value, attention_mask)
    output = output.reshape(output.shape[0], output.shape[1], -1).astype(query.dtype)
    if encoder_hidden_states is None:
        return output
    num_text = encoder_hidden_states.shape[1]
    image = attn.to_out[1](attn.to_out[0](output[:, num_text:]))
    return image, attn.to_add_out(output[:, :num_text])


# --- installation -------------------------------------------------------------------------------------------------


class Substitute(NamedTuple):
    """``replacement`` stands for ``owner.name``; owner: a module, or the class of a cell or processor.

    fails_with: words of the error by which the original fails, mostly the primitive that has no CPU kernel; empty where
    the original works and the replacement is faster or more exact.  compiled: the original fails under ``ms.jit`` only.
    fails_before: the MindSpore version from which on the original works; the replacement serves there too.
    """

    owner: object
    name: str
    replacement: Callable
    fails_with: str = ""
    compiled: bool = False
    fails_before: tuple[int, int] | None = None


def substitutes() -> tuple[Substitute, ...]:
    from mindone.diffusers.models import attention_dispatch, embeddings, normalization, resnet
    from mindone.diffusers.models.transformers import transformer_flux
    from mindone.transformers import activations
    from mindone.transformers.models.t5 import modeling_t5

    functional, nn = mint.nn.functional, mint.nn
    ada_zero, ada_zero_single = normalization.AdaLayerNormZero, normalization.AdaLayerNormZeroSingle
    flux_attention = transformer_flux.FluxAttnProcessor
    faster = more_exact = ""
    return (
        Substitute(mint, "arange", arange, "Arange"),
        Substitute(mint, "zeros_like", zeros_like, "ZerosLikeExt"),
        Substitute(mint, "ones_like", ones_like, "OnesLikeExt"),
        Substitute(mint, "full", full, "FillScalar"),
        Substitute(mint, "stack", stack, "StackExt"),
        Substitute(mint, "split", split, "SplitWithSize", compiled=True, fails_before=(2, 8)),
        Substitute(mint, "chunk", chunk, "Chunk", compiled=True, fails_before=(2, 8)),
        Substitute(mint, "outer", outer, "Outer"),
        Substitute(functional, "pad", pad, "ConstantPadND"),
        Substitute(functional, "gelu", gelu, "GeluExt"),
        Substitute(functional, "linear", linear, faster),
        Substitute(nn.Linear, "construct", _linear_construct, faster),
        Substitute(functional, "layer_norm", layer_norm, "LayerNormExt"),
        Substitute(functional, "embedding", embedding, "Embedding"),
        Substitute(functional, "conv2d", conv2d, "Conv2DExt"),
        Substitute(nn.Conv2d, "construct", _conv2d_construct, "Conv2DExt"),
        Substitute(attention_dispatch, "dispatch_attention_fn", dispatch_attention_fn, "FlashAttentionScore"),
        Substitute(embeddings, "apply_rotary_emb", apply_rotary_emb, "pointer[input_tensor] is null"),
        Substitute(embeddings, "get_timestep_embedding", get_timestep_embedding, more_exact),
        Substitute(embeddings, "get_1d_rotary_pos_embed", get_1d_rotary_pos_embed, "RepeatInterleaveInt"),
        Substitute(normalization.RMSNorm, "construct", _rms_norm_construct, faster),
        Substitute(modeling_t5.T5LayerNorm, "construct", _t5_norm_construct, faster),
        Substitute(activations.NewGELUActivation, "construct", _new_gelu_construct, faster),
        Substitute(resnet.ResnetBlock2D, "construct", _resnet_construct, faster),
        Substitute(ada_zero, "construct", _ada_zero_construct, "Chunk", compiled=True),
        Substitute(ada_zero_single, "construct", _ada_zero_single_construct, "Chunk", compiled=True),
        Substitute(
            flux_attention, "__call__", _flux_attention_call, "SplitWithSize", compiled=True, fails_before=(2, 8)
        ),
    )


def install():
    """Put every substitute in its original's place, in what is imported and what will be; safe to call twice."""
    for owner, name, replacement, *_ in substitutes():
        if isinstance(owner, type):
            setattr(owner, name, replacement)
        else:
            replace_everywhere(getattr(owner, name), replacement)
