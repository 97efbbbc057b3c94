"""Encoding what the store lacks: captions with CLIP and T5, images with the VAE encoder.

One item at a time: its bytes then depend on the item and the recipe only, not on what it was batched with.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from cache import Entries
from pipeline.data import conditions, images, indexing
from pipeline.data.buckets import crop_box
from pipeline.data.variants import Variant
from pipeline.devices import dtypes
from pipeline.flux import models
from pipeline.plan import pictures
from pipeline.plan.plan import ImageNeed, Plan
from pipeline.process.progress import Progress
from pipeline.process.stopping import StopRequest

MAX_WRITERS = 32
"""Recipes that are written at a time: each keeps a few files open."""


CAPTION_ENCODERS = {
    "text_encoder": ("CLIP", "pooled", "tokenizer", 1),
    "text_encoder_2": ("T5", "txt", "tokenizer_2", 0),
}
"""By component: what people call it, the plan's entries, the tokenizer, and which of the encoder's outputs is kept."""


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
    """A loaded model; ``compute(source)`` gives its output for one item, a batch of one, on the device.

    confirm: raises StoreError where the model's files, of which parts may be read only now, have changed.
    found: of its dtypes, as `dtypes.found_in` has them, once the first item is computed; that raises UserError where
    they are not what the policy says.
    """

    model: object
    compute: Callable
    confirm: Callable[[], None]
    found: dict


def encode_pooled(plan: Plan, photos: Iterable[indexing.IndexedPhoto]) -> dict:
    """CLIP's pooled output of every caption that lacks it.  Returns what the stage's record says of it."""
    return _encode_captions(plan, photos, "text_encoder")


def encode_txt(plan: Plan, photos: Iterable[indexing.IndexedPhoto]) -> dict:
    """T5's output sequence of every caption that lacks it.  Returns what the stage's record says of it.

    As in the reference pipeline, T5 gets no attention mask: padding is attended to, in training as in sampling.
    """
    return _encode_captions(plan, photos, "text_encoder_2")


def encode_latents(plan: Plan, photos: Iterable[indexing.IndexedPhoto]) -> dict:
    """The VAE's posterior of every variant of an image that lacks it.  Returns what the stage's record says of it."""
    return _encode_pictures(plan, plan.image_needs(photos), photo_in, "image")


def encode_controls(plan: Plan, photos: Iterable[indexing.IndexedPhoto]) -> dict:
    """As `encode_latents`, of the photos' conditions and of those that are sampled with."""
    condition = plan.experiment.controlnet.condition

    def condition_in(photo, variant, read):
        return conditions.picture(photo, read(photo.condition or photo), variant, condition)

    return _encode_pictures(plan, pictures.control_needs(plan, photos), condition_in, "control")


def photo_in(photo: indexing.IndexedPhoto, variant: Variant, read: Callable):
    """The photo in the variant; ``read(photo)`` decodes its file."""
    picture, size = read(photo), (variant.width, variant.height)
    return images.fit(picture, *size, crop_box(photo.digest, *picture.size, *size, variant.crop), variant.flip)


def load_caption_encoder(plan: Plan, component: str) -> Encoder:
    """A text encoder, whose items are captions."""
    import mindspore as ms

    _, kind, tokenizer_name, output = CAPTION_ENCODERS[component]
    tokenizer, length = models.load_component(plan, tokenizer_name), getattr(plan, kind).recipe["max_length"]
    model = models.load_component(plan, component)

    def embed(caption):
        tokens = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        return model(ms.Tensor(tokens.input_ids.astype(np.int32)))[output]

    return _checked(plan, model, embed, component)


