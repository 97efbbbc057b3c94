"""What an experiment needs from the store, item by item.  Imports no MindSpore."""

from collections.abc import Sequence
from pathlib import Path

from cache import Need, Source, Store
from pipeline.buckets import CENTRE
from pipeline.data import IndexedPhoto
from pipeline.experiment import load_experiment
from pipeline.recipes import ImageNeed, Plan, resolve
from pipeline.variants import Variant


def needed(plan: Plan, photos: Sequence[IndexedPhoto]) -> list[Need]:
    """The items of each recipe, in the order of the stages that encode them."""
    captions = tuple(plan.captions(photos))
    return [
        Need("EncodeCLIP", "text_encoder", plan.pooled.recipe, captions),
        Need("EncodeT5", "text_encoder_2", plan.txt.recipe, captions),
        *(Need("EncodeImages", "vae", each.entries.recipe, _sources(plan, each)) for each in plan.image_needs(photos)),
    ]


def needs_of(path: Path | str) -> tuple[Store, list[Need]]:
    """The store of an experiment file and what the experiment needs from it; photos that are new are decoded.

    Raises UserError where the file, the photos or the checkpoint are faulty.
    """
    plan = resolve(load_experiment(path))
    return plan.store, needed(plan, plan.photos())


def _sources(plan: Plan, need: ImageNeed) -> tuple[Source, ...]:
    """Where each photo is needed in several variants, their tensors get names of their own in an export."""
    several = len(plan.variants(need.photos[0])) > 1  # as many for each photo
    words = f" {_words(need.variant)}" if several else ""
    return tuple(Source(photo.digest, photo.name, photo.name + words) for photo in need.photos)


def _words(variant: Variant) -> str:
    crop = "" if variant.crop == CENTRE else f" crop {variant.crop}"
    return f"{variant.width}x{variant.height}{crop}{' flipped' if variant.flip else ''}"
