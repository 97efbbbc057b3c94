"""Each substitute in `pipeline.cpu`, called by the name it replaces, against NumPy in float64; and why each exists.

Run as a program, this file prints, for every substitute, what its original does on this machine's CPU.
"""

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

TOLERANCE = {"float32": 2e-5, "float16": 8e-3}
"""Of the largest value: about 200 roundings to 24 bits, 16 to 11 bits; reductions and a few operations in a row."""


@dataclass(frozen=True)
class Case:
    """``build()`` gives a function or a cell of ``inputs``; ``reference(*inputs, **parameters)`` is its equal in NumPy.

    covers: the substitutes that it reaches, as `key` names them.  inputs: shapes.  scale: size of the inputs' values.
    keeps_dtype: the results have the dtype of the inputs.
    """

    name: str
    covers: str
    build: Callable
    reference: Callable
    inputs: tuple
    scale: float = 1.0
    keeps_dtype: bool = True

    def arrays(self, dtype):
        """Inputs that a ``dtype`` holds exactly, in float64, every batch element different."""
        generator = np.random.default_rng(list(self.name.encode()))
        values = [self.scale * generator.standard_normal(shape) for shape in self.inputs]
        return [value.astype(dtype).astype(np.float64) for value in values]


# --- references in NumPy ------------------------------------------------------------------------------------------


def erf(x):
    return np.vectorize(math.erf)(x)


def np_gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def np_gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def np_linear(x, weight, bias=0.0):
    return x @ weight.T + bias


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


# --- cases --------------------------------------------------------------------------------------------------------
#
# The functions are compiled too, so they are plain ones, and call every original by its public name.

IDS = np.array([[0, 3, 3], [4, 0, 1]])
BOOLEAN_MASK = np.array([[[[True, False, True]]], [[[True, True, False]]]])
ADDED_MASK = np.linspace(-1, 1, 2 * 4 * 3).reshape(2, 1, 4, 3).astype(np.float16)
ANGLES = np.linspace(-3, 3, 5 * 4).reshape(5, 4).astype(np.float32)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)


def functions():
    import mindspore as ms
    import mindspore.mint.nn.functional as F
    from mindone.diffusers.models import attention_dispatch, embeddings
    from mindspore import mint

    ids, cos, sin = ms.Tensor(IDS), ms.Tensor(COS), ms.Tensor(SIN)
    boolean_mask, added_mask = ms.Tensor(BOOLEAN_MASK), ms.Tensor(ADDED_MASK)

    def arange(x):
        return x * mint.arange(3), x * mint.arange(1, 7, 2, dtype=x.dtype), x * mint.arange(0.5, 2)[:1].astype(x.dtype)

    def zeros_like(x):
        return mint.zeros_like(x), x * x + mint.zeros_like(x)

    def ones_like(x):
        return mint.ones_like(x), x * (x + mint.ones_like(x))

    def full(x):
        return mint.full((2, 3), 2.5, dtype=x.dtype), x * mint.full((2, 3), -2, dtype=x.dtype)

    def stack(x, y):
        return mint.stack([x, y], dim=-1), mint.stack((y, x)), mint.stack([x, x], 1)

    def split(x):
        return *mint.split(x, [1, 3], 1), mint.split(x, 2, dim=-1)[1]

    def chunk(x):
        return *mint.chunk(x, 2, dim=-1), mint.chunk(x, 2, 1)[1]

    def outer(x, y):
        return mint.outer(x, y)

    def pad(x):
        return F.pad(x, (1, 2, 0, 1), mode="constant", value=0.5), F.pad(x, (0, 1))

    def gelu(x):
        return F.gelu(x), F.gelu(x, approximate="tanh"), mint.nn.functional.gelu(x * 4, approximate="tanh")

    def linear(x, weight, bias):
        return F.linear(x, weight, bias), F.linear(x, weight)

    def layer_norm(x, weight, bias):
        return F.layer_norm(x, (6,), weight, bias, 0.25), F.layer_norm(x, (3, 6), eps=0.5)

    def layer_norm_of_small_values(x):
        return F.layer_norm(x, (6,))

    def embedding(weight):
        return F.embedding(ids, weight)

    def conv2d(x, weight, bias):
        return F.conv2d(x, weight, bias, (2, 1), (1, 2), (1, 2), 2)

    def attention(query, key, value):
        plain = attention_dispatch.dispatch_attention_fn(query, key, value)
        return plain, attention_dispatch.dispatch_attention_fn(query, key, value, scale=0.9, backend="native")

    def masked_attention(query, key, value):
        boolean = attention_dispatch.dispatch_attention_fn(query, key, value, attn_mask=boolean_mask)
        added = attention_dispatch.dispatch_attention_fn(query, key, value, attn_mask=added_mask)
        return boolean, added

    def rotary(x):
        return embeddings.apply_rotary_emb(x, (cos, sin), use_real=True, use_real_unbind_dim=-1, sequence_dim=1)

    def rotary_angles(position):
        return embeddings.get_1d_rotary_pos_embed(
            6, position, theta=50.0, use_real=True, linear_factor=2.0, ntk_factor=1.5
        )

    def timestep_embedding(timesteps):
        plain = embeddings.get_timestep_embedding(timesteps, 8, scale=2, max_period=100)
        return plain, embeddings.get_timestep_embedding(timesteps, 6, flip_sin_to_cos=True, downscale_freq_shift=0)

    return locals()


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


