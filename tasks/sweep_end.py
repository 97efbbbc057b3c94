"""How far the experiments of a sweep came: a table, the best first, what failed, and what to do next."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache import StoreError
from cache.terminal.output import show, typed
from cache.terminal.places import shown
from cache.terminal.table import Table
from pipeline.errors import UserError
from pipeline.plan.plan import Plan
from pipeline.process.progress import say
from pipeline.report import several
from pipeline.report.page import last_loss
from pipeline.report.run import read_run
from pipeline.runs import reading

if TYPE_CHECKING:
    from tasks.sweep import Sweep

DONE, TO_DO, NOT_DONE = "done", "to do", "not done"
FAULTS = UserError, StoreError, OSError


@dataclass(frozen=True)
class Row:
    """run: of an experiment, None where there is none yet.  loss: of the training, a moving average at its end.
    measured: by MeasureLoss."""

    path: Path
    state: str
    run: Path | None = None
    loss: float | None = None
    measured: float | None = None

    @property
    def rank(self) -> tuple:
        values = [math.inf if value is None else value for value in (self.measured, self.loss)]
        return self.state != DONE, *values


def say_end(sweep: "Sweep") -> None:
    rows = [_row(sweep, path) for path in sweep.files.experiments]
    ordered = sorted(rows, key=lambda row: row.rank)
    done = [row for row in rows if row.state == DONE]
    say("", f"{sweep.files.name}: {len(done)} of {len(rows)} are done")
    show(table_of(ordered))
    runs = [row.run for row in rows if row.run and row.loss is not None]
    has_page = bool(runs) and _write(sweep.files.report, runs)
    if len(done) < len(rows):
        say(f"{len(rows) - len(done)} not done: what failed has said why above; the same command goes on with them")
    _say_next(sweep, ordered[0] if done else None, has_page)


def table_of(rows: list[Row]) -> Table:
    hides = ">training loss", ">loss after"
    cells = [[row.path.stem, _number(row.loss), _number(row.measured), row.state] for row in rows]
    return Table(["experiment", *hides, "state"], cells, hides)


def state_of(plan: Plan, is_done: bool) -> str:
    """How far an experiment is, in words."""
    if is_done:
        return DONE
    found = reading.read_run(plan.run.path)
    if found.state == reading.FINISHED:
        return f"trained, {found.step:,} steps"
    of = f" of {found.steps:,}" if found.steps else ""
    return f"at step {found.step:,}{of}" if found.step else TO_DO


def _row(sweep: "Sweep", path: Path) -> Row:
    try:
        is_done = all(sweep.task(name, path).complete() for name in sweep.files.tasks)
        plan = sweep.plan(path)
        state = state_of(plan, is_done).replace(TO_DO, NOT_DONE)
        run = read_run(plan.run.path)
    except FAULTS:
        return Row(path, NOT_DONE)
    return Row(path, state, plan.run.path, last_loss(run), run.measured.after if run.measured else None)


def _write(page: Path, runs: list[Path]) -> bool:
    """Write the page of all that has been trained, where it is not there.  Returns whether it is."""
    try:
        if not several.is_made(page, runs):
            several.write(page, runs)
        return True
    except FAULTS as error:
        say(f"{shown(page)}: cannot be written: {error}", to_stderr=True)
        return False


def _say_next(sweep: "Sweep", best: Row | None, has_page: bool) -> None:
    todo = [("all side by side:", shown(sweep.files.report))] if has_page else []
    if best:
        name = sweep.method.stages.report
        todo.append(("more of the first:", f"luigi --module tasks {name} --experiment {shlex.quote(shown(best.path))}"))
    if todo:
        say("Next:", *(typed(f"  {line}") for line in Table(["", ""], todo).lines()))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
