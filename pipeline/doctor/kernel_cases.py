"""Every layer that the models are made of, and its equal in NumPy in float64.

On CPU the cases reach each substitute in `pipeline.devices.cpu`; on an NPU, MindSpore's and mindone's own kernels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pipeline.doctor.numpy_layers import (
    ANGLES,
    np_ada_norm,
    np_attention,
    np_conv2d,
    np_flux_attention,
    np_gelu,
    np_gelu_tanh,
    np_layer_norm,
    np_linear,
    np_lora,
    np_resnet_block,
    np_rms_norm,
    np_rotary,
    np_rotary_angles,
    np_timestep_embedding,
)

NUMPY: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


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
        return [value.astype(NUMPY[dtype]).astype(np.float64) for value in values]


# The functions are compiled too, so they are plain ones, and call every original by its public name.

IDS = np.array([[0, 3, 3], [4, 0, 1]])
BOOLEAN_MASK = np.array([[[[True, False, True]]], [[[True, True, False]]]])
ADDED_MASK = np.linspace(-1, 1, 2 * 4 * 3).reshape(2, 1, 4, 3).astype(np.float16)
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
        return F.pad(x, (1, 2, 0, 1), mode="constant", value=0.5), F.pad(x, (0, 1)), F.pad(x, (1, 2, 0, 1))

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


def cells():
    import mindspore as ms
    from mindone.diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
    from mindone.diffusers.models.resnet import ResnetBlock2D
    from mindone.diffusers.models.transformers.transformer_flux import FluxAttention
    from mindone.peft.tuners.lora import layer as lora
    from mindone.transformers.activations import NewGELUActivation
    from mindone.transformers.models.t5.modeling_t5 import T5LayerNorm
    from mindspore import mint, nn

    cos, sin = ms.Tensor(COS), ms.Tensor(SIN)

    class ResnetBlock(nn.Cell):
        def __init__(self):
            super().__init__()
            self.inner = ResnetBlock2D(in_channels=2, out_channels=4, temb_channels=None, groups=2, eps=0.25)

        def construct(self, x):
            return self.inner(x, None)

    def timed_block(norm):
        sizes = {"in_channels": 2, "out_channels": 4, "temb_channels": 3, "groups": 2, "eps": 0.25}
        return ResnetBlock2D(**sizes, time_embedding_norm=norm, output_scale_factor=2.0)

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

    class Adapted(nn.Cell):
        def __init__(self, alpha):
            super().__init__()
            self.inner = lora.Linear(mint.nn.Linear(6, 4), "default", r=2, lora_alpha=alpha)

        def construct(self, x):
            return self.inner(x)

    return {
        "Linear": lambda: mint.nn.Linear(6, 4),
        "Linear without bias": lambda: mint.nn.Linear(6, 4, bias=False),
        "LoRA": lambda: Adapted(2),
        "LoRA with another alpha": lambda: Adapted(3),
        "LayerNorm": lambda: mint.nn.LayerNorm(6, eps=0.25),
        "LayerNorm without weights": lambda: mint.nn.LayerNorm((6,), eps=0.5, elementwise_affine=False),
        "Conv2d": lambda: mint.nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        "Embedding": lambda: mint.nn.Embedding(5, 4),
        "GELU": lambda: mint.nn.GELU(approximate="tanh"),
        "NewGELUActivation": NewGELUActivation,
        "RMSNorm": lambda: RMSNorm(6, eps=0.25),
        "T5LayerNorm": lambda: T5LayerNorm(6, eps=0.25),
        "ResnetBlock2D": ResnetBlock,
        "ResnetBlock2D with time": lambda: timed_block("default"),
        "ResnetBlock2D scaled by time": lambda: timed_block("scale_shift"),
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
            np.pad(x, ((0, 0), (0, 1), (1, 2))),
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
    cell("LoRA", "lora.Linear.construct", np_lora(1.0), (2, 3, 6)),
    cell("LoRA with another alpha", "lora.Linear.construct", np_lora(1.5), (2, 3, 6)),
    cell("LayerNorm", "functional.layer_norm", lambda x, weight, bias: np_layer_norm(x, weight, bias, 0.25), (2, 3, 6)),
    cell("LayerNorm without weights", "functional.layer_norm", lambda x: np_layer_norm(x, eps=0.5), (2, 3, 6)),
    cell("Conv2d", "Conv2d.construct", lambda x, weight, bias: np_conv2d(x, weight, bias, **CONV), (2, 4, 5, 5)),
    cell("GELU", "functional.gelu", np_gelu_tanh, (2, 3, 7)),
    cell("AdaLayerNormZero", "AdaLayerNormZero.construct", np_ada_norm(6), (2, 3, 6), (2, 6)),
    cell("RMSNorm", "RMSNorm.construct", lambda x, weight: np_rms_norm(x, weight, 0.25), (2, 3, 6)),
    cell("T5LayerNorm", "T5LayerNorm.construct", lambda x, weight: np_rms_norm(x, weight, 0.25), (2, 3, 6)),
    cell("NewGELUActivation", "NewGELUActivation.construct", np_gelu_tanh, (2, 3, 7)),
    cell("ResnetBlock2D", "ResnetBlock2D.construct", np_resnet_block, (2, 2, 3, 4)),
    cell("ResnetBlock2D with time", "ResnetBlock2D.construct", np_resnet_block, (2, 2, 3, 4), (2, 3)),
    cell("ResnetBlock2D scaled by time", "ResnetBlock2D.construct", np_resnet_block, (2, 2, 3, 4), (2, 3)),
    cell("AdaLayerNormZeroSingle", "AdaLayerNormZeroSingle.construct", np_ada_norm(3), (2, 3, 6), (2, 6)),
    cell("FLUX double attention", "FluxAttnProcessor.__call__", np_flux_attention, (2, 3, 8), (2, 2, 8)),
    cell("FLUX single attention", "FluxAttnProcessor.__call__", np_flux_attention, (2, 5, 8)),
)


def key(substitute):
    """As the cases name a substitute; LoRA's layer and mint's are both called Linear."""
    package = "lora." if ".lora." in getattr(substitute.owner, "__module__", "") else ""
    return f"{package}{substitute.owner.__name__.rpartition('.')[2]}.{substitute.name}"
