"""Captions as tokens, for a text encoder that trains, so that the outputs in the store do not serve."""

from collections.abc import Callable

import numpy as np

from pipeline.plan.plan import Plan


def caption_tokens(plan: Plan) -> Callable[[str], np.ndarray] | None:
    """Tokens of a caption, (length,), int32, by its address, made when they are asked for.

    None where no text encoder trains.
    """
    if not plan.method.trains_encoder(plan.experiment):
        return None
    captions = dict(zip(plan.captions.items, plan.captions.texts))
    tokenizer = plan.load(plan.family.trainable_encoder.tokenizer)
    length = plan.pooled.recipe["max_length"]

    def tokens(item: str) -> np.ndarray:
        found = tokenizer(captions[item], padding="max_length", max_length=length, truncation=True)
        return np.array(found.input_ids, np.int32)

    return tokens


def pooled_reader(plan: Plan) -> Callable[[list[str]], np.ndarray]:
    """What the network's ``pooled`` is, of captions' addresses: tokens where an encoder trains, else what is stored."""
    tokens = caption_tokens(plan)
    if tokens is None:
        return lambda captions: plan.pooled.read_many(captions).astype(np.float32)
    return lambda captions: np.stack([tokens(caption) for caption in captions])
