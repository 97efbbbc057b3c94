"""How much memory a stage takes at its peak, estimated before anything is loaded.

What weights take is counted; what the work takes follows from sizes that were fitted to the peaks of real processes on
CPU (for trainings, ``python -m benchmarks.peak`` compares): for the backward pass a block keeps so many tensors of
(batch, tokens, width), and so many matrices of (batch, heads, tokens, tokens).  On Ascend nothing was measured: the
estimate there is that of PyNative without the libraries, which are in the host's memory, and without matrices of
attention, which flash attention does not keep; in float32 there is no flash attention.  Its sizes were fitted on CPU,
before attention and normalisations had gradients of their own there.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from pipeline.plan import mode
from pipeline.settings.fields import Train

MIB = 1 << 20
LIBRARIES_BYTES = {"CPU": 440 * MIB, "Ascend": 600 * MIB}
"""Resident memory of a process that has imported MindSpore and mindone and has read a dataset; of a host with NPUs,
where nobody has measured, with something for the driver's libraries."""

LOADING = 1.15
"""What weights take of the host's memory while they are loaded, over their own bytes: on CPU, and on Ascend too.  How
`pipeline.flux.models` loads decides it; nothing else knows of it."""


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

    Bytes in any case, and for each block; tensors and matrices of attention of each block, and of one block at a time;
    copies of the weights.
    """

    fixed_bytes: int
    block_bytes: int
    tensors: float
    matrices: float
    tensors_at_a_time: float
    matrices_at_a_time: float
    weights: float


KEPT = {
    "pynative": Kept(80 * MIB, 0, 45, 1.1, 0, 7.5, 0),
    "checkpointing": Kept(80 * MIB, 0, 4, 0, 30, 3.6, 0),
    "jit": Kept(265 * MIB, 42 * MIB, 45, 2.8, 0, 0, 0.5),
}
KEPT_ON_ASCEND = {
    "pynative": Kept(0, 0, 50, 1.35, 0, 5.8, 0),
    "checkpointing": Kept(0, 0, 11.6, 0, 0, 8.3, 0),
}

PREDICTION = {"CPU": (16 * MIB, 42, 2.1), "Ascend": (0, 38.5, 1.8)}
"""What a transformer takes to predict without gradients, however many blocks it has: bytes in any case, tensors of
(batch, tokens, width), and matrices of attention."""

COMPILED_BYTES, COMPILED_TENSORS, COMPILED_MATRICES = 238 * MIB, 29, 1.0
"""The same of a compiled prediction on CPU, but tensors and matrices of each block, as all of them are kept."""

ENCODED, DECODED, PLACES_MATRICES = {"CPU": 8.3, "Ascend": 12.5}, {"CPU": 15.0, "Ascend": 17.0}, 5.2
"""Tensors of (channels of the first level, height, width) that the VAE's encoder and decoder take for a picture; and
matrices of attention between the places of its last level, which take more where pictures are large."""

COMPILED_ENCODER = 1.1
"""What a compiled encoder takes on CPU for what it makes, by what PyNative does; and its weights once more."""

TEXTS = 8
"""Tensors of (tokens, inner width), and matrices of attention, that a text encoder takes for a caption."""


def of_picture(
    tensors: Mapping[str, float], config: dict, width: int, height: int, device: str, element_bytes: int
) -> int:
    """What the VAE takes to encode or to decode one picture of so many pixels.  tensors: ENCODED or DECODED.

    Of large pictures, matrices of attention between all places take most on CPU.
    """
    channels = config["block_out_channels"]
    places = width * height >> 2 * (len(channels) - 1)
    picture = Shape(batch_size=1, tokens=places, width=channels[-1], heads=1, blocks=1)
    matrices = PLACES_MATRICES * _matrix_bytes(picture, device, element_bytes)
    return int(max(tensors[device] * channels[0] * width * height * element_bytes, matrices))


def of_caption(tokens: int, inner: int, heads: int, element_bytes: int) -> int:
    """What a text encoder takes to encode one caption."""
    return TEXTS * tokens * (inner + heads * tokens) * element_bytes


def of_prediction(shape: Shape, num_kept: int, device: str, element_bytes: int) -> int:
    """What a transformer takes to predict once, without gradients.

    num_kept: blocks of a ControlNet, whose outputs are kept for the transformer's.
    """
    fixed_bytes, tensors, matrices = PREDICTION[device]
    elements = shape.batch_size * shape.tokens * shape.width * (tensors + num_kept)
    each = 4 if device == "CPU" else element_bytes  # kernels for float16 work in float32
    return int(fixed_bytes + each * elements + matrices * _matrix_bytes(shape, device, element_bytes))


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
    return max(loading_bytes(weights_bytes, device), LIBRARIES_BYTES[device] + weights_bytes + working_bytes)


def loading_bytes(weights_bytes: int, device: str) -> int:
    """Of the host, while weights are loaded; the pages of their files, which it can take back, come on top."""
    return LIBRARIES_BYTES[device] + int(LOADING * weights_bytes)


def steps_bytes(
    shape: Shape, weights_bytes: int, chosen: str, checkpointing: bool, device: str, element_bytes: int
) -> int:
    """The most that the forward and backward pass of a batch keep, beside weights, gradients and optimizer.

    chosen: the mode.  element_bytes: of the dtype that the models compute in.
    """
    tensor = shape.batch_size * shape.tokens * shape.width * element_bytes
    matrix = _matrix_bytes(shape, device, element_bytes)
    if device != "CPU":
        kept = KEPT_ON_ASCEND["checkpointing" if checkpointing else "pynative"]  # nobody has measured compiled steps
    else:
        kept = KEPT["checkpointing" if checkpointing and chosen != "jit" else chosen]  # compiled, it saves nothing
        tensor *= 4 // element_bytes  # kernels for float16 work in float32
    per_block = kept.block_bytes + kept.tensors * tensor + kept.matrices * matrix
    fixed = kept.fixed_bytes + kept.weights * weights_bytes
    at_a_time = kept.tensors_at_a_time * tensor + kept.matrices_at_a_time * matrix
    return int(fixed + shape.blocks * per_block + at_a_time)


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
