"""Encoding what the store lacks: captions with CLIP and T5, images with the VAE encoder.

One item at a time: its bytes then depend on the item and the recipe only, not on what it was batched with.
"""

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import numpy as np

from cache import Entries
from pipeline import data, images, models
from pipeline.buckets import crop_box
from pipeline.progress import Progress
from pipeline.recipes import Plan
from pipeline.stopping import StopRequest

Wanted = list[tuple[Entries, dict[str, tuple]]]
"""For each recipe, by item: the name of its photo, and what it is computed from."""

MAX_WRITERS = 32
"""Recipes that are written at a time: each keeps a few files open."""


def encode_pooled(plan: Plan, photos: Iterable[data.IndexedPhoto]) -> dict:
    """CLIP's pooled output of every caption that lacks it.  Returns what the stage's record says of it."""
    return _encode_captions(plan, plan.pooled, photos, "tokenizer", "text_encoder", "CLIP", lambda outputs: outputs[1])


def encode_txt(plan: Plan, photos: Iterable[data.IndexedPhoto]) -> dict:
    """T5's output sequence of every caption that lacks it.  Returns what the stage's record says of it.

    As in the reference pipeline, T5 gets no attention mask: padding is attended to, in training as in sampling.
    """
    return _encode_captions(plan, plan.txt, photos, "tokenizer_2", "text_encoder_2", "T5", lambda outputs: outputs[0])


def encode_latents(plan: Plan, photos: Iterable[data.IndexedPhoto]) -> dict:
    """The VAE's posterior of every variant of an image that lacks it.  Returns what the stage's record says of it."""
    import mindspore as ms

    policy = plan.precision.vae

    def load():
        vae = models.load_model(plan.checkpoint, "vae", policy.params, plan.experiment.model.variant)
        dtype = models.mindspore_dtype(policy.compute)
        read_photo = functools.lru_cache(maxsize=1)(data.read_photo)  # its variants are encoded one after another

        def posterior(source):
            photo, variant = source
            picture, size = read_photo(photo), (variant.width, variant.height)
            box = crop_box(photo.digest, *picture.size, *size, variant.crop)
            pixels = images.to_array(images.fit(picture, *size, box, variant.flip))
            return vae.encode(ms.Tensor(pixels[None]).astype(dtype))[0]

        return vae, posterior

    wanted = [
        (need.entries, {photo.digest: (photo.name, (photo, need.variant)) for photo in need.photos})
        for need in plan.image_needs(photos)
    ]
    return _encode(wanted, load, "VAE", "image")


def _encode_captions(plan, entries, photos, tokenizer_name, component, label, select) -> dict:
    import mindspore as ms

    policy, length = getattr(plan.precision, component), entries.recipe["max_length"]

    def load():
        tokenizer = models.load_tokenizer(plan.checkpoint, tokenizer_name)
        encoder = models.load_model(plan.checkpoint, component, policy.params, plan.experiment.model.variant)

        def embed(caption):
            tokens = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="np")
            return select(encoder(ms.Tensor(tokens.input_ids.astype(np.int32))))

        return encoder, embed

    sources = {source.item: (source.name, source.key) for source in plan.captions(photos)}
    return _encode([(entries, sources)], load, label, "caption")


def _encode(wanted: Wanted, load: Callable, label: str, unit: str) -> dict:
    """Write ``compute(source)`` for every missing item, where ``model, compute = load()``; load only if any is missing.

    Returns the recipes' ids, how many entries were encoded, and the dtypes that were found, not assumed.
    """
    todo = [(entries, _missing(entries, sources)) for entries, sources in wanted]
    todo = [each for each in todo if each[1]]
    total = sum(len(sources) for _, sources in todo)
    outcome = {"recipes": [entries.id for entries, _ in wanted], "encoded": total}
    if not total:
        return outcome
    model, compute = load()
    with StopRequest() as stop, Progress(label, total, unit) as progress:
        for start in range(0, len(todo), MAX_WRITERS):
            output = _write(todo[start : start + MAX_WRITERS], compute, progress, stop)
    return outcome | {"parameters_by_dtype": models.parameters_by_dtype(model), "output_dtype": str(output.dtype)}


def _missing(entries: Entries, sources: dict) -> dict:
    with entries.writer():  # it takes over what a killed process had encoded, before anyone looks
        return {item: sources[item] for item in entries.missing(sources)}


def _write(todo: Wanted, compute: Callable, progress: Progress, stop: StopRequest):
    """Compute and write it all, item by item, each for all its recipes.  Returns the last output."""
    with ExitStack() as stack:
        writers = {entries.id: stack.enter_context(entries.writer()) for entries, _ in todo}
        for item in dict.fromkeys(item for _, sources in todo for item in sources):
            for entries, (name, source) in [(entries, sources[item]) for entries, sources in todo if item in sources]:
                output = compute(source)[0]
                writers[entries.id].write(item, to_storage(output, entries.dtype), name)
                progress.advance()
                stop.check()
    return output


def to_storage(tensor, dtype: str) -> np.ndarray:
    """A device tensor as a host array of the storage ``dtype``; bfloat16 as ml_dtypes has it."""
    import mindspore as ms
    import ml_dtypes

    target = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    if tensor.dtype == ms.bfloat16:  # every bfloat16 is a float32, so nothing is rounded on the way
        tensor = tensor.astype(ms.float32)
    return tensor.asnumpy().astype(target)
