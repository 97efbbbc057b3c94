"""What cells and processors compute on CPU where replacing a function does not do: see `pipeline.devices.cpu`.

A cell that calls a primitive directly gets another ``construct``.  Tensor methods inside a compiled ``construct``
cannot be replaced from Python at all, so the few mindone constructs that call one without a CPU kernel get a version of
their own; and so do those whose steps have faster kernels.

Where `to_float` sets a cell's compute dtype, ``ms.jit`` casts the cell's inputs, and of its parameters those that the
construct itself hands to a primitive, but not those that it passes to a function.
"""

import mindspore as ms
from mindspore import ops
from mindspore.ops import operations as P

from pipeline.devices import cpu_gradients
from pipeline.devices.cpu_functions import chunk, conv2d, dispatch_attention_fn, rotated, spread_over_heads

_matmul_transposed = P.MatMul(transpose_b=True)
_bias_add = P.BiasAdd()
_as_it_is = P.Identity()


def linear_construct(self, x):
    output = _matmul_transposed(x.reshape(-1, x.shape[-1]), self.weight)
    if self.bias is not None:
        output = _bias_add(output, self.bias)
    return output.reshape(x.shape[:-1] + (self.out_features,))


def lora_linear_construct(self, x):
    """mindone's LoRA layer, without multiplying by a scale of 1, which it is where alpha is the rank."""
    if self.merged and self.disable_adapters:
        raise NotImplementedError("LoRA on CPU: adapters that are merged cannot be left out; call unmerge() first")
    result = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return result
    dtype = result.dtype
    for adapter in self.active_adapters:
        if adapter in self.lora_A.keys():
            if self.use_dora[adapter]:
                raise NotImplementedError("LoRA on CPU: DoRA is not supported")
            down, up, scale = self.lora_A[adapter], self.lora_B[adapter], self.scaling[adapter]
            x = self._cast_input_dtype(x, down.weight.dtype)
            added = up(down(self.lora_dropout[adapter](x)))
            result = result + (added if scale == 1 else added * scale)
    return result.to(dtype)


def conv2d_construct(self, input):
    if self.padding_mode != "zeros":
        raise NotImplementedError("convolution on CPU: padding_mode must be 'zeros'")
    bias = None if self.bias is None else _as_it_is(self.bias)
    return conv2d(input, _as_it_is(self.weight), bias, self.stride, self.padding, self.dilation, self.groups)


def rms_norm_construct(self, hidden_states):
    """Root mean square normalisation (arXiv:1910.07467); x * x instead of a power, whose gradient is a float64 one."""
    if self.weight is None:
        return cpu_gradients.normalized(hidden_states, self.eps).astype(hidden_states.dtype)
    if self.weight.dtype == ms.float16:
        normal = cpu_gradients.normalized(hidden_states, self.eps).astype(ms.float16) * self.weight
    else:
        normal = cpu_gradients.normalized(hidden_states, self.eps, _as_it_is(self.weight))
    return normal if self.bias is None else normal + self.bias


def t5_norm_construct(self, hidden_states):
    if self.weight.dtype != ms.float32:
        return cpu_gradients.normalized(hidden_states, self.variance_epsilon).astype(self.weight.dtype) * self.weight
    return cpu_gradients.normalized(hidden_states, self.variance_epsilon, _as_it_is(self.weight))


def new_gelu_construct(self, input):
    return cpu_gradients.gelu(input)


def resnet_construct(self, input_tensor, temb):
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


def ada_zero_construct(self, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunk(self.linear(self.silu(emb)), 6, 1)
    return _modulated(self.norm, x, scale_msa, shift_msa), gate_msa, shift_mlp, scale_mlp, gate_mlp


def ada_zero_single_construct(self, x, emb=None):
    shift_msa, scale_msa, gate_msa = chunk(self.linear(self.silu(emb)), 3, 1)
    return _modulated(self.norm, x, scale_msa, shift_msa), gate_msa


def _heads(attn, x):
    """(batch, tokens, channels) to (batch, tokens, heads, head_dim)."""
    return x.reshape(x.shape[0], x.shape[1], attn.heads, -1)


def flux_attention_call(
    self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
):
    """FLUX.1 attention; where text comes apart from the image, as one sequence with the text tokens first.

    Queries and keys are normalised and rotated together: a graph takes some 10 microseconds for each kernel, besides
    what the kernel takes.
    """
    both = _queries_and_keys(attn, hidden_states, encoder_hidden_states)
    value = _heads(attn, attn.to_v(hidden_states))
    if encoder_hidden_states is not None:
        value = ops.cat((_heads(attn, attn.add_v_proj(encoder_hidden_states)), value), 1)
    if image_rotary_emb is not None:
        both = rotated(both, *[spread_over_heads(angles, 2 * both.shape[0], attn.heads) for angles in image_rotary_emb])
    if attention_mask is None:
        output = cpu_gradients.attention(both, value)
    else:
        query, key = chunk(both, 2, 1)
        output = dispatch_attention_fn(query, key, value, attention_mask)
    output = output.reshape(output.shape[0], output.shape[1], -1).astype(both.dtype)
    if encoder_hidden_states is None:
        return output
    num_text = encoder_hidden_states.shape[1]
    image = attn.to_out[1](attn.to_out[0](output[:, num_text:]))
    return image, attn.to_add_out(output[:, :num_text])


def _queries_and_keys(attn, image, text):
    """Normalised queries, and then keys, along the tokens, text before image: (batch, 2 tokens, heads, head_dim)."""
    query, key = _heads(attn, attn.to_q(image)), _heads(attn, attn.to_k(image))
    if text is None:
        return _normalised((query, key), (attn.norm_q, attn.norm_k))
    text_query, text_key = _heads(attn, attn.add_q_proj(text)), _heads(attn, attn.add_k_proj(text))
    norms = (attn.norm_added_q, attn.norm_q, attn.norm_added_k, attn.norm_k)
    return _normalised((text_query, query, text_key, key), norms)


def _normalised(parts, norms):
    """``parts``, (batch, tokens, heads, head_dim) each, after their ``norms``, along their tokens."""
    if parts[0].dtype != ms.float32 or not _are_alike(norms):
        return ops.cat([norm(part) for norm, part in zip(norms, parts)], 1)
    lengths = tuple(part.shape[1] for part in parts)
    weights = [_as_it_is(norm.weight) for norm in norms]
    return cpu_gradients.normalized_by_part(ops.cat(parts, 1), norms[0].eps, weights, lengths)


def _are_alike(norms):
    """Whether all of them have float32 weights and nothing else but one epsilon."""
    for norm in norms:
        if norm.weight is None or norm.weight.dtype != ms.float32 or norm.bias is not None or norm.eps != norms[0].eps:
            return False
    return True
