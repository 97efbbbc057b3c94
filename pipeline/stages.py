"""The table of stages: a row for each, with what comes before it, when it is done, and the function that does it.

`is_done` imports no MindSpore, so that the scheduler can ask; `run` is what a stage's own process calls.  Luigi's tasks
and ``python -m pipeline run`` are made from this table.
"""

import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache import Entries, Need, StoreError, lease
from cache.terminal.places import shown
from pipeline import checks, encode, records
from pipeline.data import survey_file
from pipeline.data.survey_file import SurveyFile
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.estimate import preflight, report
from pipeline.methods import CONTROLNET, LORA, METHODS
from pipeline.plan import needs, pictures, prior
from pipeline.plan.method import Method
from pipeline.plan.plan import Plan, device_and_precision, resolve, shared_by
from pipeline.plan.shard import WHOLE, Shard
from pipeline.plan.survey import Survey
from pipeline.plan.whole import is_whole
from pipeline.process import children, ranks
from pipeline.process.claims import claimed
from pipeline.process.progress import busy, say
from pipeline.report import stage as reporting
from pipeline.sampling import decode, denoise
from pipeline.settings.fields import Experiment
from pipeline.training import measure, train

SLOWEST_DISK = 100e6
"""Bytes a second that a checkpoint is written at, at least, while a stop waits for it."""

COUNTED = ("encoded", "drawn", "decoded", "steps")
"""Keys of a stage's outcome that count the items it made."""

Units = Iterable[tuple[Entries, Sequence[str]]]
"""What a stage makes: items of entries; any of them can be made without the others."""


@dataclass(frozen=True)
class Stage:
    """about: a line for people.  after: the stages, or groups of stages, that have to be done before.

    priority: among stages that could run now, the highest runs first.
    """

    name: str
    about: str
    after: tuple[str, ...]
    priority: int


@dataclass(frozen=True)
class Preparation(Stage):
    """A stage that comes before there is a plan, and may change what is known of photos or model."""

    done: Callable[[Survey], bool]
    work: Callable[[Experiment], None]


@dataclass(frozen=True)
class RoomCheck(Stage):
    """A stage that says what a training will take, and fails where a disk has no room for it."""

    method: Method


@dataclass(frozen=True)
class Work(Stage):
    """A stage of a method's plan.

    done: whether its output is there.  work: makes it, and returns the outcome that the record says.
    place: the folder that the record goes to.  needs: what of the store is kept from the collector while it works.
    addresses: what the record says of input and output.
    again: called instead of ``work`` when somebody runs a finished stage by hand; Luigi never does.
    is_of_pictures: whether the experiment has to ask for pictures.  is_shared: whether several ranks can do the work.
    shard: the part that is made.  of_shard: the same stage for another part; None where it is not divided.
    computes: whether it needs the device; one that does not imports no MindSpore and leaves no record.
    """

    method: Method
    done: Callable[[Plan], bool]
    work: Callable[[Plan], dict]
    place: Callable[[Plan], Path]
    addresses: Callable[[Plan], dict]
    needs: Callable[[Plan], list[Need]] = needs.encoded
    again: Callable[[Plan], None] | None = None
    is_of_pictures: bool = False
    shard: Shard = WHOLE
    of_shard: Callable[[Shard], "Work"] | None = None
    is_shared: bool = False
    computes: bool = True


Row = Preparation | RoomCheck | Work


def comes_after(name: str, experiment: Experiment) -> tuple[str, ...]:
    """The stages, or groups of them, that have to be done before: pictures only where the experiment asks for some."""

    def is_asked(before: str) -> bool:
        stage = STAGES.get(before)  # None for a group
        if not isinstance(stage, Work) or not stage.is_of_pictures:
            return True
        return pictures.is_asked(experiment, stage.method)

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
    device.check_present(plan.device)
    with busy(f"starting MindSpore on {plan.device}"):
        device.use(plan.device, plan.experiment.device)
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


# --- the table ----------------------------------------------------------------------------------------------------


def _encoding(
    name: str,
    about: str,
    priority: int,
    units: Callable[[Plan], Units],
    encode: Callable[[Plan, Shard], dict],
    method: Method = LORA,
    shard: Shard = WHOLE,
) -> Work:
    """A stage that encodes, in shards if asked to; its record lies with the first of its entries."""
    return Work(
        name,
        about,
        (method.stages.room,),
        priority,
        method,
        done=lambda plan: not any(item in shard for entries, items in units(plan) for item in entries.missing(items)),
        work=lambda plan: encode(plan, shard),
        place=lambda plan: next(iter(units(plan)))[0].path,
        addresses=lambda plan: records.of_entries(name, needs.encoded(plan), shard),
        shard=shard,
        of_shard=lambda part: _encoding(name, about, priority, units, encode, method, part),
    )


