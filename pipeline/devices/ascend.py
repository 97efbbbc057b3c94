"""What an NPU must be told so that it computes what the precision policy says, and the same bits each time."""

import functools
from collections.abc import Callable

import mindspore as ms
from mindone.diffusers.models import attention_dispatch
from mindspore.device_context.ascend import op_precision

from pipeline.devices import device, npu_smi
from pipeline.devices.attention import attention
from pipeline.devices.replacing import replace_everywhere
from pipeline.errors import UserError
from pipeline.settings.fields import Device

FREE_WITHIN_SECONDS = 60
"""How long a stage waits for an NPU that another process still has."""

_mindones_attention = attention_dispatch.dispatch_attention_fn


@functools.cache
def prepare(settings: Device) -> None:
    """Set MindSpore up before the first operation.  Raises UserError where it is set up otherwise already.

    set_deterministic also sets HCCL_DETERMINISTIC, the switch of the collective operations, and makes CANN compile one
    operator at a time.
    """
    npu_smi.wait_until_free(npu_smi.first_visible(), FREE_WITHIN_SECONDS)
    if settings.deterministic:
        _tell(ms.set_deterministic, True)
    if settings.memory_pool_gb:
        ms.runtime.set_memory(max_size=f"{settings.memory_pool_gb:g}GB")
    if settings.cpu_affinity:
        ms.runtime.set_cpu_affinity(True)
    device.use_jit_options(jit_level=settings.jit_level, exec_order=settings.exec_order)
    _tell(op_precision.precision_mode, "must_keep_origin_dtype")
    _tell(op_precision.conv_allow_hf32, False)  # CANN's default is True: inputs are rounded to 11 bits
    _tell(op_precision.matmul_allow_hf32, False)
    install()


def install() -> None:
    """Put `dispatch_attention_fn` in the place of mindone's."""
    replace_everywhere(attention_dispatch.dispatch_attention_fn, dispatch_attention_fn)


def _tell(switch: Callable, value) -> None:
    try:
        switch(value)
    except (RuntimeError, ValueError, NameError) as error:
        raise UserError(
            f"device: cannot set {switch.__name__} to {value}: {error}; call device.use before anything else sets it"
        ) from None


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
    """mindone's attention, but of float32 in float32: mindone's rounds it to float16, for a fused kernel."""
    if query.dtype == ms.float32:
        if is_causal or enable_gqa or dropout_p:
            raise NotImplementedError("attention in float32: causal, grouped and dropout forms are not supported")
        return attention(query, key, value, attn_mask, scale)
    return _mindones_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend=backend,
        parallel_config=parallel_config,
    )
