"""What an experiment needs from the store, item by item.  Imports no MindSpore."""

from collections.abc import Iterator, Sequence
from functools import partial

from cache import Need, Source
from pipeline.data.buckets import CENTRE
from pipeline.data.indexing import IndexedPhoto
from pipeline.data.variants import Variant
from pipeline.plan import pictures
from pipeline.plan.plan import CONTROLNET, ImageNeed, Plan


def needed(plan: Plan, photos: Sequence[IndexedPhoto]) -> list[Need]:
    """The items of each recipe, in the order of the stages that make them."""
    return [*encoded(plan, photos), *sampled(plan, photos)]


def encoded(plan: Plan, photos: Sequence[IndexedPhoto]) -> list[Need]:
    """Those of them that encoders make; asks for the digests of the encoders alone."""
    captions = plan.captions(photos)
    sources = partial(map, Source, captions.items, captions.names, captions.texts)
    return [
        Need("EncodeCLIP", "text_encoder", plan.pooled.recipe, captions.items, sources),
        Need("EncodeT5", "text_encoder_2", plan.txt.recipe, captions.items, sources),
        *(_need("EncodeImages", plan, each) for each in plan.image_needs(photos)),
        *(_control_needs(plan, photos) if plan.trains == CONTROLNET else ()),
    ]


def _control_needs(plan: Plan, photos: Sequence[IndexedPhoto]) -> list[Need]:
    return [_need("EncodeControls", plan, each, "controls") for each in pictures.control_needs(plan, photos)]


def _need(stage: str, plan: Plan, need: ImageNeed, role: str = "") -> Need:
    return Need(stage, "vae", need.entries.recipe, need.items, partial(_sources, plan, need), role)


def sampled(plan: Plan, photos: Sequence[IndexedPhoto]) -> list[Need]:
    """The latents of pictures that the experiment asks for; those with what it trains, once that is there."""
    if not pictures.is_asked(plan.experiment, plan.trains):
        return []
    several = [pictures.base(plan)] if plan.experiment.sample.base else []
    several += [pictures.trained(plan, photos)] if pictures.is_trained(plan.run_folder(photos), plan.trains) else []
    stage = "SampleControlNetLatents" if plan.trains == CONTROLNET else "SampleLatents"
    return [Need.of(stage, "transformer", each.entries.recipe, _sources_of_pictures(each)) for each in several]


def _sources_of_pictures(series: pictures.Series) -> tuple[Source, ...]:
    return tuple(Source(item, series.words(item), series.words(item)) for item in series.pictures)


def _sources(plan: Plan, need: ImageNeed) -> Iterator[Source]:
    """The photo of each item. Its key tells apart variants of one photo, and the conditions that [sample] names."""
    several = len(plan.variants(need.photos[0])) > 1  # as many for each photo
    words, for_sampling = f" {_words(need.variant)}" if several else "", set(plan.sample_conditions)
    for item, photo in zip(need.items, need.photos):
        origin = " (for sampling)" if photo in for_sampling else ""
        yield Source(item, photo.name, f"{photo.name}{origin}{words}")


def _words(variant: Variant) -> str:
    crop = "" if variant.crop == CENTRE else f" crop {variant.crop}"
    return f"{variant.width}x{variant.height}{crop}{' flipped' if variant.flip else ''}"
