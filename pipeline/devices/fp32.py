"""float32 that is float32: attention that is not rounded to float16, and what the device makes of a float32 number."""

import functools
from collections.abc import Callable

import numpy as np

NUMBER = np.float32(1 + 2**-20)
"""It takes 21 bits: float32 has 24, HF32 and float16 have 11, bfloat16 has 8, and all of these make 1 of it."""


def keep_attention(model) -> None:
    """Let the attention of a loaded model compute float32 in float32; mindone's layers round it to float16 on Ascend.

    Of FLUX.1's models the VAE has such layers.  The transformer and the ControlNet call a function instead, see
    `ascend.dispatch_attention_fn`; mindone's CLIP and T5 have plain attention.
    """
    if hasattr(model, "set_flash_attention_force_cast_dtype"):
        model.set_flash_attention_force_cast_dtype(None)


@functools.cache
def rounding_operations() -> tuple[str, ...]:
    """Which of matrix product, convolution and attention round float32 inputs to fewer bits on this device."""
    return tuple(name for name, compute in probes().items() if _rounds(compute))


def _rounds(compute: Callable) -> bool:
    """Whether ``compute``, which gives its input back by products with 1, gives back less than NUMBER."""
    import mindspore as ms

    found = compute(ms.Tensor(np.full((16, 16), NUMBER))).asnumpy()
    return bool((abs(found - NUMBER) > 2**-22).any())


def probes() -> dict[str, Callable]:
    """Functions of a (16, 16) tensor that give it back, computed by one operation each."""
    import mindspore as ms
    from mindone.diffusers.models import attention_dispatch
    from mindspore import mint

    identity = ms.Tensor(np.eye(16, dtype=np.float32))

    def convolution(x):
        return mint.nn.functional.conv2d(x.reshape(1, 16, 4, 4), identity.reshape(16, 16, 1, 1))

    def attention(x):  # of one token in each row: its value
        x = x.reshape(16, 1, 1, 16)
        return attention_dispatch.dispatch_attention_fn(x, x, x)

    return {"matmul": lambda x: mint.matmul(x, identity), "convolution": convolution, "attention": attention}
