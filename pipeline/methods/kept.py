"""What decides the compiled graphs of a training's first step, or of a prediction, so that they are kept for later.

What is not known to leave a graph as it is counts: to compile once more costs a minute, a wrong graph a run.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.devices import device, kept_graphs
from pipeline.plan.method import Trainee
from pipeline.plan.plan import Plan
from pipeline.process.ranks import place

IN_NO_GRAPH = (
    *("steps", "epochs", "learning_rate", "text_encoder_lr"),
    *("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
)
"""Settings of [train] that a step is given as tensors, or that decide how often it is taken."""

OF_HOST_STEP = (
    *("optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "ema_decay"),
)
"""Those of the optimizer, which are in no graph either where it steps in NumPy."""

INPUTS = "data.", "entries."
"""What a run's identity says of its inputs, which a step is given as tensors."""


def first_step(
    plan: Plan, trainee: Trainee, identity: Mapping[str, str], batches: Sequence[tuple]
) -> contextlib.AbstractContextManager:
    """A block for a training's first step; see `kept_graphs.keeping`.

    identity: the run's, flat.  batches: that step's own, of this rank, each as the arguments of the loss.
    """
    names = IN_NO_GRAPH + (OF_HOST_STEP if device.steps_on_host() else ())
    free = {f"train.{name}" for name in names}
    run = {name: text for name, text in identity.items() if name not in free and not name.startswith(INPUTS)}
    return _keeping(plan, trainee, batches, {"run": run, "parallel": dataclasses.asdict(plan.experiment.parallel)})


def compiled_prediction(plan: Plan, model: Trainee, note: Callable[[Path | None], None]) -> Callable:
    """What the models predict, compiled.  It is given tensors of the same sizes each time.

    note: called before it compiles, with the folder that its graph is taken from, if it is.
    """
    predict = device.compiled(model.predict, parameters(model))
    method = plan.method.identity(plan) if model.trained else {}
    parts = {"model": plan.network_digest, "method": method, "drawn_for": plan.method.name if model.trained else ""}
    is_first = True

    def predicted(*arguments):
        nonlocal is_first
        if not is_first:
            return predict(*arguments)
        is_first = False
        with _keeping(plan, model, [arguments], parts) as folder:
            note(folder)
            return predict(*arguments)

    return predicted


def parameters(trainee: Trainee) -> list:
    """All that a step or a prediction may read."""
    cells = [*trainee.frozen.values(), *trainee.networks.values()]
    every = [parameter for cell in cells for parameter in cell.get_parameters()] + list(trainee.trained)
    return list({id(parameter): parameter for parameter in every}.values())


def _keeping(plan: Plan, trainee: Trainee, calls: Sequence[tuple], parts: dict) -> contextlib.AbstractContextManager:
    """calls: the arguments of each, in order: a size that is new is compiled."""
    asked = plan.experiment.device.keep_compiled
    if asked == "never" or (asked == "auto" and plan.device != "CPU"):
        return contextlib.nullcontext()
    every = parameters(trainee)
    decided = {
        "device": plan.device,
        "sources": kept_graphs.sources("pipeline", type(plan.method).__module__.partition(".")[0]),
        "arguments": [_sizes(arguments) for arguments in calls],
        "parameters": [[each.name, *size] for each, size in zip(every, _sizes(every))],
        "precision": dataclasses.asdict(plan.precision),
        "rank": [place().rank, place().size],
        "jit": device.jit_options(),
    }
    return kept_graphs.keeping(decided | parts)


def _sizes(tensors: Sequence) -> list[list]:
    """Of each tensor its type and shape; of what is None nothing."""
    return [[] if tensor is None else [str(tensor.dtype), list(tensor.shape)] for tensor in tensors]