def load_picture_encoder(plan: Plan, picture_in: Callable = photo_in) -> Encoder:
    """The VAE, whose items are photos and variants; ``picture_in`` as `photo_in`."""
    import mindspore as ms

    policy = plan.precision.vae
    vae = models.load_component(plan, "vae")
    read_photo = functools.lru_cache(maxsize=1)(indexing.read_photo)  # its variants are encoded one after another

    def posterior(source):
        pixels = images.to_array(picture_in(*source, read_photo))
        return vae.encode(models.as_input(ms.Tensor(pixels[None]), policy))[0]

    return _checked(plan, vae, posterior, "vae")


def _checked(plan: Plan, model, compute: Callable, component: str) -> Encoder:
    """An encoder whose first output is looked at."""
    policy, found = getattr(plan.precision, component), {}

    def checked(source):
        output = compute(source)
        if not found:
            found.update(dtypes.found_in(model, output, policy))
            dtypes.check(component, policy, found)
        return output

    return Encoder(model, checked, lambda: plan.confirm(component), found)


def _encode_pictures(plan: Plan, needs: Sequence[ImageNeed], picture_in: Callable, unit: str) -> dict:
    def in_variant(variant):
        return lambda photo: (photo.name, (photo, variant))

    wanted = [_lacking(need.entries, need.items, need.photos, in_variant(need.variant)) for need in needs]
    return _encode(wanted, lambda: load_picture_encoder(plan, picture_in), "VAE", unit)


def _encode_captions(plan: Plan, photos: Iterable[indexing.IndexedPhoto], component: str) -> dict:
    label, kind, *_ = CAPTION_ENCODERS[component]
    items, texts, names = plan.captions(photos)
    wanted = [_lacking(getattr(plan, kind), items, range(len(items)), lambda place: (names[place], texts[place]))]
    return _encode(wanted, lambda: load_caption_encoder(plan, component), label, "caption")


def _lacking(entries: Entries, items: Sequence[str], inputs: Sequence, of: Callable) -> Wanted:
    """The inputs whose entries are not there.  items: that of each input."""
    with entries.writer():  # it takes over what a killed process had encoded, before anyone looks
        missing = set(entries.missing(items))
    return Wanted(entries, {item: each for item, each in zip(items, inputs) if item in missing} if missing else {}, of)


def _encode(wanted: Sequence[Wanted], load: Callable[[], Encoder], label: str, unit: str) -> dict:
    """Write what the encoder computes of every input; load it only if there is any.

    Returns how many entries were encoded, and the dtypes that were found, not assumed.  Raises UserError, before
    anything is written, where these are not what the policy says.
    """
    todo = [each for each in wanted if each.inputs]
    total = sum(len(each.inputs) for each in todo)
    if not total:
        return {"encoded": 0}
    encoder = load()
    with StopRequest() as stop, Progress(label, total, unit) as progress:
        for start in range(0, len(todo), MAX_WRITERS):
            _write(todo[start : start + MAX_WRITERS], encoder, progress, stop)
    return {"encoded": total, "precision": encoder.found}


def _write(todo: Sequence[Wanted], encoder: Encoder, progress: Progress, stop: StopRequest) -> None:
    """Compute and write it all, item by item, each for all its recipes."""
    with ExitStack() as stack:
        writers = {each.entries.id: stack.enter_context(each.entries.writer()) for each in todo}
        for item in dict.fromkeys(item for each in todo for item in each.inputs):
            for each in (each for each in todo if item in each.inputs):
                name, source = each.of(each.inputs[item])
                output = to_storage(encoder.compute(source)[0], each.entries.dtype)
                encoder.confirm()
                writers[each.entries.id].write(item, output, name)
                progress.advance()
                stop.check()


def to_storage(tensor, dtype: str) -> np.ndarray:
    """A device tensor as a host array of the storage ``dtype``; bfloat16 as ml_dtypes has it."""
    import mindspore as ms
    import ml_dtypes

    target = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    if tensor.dtype == ms.bfloat16:  # every bfloat16 is a float32, so nothing is rounded on the way
        tensor = tensor.astype(ms.float32)
    return tensor.asnumpy().astype(target)
