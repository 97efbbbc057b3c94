"""What an experiment will take, before any weight is read: parameters, bytes, what is cached, room on the disks.

From configs, the store's indices and the list of photos alone; imports no MindSpore.  `report` says it to people.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from cache.terminal.words import human_bytes
from pipeline.data import variants
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.estimate import estimates, listing, written
from pipeline.estimate.estimates import Epoch, Estimate, TrainingEstimate
from pipeline.estimate.listing import Listing
from pipeline.estimate.model import Model, model_of
from pipeline.estimate.subject import Subject
from pipeline.flux import pretrained
from pipeline.plan import mode
from pipeline.plan.families import family_of
from pipeline.plan.method import Method
from pipeline.plan.plan import Plan, device_and_precision, resolve
from pipeline.settings.experiment import Experiment
from pipeline.settings.questions import questions


class PlannedModel(TypedDict):
    """download_bytes: 0 where nothing is to be downloaded."""

    name: str
    configs: str
    is_here: bool
    weights_bytes: int
    download_bytes: int


class PlannedStage(Estimate):
    """What a stage takes, and what it writes: see `written.Row`."""

    items: int | None
    missing: int | None
    item_bytes: int
    store_bytes: int | None
    runs_bytes: NotRequired[int]


class PlannedTraining(TrainingEstimate):
    """trains: the method.  stage: that trains.  is_done, run_folder: where weights and photos are here.

    first_step: what compiles then, and for how long; "" where steps are not compiled.
    """

    trains: str
    stage: str
    label: str
    first_step: str
    is_done: NotRequired[bool]
    run_folder: NotRequired[str]


class Disk(TypedDict):
    """A file system, and the folders on it that will be written to.  is_complete: whether ``needed_bytes`` is all."""

    folders: list[str]
    needed_bytes: int
    is_complete: bool
    estimated: list[str]
    free_bytes: int
    fits: bool


class PlanEstimate(TypedDict):
    """All that is known of what an experiment will take.

    devices_here: None on a CPU.  ranks_host_bytes: see `estimates.host_of_ranks`.
    """

    device: str
    devices_used: int
    devices_here: int | None
    preset: str
    model: PlannedModel
    notes: list[str]
    stages: dict[str, PlannedStage]
    training: PlannedTraining
    ranks_host_bytes: int | None
    disks: list[Disk]


def of_experiment(experiment: Experiment, method: Method, model_config: str = "") -> PlanEstimate:
    """As much as can be said in seconds; "notes" say what is not known yet, and which stage finds it out.

    model_config: as of `model_of`.  Raises UserError where there is nothing to plan with.
    """
    device_and_precision(experiment)  # what is wrong there is said before anything is looked for
    model, listed = model_of(experiment, model_config), listing.listing(experiment)
    plan = resolve(experiment, method) if model.is_here else None
    known = listing.with_photos(plan, listed) if plan and listed and plan.are_weights_known else None
    return of_plan(known) if known else of_configs(model, experiment, method, listed)


def checkpoint_bytes(plan: Plan) -> int:
    """Of one checkpoint of the plan's training."""
    return estimates.checkpoint_bytes(Subject.of_plan(plan))


def of_plan(plan: Plan) -> PlanEstimate:
    """What each stage of an experiment has, lacks and takes, all of it counted that can be."""
    subject = Subject.of_plan(plan)
    epoch = Epoch(len(plan.examples), frozenset(plan.examples.sizes))
    training = _training(subject, epoch)  # first: it says where no ControlNet can be made
    training |= {"is_done": plan.is_trained, "run_folder": str(plan.run.path)}
    kept_bytes = training["result_bytes"] * len(plan.run.list_steps(plan.method.result_files))
    training["kept_steps_bytes"] = max(0, training["kept_steps_bytes"] - kept_bytes)
    there_bytes = sum(path.stat().st_size for path in plan.run.list_checkpoints())
    return _found(subject, model_of(plan.experiment), training, written.of_plan(plan), there_bytes)


def of_configs(model: Model, experiment: Experiment, method: Method, listed: Listing | None) -> PlanEstimate:
    """As `of_plan`, where weights or photos are not here, or have not been looked into."""
    target, _ = device_and_precision(experiment)
    subject = Subject(model.configs, experiment, target, method, family_of(model.configs), model.is_here)
    squares = variants.squares(experiment.data)
    num_photos = len(listed.photos) if listed else 1
    epoch = Epoch(num_photos * experiment.data.repeats * len(squares), frozenset(squares))
    training = _training(subject, epoch)
    training["estimated"] += ["num_shapes"] if experiment.data.buckets else []
    found = _found(subject, model, training, written.of_listing(subject, listed))
    return found | {"notes": found["notes"] + _notes(experiment, method, listed, found["stages"])}


