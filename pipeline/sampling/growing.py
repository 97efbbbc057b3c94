"""Drawing the prompts of [sample] while a training goes on, with the transformer that it holds.

Every so many steps the weights are saved as a result would be, and what is drawn is drawn with what was saved: the
latents are those that SampleLatents draws of that file later, where it does not compile; what is missing it draws.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from cache import StoreError, write_atomically
from cache.core.files import make_folder
from cache.terminal.places import shown
from pipeline.errors import UserError
from pipeline.methods.tokens import pooled_reader
from pipeline.plan import pictures
from pipeline.plan.method import Trainee, untrained
from pipeline.plan.needs import note_needs
from pipeline.plan.pictures import Series
from pipeline.plan.plan import Plan
from pipeline.plan.run_folder import RunFolder
from pipeline.plan.whole import is_whole
from pipeline.process.progress import say
from pipeline.process.ranks import Ranks
from pipeline.process.stopping import Stopped
from pipeline.sampling import quick
from pipeline.sampling.denoise import Pooled, draw

Save = Callable[[Path, Mapping, int], object]
"""Writes a result to a folder: the folder, the trained parameters by name, the step."""


def is_asked(plan: Plan) -> bool:
    """Whether the experiment asks for pictures while it trains."""
    return bool(plan.experiment.sample.every) and pictures.is_asked(plan.experiment, plan.method)


def kept_files(plan: Plan) -> tuple[str, ...]:
    """The files that are kept of each step with pictures; none where these are not asked for."""
    return plan.method.result_files if is_asked(plan) else ()


class Growth:
    """What a training draws every ``sample.every`` steps.  Of several ranks all call it; the first one draws.

    A picture never ends a training: what cannot be drawn or written is said in one line.
    """

    def __init__(self, plan: Plan, ranks: Ranks, last_step: int):
        self._plan, self._ranks, self._last = plan, ranks, last_step
        self._every = plan.experiment.sample.every if is_asked(plan) else 0
        self._colours: np.ndarray | None = None

    def draw_base(self, frozen: dict) -> None:
        """Draw what the pretrained model draws.  Call it before anything is put into the frozen models.

        Raises Stopped where it was asked to stop meanwhile.
        """
        if not (self._every and self._plan.experiment.sample.base):
            return
        plan = self._plan

        def drawn():
            network = plan.family.network
            model = untrained(plan, {network: frozen[network]})
            self._draw(model, plan.pooled.read_many, pictures.base(plan))

        if end := self._ranks.ending(None, is_asked=self._attempted("the pretrained model", drawn)):
            raise end

    def is_due(self, step: int) -> bool:
        """After the last step it never is: the result is drawn by the stage that follows."""
        return bool(self._every) and 0 < step < self._last and step % self._every == 0

    def draw(self, step: int, trainee: Trainee, save: Save, result: Mapping, is_stopping: bool) -> bool:
        """Save the result as it is after a step, and draw with it.  Returns whether it was asked to stop meanwhile."""
        plan = self._plan

        def drawn():
            folder = plan.run.step(step)
            if not all(is_whole(folder / name) for name in plan.method.result_files):
                make_folder(folder)
                save(folder, result, step)
            if trainee.as_saved and not is_stopping:
                with trainee.as_saved(folder):
                    self._draw(trainee, pooled_reader(plan), pictures.of_step(plan, step))

        asked = self._attempted(f"step {step}", drawn)
        self._ranks.exchange(None)
        return asked

    def _attempted(self, what: str, work: Callable[[], None]) -> bool:
        """Have the first rank do it.  Returns whether it was asked to stop meanwhile."""
        if not self._ranks.is_first:
            return False
        try:
            work()
        except Stopped:
            return True
        except (OSError, StoreError, UserError) as error:
            say(f"{what}: not drawn: {error}; the training goes on")
        return False

    def _draw(self, model: Trainee, pooled: Pooled, series: Series) -> None:
        """Draw what is missing of a series, and show it."""
        plan = self._plan
        note_needs(plan)  # before: what is drawn of them is kept, however the stage ends
        with series.entries.writer():  # it takes over what a killed process had drawn
            missing = series.missing()
        if missing:
            draw(plan, model, pooled, series, missing, "pynative")  # to compile for each of the steps repays nothing
        if self._colours is None:
            self._colours = quick.fitted(plan)
        there = [each for each in pictures.by_now(plan) if not each.missing()]
        say(f"{series.name}: a quick look: {shown(quick.write(plan, there, self._colours))}")


def take_over(source: RunFolder, target: RunFolder, files: tuple[str, ...], last_step: int) -> None:
    """Take over the weights that a shorter run has kept of its steps up to ``last_step``."""
    for step in source.list_steps(files):
        for name in files if step <= last_step else ():
            path = target.step(step) / name
            make_folder(path.parent)
            if not is_whole(path):
                write_atomically(path, (source.step(step) / name).read_bytes())
