"""Whether steps are compiled, where an experiment leaves that open.  Imports no MindSpore."""

from pipeline.settings import Train

STEPS_THAT_REPAY_COMPILING = 100
"""On CPU, for each size of batch: three to ten times what ``benchmarks.step`` gives, so that it is repaid surely."""


def choose(device: str, settings: Train, num_shapes: int) -> tuple[str, str]:
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