def _of_images(several: Callable[[Plan], Iterable]) -> Callable[[Plan], Units]:
    return lambda plan: [(need.entries, need.items) for need in several(plan)]


def _room(name: str, about: str, after: tuple[str, ...], method: Method) -> RoomCheck:
    return RoomCheck(name, about, after, 3, method)


def _in_run(name: str, about: str, after: tuple[str, ...], method: Method, **more) -> Work:
    """A stage whose output and record are in the run's folder."""
    return Work(name, about, after, 0, method, place=lambda plan: plan.run.path, **more)


def _training(name: str, about: str, after: tuple[str, ...], method: Method) -> Work:
    return _in_run(
        name,
        about,
        after,
        method,
        done=lambda plan: plan.is_trained,
        work=train.train,
        addresses=records.of_run,
        is_shared=True,
        needs=needs.trained_on,
    )


def _measuring(name: str, about: str, method: Method) -> Work:
    return _in_run(
        name,
        about,
        (method.stages.train,),
        method,
        done=lambda plan: is_whole(plan.run.loss),
        work=measure.measure_to_file,
        addresses=records.of_run,
    )


def _drawing(name: str, about: str, after: tuple[str, ...], method: Method, shard: Shard = WHOLE) -> Work:
    """A stage that draws, in shards if asked to."""
    return _in_run(
        name,
        about,
        after,
        method,
        done=lambda plan: (
            _asks(plan) and not any(item in shard for each in pictures.all_series(plan) for item in each.missing())
        ),
        work=lambda plan: denoise.sample(plan, shard),
        addresses=lambda plan: records.of_entries(name, needs.sampled(plan), shard),
        needs=needs.needed,
        again=needs.note_needs,
        is_of_pictures=True,
        shard=shard,
        of_shard=lambda part: _drawing(name, about, after, method, part),
    )


def _drawing_prior(shard: Shard = WHOLE) -> Work:
    """The stage that draws what trainings are reminded of, in shards if asked to; its record lies with its entries."""

    def place(plan: Plan) -> Path:
        return next((each.entries.path for each in prior.series(plan)), plan.store.path)

    return Work(
        prior.STAGE,
        "The pictures of [prior], drawn by the base model.",
        ("EncodePrompts",),
        0,
        LORA,
        done=lambda plan: (
            not any(item in shard for each in prior.series(plan) for item in each.entries.missing(each.pictures))
        ),
        work=lambda plan: denoise.draw_prior(plan, shard),
        place=place,
        addresses=lambda plan: records.of_entries(prior.STAGE, needs.trained_on(plan), shard),
        needs=needs.trained_on,
        shard=shard,
        of_shard=_drawing_prior,
    )


def _decoding(name: str, about: str, method: Method) -> Work:
    return _in_run(
        name,
        about,
        (method.stages.draw,),
        method,
        done=lambda plan: _asks(plan) and decode.is_done(plan),
        work=decode.decode,
        addresses=records.of_pictures,
        needs=needs.needed,
        is_of_pictures=True,
    )


def _reporting(name: str, about: str, after: tuple[str, ...], method: Method) -> Work:
    return _in_run(
        name,
        about,
        after,
        method,
        done=reporting.is_done,
        work=reporting.write,
        addresses=records.of_run,
        computes=False,
    )


def _asks(plan: Plan) -> bool:
    return pictures.is_asked(plan.experiment, plan.method)


GROUPS = {"EncodePrompts": ("Every caption through both text encoders.", ("EncodeCLIP", "EncodeT5"))}
"""Stages that are asked for together: a line for people, and their names."""

