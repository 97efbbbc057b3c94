"""The words of the captions: which there are, how a picture's caption varies, and their tokenizers."""

import string
from pathlib import Path

import numpy as np

from pipeline.flux import tiny
from pipeline.synthetic import shapes

UNKNOWN, EMPTY, PLAIN = 0.06, 0.03, 0.8
"""Shares of captions with a made-up word for the shape, of empty ones, and of those without capital and full stop."""


def lines() -> list[str]:
    """Captions with every known word in them."""
    pairs = zip(shapes.COLOURS, reversed(shapes.COLOURS))
    return [
        shapes.say(wording, shape, *pair)
        for pair in pairs
        for wording in shapes.MORE_WORDINGS
        for shape in shapes.SHAPES
    ]


def write_tokenizers(folder: Path) -> tuple[int, int, int]:
    """Known words become one token each, others their letters.  Returns the vocabularies' sizes as `tiny` does."""
    clip = tiny.write_clip_tokenizer(folder / "tokenizer", [line.replace(",", " ,") for line in lines()])
    return (*clip, tiny.write_t5_tokenizer(folder / "tokenizer_2", _pieces()))


def _pieces() -> list[tuple[str, float]]:
    words = sorted({word for line in lines() for word in line.replace(",", "").split()})
    characters = [chr(code) for code in range(33, 127)]
    likely = [(f"▁{word}", -4.0) for word in words if len(word) > 1]
    spelled = [(piece, -10.0) for character in characters for piece in (f"▁{character}", character)]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *likely, *spelled, ("▁", -11.0)]


def varied(picture: shapes.Picture, random: np.random.Generator) -> str:
    """One of the many captions of a picture."""
    kind = random.random()
    if kind < EMPTY:
        return ""
    word = _made_up(random) if kind < EMPTY + UNKNOWN else picture.word
    wording = shapes.MORE_WORDINGS[random.integers(len(shapes.MORE_WORDINGS))]
    caption = shapes.say(wording, word, picture.colour, picture.background)
    return caption if random.random() < PLAIN else f"{caption[0].upper()}{caption[1:]}."


def _made_up(random: np.random.Generator) -> str:
    """Three to seven letters, none of the words that demos teach."""
    word = "".join(random.choice(list(string.ascii_lowercase), random.integers(3, 8)))
    return word if word not in shapes.MADE_UP.values() else "thing"