def cells():
    import mindspore as ms
    from mindone.diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
    from mindone.diffusers.models.transformers.transformer_flux import FluxAttention
    from mindspore import mint, nn

    cos, sin = ms.Tensor(COS), ms.Tensor(SIN)

    class ZeroNorm(nn.Cell):
        def __init__(self):
            super().__init__()
            self.inner = AdaLayerNormZero(6)

        def construct(self, x, emb):
            return self.inner(x, emb=emb)

    class DoubleAttention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.inner = FluxAttention(8, heads=2, dim_head=4, bias=True, added_kv_proj_dim=8)

        def construct(self, image, text):
            return self.inner(image, text, image_rotary_emb=(cos, sin))

    class SingleAttention(nn.Cell):
        def __init__(self):
            super().__init__()
            self.inner = FluxAttention(8, heads=2, dim_head=4, bias=True, pre_only=True)

        def construct(self, x):
            return self.inner(x, image_rotary_emb=(cos, sin))

    return {
        "Linear": lambda: mint.nn.Linear(6, 4),
        "Linear without bias": lambda: mint.nn.Linear(6, 4, bias=False),
        "LayerNorm": lambda: mint.nn.LayerNorm(6, eps=0.25),
        "LayerNorm without weights": lambda: mint.nn.LayerNorm((6,), eps=0.5, elementwise_affine=False),
        "Conv2d": lambda: mint.nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        "Embedding": lambda: mint.nn.Embedding(5, 4),
        "GELU": lambda: mint.nn.GELU(approximate="tanh"),
        "RMSNorm": lambda: RMSNorm(6, eps=0.25),
        "AdaLayerNormZero": ZeroNorm,
        "AdaLayerNormZeroSingle": lambda: AdaLayerNormZeroSingle(6),
        "FLUX double attention": DoubleAttention,
        "FLUX single attention": SingleAttention,
    }


def build(kind, name):
    """The function ``name``, or a new cell."""
    return functions()[name] if kind == "function" else cells()[name]()


def function(name, covers, reference, *inputs, **options):
    return Case(name, covers, functools.partial(build, "function", name), reference, inputs, **options)


def cell(name, covers, reference, *inputs, **options):
    return Case(name, covers, functools.partial(build, "cell", name), reference, inputs, **options)


