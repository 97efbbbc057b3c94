"""What a training says of its steps: metrics.jsonl, TensorBoard scalars, and the numbers of its result."""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache import write_atomically
from cache.core.files import named
from pipeline.devices import device
from pipeline.errors import NotFinite
from pipeline.plan.run_folder import RunFolder
from pipeline.process.progress import say
from pipeline.process.ranks import ALONE, Ranks
from pipeline.runs import hyperparameters, metrics_file
from pipeline.settings.fields import Train
from pipeline.training.trackers import Tracker


@dataclass(frozen=True)
class Outcome:
    """What one step gave, as tensors that the device may still be computing.

    losses: of each batch of this rank, times ``scale``.  norm: of the mean gradient, before clipping.
    """

    losses: Sequence
    scale: float
    norm: Any
    ranks: Ranks = ALONE

    def read(self) -> tuple[float, float]:
        """The mean loss of all ranks and the gradient's norm; waits for the device, and for the other ranks."""
        by_rank = self.ranks.exchange([float(loss.asnumpy()) for loss in self.losses])
        losses = [loss for turn in zip(*by_rank) for loss in turn]  # in the order of the batches
        loss = float(np.mean(losses)) / self.scale
        return loss, float(self.norm if isinstance(self.norm, float) else self.norm.asnumpy())


class Metrics:
    """Writes a line every ``log_every`` steps and for the last one; use it in a ``with`` block.

    What the run's folder says of steps after ``first_step`` is removed: these will be taken again.  What cannot be
    written, on a full disk for one, is given up with one line: it must not stop a training.  writes: whether this is
    the rank that does; the others do the same and write nothing.
    """

    def __init__(self, run: RunFolder, first_step: int, settings: Train, writes: bool = True):
        self.settings = settings
        self._lines, self._waited = Lines(run.metrics, first_step), 0.0
        self._writers: list[Lines | Board | Tracker] = [self._lines, Board(run, first_step + 1)] if writes else []
        if writes and settings.tracker != "none":
            self._writers.append(Tracker(settings.tracker, run, first_step))
        self._attempt(lambda writer: writer.open())
        kept = [json.loads(line) for line in self._lines.kept]
        self._seconds, self._loss = [line["step_seconds"] for line in kept], kept[-1]["loss"] if kept else None
        self._step, self._began, self._first = first_step, time.perf_counter(), time.perf_counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._attempt(lambda writer: writer.close(self._step == self.settings.steps))

    def _attempt(self, work: Callable[[Any], object]) -> None:
        """Have all writers do it, and give up those that cannot."""
        for writer in list(self._writers):
            try:
                work(writer)
            except OSError as error:
                self._writers.remove(writer)
                say(f"{writer.path}: {error.strerror or error}; no more is written there, the training goes on")

    def is_due(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.settings.steps

    def write(self, step: int, outcome: Outcome, learning_rate: float, waited_seconds: float) -> float:
        """Write a line; the times in it are means over the steps since the line before.  Returns the loss.

        waited_seconds: for batches, since the beginning.  Raises UserError where the loss is not finite.
        """
        loss, norm = outcome.read()
        if not np.isfinite(loss):
            raise NotFinite(f"step {step}: the loss is {loss}; lower train.learning_rate, or use a wider precision")
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
        self._attempt(lambda writer: writer.add(line))
        return loss

    def leave_out(self, seconds: float) -> None:
        """So many seconds were no part of any step."""
        self._began, self._first = self._began + seconds, self._first + seconds

    def sync(self) -> None:
        """Wait until all lines are on disk: a checkpoint must not be newer than them."""
        self._attempt(lambda writer: writer.sync())

    def summary(self) -> dict:
        """The last loss, the median step time in seconds, and the share of all time that was spent waiting for data."""
        whole = time.perf_counter() - self._first
        median = float(np.median(self._seconds)) if self._seconds else None
        return {"loss": self._loss, "step_seconds": median, "data_wait_share": self._waited / whole}


class Lines:
    """metrics.jsonl.  kept: its lines up to ``last_step``, from which it goes on."""

    def __init__(self, path: Path, last_step: int):
        self.path, self._last_step, self.kept = path, last_step, list[str]()

    def open(self) -> None:
        self.kept = kept_lines(self.path, self._last_step)
        write_atomically(self.path, "".join(self.kept))
        self._file = open(self.path, "a")

    def add(self, line: dict) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self, is_finished: bool) -> None:
        self._file.close()


class Board:
    """TensorBoard's scalars, and the settings for its tab HPARAMS, written by the thread that trains.

    tensorboardX's own SummaryWriter writes from a thread of its own: where that cannot write, its queue fills up, and
    the training waits for ever.  first_step: older files in the folder count for the steps before it alone.
    """

    def __init__(self, run: RunFolder, first_step: int):
        self.path, self._first_step, self._run = run.tensorboard, first_step, run

    def open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import hparams

        self.path.mkdir(exist_ok=True)
        self._file = EventsWriter(str(self.path / "events"))
        self._file.write_event(Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START)))
        shown = {f"train/{name}": None for name in ("loss", "step_seconds")}  # in the table, as of the last step
        *begin, self._end = hparams(hyperparameters.of_run(self._run), shown)
        self._write(begin)

    def _write(self, summaries: Iterable, step: int = 0) -> None:
        from tensorboardX.proto.event_pb2 import Event

        for summary in summaries:
            self._file.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._file.flush()

    def add(self, line: dict) -> None:
        from tensorboardX.summary import scalar

        values = [
            scalar(f"train/{name}", value) for name, value in line.items() if name != "step" and value is not None
        ]
        self._write(values, line["step"])

    def sync(self) -> None:
        """Nothing: the scalars are in metrics.jsonl too."""

    def close(self, is_finished: bool) -> None:
        if is_finished:
            self._write([self._end])
        self._file.close()


def kept_lines(path: Path, last_step: int) -> list[str]:
    """The whole lines of a metrics file up to a step; none where there is no file.

    Lines that cannot be read, as a disk that failed leaves them, are left out, and said.
    """
    try:
        with named(path):
            lines = path.read_text(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    steps = [_step_in(line) for line in lines]
    if damaged := sum(step is None for step in steps[:-1]):  # the last one may have been cut short by a kill
        say(f"{path}: {damaged} of its lines cannot be read and are left out")
    return [line for line, step in zip(lines, steps) if step is not None and step <= last_step]


def _step_in(line: str) -> int | None:
    found = metrics_file.parsed(line)
    return None if found is None else found["step"]


def copy(source: RunFolder, target: RunFolder, last_step: int) -> None:
    """Take over what a shorter run says of its steps up to ``last_step``."""
    write_atomically(target.metrics, "".join(kept_lines(source.metrics, last_step)))
