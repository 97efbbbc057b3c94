"""Whether stages are done, and running one: for what `pipeline.stage_table` has.

`is_done` imports no MindSpore, so that the scheduler can ask; `run` is what a stage's own process calls.
"""

import time
from dataclasses import replace
from pathlib import Path

from cache import StoreError, lease
from cache.terminal.places import shown
from pipeline import checks, records
from pipeline.data import survey_file
from pipeline.data.survey_file import SurveyFile
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.estimate import preflight, report
from pipeline.plan import needs
from pipeline.plan.method import Method
from pipeline.plan.plan import Plan, device_and_precision, resolve, shared_by
from pipeline.plan.shard import WHOLE, Shard
from pipeline.plan.survey import Survey
from pipeline.process import children, ranks
from pipeline.process.claims import claimed
from pipeline.process.progress import busy, say
from pipeline.sampling import decode
from pipeline.settings.experiment import Experiment
from pipeline.stage_table import STAGES, Preparation, RoomCheck, Row, Work

SLOWEST_DISK = 100e6
"""Bytes a second that a checkpoint is written at, at least, while a stop waits for it."""

COUNTED = ("encoded", "drawn", "decoded", "steps")
"""Keys of a stage's outcome that count the items it made."""


def comes_after(name: str, experiment: Experiment) -> tuple[str, ...]:
    """The stages, or groups of them, that have to be done before; those alone that the experiment asks for."""

    def is_asked(before: str) -> bool:
        stage = STAGES.get(before)  # None for a group
        return not isinstance(stage, Work) or stage.is_asked(experiment)

    return tuple(filter(is_asked, STAGES[name].after))


def is_divisible(name: str) -> bool:
    """Whether several processes can share the stage, each with a shard of it."""
    stage = STAGES[name]
    return isinstance(stage, Work) and stage.of_shard is not None


def _part(name: str, shard: Shard) -> Row:
    """The stage, or a shard of it.  Raises UserError where it is not divided."""
    stage = STAGES[name]
    if shard == WHOLE:
        return stage
    if isinstance(stage, Work) and stage.of_shard:
        return stage.of_shard(shard)
    divided = ", ".join(filter(is_divisible, STAGES))
    raise UserError(f"shard: {name} is not divided into shards, as these are: {divided}; leave --shard out")


def is_done(name: str, survey: Survey, shard: Shard = WHOLE) -> bool:
    """Whether the output of the stage, or of a shard of it, is there for the experiment and its files as surveyed."""
    stage = _part(name, shard)
    try:
        if isinstance(stage, Preparation):
            return stage.done(survey)
        if survey.photos(stage.method) is None or not checks.model_is_here(survey.experiment):
            return False
        plan = survey.plan(stage.method)
        if isinstance(stage, RoomCheck):
            preflight.check_room(plan)
            checks.check_captions(plan)
            return True
        return stage.done(plan)
    except (UserError, StoreError, OSError):  # whatever it is, the stage's own process meets it too, and says it
        return False


def grace_seconds(name: str, survey: Survey) -> float:
    """How long the stage's process may take to end when it is asked to: a training writes a checkpoint first."""
    stage = STAGES[name]
    if not isinstance(stage, Work) or name != stage.method.stages.train:
        return children.GRACE_SECONDS
    return children.GRACE_SECONDS + preflight.checkpoint_bytes(survey.plan(stage.method)) / SLOWEST_DISK


def survey_for(name: str, survey: Survey) -> SurveyFile | None:
    """What the stage's process is given, so that it need not look at the photos; None where it has to."""
    stage = STAGES[name]
    if isinstance(stage, Preparation) or survey.photos(stage.method) is None:
        return None
    file = survey.file(stage.method)
    return file if file and file.is_whole else None


def run(name: str, experiment: Experiment, survey: str = "", shard: Shard = WHOLE) -> None:
    """Do the work of a stage in this process, and leave its record.  Raises UserError, StoreError or Stopped.

    survey: the path of a file from which photos are taken instead of looking at them.
    """
    stage, began = _part(name, shard), time.time()
    if isinstance(stage, Preparation):
        stage.work(experiment)
        return
    of = survey_file.subject(experiment, stage.method.has_pairs(experiment))
    plan = resolve(experiment, stage.method, survey_file.read(survey, of) if survey else None)
    if experiment.device.target == "auto" and (warning := device.fallback()):
        say(warning, to_stderr=True)
    if isinstance(stage, RoomCheck):
        say(*report.parts(preflight.of_plan(plan)))
        preflight.check_room(plan)
        checks.check_captions(plan)
        checks.say_cut_captions(plan)
        return
    if _says_done(stage, plan):
        return
    if stage.shard == WHOLE:
        _work(stage, plan, began)
        return
    # Luigi starts a shard twice where it takes a paused worker for dead, and where its central scheduler was killed and
    # has forgotten what runs.  To encode it twice would do no harm, and be a waste.
    record = records.path_of(name, stage.place(plan), shard)
    with claimed(record.with_suffix(".lock"), shard.words(name)):
        if not _says_done(stage, plan):
            _work(stage, plan, began)


def show_by_now(experiment: Experiment, method: Method, folder: Path | None = None) -> None:
    """Decode in this process what a run has drawn by now, while its training may go on.

    folder: of the run that is meant.  Raises UserError where the experiment and its files are another run's by now.
    """
    if folder:  # it may have been moved
        experiment = replace(experiment, paths=replace(experiment.paths, runs=str(folder.resolve().parent)))
    plan = resolve(experiment, method)
    if folder and plan.run.path.name != folder.resolve().name:
        raise UserError(
            f"{shown(folder)}: its photos, captions or model have changed since; as they are now, they are those of "
            f"{shown(plan.run.path)}"
        )
    _use_device(plan)
    with lease(plan.store.path, needs.sampled(plan)):
        decode.decode_by_now(plan)


def _use_device(plan: Plan) -> None:
    device.check_present(plan.device)
    with busy(f"starting MindSpore on {plan.device}"):
        device.use(plan.device, plan.experiment.device)


def _says_done(stage: Work, plan: Plan) -> bool:
    """Whether the stage has nothing to do, which is then said."""
    if not stage.done(plan):
        return False
    say(f"{stage.shard.words(stage.name)}: done already, in {shown(stage.place(plan))}")
    if stage.again:
        stage.again(plan)
    return True


def _work(stage: Work, plan: Plan, began: float) -> None:
    if not stage.computes:
        stage.work(plan)
        return
    _use_device(plan)
    with lease(plan.store.path, stage.needs(plan)):
        outcome = stage.work(plan)
    folder = stage.place(plan)
    if not ranks.place().is_first:
        return
    if 0 in map(outcome.get, COUNTED) and records.path_of(stage.name, folder, stage.shard).is_file():
        return  # the record of when there was something to do stays
    records.write(stage.name, plan, stage.addresses(plan), folder, time.time() - began, outcome, stage.shard)


def num_ranks(name: str, experiment: Experiment) -> int:
    """How many processes do the work of a stage together.  Raises UserError where they cannot."""
    stage = STAGES[name]
    if not isinstance(stage, Work) or not stage.is_shared:
        return 1
    target, _ = device_and_precision(experiment)
    return shared_by(experiment, target)
