"""Encoding what the store lacks: captions with CLIP and T5, images with the VAE encoder.

One item at a time: its bytes then depend on the item and the recipe only, not on what it was batched with.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import Entries
from cache.terminal.places import shown
from pipeline.data import conditions, images, indexing
from pipeline.data.buckets import crop_box
from pipeline.data.variants import Size, Variant
from pipeline.devices import device, dtypes, tensors
from pipeline.devices.tensors import to_storage
from pipeline.estimate import estimates
from pipeline.estimate.subject import Subject
from pipeline.methods import kept
from pipeline.plan import needs
from pipeline.plan.plan import ImageNeed, Plan
from pipeline.plan.shard import WHOLE, Shard
from pipeline.process.ahead import made_ahead
from pipeline.process.progress import Progress, say
from pipeline.process.stopping import StopRequest

MAX_WRITERS = 32
"""Recipes that are written at a time: each keeps a few files open."""


@dataclass(frozen=True)
class Wanted:
    """What is to be encoded under one recipe: inputs by item.

    of: gives, of an input, the name that is kept with its entry, and what an `Encoder` computes it from.
    """

    entries: Entries
    inputs: Mapping[str, object]
    of: Callable[[object], tuple[str, object]]


@dataclass(frozen=True)
class Encoder:
    """A loaded model.

    prepare: makes of an item's sources, one for each recipe, what `compute` takes; without the device, in any thread.
    compute: the model's output for one of them, a batch of one, on the device.
    confirm: raises StoreError where the model's files, of which parts may be read only now, have changed.
    found: of its dtypes, as `dtypes.found_in` has them, once the first item is computed; that raises UserError where
    they are not what the policy says.
    """

    model: object
    prepare: Callable[[Sequence], list]
    compute: Callable[[Any], Any]
    confirm: Callable[[], None]
    found: dict

    def __call__(self, source):
        return self.compute(*self.prepare([source]))


def encode_captions(plan: Plan, kind: str, shard: Shard = WHOLE) -> dict:
    """The output of a caption encoder, "pooled" or "txt", of every caption of the shard that lacks it.

    As in the reference pipeline, T5 gets no attention mask: padding is attended to, in training as in sampling.
    Returns what the stage's record says of it.
    """
    items, texts, names = plan.captions
    entries, places = plan.entries_of(kind), range(len(items))
    wanted = [_lacking(entries, items, places, lambda place: (names[place], texts[place]), shard)]
    label = shard.words(plan.family.caption_encoders[kind].label)
    return _encode(wanted, lambda: load_caption_encoder(plan, kind, len(wanted[0].inputs)), label, "caption")


def encode_images(plan: Plan, shard: Shard = WHOLE) -> dict:
    """The VAE's posterior of every variant of the shard's images that lacks it.

    Returns what the stage's record says of it.
    """
    return _encode_pictures(plan, plan.image_needs, photo_in, "image", shard)


def encode_controls(plan: Plan, shard: Shard = WHOLE) -> dict:
    """As `encode_images`, of the photos' conditions and of those that are sampled with."""
    condition = plan.method.condition(plan.experiment)

    def condition_in(photo, variant, read):
        return conditions.picture(photo, read(photo.condition or photo), variant, condition)

    return _encode_pictures(plan, needs.controls(plan), condition_in, "control", shard)


def photo_in(photo: indexing.IndexedPhoto, variant: Variant, read: Callable):
    """The photo in the variant; ``read(photo)`` decodes its file."""
    picture, width, height = read(photo), variant.width, variant.height
    box = crop_box(photo.digest, picture.width, picture.height, width, height, variant.crop)
    return images.fit(picture, width, height, box, variant.flip)


def load_caption_encoder(plan: Plan, kind: str, count: int = 1) -> Encoder:
    """A text encoder, whose items are captions.  count: how many it will encode."""
    import mindspore as ms

    encoder, length = plan.family.caption_encoders[kind], plan.entries_of(kind).recipe["max_length"]
    tokenizer, model = plan.load(encoder.tokenizer), plan.load(encoder.component)

    def tokens(captions):
        fitted = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
        return [tokenizer(caption, **fitted).input_ids.astype("int32") for caption in captions]

    def embed(ids):
        return model(ids)[encoder.output]

    is_often = estimates.compiles_captions(Subject.of_plan(plan), kind, count)
    embed_often = kept.Often(plan, encoder.component, model, embed, lambda shape: is_often)
    return _checked(plan, model, tokens, lambda ids: embed_often(ms.Tensor(ids)), encoder.component)


