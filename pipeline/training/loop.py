"""The training loop, for whatever is trained: it takes a loss, the parameters to step, and the batches."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.devices import device
from pipeline.plan.run_folder import RunFolder
from pipeline.process.ahead import made_ahead
from pipeline.process.progress import Progress, say
from pipeline.process.stopping import StopRequest
from pipeline.settings.fields import Train
from pipeline.training import checkpoint
from pipeline.training.gradients import LossScale, make_accumulator
from pipeline.training.metrics import Metrics, Outcome
from pipeline.training.optimizer import Optimizer
from pipeline.training.schedules import Schedule
from pipeline.training.team import WHOLE_STEP, Share

FIRST_LOSS_SCALE = 2.0**16
AHEAD = 2
"""Batches that are made before they are asked for."""


class Training:
    """What is trained, and all that a step changes: `state` and `counters` are what a checkpoint holds.

    loss: takes the tensors of a batch, returns a float32 scalar; its gradient is with respect to ``trained``.
    settings.mode: ``"jit"`` or ``"pynative"``.  scaled: for a loss computed in float16, see `LossScale`.
    groups: of each parameter, 0 for ``learning_rate`` and 1 for ``text_encoder_lr``; all 0, unless given.
    before_batch: called with the number of each batch, counted from 0; None where nothing happens before one.
    share: of several ranks, what this one does of each step.
    num_batches: in a step, of all ranks; ``settings.accumulate``, unless given.
    read: all parameters that the loss reads, where its compiled graph is to be kept.
    """

    def __init__(
        self,
        loss: Callable,
        trained: list,
        settings: Train,
        scaled: bool = False,
        groups: Sequence[int] = (),
        before_batch: Callable[[int], object] | None = None,
        share: Share = WHOLE_STEP,
        num_batches: int = 0,
        read: Sequence = (),
    ):
        import mindspore as ms

        def scaled_loss(scale, *tensors):
            return loss(*tensors) * scale

        gradient = ms.value_and_grad(scaled_loss, None, ms.ParameterTuple(trained))
        self._gradient = device.compiled(gradient, read) if settings.mode == "jit" else gradient
        self.trained, self.step, self._before_batch = trained, 0, before_batch
        self.optimizer = Optimizer(trained, settings, groups, share.shards)
        rates = (settings.learning_rate, settings.text_encoder_lr)
        self.schedules = [schedule_of(settings, rate) for rate in rates[: max(self.optimizer.groups) + 1]]
        self.num_batches = num_batches or settings.accumulate
        self.ranks, self._sums = share.ranks, share.sums or (make_accumulator() if self.num_batches > 1 else None)
        self.loss_scale = LossScale(FIRST_LOSS_SCALE) if scaled else None
        self.numerics = [[0, device.numerics()]]
        """From which step on which version of the device's numerics computed; more than one after going on."""

    @property
    def state(self) -> dict:
        """The trained parameters and the optimizer's state, by name; of that, what this rank keeps."""
        return self._trained_by_name() | self.optimizer.state()

    def _trained_by_name(self) -> dict:
        return {f"trained.{parameter.name}": parameter for parameter in self.trained}

    @property
    def counters(self) -> dict:
        scale = self.loss_scale
        return {
            "num_updates": self.optimizer.num_updates,
            "loss_scale": scale and scale.scale,
            "good_steps": scale and scale.good_steps,
            "numerics": self.numerics,
        }

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint, and say if its numerics are others.  Raises UserError if it holds other tensors."""
        checkpoint.restore(found, self.state, self.optimizer.kept_elsewhere())
        self.step, counters = found.step, found.counters
        self.optimizer.num_updates = counters["num_updates"]
        if self.loss_scale:
            self.loss_scale.scale, self.loss_scale.good_steps = counters["loss_scale"], counters["good_steps"]
        self._note_numerics(counters.get("numerics", [[0, 1]]))

    def _note_numerics(self, before: list[list[int]]) -> None:
        """Say where the steps so far were computed with other numerics than those to come."""
        last, now = before[-1][1], device.numerics()
        self.numerics = before if last == now else [*before, [self.step, now]]
        if last != now:
            say(
                f"the steps up to {self.step} were computed by numerics {last}, those from here on by {now}: the "
                "result will differ by rounding from that of an unbroken run"
            )

    def check_equal(self) -> None:
        """Raise UserError where the ranks are not at the same step with the same state."""
        if self.ranks.size > 1:
            shared = self._trained_by_name() if self.optimizer.shards else self.state
            own = checkpoint.digest_of(self.step, shared, self.counters, {})
            self.ranks.check_equal(own, f"step {self.step}")

    def save(self, run: RunFolder, identity: dict, keep: int) -> None:
        """Write a checkpoint to the run's folder.  Raises UserError where it would be worth nothing.

        Of several ranks all call it, and all have it when it returns.
        """
        if self.optimizer.shards:
            self.check_equal()
            whole = self._trained_by_name() | self.optimizer.whole_state()
            if self.ranks.is_first:
                checkpoint.save(run, self.step, whole, self.counters, identity, keep)
        else:
            checkpoint.save(run, self.step, self.state, self.counters, identity, keep, self.ranks)
        self.ranks.exchange(None)

    def result(self) -> dict:
        """The parameters that the training has made, by name: their moving averages where these are kept.

        Of several ranks all must call it, and the first one has them.
        """
        return self.optimizer.result()

    @property
    def learning_rates(self) -> list[float]:
        """Of the next step, by group."""
        return [schedule.at(self.step) for schedule in self.schedules]

    def advance(self, batches: Sequence[tuple]) -> Outcome:
        """Take one step on the mean gradient of all ranks' batches; these are this rank's, as arguments of the loss."""
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        losses, gradients = self.gradients(batches, scale)
        norm = self._update(gradients, scale * len(batches) * self.ranks.size)
        self.step += 1
        return Outcome(losses, scale, norm, self.ranks)

    def gradients(self, batches: Sequence[tuple], scale: float = 1.0) -> tuple[list, Sequence]:
        """Each batch's loss times ``scale``, and the sum of all ranks' gradients, waited for."""
        import mindspore as ms

        losses, scale = [], ms.Tensor(scale, ms.float32)
        for turn, tensors in enumerate(batches):
            if self._before_batch:
                self._before_batch((self.step * len(batches) + turn) * self.ranks.size + self.ranks.rank)
            loss, gradients = self._gradient(scale, *tensors)
            losses.append(loss)
            if self._sums:
                self._sums.add(gradients, is_first=turn == 0)
        return losses, self._sums.total() if self._sums else gradients

    def _update(self, gradients, divide_by: float):
        """Step the optimizer; a step whose gradients overflowed is skipped.  Returns the norm."""
        rates = self.learning_rates
        if not self.loss_scale:
            return self.optimizer.update(gradients, rates, divide_by)
        norm = self.optimizer.norm(gradients, divide_by)
        if np.isfinite(norm):
            self.optimizer.update(gradients, rates, divide_by)
        self.loss_scale.adjust(bool(np.isfinite(norm)))
        return norm


class Watch(NamedTuple):
    """What draws between steps.

    is_due: after which steps, by number: the same answer on all ranks.  draw: called by all of them, with whether the
    training is about to stop; returns whether it was asked to stop meanwhile.
    """

    is_due: Callable[[int], bool]
    draw: Callable[[bool], bool]


NOTHING_DRAWN = Watch(lambda step: False, lambda is_stopping: False)


def run(
    training: Training,
    make: Callable[[int], Any],
    tensors: Callable[[Any], tuple],
    settings: Train,
    folder: RunFolder,
    identity: dict,
    first_step: Callable[[Path | None], str] = lambda kept: "",
    watch: Watch = NOTHING_DRAWN,
    compiling: Callable[[Sequence[tuple]], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict:
    """Train from ``training.step`` to ``settings.steps``; metrics and checkpoints go to the run's ``folder``.

    make: the batch of a number, counted over all batches from 0; called ahead, in a thread.
    tensors: the arguments of the loss for a batch.
    first_step: what is said while the first step of each size of batch is taken, as it compiles; asked with the folder
    that its graphs are taken from, if they are.
    watch: what draws between steps, of the step that it goes on from too: it may have been stopped before it had drawn.
    compiling: a block for the first step of all, which may give such a folder; called with the step's own batches, as a
    training that goes on may begin with another size than a whole one.

    The device is waited for every ``log_every`` steps and at checkpoints.  Returns the last loss, the median step time
    in seconds, and the share of all time that was spent waiting for batches.  Raises UserError where the loss is not
    finite; Stopped, with a checkpoint written, after the step in which it was asked for, of any rank.  Where the next
    batch cannot be had, a checkpoint of the steps so far is written too.
    """
    ranks, size = training.ranks, training.num_batches
    numbers = range(training.step * size + ranks.rank, settings.steps * size, ranks.size)
    own = size // ranks.size  # of a step's batches
    saved = training.step  # of which step there is a checkpoint, or that needs none
    with (
        Metrics(folder, training.step, settings, writes=ranks.is_first) as metrics,
        Progress("train", settings.steps, "step", training.step) as progress,
        made_ahead(make, numbers, AHEAD * own) as ahead,
        contextlib.ExitStack() as safe,
    ):
        stop, sizes = None, Sizes(progress, first_step, compiling)
        is_asked = draw_if_due(watch, training.step, False, metrics, progress)
        while training.step < settings.steps:
            rate, several, error = training.learning_rates[0], [], None
            try:
                several = [tensors(ahead.next()) for _ in range(own)]
            except BaseException as found:  # a corrupt entry for one; all steps so far are sound
                error = found
            is_asked |= bool(stop and stop.requested)
            if end := ranks.ending(error, is_asked):
                if training.step > saved:
                    metrics.sync()
                    training.save(folder, identity, settings.keep_checkpoints)
                raise end
            with sizes.told_apart(several):
                outcome = training.advance(several)
            stop = stop or safe.enter_context(StopRequest())  # before, there was nothing to keep: a step may compile
            if metrics.is_due(training.step):
                loss = metrics.write(training.step, outcome, rate, ahead.waited_seconds)
                progress.advance(training.step - progress.done, f"loss {loss:.4f}")
            if _is_checkpoint_due(training.step, settings):
                metrics.sync()
                training.save(folder, identity, settings.keep_checkpoints)
                saved = training.step
            is_asked = draw_if_due(watch, training.step, stop.requested, metrics, progress)
        return metrics.summary()


def draw_if_due(watch: Watch, step: int, is_stopping: bool, metrics: Metrics, progress: Progress) -> bool:
    """Draw if it is time; that takes no part in the time of steps.  Returns whether it was asked to stop meanwhile."""
    if not watch.is_due(step):
        return False
    began = time.perf_counter()
    is_asked = watch.draw(is_stopping)
    metrics.leave_out(time.perf_counter() - began)
    progress.leave_out(time.perf_counter() - began, 0)
    return is_asked


class Sizes:
    """The sizes of batches that there have been: the first step of each compiles, and tells nothing of the others."""

    def __init__(
        self,
        progress: Progress,
        first_step: Callable[[Path | None], str],
        compiling: Callable[[Sequence[tuple]], contextlib.AbstractContextManager],
    ):
        self._progress, self._first_step, self._compiling = progress, first_step, compiling
        self._seen = set[tuple]()

    @contextlib.contextmanager
    def told_apart(self, several: Sequence[tuple]) -> Iterator[None]:
        """A block that takes a step with these batches."""
        new = {tuple(getattr(tensor, "shape", None) for tensor in tensors) for tensors in several} - self._seen
        if not new:
            yield
            return
        is_first = not self._seen
        self._seen |= new
        began = time.monotonic()
        with self._compiling(several) if is_first else contextlib.nullcontext() as folder:
            self._progress.say_now(self._first_step(folder))
            yield
        self._progress.leave_out(time.monotonic() - began)


def schedule_of(settings: Train, rate: float) -> Schedule:
    s = settings
    return Schedule(s.lr_scheduler, rate, s.lr_warmup_steps, s.steps, s.lr_num_cycles, s.lr_power)


def _is_checkpoint_due(step: int, settings: Train) -> bool:
    return step == settings.steps or bool(settings.checkpoint_every and step % settings.checkpoint_every == 0)
