"""Substitutes for the kernels that MindSpore lacks on CPU, so that mindone's models run there unchanged.

mindone's models are written on ``mindspore.mint``, and several of its primitives have an Ascend kernel only.  Each
substitute computes the same from primitives that have a CPU kernel and a CPU gradient.  It is a plain function of the
original's signature, put in the original's place by `install`, and serves PyNative and ``ms.jit`` alike: the graph
compiler parses it as it would the original.  Nothing here is installed on Ascend.

Functions are in `cpu_functions`.  Two kinds of places need more, and that is in `cpu_constructs`.

`substitutes` lists them all with the reason for each; the tests ask MindSpore whether the reason still holds.  Dropout
with p > 0 in training (DropoutExt) has no substitute: it would draw from device state that no checkpoint can restore.
"""

from collections.abc import Callable
from typing import NamedTuple

from mindspore import mint

from pipeline.devices import cpu_constructs as constructs
from pipeline.devices import cpu_functions as functions
from pipeline.devices.replacing import replace_everywhere


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
    from mindone.peft.tuners.lora import layer as lora_layer
    from mindone.transformers import activations
    from mindone.transformers.models.t5 import modeling_t5

    functional, nn = mint.nn.functional, mint.nn
    ada_zero, ada_zero_single = normalization.AdaLayerNormZero, normalization.AdaLayerNormZeroSingle
    flux_attention = transformer_flux.FluxAttnProcessor
    faster = more_exact = ""
    return (
        Substitute(mint, "arange", functions.arange, "Arange"),
        Substitute(mint, "zeros_like", functions.zeros_like, "ZerosLikeExt"),
        Substitute(mint, "ones_like", functions.ones_like, "OnesLikeExt"),
        Substitute(mint, "full", functions.full, "FillScalar"),
        Substitute(mint, "stack", functions.stack, "StackExt"),
        Substitute(mint, "split", functions.split, "SplitWithSize", compiled=True, fails_before=(2, 8)),
        Substitute(mint, "chunk", functions.chunk, "Chunk", compiled=True, fails_before=(2, 8)),
        Substitute(mint, "outer", functions.outer, "Outer"),
        Substitute(functional, "pad", functions.pad, "ConstantPadND"),
        Substitute(functional, "gelu", functions.gelu, "GeluExt"),
        Substitute(functional, "linear", functions.linear, faster),
        Substitute(nn.Linear, "construct", constructs.linear_construct, faster),
        Substitute(lora_layer.Linear, "construct", constructs.lora_linear_construct, faster),
        Substitute(functional, "layer_norm", functions.layer_norm, "LayerNormExt"),
        Substitute(functional, "embedding", functions.embedding, "Embedding"),
        Substitute(functional, "conv2d", functions.conv2d, "Conv2DExt"),
        Substitute(nn.Conv2d, "construct", constructs.conv2d_construct, "Conv2DExt"),
        Substitute(attention_dispatch, "dispatch_attention_fn", functions.dispatch_attention_fn, "FlashAttentionScore"),
        Substitute(embeddings, "apply_rotary_emb", functions.apply_rotary_emb, "pointer[input_tensor] is null"),
        Substitute(embeddings, "get_timestep_embedding", functions.get_timestep_embedding, more_exact),
        Substitute(embeddings, "get_1d_rotary_pos_embed", functions.get_1d_rotary_pos_embed, "RepeatInterleaveInt"),
        Substitute(normalization.RMSNorm, "construct", constructs.rms_norm_construct, faster),
        Substitute(modeling_t5.T5LayerNorm, "construct", constructs.t5_norm_construct, faster),
        Substitute(activations.NewGELUActivation, "construct", constructs.new_gelu_construct, faster),
        Substitute(resnet.ResnetBlock2D, "construct", constructs.resnet_construct, faster),
        Substitute(ada_zero, "construct", constructs.ada_zero_construct, "Chunk", compiled=True),
        Substitute(ada_zero_single, "construct", constructs.ada_zero_single_construct, "Chunk", compiled=True),
        Substitute(
            flux_attention,
            "__call__",
            constructs.flux_attention_call,
            "SplitWithSize",
            compiled=True,
            fails_before=(2, 8),
        ),
    )


def install():
    """Put every substitute in its original's place, in what is imported and what will be; safe to call twice."""
    for owner, name, replacement, *_ in substitutes():
        if isinstance(owner, type):
            setattr(owner, name, replacement)
        else:
            replace_everywhere(getattr(owner, name), replacement)
