"""A sweep as one graph of Luigi: the tasks of all its experiments, and the page that compares their runs."""

from pathlib import Path

import luigi

from cache.terminal.arguments import fail
from pipeline.errors import UserError
from pipeline.methods import METHODS
from pipeline.plan.method import Method
from pipeline.plan.plan import Plan
from pipeline.report import several
from pipeline.sweep import files
from tasks import scheduler, sweep_end, table

OF_RUNS = {name: method for method in METHODS.values() for name in method.stages[1:]}
"""The tasks that can be run of each experiment, with the method that they are of."""


class SweepParameter(luigi.Parameter):
    """The path of a sweep's list."""

    def parse(self, text: str) -> str:
        path = Path(text).expanduser().absolute()
        try:
            files.read(path)
        except UserError as error:
            fail(str(error))
        return str(path)


class Sweep(luigi.Task):
    """Every experiment of a sweep, and a page that compares them."""

    sweep = SweepParameter(description="sweep.json, as python -m tasks sweep writes it")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scheduler.choose(self.task_family)
        self.files = files.read(Path(self.sweep))
        table.share(map(str, self.files.experiments))

    def requires(self):
        return [self.task(name, path) for path in self.files.experiments for name in self.files.tasks]

    def task(self, name: str, path: Path) -> luigi.Task:
        return table.task_of(name, str(path))

    def complete(self):
        return all(task.complete() for task in self.requires()) and several.is_made(self.files.report, self.runs())

    def is_complete_now(self) -> bool:
        """As `complete`, looked at anew."""
        table.forget()
        return self.complete()

    def run(self):
        several.write(self.files.report, self.runs())

    @property
    def method(self) -> Method:
        return OF_RUNS[self.files.tasks[0]]

    def plan(self, path: Path) -> Plan:
        """Of an experiment.  Raises UserError, StoreError or OSError where there is none yet."""
        return table.survey(str(path)).plan(self.method)

    def runs(self) -> list[Path]:
        return [self.plan(path).run.path for path in self.files.experiments]

    def say_end(self) -> None:
        """Say how far all came, and write the page of what is there where some of it is not done."""
        table.forget()
        sweep_end.say_end(self)

    def __repr__(self):
        return f"Sweep({self.files.name})"
