"""What a training says of its steps: metrics.jsonl, TensorBoard scalars, and the numbers of its result."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import write_atomically
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.plan.run_folder import RunFolder
from pipeline.settings.fields import Train


@dataclass(frozen=True)
class Outcome:
    """What one step gave, as tensors that the device may still be computing.

    losses: of each accumulated batch, times ``scale``.  norm: of the mean gradient, before clipping.
    """

    losses: Sequence
    scale: float
    norm: object

    def read(self) -> tuple[float, float]:
        """The mean loss and the gradient's norm; waits for the device."""
        loss = float(np.mean([float(loss.asnumpy()) for loss in self.losses])) / self.scale
        return loss, float(self.norm if isinstance(self.norm, float) else self.norm.asnumpy())


class Metrics:
    """Writes a line every ``log_every`` steps and for the last one; use it in a ``with`` block.

    What the run's folder says of steps after ``first_step`` is removed: these will be taken again.
    """

    def __init__(self, run: RunFolder, first_step: int, settings: Train):
        from tensorboardX import SummaryWriter

        self.settings = settings
        kept = kept_lines(run.metrics, first_step)
        write_atomically(run.metrics, "".join(kept))
        self._file = open(run.metrics, "a")
        self._board = SummaryWriter(str(run.tensorboard), purge_step=first_step + 1, write_to_disk=True)
        self._seconds, self._waited = [json.loads(line)["step_seconds"] for line in kept], 0.0
        self._loss = json.loads(kept[-1])["loss"] if kept else None
        self._step, self._began, self._first = first_step, time.perf_counter(), time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()
        self._board.close()

    def is_due(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.settings.steps

    def write(self, step: int, outcome: Outcome, learning_rate: float, waited_seconds: float) -> float:
        """Write a line; the times in it are means over the steps since the line before.  Returns the loss.

        waited_seconds: for batches, since the beginning.  Raises UserError where the loss is not finite.
        """
        loss, norm = outcome.read()
        if not np.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss}; lower train.learning_rate, or use a wider precision")
        now, count = time.perf_counter(), step - self._step
        line = {
            "step": step,
            "loss": loss,
            "lr": learning_rate,
            "grad_norm": norm if np.isfinite(norm) else None,
            "loss_scale": outcome.scale,
            "step_seconds": (now - self._began) / count,
            "data_wait_seconds": (waited_seconds - self._waited) / count,
            "peak_memory_bytes": device.peak_resident_bytes(),
        }
        self._seconds.append(line["step_seconds"])
        self._step, self._began, self._waited, self._loss = step, now, waited_seconds, loss
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"train/{name}", value, step)
        return loss

    def sync(self) -> None:
        """Wait until all lines are on disk: a checkpoint must not be newer than them."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def summary(self) -> dict:
        """The last loss, the median step time in seconds, and the share of all time that was spent waiting for data."""
        whole = time.perf_counter() - self._first
        median = float(np.median(self._seconds)) if self._seconds else None
        return {"loss": self._loss, "step_seconds": median, "data_wait_share": self._waited / whole}


def kept_lines(path: Path, last_step: int) -> list[str]:
    """The whole lines of a metrics file up to a step; none where there is no file."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= last_step]


def copy(source: RunFolder, target: RunFolder, last_step: int) -> None:
    """Take over what a shorter run says of its steps up to ``last_step``."""
    write_atomically(target.metrics, "".join(kept_lines(source.metrics, last_step)))
