"""Encoding what the store lacks: captions with CLIP and T5, images with the VAE encoder.

One item at a time: its bytes then depend on the item and the recipe only, not on what it was batched with.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from cache import Entries
from pipeline import conditions, data, dtypes, images, models, pictures, simulation
from pipeline.buckets import crop_box
from pipeline.precision import Policy
from pipeline.progress import Progress
from pipeline.recipes import ImageNeed, Plan
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

    def photo_in(photo, variant, read):
        picture, size = read(photo), (variant.width, variant.height)
        return images.fit(picture, *size, crop_box(photo.digest, *picture.size, *size, variant.crop), variant.flip)

    return _encode_pictures(plan, plan.image_needs(photos), photo_in, "image")


def encode_controls(plan: Plan, photos: Iterable[data.IndexedPhoto]) -> dict:
    """As `encode_latents`, of the photos' conditions and of those that are sampled with."""
    condition = plan.experiment.controlnet.condition

    def condition_in(photo, variant, read):
        return conditions.picture(photo, read(photo.condition or photo), variant, condition)

    return _encode_pictures(plan, pictures.control_needs(plan, photos), condition_in, "control")


def _encode_pictures(plan: Plan, needs: Sequence[ImageNeed], picture_in: Callable, unit: str) -> dict:
    """Encode what is missing of ``picture_in(photo, variant, read)``, where ``read(photo)`` decodes a file."""
    import mindspore as ms

    policy = plan.precision.vae

    def load():
        vae = models.load_component(plan, "vae")
        dtype = models.mindspore_dtype(policy.compute_on_device)
        rounded = simulation.rounding()
        read_photo = functools.lru_cache(maxsize=1)(data.read_photo)  # its variants are encoded one after another

        def posterior(source):
            pixels = images.to_array(picture_in(*source, read_photo))
            x = ms.Tensor(pixels[None]).astype(dtype)
            return vae.encode(rounded(x) if policy.simulated else x)[0]

        return vae, posterior

    wanted = [
        (need.entries, {item: (photo.name, (photo, need.variant)) for item, photo in zip(need.items, need.photos)})
        for need in needs
    ]
    return _encode(wanted, load, "vae", policy, "VAE", unit)


def _encode_captions(plan, entries, photos, tokenizer_name, component, label, select) -> dict:
    import mindspore as ms

    policy, length = getattr(plan.precision, component), entries.recipe["max_length"]

    def load():
        tokenizer = models.load_tokenizer(plan.checkpoint, tokenizer_name)
        encoder = models.load_component(plan, component)

        def embed(caption):
            tokens = tokenizer(caption, padding="max_length", max_length=length, truncation=True, return_tensors="np")
            return select(encoder(ms.Tensor(tokens.input_ids.astype(np.int32))))

        return encoder, embed

    sources = {source.item: (source.name, source.key) for source in plan.captions(photos)}
    return _encode([(entries, sources)], load, component, policy, label, "caption")


def _encode(wanted: Wanted, load: Callable, component: str, policy: Policy, label: str, unit: str) -> dict:
    """Write ``compute(source)`` for every missing item, where ``model, compute = load()``; load only if any is missing.

    Returns how many entries were encoded, and the dtypes that were found, not assumed.  Raises UserError, before
    anything is written, where these are not what the policy says.
    """
    todo = [(entries, _missing(entries, sources)) for entries, sources in wanted]
    todo = [each for each in todo if each[1]]
    total = sum(len(sources) for _, sources in todo)
    if not total:
        return {"encoded": 0}
    model, compute = load()
    compute, found = _checked(compute, model, component, policy)
    with StopRequest() as stop, Progress(label, total, unit) as progress:
        for start in range(0, len(todo), MAX_WRITERS):
            _write(todo[start : start + MAX_WRITERS], compute, progress, stop)
    return {"encoded": total, "precision": found}


def _checked(compute: Callable, model, component: str, policy: Policy) -> tuple[Callable, dict]:
    """``compute``, whose first output is looked at, and what is found then."""
    found: dict = {}

    def checked(source):
        output = compute(source)
        if not found:
            found.update(dtypes.found_in(model, output, policy))
            dtypes.check(component, policy, found)
        return output

    return checked, found


def _missing(entries: Entries, sources: dict) -> dict:
    with entries.writer():  # it takes over what a killed process had encoded, before anyone looks
        return {item: sources[item] for item in entries.missing(sources)}


def _write(todo: Wanted, compute: Callable, progress: Progress, stop: StopRequest) -> None:
    """Compute and write it all, item by item, each for all its recipes."""
    with ExitStack() as stack:
        writers = {entries.id: stack.enter_context(entries.writer()) for entries, _ in todo}
        for item in dict.fromkeys(item for _, sources in todo for item in sources):
            for entries, (name, source) in [(entries, sources[item]) for entries, sources in todo if item in sources]:
                output = compute(source)[0]
                writers[entries.id].write(item, to_storage(output, entries.dtype), name)
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