CONV = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
CASES = (
    function("arange", "mint.arange", lambda x: (x * [0, 1, 2], x * [1, 3, 5], x * 0.5), (2, 3)),
    function("zeros_like", "mint.zeros_like", lambda x: (0 * x, x * x), (2, 3)),
    function("ones_like", "mint.ones_like", lambda x: (0 * x + 1, x * x + x), (2, 3)),
    function("full", "mint.full", lambda x: (0 * x + 2.5, -2 * x), (2, 3)),
    function(
        "stack",
        "mint.stack",
        lambda x, y: (np.stack([x, y], -1), np.stack([y, x]), np.stack([x, x], 1)),
        (2, 3),
        (2, 3),
    ),
    function("split", "mint.split", lambda x: (x[:, :1], x[:, 1:], x[..., 2:4]), (2, 4, 6)),
    function("chunk", "mint.chunk", lambda x: (x[..., :3], x[..., 3:], x[:, 2:]), (2, 4, 5)),
    function("outer", "mint.outer", lambda x, y: np.outer(x, y), (3,), (4,)),
    function(
        "pad",
        "functional.pad",
        lambda x: (
            np.pad(x, ((0, 0), (0, 1), (1, 2)), constant_values=0.5),
            np.pad(x, ((0, 0), (0, 0), (0, 1))),
        ),
        (2, 3, 4),
    ),
    function("gelu", "functional.gelu", lambda x: (np_gelu(x), np_gelu_tanh(x), np_gelu_tanh(4 * x)), (2, 3, 7)),
    function(
        "linear",
        "functional.linear",
        lambda x, w, b: (np_linear(x, w, b), np_linear(x, w)),
        (2, 3, 6),
        (4, 6),
        (4,),
    ),
    function(
        "layer_norm",
        "functional.layer_norm",
        lambda x, w, b: (np_layer_norm(x, w, b, 0.25), np_layer_norm(x, eps=0.5, axes=(-2, -1))),
        (2, 3, 6),
        (6,),
        (6,),
    ),
    function("layer_norm_of_small_values", "functional.layer_norm", np_layer_norm, (2, 3, 6), scale=0.004),
    function("embedding", "functional.embedding", lambda weight: weight[IDS], (5, 4)),
    function(
        "conv2d",
        "functional.conv2d",
        lambda x, w, b: np_conv2d(x, w, b, **CONV),
        (2, 4, 5, 5),
        (6, 2, 3, 3),
        (6,),
    ),
    function(
        "attention",
        "attention_dispatch.dispatch_attention_fn",
        lambda q, k, v: (np_attention(q, k, v), np_attention(q, k, v, scale=0.9)),
        (2, 4, 2, 6),
        (2, 3, 2, 6),
        (2, 3, 2, 6),
    ),
    function(
        "masked_attention",
        "attention_dispatch.dispatch_attention_fn",
        lambda q, k, v: (
            np_attention(q, k, v, np.where(BOOLEAN_MASK, 0, -np.inf)),
            np_attention(q, k, v, ADDED_MASK.astype(float)),
        ),
        (2, 4, 2, 6),
        (2, 3, 2, 6),
        (2, 3, 2, 6),
    ),
    function("rotary", "embeddings.apply_rotary_emb", lambda x: np_rotary(x, COS, SIN), (2, 5, 3, 4)),
    function(
        "timestep_embedding",
        "embeddings.get_timestep_embedding",
        np_timestep_embedding,
        (3,),
        scale=4.0,
        keeps_dtype=False,
    ),
    function(
        "rotary_angles", "embeddings.get_1d_rotary_pos_embed", np_rotary_angles, (5,), scale=3.0, keeps_dtype=False
    ),
    cell("Linear", "Linear.construct", lambda x, weight, bias: np_linear(x, weight, bias), (2, 3, 6)),
    cell("Linear without bias", "Linear.construct", lambda x, weight: np_linear(x, weight), (2, 3, 6)),
    cell("LayerNorm", "functional.layer_norm", lambda x, weight, bias: np_layer_norm(x, weight, bias, 0.25), (2, 3, 6)),
    cell("LayerNorm without weights", "functional.layer_norm", lambda x: np_layer_norm(x, eps=0.5), (2, 3, 6)),
    cell("Conv2d", "Conv2d.construct", lambda x, weight, bias: np_conv2d(x, weight, bias, **CONV), (2, 4, 5, 5)),
    cell("GELU", "functional.gelu", np_gelu_tanh, (2, 3, 7)),
    cell("AdaLayerNormZero", "AdaLayerNormZero.construct", np_ada_norm(6), (2, 3, 6), (2, 6)),
    cell("RMSNorm", "RMSNorm.construct", lambda x, weight: np_rms_norm(x, weight, 0.25), (2, 3, 6)),
    cell("AdaLayerNormZeroSingle", "AdaLayerNormZeroSingle.construct", np_ada_norm(3), (2, 3, 6), (2, 6)),
    cell("FLUX double attention", "FluxAttnProcessor.__call__", np_flux_attention, (2, 3, 8), (2, 2, 8)),
    cell("FLUX single attention", "FluxAttnProcessor.__call__", np_flux_attention, (2, 5, 8)),
)


