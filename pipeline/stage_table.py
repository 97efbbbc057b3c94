"""The table of stages: a row for each, with what comes before it, when it is done, and the function that does it.

Luigi's tasks and ``python -m pipeline run`` are made from this table; `pipeline.stages` asks and runs it.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache import Entries, Need
from pipeline import checks, encode, records
from pipeline.methods import CONTROLNET, LORA, METHODS
from pipeline.plan import needs, pictures, prior
from pipeline.plan.method import Method
from pipeline.plan.plan import Plan
from pipeline.plan.shard import WHOLE, Shard
from pipeline.plan.survey import Survey
from pipeline.plan.whole import is_whole
from pipeline.report import stage as reporting
from pipeline.sampling import decode, denoise
from pipeline.settings.experiment import Experiment
from pipeline.training import measure, train

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
    is_of_pictures: whether the experiment has to ask for pictures.  is_asked: whether an experiment asks for what it
    makes; others wait for it only then.  is_shared: whether several ranks can do the work.
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
    is_asked: Callable[[Experiment], bool] = lambda experiment: True
    shard: Shard = WHOLE
    of_shard: Callable[[Shard], "Work"] | None = None
    is_shared: bool = False
    computes: bool = True


Row = Preparation | RoomCheck | Work


# --- rows -------------------------------------------------------------------------------------------------------------


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
        is_asked=lambda experiment: pictures.is_asked(experiment, method),
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
        is_asked=lambda experiment: experiment.has_prior,
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
        is_asked=lambda experiment: pictures.is_asked(experiment, method),
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
    trained_on = (names.room, *encoded, prior.STAGE)
    return [
        _room(names.room, f"As CheckRoom, for the training of a {label}.", ("GetModel", "CheckData"), method),
        _training(names.train, f"A {label} trained on the cached tensors.", trained_on, method),
        _measuring(names.measure, f"As MeasureLoss, of the {label}.", method),
        _drawing(names.draw, f"As SampleLatents, with the run's {label}.", (*encoded, names.train), method),
        _decoding(names.decode, f"As Sample, with the run's {label}.", method),
        _reporting(names.report, "As Report.", (names.train, names.decode), method),
    ]


for _method in METHODS.values():
    if _method.stages.train not in [stage.name for stage in TABLE]:
        TABLE += _rows_of(_method)

STAGES: dict[str, Row] = {stage.name: stage for stage in TABLE}


def _all_before(name: str) -> set[str]:
    """The stages and groups that come before one, however far."""
    after = GROUPS[name][1] if name in GROUPS else STAGES[name].after
    return set(after).union(*map(_all_before, after))


BEFORE_TRAINING = frozenset().union(*(_all_before(method.stages.train) for method in METHODS.values()))
"""Stages and groups that read nothing of what a method or [train] says, but for what `sweep.shared` names."""


def described(with_groups: bool) -> str:
    """A line for each stage, and for each group of stages if asked for, as ``--help`` shows them."""
    abouts = {stage.name: stage.about for stage in TABLE}
    abouts |= {name: about for name, (about, _) in GROUPS.items() if with_groups}
    indent = " " * 26
    return "\n".join(
        textwrap.fill(f"  {name:<23} {about}", 80, subsequent_indent=indent) for name, about in abouts.items()
    )
