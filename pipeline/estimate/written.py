"""What an experiment writes to the store and to its run's folder, stage by stage.  Imports no MindSpore.

Where the weights are here and the photos are known, this is counted item by item; else it follows from configs and from
a list of the photos that are there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, NotRequired, TypedDict

from cache import caption_item
from pipeline.data import variants
from pipeline.devices.precision import BYTES
from pipeline.estimate.listing import Listing
from pipeline.estimate.subject import Subject
from pipeline.plan import pictures, prior
from pipeline.plan.method import Method
from pipeline.plan.needs import CONTROLS, IMAGES, trained_on
from pipeline.plan.pictures import LARGEST_SHOWN, SMALLEST_SHOWN
from pipeline.plan.plan import Plan
from pipeline.plan.whole import is_whole
from pipeline.settings.experiment import Experiment

OVERHEAD = 1.02
"""What the store adds to the rows of an entry: checksums, indices, alignment; small vectors take a little more."""


class Row(TypedDict):
    """What a stage writes.  items, missing: None where that is not known.  estimated: fields that are.

    store_bytes: of what is missing, or of all where nobody knows.  runs_bytes: likewise, to the run's folder.
    """

    items: int | None
    missing: int | None
    item_bytes: int
    store_bytes: int | None
    estimated: list[str]
    runs_bytes: NotRequired[int]


class Counted(NamedTuple):
    """The entries of one recipe."""

    items: int
    missing: int
    item_bytes: int


# --- a plan's, item by item ---------------------------------------------------------------------------------------


def of_plan(plan: Plan) -> dict[str, Row]:
    """What each stage has to make, by name."""
    parts: dict[str, list[Counted]] = {}
    for need in trained_on(plan):
        entries = plan.entries(need.recipe)
        part = Counted(len(need.items), len(entries.missing(need.items)), _entry_bytes(entries.shape, entries.dtype))
        parts.setdefault(need.stage, []).append(part)
    rows = {stage: _sum(several) for stage, several in parts.items()}
    return rows | (_drawn(plan) if pictures.is_asked(plan.experiment, plan.method) else {})


def _sum(parts: list[Counted]) -> Row:
    """Of a stage that makes entries of several sizes; item_bytes: of the mean one."""
    items = sum(part.items for part in parts)
    return {
        "items": items,
        "missing": sum(part.missing for part in parts),
        "store_bytes": sum(_stored_bytes(part.missing, part.item_bytes) for part in parts),
        "item_bytes": sum(part.items * part.item_bytes for part in parts) // max(1, items),
        "estimated": [],
    }


def _drawn(plan: Plan) -> dict[str, Row]:
    """Pictures with what the experiment trains are all missing until that is there."""
    several = pictures.by_now(plan)
    is_known = plan.is_trained  # how many steps it kept the weights of
    items = sum(len(each.pictures) for each in several) if is_known else _num_pictures(plan.experiment)
    files = [plan.run.path / name for each in several for name in pictures.file_names(plan, each)]
    in_store = sum(len(each.pictures) - len(each.missing()) for each in several)
    entries = pictures.base(plan).entries
    return {
        plan.method.stages.draw: _row(items, items - in_store, _entry_bytes(entries.shape, entries.dtype)),
        plan.method.stages.decode: _png_row(plan.experiment, plan.method, items, items - sum(map(is_whole, files))),
    }


# --- from configs and a list of photos ----------------------------------------------------------------------------


def of_listing(subject: Subject, listed: Listing | None) -> dict[str, Row]:
    """As `of_plan`; what is missing is known only where there is no store yet.

    listed: None where the photos are not there; then nothing is known but the bytes of an item.
    """
    is_new = not any(folder.exists() for folder in subject.experiment.stores)
    rows = {
        stage: _row(items, items if is_new else None, _entry_bytes_of(subject, stage))
        for stage, items in _items(subject, listed).items()
    }
    for stage in rows.keys() & {IMAGES, CONTROLS}:
        rows[stage]["estimated"] = ["items", "missing", "store_bytes"]  # equal files are encoded once
        rows[stage]["estimated"] += ["item_bytes"] if subject.experiment.data.buckets else []
    if subject.has_pictures:
        missing = None if subject.experiment.runs.exists() else _num_pictures(subject.experiment)
        items = _num_pictures(subject.experiment)
        rows[subject.method.stages.decode] = _png_row(subject.experiment, subject.method, items, missing)
    return rows


def _items(subject: Subject, listed: Listing | None) -> dict[str, int | None]:
    """How many entries each stage makes."""
    experiment, captions, images, controls = subject.experiment, None, None, None
    if listed:
        prompts = [*prior.prompts(experiment), *experiment.sample.prompts]
        prompts += [""] if experiment.train.caption_dropout else []
        captions = len(listed.captions.union(map(caption_item, prompts)))
        each = len(variants.squares(experiment.data)) * len(variants.of_size(experiment.data, (0, 0)))
        images = len(listed.photos) * each
        controls = len(listed.conditions) * each if subject.method.has_pairs(experiment) else images
        controls += len(experiment.sample.conditions) if subject.has_pictures else 0
    found = {encoder.stage: captions for encoder in subject.family.caption_encoders.values()} | {IMAGES: images}
    found |= {CONTROLS: controls} if subject.method.reads_conditions else {}
    found |= {prior.STAGE: experiment.prior.num_images} if experiment.has_prior else {}
    return found | ({subject.method.stages.draw: _num_pictures(experiment)} if subject.has_pictures else {})


def _entry_bytes_of(subject: Subject, stage: str) -> int:
    """Of one entry; of images at several resolutions, of the mean one."""
    experiment, family = subject.experiment, subject.family
    for kind, encoder in family.caption_encoders.items():
        if stage == encoder.stage:
            shape = family.caption_settings(kind, subject.configs, experiment.data)["shape"]
            return _entry_bytes(shape, subject.policy(encoder.component).storage)
    vae, storage = subject.config(family.image_encoder), subject.policy(family.image_encoder).storage
    if stage == subject.method.stages.draw:
        side = experiment.sample_resolution
        doubled, *size = family.posterior_shape(vae, side, side)
        return _entry_bytes((doubled // 2, *size), "float32")
    if stage == prior.STAGE:
        shapes = [family.posterior_shape(vae, *size) for size in variants.squares(experiment.data)]
        each = [_entry_bytes((doubled // 2, *size), "float32") for doubled, *size in shapes]
        return sum(each) // len(each)
    each = [_entry_bytes(family.posterior_shape(vae, *size), storage) for size in variants.squares(experiment.data)]
    return sum(each) // len(each)


# --- rows ---------------------------------------------------------------------------------------------------------


def _row(items: int | None, missing: int | None, item_bytes: int) -> Row:
    """Of a stage that makes entries of one size."""
    number = items if missing is None else missing
    stored = None if number is None else _stored_bytes(number, item_bytes)
    estimated = ["store_bytes"] if missing is None else []
    return {"items": items, "missing": missing, "item_bytes": item_bytes, "store_bytes": stored, "estimated": estimated}


def _stored_bytes(number: int, item_bytes: int) -> int:
    return math.ceil(number * item_bytes * OVERHEAD)


def _png_row(experiment: Experiment, method: Method, items: int, missing: int | None) -> Row:
    """Of pictures, which go to the run's folder: three bytes a pixel, of which PNG saves a part.

    The conditions, where the method reads some, are written beside them, and one image shows all of them.
    """
    num_conditions = len(experiment.sample.conditions) * method.reads_conditions
    side = experiment.sample_resolution
    pixels, shown_pixels = side**2, max(SMALLEST_SHOWN, min(side, LARGEST_SHOWN)) ** 2
    number = items if missing is None else missing
    beside = num_conditions * pixels + (items + num_conditions) * shown_pixels
    return {
        "items": items,
        "missing": missing,
        "item_bytes": 3 * pixels,
        "store_bytes": 0,
        "runs_bytes": 3 * (number * pixels + beside) if number else 0,
        "estimated": ["item_bytes", "runs_bytes"],
    }


def _num_pictures(experiment: Experiment) -> int:
    """Of a training whose length is in epochs, without those that are drawn while it goes on."""
    while_training = pictures.num_steps(experiment, experiment.train.steps) if not experiment.train.epochs else 0
    return len(experiment.sample.prompts) * (1 + experiment.sample.base + while_training)


def _entry_bytes(shape: Sequence[int], dtype: str) -> int:
    """With the checksum that is stored beside it."""
    return math.prod(shape) * BYTES[dtype] + 4