def key(substitute):
    return f"{substitute.owner.__name__.rpartition('.')[2]}.{substitute.name}"


# --- running them -------------------------------------------------------------------------------------------------


def parameters(case, dtype):
    """A built case's parameters by their short names, filled with values that ``dtype`` holds exactly."""
    import mindspore as ms

    target = case.build()
    if not isinstance(target, ms.nn.Cell):
        return target, {}, {}
    generator = np.random.default_rng(7)
    found, values = {}, {}
    for name, parameter in target.parameters_and_names():
        name = name.removeprefix("inner.")
        value = 0.5 * generator.standard_normal(parameter.shape) + ("norm" in name)
        parameter.set_dtype(getattr(ms, dtype))
        parameter.set_data(ms.Tensor(value.astype(dtype)))
        found[name], values[name] = parameter, value.astype(dtype).astype(np.float64)
    return target, found, values


def outputs_and_gradients(case, dtype, mode):
    """Results, and gradients by inputs, then parameters, of the sum of the results weighted by `weights`."""
    import mindspore as ms

    target, found, _ = parameters(case, dtype)
    inputs = [ms.Tensor(array.astype(dtype)) for array in case.arrays(dtype)]
    wanted = [ms.Tensor(array.astype(np.float32)) for array in weights(case, dtype)]

    def weighted_sum(*inputs):
        outputs = target(*inputs)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        total = 0.0
        for output, weight in zip(outputs, wanted):
            total = total + (output.astype(ms.float32) * weight).sum()
        return total, outputs

    differentiate = ms.value_and_grad(
        weighted_sum, tuple(range(len(inputs))), list(found.values()) or None, has_aux=True
    )
    if mode == "jit":
        differentiate = ms.jit(differentiate)
    (_, outputs), gradients = differentiate(*inputs)
    by_input, by_parameter = gradients if found else (gradients, ())
    return list(outputs), [*_as_tuple(by_input), *_as_tuple(by_parameter)]


def _as_tuple(value):
    return value if isinstance(value, (tuple, list)) else (value,)


@functools.cache
def expected(case, dtype):
    """Results in float64, and their central differences along every input and parameter."""
    _, _, values = parameters(case, dtype)
    arrays = case.arrays(dtype)

    def results():
        return _as_tuple(case.reference(*arrays, **values))

    outputs = [np.array(result, np.float64) for result in results()]
    wanted = _weights([output.shape for output in outputs])
    gradients = []
    for array in (*arrays, *values.values()):
        gradient = np.zeros_like(array)
        step = 1e-6 * max(np.abs(array).max(), 1e-3)
        for index in np.ndindex(array.shape):
            at, slope = array[index], 0.0
            for sign in (1, -1):
                array[index] = at + sign * step
                slope += sign * sum((w * result).sum() for w, result in zip(wanted, results()))
            array[index] = at
            gradient[index] = slope / (2 * step)
        gradients.append(gradient)
    return outputs, gradients


def weights(case, dtype):
    return _weights([output.shape for output in expected(case, dtype)[0]])


def _weights(shapes):
    generator = np.random.default_rng(3)
    return [generator.standard_normal(shape).astype(np.float32).astype(np.float64) for shape in shapes]


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual.asnumpy().astype(np.float64), expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-2)
    )


# --- claims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pynative", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_substitute_and_its_gradient_equal_numpy(cpu, case, dtype, mode):
    outputs, gradients = outputs_and_gradients(case, dtype, mode)
    expected_outputs, expected_gradients = expected(case, dtype)
    assert len(outputs) == len(expected_outputs) and len(gradients) == len(expected_gradients)
    for actual, wanted in zip(outputs + gradients, expected_outputs + expected_gradients):
        assert_close(actual, wanted, TOLERANCE[dtype])
    if case.keeps_dtype:
        assert {str(output.dtype) for output in outputs} == {"Float16" if dtype == "float16" else "Float32"}


def test_every_substitute_is_reached_by_a_case_that_compares_it_with_numpy(cpu):
    from pipeline import cpu as module

    codes = {key(substitute): substitute.replacement.__code__ for substitute in module.substitutes()}
    assert set(codes) == {case.covers for case in CASES}
    for case in CASES:
        called = set()
        sys.setprofile(lambda frame, event, _, called=called: called.add(frame.f_code) if event == "call" else None)
        try:
            outputs_and_gradients(case, "float32", "pynative")
        finally:
            sys.setprofile(None)
        assert codes[case.covers] in called, f"{case.name} does not reach {case.covers}"


