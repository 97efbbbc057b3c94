"""What decides the compiled graphs of a training's first step, a prediction or an encoder, so that they are kept.

What is not known to leave a graph as it is counts: to compile once more costs a minute, a wrong graph a run.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.devices import device, kept_graphs
from pipeline.plan.method import Trainee
from pipeline.plan.plan import Plan
from pipeline.process.progress import say
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
    return _keeping(
        plan, parameters(trainee), batches, {"run": run, "parallel": dataclasses.asdict(plan.experiment.parallel)}
    )


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
        with _keeping(plan, parameters(model), [arguments], parts) as folder:
            note(folder)
            return predict(*arguments)

    return predicted


class Often:
    """A model's function of one tensor, compiled for each size that comes often enough, and for no other.

    The first of a size is computed in both ways: what is compiled counts only if its bits are those of PyNative, so
    that how many there are of a size decides no entry.  Where it cannot be compiled that is said, and PyNative goes on.

    is_often: of a tensor's shape.
    """

    def __init__(
        self, plan: Plan, component: str, model, function: Callable, is_often: Callable[[tuple[int, ...]], bool]
    ):
        self._plan, self._component, self._model = plan, component, model
        self._function, self._is_often = function, is_often
        self._by_shape: dict[tuple[int, ...], Callable] = {}

    def __call__(self, tensor):
        shape = tuple(tensor.shape)
        if shape in self._by_shape:
            return self._by_shape[shape](tensor)
        output, self._by_shape[shape] = self._function(tensor), self._function
        if self._is_often(shape) and (compiled := self._compiled(tensor, output.asnumpy().tobytes())):
            self._by_shape[shape] = compiled
        return output

    def _compiled(self, tensor, expected: bytes) -> Callable | None:
        own = list(self._model.get_parameters())
        parts = {"encoder": self._component, "digest": self._plan.digest_of(self._component)}
        try:
            function = device.compiled(self._function, own)
            with _keeping(self._plan, own, [(tensor,)], parts):
                found = function(tensor).asnumpy().tobytes()
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"{self._component}: not compiled, as that fails: {reason}")
            return None
        if found != expected:
            say(f"{self._component}: not compiled, as its bits would be others")
            return None
        return function


def parameters(trainee: Trainee) -> list:
    """All that a step or a prediction may read."""
    cells = [*trainee.frozen.values(), *trainee.networks.values()]
    every = [parameter for cell in cells for parameter in cell.get_parameters()] + list(trainee.trained)
    return list({id(parameter): parameter for parameter in every}.values())


def _keeping(plan: Plan, every: Sequence, calls: Sequence[tuple], parts: dict) -> contextlib.AbstractContextManager:
    """every: all parameters that are read.  calls: the arguments of each, in order: a size that is new is compiled."""
    asked = plan.experiment.device.keep_compiled
    if asked == "never" or (asked == "auto" and plan.device != "CPU"):
        return contextlib.nullcontext()
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
