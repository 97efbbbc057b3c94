"""What an experiment needs from the store, item by item.  Imports no MindSpore."""

from collections.abc import Iterable
from pathlib import Path

from cache import Need, Source, Store, caption_item
from pipeline.data import IndexedPhoto
from pipeline.experiment import load_experiment
from pipeline.recipes import Plan, resolve


def needed(plan: Plan, photos: Iterable[IndexedPhoto]) -> list[Need]:
    """The items of each recipe, in the order of the stages that encode them."""
    photos = list(photos)
    captions = _each_once(Source(caption_item(photo.caption), photo.name, photo.caption) for photo in photos)
    images = _each_once(Source(photo.digest, photo.name, photo.name) for photo in photos)
    return [
        Need("EncodeCLIP", "text_encoder", plan.pooled.recipe, captions),
        Need("EncodeT5", "text_encoder_2", plan.txt.recipe, captions),
        Need("EncodeImages", "vae", plan.latents.recipe, images),
    ]


def needs_of(path: Path | str) -> tuple[Store, list[Need]]:
    """The store of an experiment file and what the experiment needs from it; photos that are new are decoded.

    Raises UserError where the file, the photos or the checkpoint are faulty.
    """
    plan = resolve(load_experiment(path))
    return plan.store, needed(plan, plan.photos())


def _each_once(sources: Iterable[Source]) -> tuple[Source, ...]:
    found: dict[str, Source] = {}
    for source in sources:
        found.setdefault(source.item, source)
    return tuple(found.values())