def _notes(
    experiment: Experiment, method: Method, listed: Listing | None, stages: dict[str, PlannedStage]
) -> list[str]:
    """What is not known before GetModel and CheckData have looked into weights and photos."""
    if listed is None:
        then = "check [data] images" if experiment.data.images else "CheckData draws what is in it"
        return [f"{experiment.images}: no such folder yet, so that captions and images are not counted; {then}"]
    notes = [f"{listed.folder}: {len(listed.photos):,} photos, listed, not decoded"]
    notes += [f"{len(listed.problems):,} more cannot be used; CheckData says why"] if listed.problems else []
    if method.has_pairs(experiment) and (alone := sum(photo.conditioning is None for photo in listed.photos)):
        notes.append(f"{alone:,} of them have no condition; CheckControls says which")
    if experiment.data.buckets:
        notes.append("which buckets the photos need is not known; the plan is for squares")
    if any(row["missing"] is None for row in stages.values()):
        notes.append("what is there already is known after GetModel and CheckData; all of it is counted as missing")
    return notes


def _training(subject: Subject, epoch: Epoch) -> PlannedTraining:
    method, estimate = subject.method, estimates.training(subject, epoch)
    first_step = mode.compiling(subject.target, estimates.num_blocks(subject)) if estimate["mode"] == "jit" else ""
    return {
        "trains": method.name,
        "stage": method.stages.train,
        "label": method.label,
        "first_step": first_step,
        **estimate,
    }


def _found(
    subject: Subject, model: Model, training: PlannedTraining, rows: dict[str, written.Row], there_bytes: int = 0
) -> PlanEstimate:
    """rows: what each stage writes.  there_bytes: of the training's checkpoints."""
    stages: dict[str, PlannedStage] = {}
    for name, row in rows.items():
        taken = estimates.stage(subject, name)
        stages[name] = {**taken, **row, "estimated": taken["estimated"] + row["estimated"]}
    size = sum(subject.file_bytes(component) for component in pretrained.WEIGHTS)
    download_bytes = size if model.is_to_be_fetched else 0  # configs and tokenizers are a few megabytes
    return {
        "device": subject.target,
        "devices_used": subject.num_ranks,
        "devices_here": device.num_npus() if subject.target == "Ascend" else None,
        "preset": subject.policies.label,
        "model": {
            "name": model.name,
            "configs": str(model.configs),
            "is_here": model.is_here,
            "weights_bytes": size,
            "download_bytes": download_bytes,
        },
        "notes": [*([model.why] if model.why else []), *questions(subject.experiment, subject.method.name)],
        "stages": stages,
        "training": training,
        "ranks_host_bytes": estimates.host_of_ranks(subject, training),
        "disks": _disks([*_written(subject.experiment, stages, training, there_bytes), *_downloaded(download_bytes)]),
    }


# --- room on the disks --------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """What will be written to a folder.  is_complete: whether that is all; else it is what is known of it."""

    folder: Path
    num_bytes: int
    is_estimated: bool
    is_complete: bool = True


def _written(
    experiment: Experiment, stages: dict[str, PlannedStage], training: PlannedTraining, there_bytes: int
) -> list[Written]:
    """To the store, and to the runs."""
    stored = [row["store_bytes"] for row in stages.values()]
    in_runs = sum(row.get("runs_bytes", 0) for row in stages.values())
    if not training.get("is_done"):
        in_runs += max(0, training["checkpoints_bytes"] - there_bytes)
        in_runs += training["result_bytes"] + training["kept_steps_bytes"]
    guessed = {key for row in stages.values() for key in row["estimated"] if row.get(key)}
    return [
        Written(experiment.stores[0], sum(filter(None, stored)), "store_bytes" in guessed, None not in stored),
        Written(experiment.runs, in_runs, "runs_bytes" in guessed),
    ]


def _downloaded(num_bytes: int) -> list[Written]:
    return [Written(pretrained.hub_folder(), num_bytes, True)] if num_bytes else []


def _disks(several: Iterable[Written]) -> list[Disk]:
    """By file system: what will be written to it, and what is free there."""
    disks: dict[int, Disk] = {}
    for written_to in several:
        existing = next(each for each in (written_to.folder, *written_to.folder.parents) if each.exists())
        disk = disks.setdefault(os.stat(existing).st_dev, _empty_disk())
        disk["folders"].append(str(written_to.folder))
        disk["needed_bytes"] += written_to.num_bytes
        disk["is_complete"] &= written_to.is_complete
        disk["estimated"] = ["needed_bytes"] if disk["estimated"] or written_to.is_estimated else []
        disk["free_bytes"] = shutil.disk_usage(existing).free
        disk["fits"] = disk["needed_bytes"] <= disk["free_bytes"]
    return list(disks.values())


def _empty_disk() -> Disk:
    return {"folders": [], "needed_bytes": 0, "is_complete": True, "estimated": [], "free_bytes": 0, "fits": True}


def check_room(plan: Plan) -> None:
    """Raise UserError where a disk has no room for what the experiment will write to it."""
    for disk in of_plan(plan)["disks"]:
        if not disk["fits"]:
            raise UserError(
                f"{' and '.join(disk['folders'])}: {human_bytes(disk['needed_bytes'])} will be written there, "
                f"{human_bytes(disk['free_bytes'])} are free; make room, or change [paths]"
            )
