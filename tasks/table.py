"""The Luigi tasks, one for each row of `pipeline.stage_table`.

Each task starts its stage as a process of its own, and is complete when the stage's output is there.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterable

import luigi

from cache.terminal.arguments import fail
from pipeline import stage_table, stages
from pipeline.data.survey_file import SurveyFile
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.plan import pictures
from pipeline.plan.method import Method
from pipeline.plan.plan import device_and_precision
from pipeline.plan.shard import WHOLE, Shard
from pipeline.plan.survey import Survey
from pipeline.process import children
from pipeline.settings.experiment import Experiment
from pipeline.settings.reading import load_experiment
from pipeline.sweep import shared
from tasks import endings, manners, scheduler, templates
from tasks.manners import ONLY_ONCE
from tasks.process import StageFailed, tied_to_luigi

manners.apply()
endings.tell(lambda path: survey_anew(path))
manners.describe(stage_table.described(with_groups=True))


class ExperimentParameter(luigi.Parameter):
    """The path of an experiment file; what is wrong with it is said before anything is scheduled.

    asks_pictures_of: a method of whose result the file has to ask for pictures.
    """

    def __init__(self, asks_pictures_of: Method | None = None):
        about = (
            "TOML file with prompts in [sample]" if asks_pictures_of else "TOML file; without it, the embedded default"
        )
        super().__init__(default="", description=about)
        self.method = asks_pictures_of

    def parse(self, text: str) -> str:
        try:
            experiment = load_experiment(text)
            chosen, _ = device_and_precision(experiment)
            device.check_present(chosen)
            if self.method:
                pictures.check(experiment, self.method)
        except UserError as error:
            where = "" if str(error).startswith(text) else f"{text or 'the embedded experiment'}: "
            fail(where + str(error))
        return self.normalize(text)

    def normalize(self, text: str) -> str:
        return os.path.abspath(os.path.expanduser(text)) if text else ""


class OfExperiment:
    """What every task here is told, and what it comes after."""

    experiment = ExperimentParameter()
    after: tuple[str, ...] = ()
    task_family: str  # Luigi's

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        scheduler.choose(self.task_family)  # Luigi makes the command's task, then looks where its scheduler is

    def requires(self):
        return [task_of(name, self.experiment) for name in self.after]

    def __repr__(self):
        """What people read of it in Luigi's lines: the experiment's name instead of its path."""
        return f"{self.task_family}({', '.join(self.words())})"

    def words(self) -> list[str]:
        """What tells this task from others of its family."""
        return [load_experiment(self.experiment).name]


class StageTask(OfExperiment, luigi.Task):
    """A task whose work is a stage."""

    resources = {"device": 1}
    stage: str

    def requires(self):
        names = stages.comes_after(self.stage, load_experiment(self.experiment))
        return [task_of(name, self.experiment) for name in names]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._has_said_why = multiprocessing.RawValue("b")  # Luigi may run the task in a process of its own

    @property
    def retry_count(self) -> int | None:
        """As the scheduler has it for a stage that was killed; what a stage has said itself no second try mends."""
        return ONLY_ONCE if self._has_said_why.value else None

    @property
    def part(self) -> Shard:
        """What of the stage is this task's work."""
        return WHOLE

    def complete(self):
        return stages.is_done(self.stage, survey(self.experiment), self.part)

    def is_finished(self) -> bool:
        """Whether its stage has nothing to do, asked when its turn comes.

        Luigi asks what is complete before the first task runs; without a memory of file digests nothing is, until
        CheckData has run.
        """
        return self.complete()

    def run(self):
        if self.is_finished():
            logging.getLogger("luigi-interface").info("its output is there already: %s", self)
            return
        stage, part, begun_with = self.stage, self.part, load_experiment(self.experiment)
        photos = stages.survey_for(stage, survey(self.experiment))
        arguments = ["--experiment", self.experiment] if self.experiment else []
        arguments += ["--shard", str(part)] if part != WHOLE else []
        arguments += ["--survey", photos.path] if photos else []
        with tied_to_luigi():
            seconds = stages.grace_seconds(stage, survey(self.experiment))  # before: what fails here leaves no process
            child = self._started(["run", stage, *arguments], [photos.fileno()] if photos else [])
            code = children.waited_for(child, grace_seconds=seconds)
        if code:
            self._has_said_why.value = code > 0
            raise StageFailed.with_code(part.words(stage), code)
        if isinstance(stage_table.STAGES[stage], stage_table.Preparation):  # it may have learnt of photos or model
            look_again()  # those of experiments that share this task too
        self._check_output(part.words(stage), begun_with)

    def _check_output(self, words: str, begun_with: Experiment) -> None:
        """Raise StageFailed where what its stage has made is not what the experiment file asks for now."""
        done = f"{words} is done as {self.experiment} was when it began"
        try:
            is_other = load_experiment(self.experiment) != begun_with
        except UserError as error:
            raise StageFailed(f"{done}; now {error}") from None
        if self.complete():
            return
        if is_other:
            raise StageFailed(f"{done}; the file has changed since, and the same command does what it says now")
        raise StageFailed(f"{words} ended without an error, but its output is missing or incomplete")

    def _started(self, arguments: list[str], files: list[int]) -> children.Child:
        """The stage's process; on CPU a fork of the template, which begins to import while a first stage needs none."""
        template = templates.of(load_experiment(self.experiment))
        computes = isinstance(found := stage_table.STAGES[self.stage], stage_table.Work) and found.computes
        return (template and computes and template.start(arguments, files)) or children.start(arguments, files=files)


