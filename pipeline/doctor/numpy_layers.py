"""The layers of FLUX.1's models in NumPy, in float64: what the substitutes are compared with."""

import math

import numpy as np

ANGLES = np.linspace(-3, 3, 5 * 4).reshape(5, 4).astype(np.float32)


def erf(x):
    return np.vectorize(math.erf)(x)


def np_gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def np_gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def np_linear(x, weight, bias=0.0):
    return x @ weight.T + bias


def np_lora(scale):
    def reference(x, **p):
        added = np_linear(np_linear(x, p["lora_A.default.weight"]), p["lora_B.default.weight"])
        return np_linear(x, p["base_layer.weight"], p["base_layer.bias"]) + scale * added

    return reference


def np_layer_norm(x, weight=1.0, bias=0.0, eps=1e-5, axes=(-1,)):
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + eps) * weight + bias


def np_rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def np_conv2d(x, weight, bias, stride, padding, dilation, groups):
    (batch, _, height, width), (num_out, depth, rows, columns) = x.shape, weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    out_height = (height + 2 * padding[0] - dilation[0] * (rows - 1) - 1) // stride[0] + 1
    out_width = (width + 2 * padding[1] - dilation[1] * (columns - 1) - 1) // stride[1] + 1
    output = np.zeros((batch, num_out, out_height, out_width)) + bias[:, None, None]
    for o in range(num_out):
        first = o // (num_out // groups) * depth
        for r in range(rows):
            for c in range(columns):
                top, left = r * dilation[0], c * dilation[1]
                bottom, right = top + stride[0] * out_height, left + stride[1] * out_width
                patch = x[:, first : first + depth, top : bottom : stride[0], left : right : stride[1]]
                output[:, o] += np.einsum("bdhw,d->bhw", patch, weight[o, :, r, c])
    return output


def np_resnet_block(x, temb=None, **p):
    """A residual block with 2 groups and a shortcut between different numbers of channels.

    Without ``temb`` as the VAE has it; else halved, with the time added, or with a scale and a shift by it.
    """

    def silu(x):
        return x / (1 + np.exp(-x))

    def convolved(name, x):
        weight = p[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return np_conv2d(x, weight, p[f"{name}.bias"], (1, 1), (padding, padding), (1, 1), 1)

    def normal(name, x):
        weight, bias = (p[f"{name}.{each}"][:, None, None] for each in ("weight", "bias"))
        return np_layer_norm(x.reshape(x.shape[0], 2, -1), eps=0.25).reshape(x.shape) * weight + bias

    inner = convolved("conv1", silu(normal("norm1", x)))
    if temb is None:
        return convolved("conv_shortcut", x) + convolved("conv2", silu(normal("norm2", inner)))
    time = np_linear(silu(temb), p["time_emb_proj.weight"], p["time_emb_proj.bias"])[:, :, None, None]
    if time.shape[1] == inner.shape[1]:
        inner = normal("norm2", inner + time)
    else:
        scale, shift = np.split(time, 2, 1)
        inner = normal("norm2", inner) * (1 + scale) + shift
    return (convolved("conv_shortcut", x) + convolved("conv2", silu(inner))) / 2


def np_attention(query, key, value, mask=0.0, scale=None):
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * scale + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


def np_rotary(x, cos, sin):
    turned = np.empty_like(x)
    turned[..., 0::2], turned[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return x * cos[:, None, :] + turned * sin[:, None, :]


def np_ada_norm(parts):
    def reference(x, emb, **parameters):
        silu = emb / (1 + np.exp(-emb))
        modulation = np_linear(silu, parameters["linear.weight"], parameters["linear.bias"])
        shift, scale, *rest = np.split(modulation, parts, 1)
        return np_layer_norm(x, eps=1e-6) * (1 + scale[:, None]) + shift[:, None], *rest

    return reference


def np_flux_attention(image, text=None, **p):
    """FLUX.1's attention with 2 heads, each projection a linear map, text tokens before image tokens."""

    def project(name, x):
        return np_linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def heads(name, x):
        return project(name, x).reshape(*x.shape[:2], 2, -1)

    query = np_rms_norm(heads("to_q", image), p["norm_q.weight"], 1e-5)
    key = np_rms_norm(heads("to_k", image), p["norm_k.weight"], 1e-5)
    value = heads("to_v", image)
    if text is not None:
        query = np.concatenate([np_rms_norm(heads("add_q_proj", text), p["norm_added_q.weight"], 1e-5), query], 1)
        key = np.concatenate([np_rms_norm(heads("add_k_proj", text), p["norm_added_k.weight"], 1e-5), key], 1)
        value = np.concatenate([heads("add_v_proj", text), value], 1)
    angles = ANGLES[: query.shape[1]]
    query, key = np_rotary(query, np.cos(angles), np.sin(angles)), np_rotary(key, np.cos(angles), np.sin(angles))
    output = np_attention(query, key, value).reshape(*query.shape[:2], -1)
    if text is None:
        return output
    num_text = text.shape[1]
    return project("to_out.0", output[:, num_text:]), project("to_add_out", output[:, :num_text])


def np_timestep_embedding(timesteps):
    first = np.outer(2 * timesteps, np.exp(-np.log(100) * np.arange(4) / 3))
    second = np.outer(timesteps, np.exp(-np.log(10000) * np.arange(3) / 3))
    return (
        np.concatenate([np.sin(first), np.cos(first)], 1),
        np.concatenate([np.cos(second), np.sin(second)], 1),
    )


def np_rotary_angles(position):
    angles = np.repeat(np.outer(position, 1 / 75.0 ** (np.arange(0, 6, 2) / 6) / 2), 2, 1)
    return np.cos(angles), np.sin(angles)