def load_picture_encoder(plan: Plan, picture_in: Callable = photo_in, counts: Mapping[Size, int] = {}) -> Encoder:
    """The VAE, whose items are photos and variants; ``picture_in`` as `photo_in`.

    counts: how many pictures of each size in pixels it will encode.
    """
    import mindspore as ms

    component = plan.family.image_encoder
    policy, vae = plan.policy(component), plan.load(component)

    budget = images.PixelBudget()

    def pictures(sources):
        photo = sources[0][0]
        largest = max(each.width * each.height for each in (photo, photo.condition or photo))
        with budget.taken(largest):
            read_photo = Newest(indexing.read_photo)
            return [picture_in(*source, read_photo) for source in sources]

    def encoded(pixels):
        return vae.encode(pixels)[0]

    def is_often(shape):
        size = shape[-1], shape[-2]
        return estimates.compiles_pictures(subject, size, counts.get(size, 0))

    subject = Subject.of_plan(plan)
    encoded_often = kept.Often(plan, component, vae, encoded, is_often)

    def posterior(picture):
        pixels = images.to_array(picture)[None]
        return encoded_often(tensors.as_input(ms.Tensor(pixels), policy))

    return _checked(plan, vae, pictures, posterior, component)


class Newest:
    """Reads a photo once for several variants of it."""

    def __init__(self, read: Callable):
        self._read, self._image = read, None
        self._photo: indexing.IndexedPhoto | None = None

    def __call__(self, photo: indexing.IndexedPhoto):
        if photo != self._photo:
            self._photo, self._image = photo, self._read(photo)
        return self._image


def _checked(plan: Plan, model, prepare: Callable, compute: Callable, component: str) -> Encoder:
    """An encoder whose first output is looked at."""
    policy = plan.policy(component)
    found: dict = {}

    def checked(prepared):
        output = compute(prepared)
        if not found:
            found.update(dtypes.found_in(model, output, policy))
            dtypes.check(component, policy, found, plan.family.keeps_fp32(component))
        return output

    return Encoder(model, prepare, checked, lambda: plan.confirm(component), found)


def _encode_pictures(plan: Plan, several: Sequence[ImageNeed], picture_in: Callable, unit: str, shard: Shard) -> dict:
    def in_variant(variant):
        return lambda photo: (photo.name, (photo, variant))

    wanted = [_lacking(need.entries, need.items, need.photos, in_variant(need.variant), shard) for need in several]
    threads = device.num_host_threads(plan.device)
    counts = Counter(
        (need.variant.width, need.variant.height) for need, own in zip(several, wanted) for _ in own.inputs
    )
    return _encode(wanted, lambda: load_picture_encoder(plan, picture_in, counts), shard.words("VAE"), unit, threads)


def _lacking(entries: Entries, items: Sequence[str], inputs: Sequence, of: Callable, shard: Shard) -> Wanted:
    """The inputs of the shard whose entries are not there.  items: that of each input."""
    with entries.writer():  # it takes over what a killed process had encoded, before anyone looks
        missing = {item for item in entries.missing(items) if item in shard}
    return Wanted(entries, {item: each for item, each in zip(items, inputs) if item in missing} if missing else {}, of)


def _encode(wanted: Sequence[Wanted], load: Callable[[], Encoder], label: str, unit: str, num_threads: int = 1) -> dict:
    """Write what the encoder computes of every input; load it only if there is any.

    num_threads: that prepare inputs while the device computes.

    Returns how many entries were encoded, and the dtypes that were found, not assumed.  Raises UserError, before
    anything is written, where these are not what the policy says.
    """
    todo = [each for each in wanted if each.inputs]
    total = sum(len(each.inputs) for each in todo)
    if not total:
        return {"encoded": 0}
    _say_what_is_broken(todo, label)
    encoder = load()
    with StopRequest() as stop, Progress(label, total, unit) as progress:
        for start in range(0, len(todo), MAX_WRITERS):
            _write(todo[start : start + MAX_WRITERS], encoder, progress, stop, num_threads)
    return {"encoded": total, "precision": encoder.found}


def _say_what_is_broken(todo: Sequence[Wanted], label: str) -> None:
    for folder in dict.fromkeys(folder for each in todo for folder in each.entries.broken):
        say(
            f"{label}: {shown(Path(folder))} is not whole, so that its entries are encoded again; "
            "python -m cache verify --repair may save some, if you stop here and run it first"
        )


def _write(todo: Sequence[Wanted], encoder: Encoder, progress: Progress, stop: StopRequest, num_threads: int) -> None:
    """Compute and write it all, item by item, each for all its recipes; threads prepare the next items meanwhile."""
    items = list(dict.fromkeys(item for each in todo for item in each.inputs))

    def prepared(item):
        several = [(each.entries, *each.of(each.inputs[item])) for each in todo if item in each.inputs]
        made = encoder.prepare([source for _, _, source in several])
        return [(entries, name, each) for (entries, name, _), each in zip(several, made)]

    with ExitStack() as stack:
        writers = {each.entries.id: stack.enter_context(each.entries.writer()) for each in todo}
        ahead = stack.enter_context(made_ahead(prepared, items, num_threads + 1, num_threads))
        for item in items:
            for entries, name, each in ahead.next():
                output = to_storage(encoder.compute(each)[0], entries.dtype)
                encoder.confirm()
                writers[entries.id].write(item, output, name)
                progress.advance()
                stop.check()