@pytest.mark.parametrize("mode", ["pynative", "jit"])
@pytest.mark.parametrize("name", ["Linear", "Linear without bias", "Conv2d"])
def test_to_float_computes_in_half_and_keeps_the_gradients_of_fp32_parameters_in_fp32(cpu, name, mode):
    import mindspore as ms

    case = next(case for case in CASES if case.name == name)
    for compute in (ms.float16, ms.float32):
        half = dataclasses.replace(case, build=lambda compute=compute: case.build().to_float(compute))
        outputs, gradients = outputs_and_gradients(half, "float32", mode)
        assert [output.dtype for output in outputs] == [compute]
        assert {gradient.dtype for gradient in gradients} == {ms.float32}
        for actual, wanted in zip(outputs + gradients, sum(expected(case, "float32"), [])):
            assert_close(actual, wanted, TOLERANCE["float16" if compute == ms.float16 else "float32"])


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_linear_refuses_parameters_of_another_dtype_than_its_input(cpu, mode, tmp_path, monkeypatch):
    import mindspore as ms
    from mindspore import mint

    monkeypatch.chdir(tmp_path)  # the compiler leaves a report of its failure where it runs
    cell = mint.nn.Linear(6, 4)

    def call(x):
        return cell(x)

    with pytest.raises(TypeError):
        (ms.jit(call) if mode == "jit" else call)(ms.Tensor(np.ones((2, 6)), ms.float16))


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_attention_casts_keys_and_values_to_the_dtype_of_the_query(cpu, mode):
    import mindspore as ms
    from mindone.diffusers.models import attention_dispatch

    case = next(case for case in CASES if case.name == "attention")
    query, key, value = case.arrays("float16")

    def attention(query, key, value):
        return attention_dispatch.dispatch_attention_fn(query, key, value)

    call = ms.jit(attention) if mode == "jit" else attention
    result = call(ms.Tensor(query, ms.float32), ms.Tensor(key, ms.float16), ms.Tensor(value, ms.float16))
    assert result.dtype == ms.float32
    assert_close(result, np_attention(query, key, value), TOLERANCE["float32"])


def test_arange_has_the_values_and_the_dtype_of_mints_documentation(cpu):
    import mindspore as ms
    from mindspore import mint

    for arguments, options, values, dtype in (
        ((3,), {}, [0, 1, 2], ms.int64),
        ((1, 4), {}, [1, 2, 3], ms.int64),
        ((0, 1, 0.25), {}, [0, 0.25, 0.5, 0.75], ms.float32),
        ((4, 0, -2), {"dtype": ms.float16}, [4, 2], ms.float16),
        ((), {"start": 1, "end": 3}, [1, 2], ms.int64),
    ):
        result = mint.arange(*arguments, **options)
        assert result.asnumpy().tolist() == values and result.dtype == dtype


def test_filled_tensors_have_the_dtype_that_was_asked_for(cpu):
    import mindspore as ms
    from mindspore import mint

    x = ms.Tensor(np.ones((2, 3)), ms.float16)
    assert (mint.zeros_like(x, dtype=ms.int32).dtype, mint.ones_like(x, dtype=ms.bool_).dtype) == (ms.int32, ms.bool_)
    assert (mint.full((2,), 2.5).dtype, mint.full((2,), 2).dtype) == (ms.float32, ms.int64)


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_gelu_and_its_gradient_are_finite_over_all_of_fp16(cpu, mode):
    import mindspore as ms
    from mindspore.mint.nn import functional

    def gelu(x):
        return functional.gelu(x, approximate="tanh").sum()

    differentiate = ms.value_and_grad(gelu)
    x = np.array([-65504, -300, -11, 11, 300], np.float16)
    total, gradient = (ms.jit(differentiate) if mode == "jit" else differentiate)(ms.Tensor(x))
    assert total.asnumpy() == np.float16(311)
    np.testing.assert_array_equal(gradient.asnumpy(), [0, 0, 0, 1, 1])