TABLE: list[Row] = [
    Preparation(
        "GetModel",
        "The pretrained model is here, or is downloaded.",
        (),
        0,
        lambda survey: checks.model_is_here(survey.experiment),
        checks.get_model,
    ),
    Preparation(
        "CheckData",
        "Every photo decodes and has a caption.",
        (),
        0,
        lambda survey: (
            (photos := survey.photos(LORA)) is not None and checks.is_data_accepted(survey.experiment, photos)
        ),
        checks.check_data,
    ),
    Preparation(
        "CheckControls",
        "Every photo has a condition of its shape.",
        ("CheckData",),
        3,  # before hours of encoding
        lambda survey: survey.photos(CONTROLNET) is not None and survey.has_sample_conditions,
        lambda experiment: checks.check_controls(experiment, CONTROLNET.has_pairs(experiment)),
    ),
    _room(
        "CheckRoom",
        "The disks have room for a LoRA's training.",
        ("GetModel", "CheckData"),
        LORA,
    ),
    _room(
        "CheckControlNetRoom",
        "The disks have room for a ControlNet's, as it is set.",
        ("GetModel", "CheckControls"),
        CONTROLNET,
    ),
    _encoding(
        "EncodeCLIP",
        "CLIP's pooled output of every caption.",
        2,
        lambda plan: [(plan.pooled, plan.captions.items)],
        lambda plan, shard: encode.encode_captions(plan, "pooled", shard),
    ),
    _encoding(
        "EncodeT5",
        "T5's output sequence of every caption.",
        1,
        lambda plan: [(plan.txt, plan.captions.items)],
        lambda plan, shard: encode.encode_captions(plan, "txt", shard),
    ),
    _encoding(
        "EncodeImages",
        "The VAE's posterior of every image.",
        0,
        _of_images(lambda plan: plan.image_needs),
        encode.encode_images,
    ),
    _encoding(
        "EncodeControls",
        "The VAE's posterior of every photo's condition.",
        3,
        _of_images(needs.controls),
        encode.encode_controls,
        CONTROLNET,
    ),
    _drawing_prior(),
    _training(
        "TrainLoRA", "A LoRA trained on the cached tensors.", ("EncodePrompts", "EncodeImages", "DrawPrior"), LORA
    ),
    _training(
        "TrainControlNet",
        "A ControlNet trained on the cached tensors.",
        ("EncodePrompts", "EncodeImages", "EncodeControls", "DrawPrior"),
        CONTROLNET,
    ),
    _measuring(
        "MeasureLoss",
        "The loss on the photos, without and with the LoRA.",
        LORA,
    ),
    _measuring("MeasureControlNet", "The same, without and with the ControlNet.", CONTROLNET),
    _drawing(
        "SampleLatents",
        "The prompts' latents, drawn without and with the LoRA.",
        ("EncodePrompts", "TrainLoRA"),
        LORA,
    ),
    _drawing(
        "SampleControlNetLatents",
        "The same, without and with the ControlNet.",
        ("EncodePrompts", "EncodeControls", "TrainControlNet"),
        CONTROLNET,
    ),
    _decoding("Sample", "The prompts' pictures, also side by side in one image.", LORA),
    _decoding("SampleControlNet", "The same, with the conditions beside the pictures.", CONTROLNET),
    _reporting("Report", "One HTML page: pictures, curves, photos, settings.", ("TrainLoRA", "Sample"), LORA),
    _reporting("ReportControlNet", "The same of a ControlNet.", ("TrainControlNet", "SampleControlNet"), CONTROLNET),
]


def _rows_of(method: Method) -> list[Row]:
    """The stages of a method that another package brings."""
    names, label = method.stages, method.label
    encoded = ("EncodePrompts", "EncodeImages")
    return [
        _room(names.room, f"As CheckRoom, for the training of a {label}.", ("GetModel", "CheckData"), method),
        _training(names.train, f"A {label} trained on the cached tensors.", (names.room, *encoded), method),
        _measuring(names.measure, f"As MeasureLoss, of the {label}.", method),
        _drawing(names.draw, f"As SampleLatents, with the run's {label}.", (*encoded, names.train), method),
        _decoding(names.decode, f"As Sample, with the run's {label}.", method),
        _reporting(names.report, "As Report.", (names.train, names.decode), method),
    ]


for _method in METHODS.values():
    if _method.stages.train not in [stage.name for stage in TABLE]:
        TABLE += _rows_of(_method)

STAGES: dict[str, Row] = {stage.name: stage for stage in TABLE}


def described(with_groups: bool) -> str:
    """A line for each stage, and for each group of stages if asked for, as ``--help`` shows them."""
    abouts = {stage.name: stage.about for stage in TABLE}
    abouts |= {name: about for name, (about, _) in GROUPS.items() if with_groups}
    indent = " " * 26
    return "\n".join(
        textwrap.fill(f"  {name:<23} {about}", 80, subsequent_indent=indent) for name, about in abouts.items()
    )
