"""Whether steps are compiled, where an experiment leaves that open.  Imports no MindSpore."""

from pathlib import Path

from cache.terminal.places import shown
from cache.terminal.words import duration, human_bytes
from pipeline.settings.fields import Train
from pipeline.settings.values import Mode

STEPS_THAT_REPAY_COMPILING = 100
"""On CPU, for each size of batch: three to ten times what ``benchmarks.step`` gives, so that it is repaid surely."""

PREDICTIONS_THAT_REPAY_COMPILING = 40
"""On CPU, for pictures of one size: of the small model compiling took what 12 to 34 predictions save, of 20, 5 and 1 at
a time."""

ITEMS_THAT_REPAY_COMPILING = 150
"""On CPU, for an encoder and items of one size: compiling took what 110 to 130 items save with the small models, 36
with CLIP-L, 4 to 15 with FLUX.1-dev's VAE."""

SHARE_FOR_COMPILED = 8
"""Compiled predictions, which keep what all blocks make, are chosen where they take at most this part of a memory."""

COMPILING_SECONDS = 0.8, 0.027
"""What compiling a step takes for each block of the models, and how much more for each block that there is; on CPU.

Fitted to 6, 24 and 57 blocks of a tiny width (7, 34 and 132 s); the width decides little.
"""


def choose_for_drawing(
    device: str, asked: Mode, num_predictions: int, compiled_bytes: int, memory_bytes: int
) -> tuple[Mode, str]:
    """As `choose`, of pictures of one size.

    num_predictions: of all batches together, each counted once a step.  compiled_bytes: what one takes, compiled.
    memory_bytes: what there is.
    """
    if asked != "auto":
        return asked, "as the experiment says"
    if device != "CPU":
        return "pynative", f'as nobody has measured compiled drawing on {device}; [sample] mode = "jit" compiles'
    repaid = PREDICTIONS_THAT_REPAY_COMPILING
    if num_predictions < repaid:
        return "pynative", f"as compiling is repaid by about {repaid} predictions, and there are {num_predictions}"
    if SHARE_FOR_COMPILED * compiled_bytes > memory_bytes:
        return "pynative", f"as compiled it would take {human_bytes(compiled_bytes)} more"
    return "jit", f"as {num_predictions} predictions repay compiling"


def compiles_encoder(device: str, num_items: int, compiled_bytes: int, memory_bytes: int) -> bool:
    """Whether items of one size are encoded by a compiled model; the arguments as those of `choose_for_drawing`."""
    fits = SHARE_FOR_COMPILED * compiled_bytes <= memory_bytes
    return device == "CPU" and num_items >= ITEMS_THAT_REPAY_COMPILING and fits


def compiling(device: str, num_blocks: int, kept: Path | None = None) -> str:
    """What is said while a step is compiled, as the first of each size of batch is.  kept: where its graph is taken."""
    if kept:
        return f"compiled before, in {shown(kept.parent)}"
    if device != "CPU":
        return f"compiling {num_blocks} blocks, nobody has measured how long that takes on {device}"
    first, more = COMPILING_SECONDS
    return f"compiling {num_blocks} blocks, about {duration(num_blocks * (first + more * num_blocks))}"


def choose(device: str, settings: Train, num_shapes: int) -> tuple[Mode, str]:
    """``"jit"`` or ``"pynative"``, and why; ``settings.steps`` must be known."""
    if settings.mode != "auto":
        return settings.mode, "as the experiment says"
    if device != "CPU":
        return "pynative", f'as nobody has measured compiled training on {device}; mode = "jit" compiles'
    if settings.gradient_checkpointing:
        return "pynative", "as gradient checkpointing saves memory there alone"
    steps = settings.steps
    repaid = STEPS_THAT_REPAY_COMPILING * num_shapes
    if steps >= repaid:
        return "jit", f"as {steps} steps repay compiling for {num_shapes} size{'s' * (num_shapes > 1)} of batches"
    return "pynative", f"as compiling is repaid by about {repaid} steps, and there are {steps}"
