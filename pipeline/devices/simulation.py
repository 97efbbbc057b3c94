"""bfloat16 on a device that cannot compute it: values are rounded to it, and kept and computed with in float32.

What is rounded: a simulated model's parameters once they are loaded, its inputs, its output, and the gradients that
pass through these.  Products and sums inside the model keep float32's 24 bits, of which a device with bfloat16 keeps 8
after each operation: errors are smaller here than they would be there.
"""

import functools
from collections.abc import Callable, Iterable

import numpy as np


def simulate(model, last_layers: Iterable[str]) -> None:
    """Round a loaded model's parameters, and from now on its output.  last_layers: as of `round_outputs`."""
    rounded = rounding()
    for parameter in model.get_parameters():
        parameter.set_data(rounded(parameter))
    round_outputs(model, last_layers)


def round_outputs(model, last_layers: Iterable[str]) -> None:
    """Let a model's last layers round what they give, in PyNative as in compiled steps.

    last_layers: the names of the layers, or lists of layers, that give its output.
    """
    from mindspore import nn

    for name in last_layers:
        found = functools.reduce(getattr, name.split("."), model)
        for layer in found if isinstance(found, nn.CellList) else [found]:
            round_output(layer)


def round_output(layer) -> None:
    """Let a layer of one input and one output round its output."""
    layer.__class__ = _rounding_class(layer.__class__)


@functools.cache
def _rounding_class(base) -> type:
    rounded = rounding()

    class Rounded(base):
        def construct(self, x):
            return rounded(super().construct(x))

    return Rounded


@functools.cache
def rounding() -> Callable:
    """A function of a tensor that rounds to the nearest bfloat16, ties to even, kept as float32; gradients too."""
    import mindspore as ms

    narrow, wide = ms.bfloat16, ms.float32

    def rounded(tensor):
        return tensor.astype(narrow).astype(wide)

    return rounded


def is_rounded(tensor) -> bool:
    """Whether every value of a float32 tensor is one of bfloat16's, whose lower 16 bits are zero."""
    return not (tensor.asnumpy().view(np.uint32) & 0xFFFF).any()