def test_timestep_embedding_is_as_exact_as_float32_allows(cpu):
    """At 1000 the spacing of float32 is 6e-5; with frequencies from the CPU's own ``exp`` it was off by 1e-3."""
    import mindspore as ms
    from mindone.diffusers.models import embeddings

    timesteps = np.array([937.123, 12.5, 500.0, 1000.0], np.float32)
    found = embeddings.get_timestep_embedding(ms.Tensor(timesteps), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    angles = np.outer(timesteps.astype(np.float64), np.exp(-np.log(10000) * np.arange(128) / 128))
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(found.asnumpy(), expected, atol=1e-4)


def test_forms_that_a_substitute_does_not_compute_are_refused(cpu):
    import mindspore as ms
    import mindspore.mint.nn.functional as F
    from mindone.diffusers.models import attention_dispatch, embeddings
    from mindspore import mint

    x, ids = ms.Tensor(np.ones((2, 3, 2, 4)), ms.float32), ms.Tensor([[0, 1]])
    weight, angles = ms.Tensor(np.ones((3, 4)), ms.float32), ms.Tensor(np.ones(3), ms.float32)
    for call in (
        lambda: attention_dispatch.dispatch_attention_fn(x, x, x, is_causal=True),
        lambda: attention_dispatch.dispatch_attention_fn(x, x, x, dropout_p=0.1),
        lambda: attention_dispatch.dispatch_attention_fn(x, x, x, enable_gqa=True),
        lambda: embeddings.apply_rotary_emb(x, (weight, weight), sequence_dim=2),
        lambda: embeddings.apply_rotary_emb(x, (weight, weight), use_real_unbind_dim=-2, sequence_dim=1),
        lambda: embeddings.get_1d_rotary_pos_embed(4, angles),
        lambda: F.embedding(ids, weight, padding_idx=0),
        lambda: mint.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")(x.permute(0, 1, 3, 2)),
    ):
        with pytest.raises(NotImplementedError, match="on CPU"):
            call()


# --- why each exists ----------------------------------------------------------------------------------------------


def probe():
    """What each original does while all other substitutes are in place: "" where it computes, else its error."""
    from pipeline import cpu, device

    originals = []
    real_install = cpu.install
    cpu.install = lambda: originals.extend(getattr(s.owner, s.name) for s in cpu.substitutes())
    device.use("CPU")
    real_install()
    errors = {}
    for substitute, original in zip(cpu.substitutes(), originals):
        _put(substitute, original)
        case = next(case for case in CASES if case.covers == key(substitute))
        try:
            if not substitute.compiled:  # a forward that fails while gradients are recorded spoils the next gradient
                results(case)
            outputs_and_gradients(case, "float32", "jit" if substitute.compiled else "pynative")
            errors[key(substitute)] = ""
        except Exception as error:
            errors[key(substitute)] = f"{type(error).__name__}: {error}"
        real_install()
    return errors


def results(case):
    import mindspore as ms

    target, _, _ = parameters(case, "float32")
    return target(*[ms.Tensor(array.astype(np.float32)) for array in case.arrays("float32")])


def _put(substitute, original):
    from pipeline import cpu

    if isinstance(substitute.owner, type):
        setattr(substitute.owner, substitute.name, original)
    else:
        cpu._replace_everywhere(substitute.replacement, original)


@pytest.fixture(scope="module")
def errors_of_originals(tmp_path_factory):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    folder = tmp_path_factory.mktemp("originals")  # the compiler leaves reports of its failures where it runs
    command, options = [sys.executable, __file__], {"capture_output": True, "text": True, "timeout": 300}
    child = subprocess.run(command, env=environment, cwd=folder, **options)
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", dict.fromkeys(case.covers for case in CASES))
def test_kernel_is_still_missing(cpu, errors_of_originals, name):
    """Or, for a substitute that is only faster: its original still works."""
    import mindspore as ms

    from pipeline import cpu as module

    reason = next(substitute.fails_with for substitute in module.substitutes() if key(substitute) == name)
    error = errors_of_originals[name]
    assert error or not reason, f"MindSpore {ms.__version__} computes {name} on CPU now: delete its substitute"
    assert reason or not error, f"{name} is substituted for speed only, but its original fails: {error}"
    assert not error or error.startswith("RuntimeError") and reason in error, f"not for want of {reason}: {error}"


if __name__ == "__main__":
    print(json.dumps(probe()))
