"""Encoding what the store lacks: captions with CLIP and T5, images with the VAE encoder.

One item at a time: its bytes then depend on the item and the recipe only, not on what it was batched with.
"""

from collections.abc import Callable, Iterable

import numpy as np

from cache import Entries, caption_item
from pipeline import data, images, models
from pipeline.progress import Progress
from pipeline.recipes import Plan
from pipeline.stopping import StopRequest


def encode_pooled(plan: Plan, photos: Iterable[data.IndexedPhoto]) -> dict:
    """CLIP's pooled output of every caption that lacks it.  Returns what the stage's record says of it."""
    return _encode_captions(plan, plan.pooled, photos, "tokenizer", "text_encoder", "CLIP", lambda outputs: outputs[1])


def encode_txt(plan: Plan, photos: Iterable[data.IndexedPhoto]) -> dict:
    """T5's output sequence of every caption that lacks it.  Returns what the stage's record says of it.

    As in the reference pipeline, T5 gets no attention mask: padding is attended to, in training as in sampling.
    """
    return _encode_captions(plan, plan.txt, photos, "tokenizer_2", "text_encoder_2", "T5", lambda outputs: outputs[0])


def encode_latents(plan: Plan, photos: Iterable[data.IndexedPhoto]) -> dict:
    """The VAE's posterior of every image that lacks it.  Returns what the stage's record says of it."""
    import mindspore as ms

    policy, entries = plan.precision.vae, plan.latents
    width, height = entries.recipe["width"], entries.recipe["height"]

    def load():
        vae = models.load_model(plan.checkpoint, "vae", policy.params, plan.experiment.model.variant)
        dtype = models.mindspore_dtype(policy.compute)

        def posterior(photo):
            pixels = images.to_array(images.fit(data.read_photo(photo), width, height))
            return vae.encode(ms.Tensor(pixels[None]).astype(dtype))[0]

        return vae, posterior

    sources = _by_item((photo.digest, photo.name, photo) for photo in photos)
    return _encode(entries, sources, load, "VAE", "image")


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

    sources = _by_item((caption_item(photo.caption), photo.name, photo.caption) for photo in photos)
    return _encode(entries, sources, load, label, "caption")


def _encode(entries: Entries, sources: dict, load: Callable, label: str, unit: str) -> dict:
    """Write ``compute(source)`` for every missing item, where ``model, compute = load()``; load only if any is missing.

    sources: item -> (name of its photo, source).
    Returns the recipe's id, how many were encoded, and the dtypes that were found, not assumed.
    """
    with entries.writer() as writer:  # it takes over what a killed process had encoded, before anyone looks
        missing = entries.missing(sources)
        outcome = {"recipe": entries.id, "encoded": len(missing)}
        if not missing:
            return outcome
        model, compute = load()
        with StopRequest() as stop, Progress(label, len(missing), unit) as progress:
            for item in missing:
                name, source = sources[item]
                output = compute(source)[0]
                writer.write(item, to_storage(output, entries.dtype), name)
                progress.advance()
                stop.check()
    return outcome | {"parameters_by_dtype": models.parameters_by_dtype(model), "output_dtype": str(output.dtype)}


def _by_item(sources: Iterable[tuple]) -> dict[str, tuple]:
    """Item -> (name, source), of the first photo that has it."""
    found: dict[str, tuple] = {}
    for item, name, source in sources:
        found.setdefault(item, (name, source))
    return found


def to_storage(tensor, dtype: str) -> np.ndarray:
    """A device tensor as a host array of the storage ``dtype``; bfloat16 as ml_dtypes has it."""
    import mindspore as ms
    import ml_dtypes

    target = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    if tensor.dtype == ms.bfloat16:  # every bfloat16 is a float32, so nothing is rounded on the way
        tensor = tensor.astype(ms.float32)
    return tensor.asnumpy().astype(target)
