"""The train step and the loop around it, for whatever is trained: it takes a loss and the parameters to step."""

import contextlib
import errno
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import device
from pipeline.errors import UserError
from pipeline.experiment import Train
from pipeline.progress import Progress

METRICS_NAME = "metrics.jsonl"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Step:
    """One step, in PyNative or compiled by ``ms.jit``: gradient of ``loss``, then the optimizer.

    loss: takes tensors, returns a float32 scalar; its gradient is with respect to ``trained``.
    """

    gradient: Callable
    optimizer: Callable

    def __call__(self, *tensors):
        """Returns the loss as a tensor, which the device may still be computing."""
        loss, gradients = self.gradient(*tensors)
        device.wait_asleep(gradients)
        self.optimizer(gradients)
        return loss


def make_step(loss: Callable, trained: list, settings: Train) -> Step:
    import mindspore as ms

    gradient = ms.value_and_grad(loss, None, ms.ParameterTuple(trained))
    if settings.mode == "jit":
        gradient = ms.jit(gradient)
    return Step(gradient, _optimizer(trained, settings))


def _optimizer(trained: list, settings: Train) -> Callable:
    """AdamW with bias correction (arXiv:1711.05101), or MindSpore's AdamWeightDecay, which has none.

    Without the correction the first steps are several times too small: the moments start at zero and are taken as they
    are.  mindone's own scripts train that way; choose it to compare with them.
    """
    from mindspore import nn
    from mindspore.experimental.optim import AdamW

    betas, eps, decay = (settings.adam_beta1, settings.adam_beta2), settings.adam_epsilon, settings.weight_decay
    if settings.optimizer == "adamw":
        return AdamW(trained, lr=settings.learning_rate, betas=betas, eps=eps, weight_decay=decay)
    return nn.AdamWeightDecay(trained, settings.learning_rate, *betas, eps, decay)


def run(step: Step, tensors: Callable[[int], tuple], settings: Train, folder: Path) -> dict:
    """Train for ``settings.steps`` steps; write loss, learning rate and step time to metrics.jsonl in ``folder``.

    tensors: gives the arguments of the step by its number, from 0.  The device is waited for every ``log_every`` steps;
    a line's step_seconds is the mean since the line before.  Returns the last loss and the median step time in seconds.
    Raises UserError where the loss is not finite.
    """
    seconds, last, began = [], 0, time.perf_counter()
    with open(folder / METRICS_NAME, "w") as metrics, Progress("train", settings.steps, "step") as progress:
        for number in range(1, settings.steps + 1):
            loss = step(*tensors(number - 1))
            if number % settings.log_every == 0 or number == settings.steps:
                value = _finite(loss, number)
                now = time.perf_counter()
                seconds.append((now - began) / (number - last))
                line = {"step": number, "loss": value, "lr": settings.learning_rate, "step_seconds": seconds[-1]}
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                progress.advance(number - last, f"loss {value:.4f}")
                last, began = number, now
    return {"loss": value, "step_seconds": float(np.median(seconds))}


def _finite(loss, number: int) -> float:
    value = float(loss.asnumpy())
    if not np.isfinite(value):
        raise UserError(f"step {number}: the loss is {value}; lower train.learning_rate, or use a wider precision")
    return value


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from training in the same run folder at the same time."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process trains this run; wait for it, or change the experiment"
            ) from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            print(f"{folder}: this file system has no locks; see that no second process trains this run", flush=True)
        yield
