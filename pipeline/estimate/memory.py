"""How much memory a stage takes at its peak, estimated before anything is loaded.

What weights take is counted; what the work takes follows from sizes that were fitted to the peaks of real processes on
CPU (for trainings, ``python -m benchmarks.peak`` compares): for the backward pass a block keeps so many tensors of
(batch, tokens, width), and so many matrices of (batch, heads, tokens, tokens).  On Ascend nothing was measured: the
estimate there is that of PyNative without the libraries, which are in the host's memory, and without matrices of
attention, which flash attention does not keep; in float32 there is no flash attention.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from pipeline.plan import mode
from pipeline.settings.fields import Train

MIB = 1 << 20
LIBRARIES_BYTES = 600 * MIB
"""Resident memory of a process that has imported MindSpore and mindone and has read a dataset, on CPU."""

LOADED, LOADING = 1.1, 1.15
"""What weights take of the host's memory once they are loaded, and while they are, over their own bytes: on CPU, and
while loading on Ascend too.  How `pipeline.flux.models` loads decides both; nothing else knows of it."""


@dataclass(frozen=True)
class Shape:
    """Of the largest batch.  tokens: of picture and text together.  blocks: that compute, of all models together."""

    batch_size: int
    tokens: int
    width: int
    heads: int
    blocks: int


class Kept(NamedTuple):
    """What the steps keep.

    Bytes in any case, and for each block; tensors and matrices of attention for each block; matrices at a time; copies
    of the weights.
    """

    fixed_bytes: int
    block_bytes: int
    tensors: float
    matrices: float
    matrices_at_a_time: float
    weights: float


KEPT = {
    "pynative": Kept(87 * MIB, 0, 50, 1.35, 5.8, 0),
    "checkpointing": Kept(120 * MIB, 0, 11.6, 0, 8.3, 0),
    "jit": Kept(197 * MIB, 31 * MIB, 146, 6, 0, 0.5),
}

PREDICTION_BYTES, PREDICTION_TENSORS, PREDICTION_MATRICES = 16 * MIB, 38.5, 1.8
"""What a transformer takes to predict without gradients, however many blocks it has: bytes in any case, tensors of
(batch, tokens, width), and matrices of attention.  Within 8 % of what eight processes took, of widths 256 to 1536 and
288 to 3200 tokens."""

COMPILED_BYTES, COMPILED_TENSORS, COMPILED_MATRICES = 194 * MIB, 65.4, 1.24
"""The same of a compiled prediction on CPU, but tensors and matrices of each block, as all of them are kept.  Within
5 % of what six processes took, of the same sizes."""

ENCODED, DECODED = 12.5, 17.0
"""Tensors of (channels of the first level, height, width) that the VAE's encoder and decoder take for a picture."""

COMPILED_ENCODER = 2.5
"""What a compiled encoder takes on CPU for what it makes, by what PyNative does; and its weights once more."""

TEXTS = 8
"""Tensors of (tokens, inner width), and matrices of attention, that a text encoder takes for a caption."""


def of_picture(tensors: float, config: dict, width: int, height: int, element_bytes: int) -> int:
    """What the VAE takes to encode or to decode one picture of so many pixels.  tensors: ENCODED or DECODED.

    They were fitted up to 1024 px; far beyond, attention between all places of a picture takes most on CPU.
    """
    return int(tensors * config["block_out_channels"][0] * width * height * element_bytes)


def of_caption(tokens: int, inner: int, heads: int, element_bytes: int) -> int:
    """What a text encoder takes to encode one caption."""
    return TEXTS * tokens * (inner + heads * tokens) * element_bytes


def of_prediction(shape: Shape, num_kept: int, device: str, element_bytes: int) -> int:
    """What a transformer takes to predict once, without gradients.

    num_kept: blocks of a ControlNet, whose outputs are kept for the transformer's.
    """
    elements = shape.batch_size * shape.tokens * shape.width * (PREDICTION_TENSORS + num_kept)
    matrices = PREDICTION_MATRICES * _matrix_bytes(shape, device, element_bytes)
    if device != "CPU":
        return int(elements * element_bytes + matrices)
    return int(PREDICTION_BYTES + 4 * elements + matrices)  # kernels for float16 work in float32


