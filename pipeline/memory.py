"""How much memory a training takes at its peak, estimated before anything is loaded.

What the libraries and weights take is counted; what the steps take follows from sizes that were fitted to the peaks of
real processes on CPU (``python -m benchmarks.peak`` compares): a block keeps so many tensors of (batch, tokens, width),
and so many matrices of (batch, heads, tokens, tokens), for the backward pass.  On Ascend nothing was measured: the
estimate there is that of PyNative without matrices of attention, which flash attention does not keep, and without the
libraries, which are in the host's memory.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from pipeline import mode
from pipeline.experiment import Train

MIB = 1 << 20
LIBRARIES_BYTES = 600 * MIB
"""Resident memory of a process that has imported MindSpore and mindone and has read a dataset, on CPU."""

LOADED = 1.1
"""What loaded weights take, over their own bytes."""


@dataclass(frozen=True)
class Shape:
    """Of the largest batch.  tokens: of picture and text together.  blocks: that compute, of all models together."""

    batch_size: int
    tokens: int
    width: int
    heads: int
    blocks: int


class Kept(NamedTuple):
    """What the steps keep: bytes in any case, tensors a block, matrices of attention a block, and at a time."""

    fixed_bytes: int
    tensors: float
    matrices: float
    matrices_at_a_time: float


KEPT = {
    "pynative": Kept(87 * MIB, 50, 1.35, 5.8),
    "checkpointing": Kept(120 * MIB, 11.6, 0, 8.3),
    "jit": Kept(285 * MIB, 210, 4.8, 0),
}


PICTURES = 12.5
"""Tensors of (channels of the first level, height, width) that the VAE's encoder takes for a picture."""

TEXTS = 8
"""Tensors of (tokens, inner width), and matrices of attention, that a text encoder takes for a caption."""


def of_picture(config: dict, width: int, height: int, element_bytes: int) -> int:
    """What the VAE's encoder takes to encode one picture of so many pixels."""
    return int(PICTURES * config["block_out_channels"][0] * width * height * element_bytes)


def of_caption(tokens: int, inner: int, heads: int, element_bytes: int) -> int:
    """What a text encoder takes to encode one caption."""
    return TEXTS * tokens * (inner + heads * tokens) * element_bytes


def of_encoder(weights_bytes: int, item_bytes: int, device: str) -> int:
    """The peak of a stage that encodes: of the process on CPU, of the device elsewhere."""
    return _with_libraries(weights_bytes, device) + item_bytes


def _with_libraries(weights_bytes: int, device: str) -> int:
    return LIBRARIES_BYTES + int(LOADED * weights_bytes) if device == "CPU" else weights_bytes


def steps_bytes(shape: Shape, chosen: str, checkpointing: bool, device: str, element_bytes: int) -> int:
    """The most that the forward and backward pass of a batch keep, beside weights, gradients and optimizer.

    element_bytes: of the dtype that the models compute in; MindSpore's CPU kernels for float16 work in float32.
    """
    if device != "CPU":
        chosen = "pynative"  # nobody has measured compiled steps there
    elif chosen == "jit":
        checkpointing = False  # it saves nothing there
    kept = KEPT["checkpointing" if checkpointing else chosen]
    size = 4 if device == "CPU" else element_bytes
    tensor = shape.batch_size * shape.tokens * shape.width * size
    matrix = shape.batch_size * shape.heads * shape.tokens**2 * size if device == "CPU" else 0
    fixed = kept.fixed_bytes if device == "CPU" else 0
    per_block = kept.tensors * tensor + kept.matrices * matrix
    return int(fixed + shape.blocks * per_block + kept.matrices_at_a_time * matrix)


def of_training(
    held_bytes: dict[str, int], shape: Shape, settings: Train, device: str, element_bytes: int, num_sizes: int
) -> dict:
    """The mode of the steps, what they keep with and without gradient checkpointing, and the peak of the training.

    held_bytes: what is there all the time, with the weights as "weights_bytes".  settings: of which the number of steps
    is known.  num_sizes: that batches come in.  The peak is that of the process on CPU, of the device elsewhere.
    """

    def steps(checkpointing: bool) -> tuple[str, int]:
        own = dataclasses.replace(settings, gradient_checkpointing=checkpointing)
        chosen, _ = mode.choose(device, own, num_sizes)
        return chosen, steps_bytes(shape, chosen, checkpointing, device, element_bytes)

    chosen, own = steps(settings.gradient_checkpointing)
    weights = held_bytes["weights_bytes"]
    beside = sum(held_bytes.values()) - weights
    return {
        "mode": chosen,
        "tokens": shape.tokens,
        "activations_bytes": own,
        "activations_without_checkpointing_bytes": steps(False)[1],
        "activations_with_checkpointing_bytes": steps(True)[1],
        "peak_bytes": _with_libraries(weights, device) + beside + own,
    }
