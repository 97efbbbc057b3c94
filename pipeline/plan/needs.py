"""The items that a plan needs from the store.  Imports no MindSpore."""

from collections.abc import Iterator
from functools import partial

from cache import Need, Source, needs_text, write_atomically
from cache.core.files import named
from pipeline.data import conditions
from pipeline.data.buckets import CENTRE
from pipeline.data.variants import Variant
from pipeline.plan import pictures, prior
from pipeline.plan.plan import ImageNeed, Plan

IMAGES, CONTROLS = "EncodeImages", "EncodeControls"
"""The stages that encode photos and conditions; those that encode captions are the family's."""


def needed(plan: Plan) -> list[Need]:
    """The items of each recipe, in the order of the stages that make them."""
    return [*trained_on(plan), *sampled(plan)]


def trained_on(plan: Plan) -> list[Need]:
    """What a training reads: what encoders make, and the pictures of [prior]."""
    return [*encoded(plan), *prior.needs(plan)]


def encoded(plan: Plan) -> list[Need]:
    """The part of `needed` that encoders make.  It never asks for the transformer's digest."""
    captions, image_encoder = plan.captions, plan.family.image_encoder
    sources = partial(map, Source, captions.items, captions.names, captions.texts)
    of_captions = [
        Need(encoder.stage, encoder.component, entries.recipe, captions.items, sources)
        for encoder, entries in zip(plan.family.caption_encoders.values(), (plan.pooled, plan.txt))
    ]
    of_images = [(IMAGES, "", each) for each in plan.image_needs]
    of_images += [(CONTROLS, "controls", each) for each in controls(plan)]
    return of_captions + [
        Need(stage, image_encoder, need.entries.recipe, need.items, partial(_sources, plan, need), role)
        for stage, role, need in of_images
    ]


def controls(plan: Plan) -> list[ImageNeed]:
    """`Plan.control_needs`, and what pictures are conditioned on besides."""
    needs, own = {need.variant: need for need in plan.control_needs}, pictures.variant(plan)
    if plan.sample_conditions:
        found = {conditions.item(photo, own): photo for photo in plan.sample_conditions}
        found |= dict(zip(needs[own].items, needs[own].photos)) if own in needs else {}
        entries = plan.latents(own, plan.method.condition(plan.experiment))
        needs[own] = ImageNeed(own, entries, tuple(found), tuple(found.values()))
    return list(needs.values())


def sampled(plan: Plan) -> list[Need]:
    """The latents of pictures that the experiment asks for; those with what a training makes, once that is there."""
    if not pictures.is_asked(plan.experiment, plan.method):
        return []
    stage, network = plan.method.stages.draw, plan.family.network
    return [Need.of(stage, network, each.entries.recipe, _sources_of_pictures(each)) for each in pictures.by_now(plan)]


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


def note_needs(plan: Plan) -> None:
    """Write needs.json: the entries of this run, and those of the pictures drawn last.  The collector keeps them."""
    path, text = plan.run.needs, needs_text(needed(plan))
    with named(path):
        if not path.is_file() or path.read_text() != text:
            write_atomically(path, text)