def of_compiled_prediction(shape: Shape, element_bytes: int) -> int:
    """The same, compiled on CPU."""
    tensor = 4 * shape.batch_size * shape.tokens * shape.width
    per_block = COMPILED_TENSORS * tensor + COMPILED_MATRICES * _matrix_bytes(shape, "CPU", element_bytes)
    return int(COMPILED_BYTES + shape.blocks * per_block)


def _matrix_bytes(shape: Shape, device: str, element_bytes: int) -> int:
    """Of one matrix of attention of a batch: 0 where flash attention makes none."""
    if device != "CPU" and element_bytes < 4:
        return 0
    return shape.batch_size * shape.heads * shape.tokens**2 * 4


def peak_bytes(weights_bytes: int, working_bytes: int, device: str) -> int:
    """Of loading, or of working with what is loaded; on Ascend weights are loaded on the host."""
    if device != "CPU":
        return weights_bytes + working_bytes
    return max(loading_bytes(weights_bytes), LIBRARIES_BYTES + int(LOADED * weights_bytes) + working_bytes)


def loading_bytes(weights_bytes: int) -> int:
    """Of the host, while weights are loaded; the pages of their files, which it can take back, come on top."""
    return LIBRARIES_BYTES + int(LOADING * weights_bytes)


def steps_bytes(
    shape: Shape, weights_bytes: int, chosen: str, checkpointing: bool, device: str, element_bytes: int
) -> int:
    """The most that the forward and backward pass of a batch keep, beside weights, gradients and optimizer.

    chosen: the mode.  element_bytes: of the dtype that the models compute in.
    """
    tensor = shape.batch_size * shape.tokens * shape.width * element_bytes
    matrix = _matrix_bytes(shape, device, element_bytes)
    if device != "CPU":
        kept = KEPT["checkpointing" if checkpointing else "pynative"]  # nobody has measured compiled steps there
        return int(shape.blocks * (kept.tensors * tensor + kept.matrices * matrix) + kept.matrices_at_a_time * matrix)
    kept = KEPT["checkpointing" if checkpointing and chosen != "jit" else chosen]  # compiled, it saves nothing
    wide = 4 / element_bytes  # kernels for float16 work in float32
    per_block = kept.block_bytes + kept.tensors * tensor * wide + kept.matrices * matrix
    fixed = kept.fixed_bytes + kept.weights * weights_bytes
    return int(fixed + shape.blocks * per_block + kept.matrices_at_a_time * matrix)


class Held(TypedDict):
    """What is there all the time while a training runs."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int


class Steps(TypedDict):
    """What the steps of a training keep.

    peak_bytes: of the whole training, which is that of the process on CPU, of the device elsewhere.
    """

    mode: str
    tokens: int
    activations_bytes: int
    activations_without_checkpointing_bytes: int
    activations_with_checkpointing_bytes: int
    peak_bytes: int


def of_training(held: Held, shape: Shape, settings: Train, device: str, element_bytes: int, num_sizes: int) -> Steps:
    """The mode of the steps, what they keep with and without gradient checkpointing, and the peak of the training.

    settings: of which the number of steps is known.  num_sizes: that batches come in.
    """
    weights = held["weights_bytes"]

    def steps(checkpointing: bool) -> tuple[str, int]:
        own = dataclasses.replace(settings, gradient_checkpointing=checkpointing)
        chosen, _ = mode.choose(device, own, num_sizes)
        return chosen, steps_bytes(shape, weights, chosen, checkpointing, device, element_bytes)

    chosen, own = steps(settings.gradient_checkpointing)
    beside = held["gradients_bytes"] + held["optimizer_bytes"]
    return {
        "mode": chosen,
        "tokens": shape.tokens,
        "activations_bytes": own,
        "activations_without_checkpointing_bytes": steps(False)[1],
        "activations_with_checkpointing_bytes": steps(True)[1],
        "peak_bytes": peak_bytes(weights, beside + own, device),
    }