class RoomTask(StageTask):
    """Runs its stage before a training even where there is room, so that people see the table."""

    def is_finished(self):
        stage = stage_table.STAGES[self.stage]
        assert isinstance(stage, stage_table.RoomCheck)
        return self.complete() and stages.is_done(stage.method.stages.train, survey(self.experiment))


class EncodingTask(StageTask):
    """As the experiment's [parallel] says, behind its shards, or a whole stage.

    Behind its shards it finds everything done, but for what has come or been lost in the meantime.
    """

    def requires(self):
        count = load_experiment(self.experiment).parallel.encoders
        shards = Shard.all_of(count) if count > 1 else []
        return [SHARDS[self.stage](self.experiment, str(shard)) for shard in shards] or super().requires()


class ShardParameter(luigi.Parameter):
    """A shard, I/N."""

    def parse(self, text: str) -> str:
        try:
            return str(Shard.parse(text))
        except UserError as error:
            fail(f"shard: {error}")


class ShardTask(StageTask):
    """A shard of a stage that encodes."""

    shard = ShardParameter(description="I/N: part I of N, counted from 0")

    @property
    def part(self):
        return Shard.parse(self.shard)

    def words(self):
        return [*super().words(), self.shard]


_surveys: dict[str, Survey] = {}
_twins: dict[str, str] = {}
"""Of the experiments of a sweep, by their paths: the first that needs the same encodings."""


def share(paths: Iterable[str]) -> None:
    """Have each task before the trainings be one for all those experiments that need the same of it."""
    first: dict[str, str] = {}
    for path in paths:
        _twins[path] = first.setdefault(shared.key(load_experiment(path)), path)


def task_of(name: str, path: str) -> luigi.Task:
    """A task of an experiment; one before the training may be that of another with the same needs."""
    return TASKS[name](_twins.get(path, path) if name in stage_table.BEFORE_TRAINING else path)


def survey(path: str) -> Survey:
    """The survey of an experiment file as it now is, made once and kept, and handed on to the stages' processes."""
    experiment, known = load_experiment(path), _surveys.get(path)
    if known is None or known.experiment != experiment:
        twin = _twins.get(path, path)  # its photos are the same ones
        files = survey(twin).files if twin != path else {is_paired: SurveyFile() for is_paired in (False, True)}
        known = _surveys[path] = Survey(experiment, files)
    return known


def look_again(*paths: str) -> None:
    """Have surveys find what was not known before."""
    for path in paths or list(_surveys):
        _surveys[path] = _surveys[path].anew()


def survey_anew(path: str) -> Survey:
    """The survey of an experiment file, with all that is known by now."""
    survey(path)
    look_again(path)
    return survey(path)


def forget() -> None:
    """Have all be looked at anew: photos may have come or gone."""
    _surveys.clear()


def is_complete(name: str, experiment: str) -> bool:
    """Whether all of a task is there, looked at anew."""
    forget()
    return TASKS[name](experiment).complete()


os.register_at_fork(after_in_child=look_again)  # one of several workers: another one may have learnt something


def _task(stage: stage_table.Stage) -> type[luigi.Task]:
    members = _members_of(stage)
    if isinstance(stage, stage_table.Work) and stage.is_of_pictures:
        members["experiment"] = ExperimentParameter(asks_pictures_of=stage.method)
    return type(stage.name, (_kind(stage),), members)


def _kind(stage: stage_table.Stage) -> type[StageTask]:
    if isinstance(stage, stage_table.RoomCheck):
        return RoomTask
    return EncodingTask if stages.is_divisible(stage.name) else StageTask


def _members_of(stage: stage_table.Stage) -> dict:
    about = {"__doc__": stage.about, "__module__": __name__, "stage": stage.name}
    return about | {"after": stage.after, "priority": stage.priority}


def _shard_task(stage: stage_table.Stage) -> type[luigi.Task]:
    return type(f"{stage.name}Shard", (ShardTask,), _members_of(stage) | {"__doc__": f"A shard of {stage.name}."})


TASKS: dict[str, type[luigi.Task]] = {stage.name: _task(stage) for stage in stage_table.TABLE}
SHARDS = {stage.name: _shard_task(stage) for stage in stage_table.TABLE if stages.is_divisible(stage.name)}
"""The tasks of the shards, by the stage that they are of."""

for _name, (_about, _after) in stage_table.GROUPS.items():
    _members = {"__doc__": _about, "__module__": __name__, "after": _after}
    TASKS[_name] = type(_name, (OfExperiment, luigi.WrapperTask), _members)
globals().update(TASKS, **{each.__name__: each for each in SHARDS.values()})
