"""What an experiment needs from the store, item by item.  Imports no MindSpore."""

from collections.abc import Sequence
from pathlib import Path

from cache import Need, Source, Store
from pipeline.buckets import CENTRE
from pipeline.data import IndexedPhoto
from pipeline.experiment import load_experiment
from pipeline.recipes import CONTROLNET, LORA, ImageNeed, Plan, resolve
from pipeline.variants import Variant


def needed(plan: Plan, photos: Sequence[IndexedPhoto]) -> list[Need]:
    """The items of each recipe, in the order of the stages that encode them."""
    captions = tuple(plan.captions(photos))
    return [
        Need("EncodeCLIP", "text_encoder", plan.pooled.recipe, captions),
        Need("EncodeT5", "text_encoder_2", plan.txt.recipe, captions),
        *(Need("EncodeImages", "vae", each.entries.recipe, _sources(plan, each)) for each in plan.image_needs(photos)),
        *(_control_needs(plan, photos) if plan.trains == CONTROLNET else ()),
    ]


def _control_needs(plan: Plan, photos: Sequence[IndexedPhoto]) -> list[Need]:
    return [
        Need("EncodeControls", "vae", each.entries.recipe, _sources(plan, each, " control"))
        for each in plan.control_needs(photos)
    ]


def needs_of(path: Path | str) -> tuple[Store, list[Need]]:
    """The store of an experiment file and what the experiment needs from it; photos that are new are decoded.

    Conditions are needed where the file has a table [controlnet].
    Raises UserError where the file, the photos or the checkpoint are faulty.
    """
    experiment = load_experiment(path)
    plan = resolve(experiment, CONTROLNET if CONTROLNET in experiment.tables else LORA)
    return plan.store, needed(plan, plan.photos())


def _sources(plan: Plan, need: ImageNeed, words: str = "") -> tuple[Source, ...]:
    """Where each photo is needed in several variants, their tensors get names of their own in an export."""
    several = len(plan.variants(need.photos[0])) > 1  # as many for each photo
    words += f" {_words(need.variant)}" if several else ""
    return tuple(Source(item, photo.name, photo.name + words) for item, photo in zip(need.items, need.photos))


def _words(variant: Variant) -> str:
    crop = "" if variant.crop == CENTRE else f" crop {variant.crop}"
    return f"{variant.width}x{variant.height}{crop}{' flipped' if variant.flip else ''}"
