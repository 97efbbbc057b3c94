"""How many tokens captions have, by the model's own tokenizers, and which are cut.  Imports no MindSpore."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from pipeline.data.findings import LINE_BREAKS, Cut
from pipeline.flux.family import CaptionEncoder, Flux
from pipeline.process.progress import Progress
from pipeline.settings.fields import Data

BATCH = 1000
"""Captions that are tokenized at a time."""

SPECIAL_TOKENS = 2
CLIP_LIMIT = 77
"""Of every published FLUX.1; read from the model's config where that is here."""


def cuts(folder: Path, family: Flux, data: Data, captions: Iterable[str]) -> list[Cut]:
    """What each text encoder of the model in ``folder`` cuts.

    captions: each once, as it takes minutes to tokenize a million of them.
    """
    captions = list(captions)
    return [_cut(folder, family, encoder, data, captions) for encoder in family.caption_encoders.values()]


def are_surely_short(data: Data, captions: Iterable[str]) -> bool:
    """Whether no text encoder cuts a caption, as far as can be told without the model."""
    limit = min(CLIP_LIMIT, data.max_sequence_length)
    return all(is_surely_short(caption, limit) for caption in captions)


def is_surely_short(caption: str, limit: int) -> bool:
    """Whether a caption has at most ``limit`` tokens whatever CLIP's or T5's vocabulary is.

    Each token but two stands for at least one character of an ASCII caption.  Both tokenizers first normalize a text,
    CLIP by NFC and lower case, T5 by NFKC: of ASCII that leaves no more characters.  CLIP's byte-level BPE then cuts it
    into pieces of at least one byte, and adds a token before and one behind.  T5's SentencePiece puts a space in front,
    cuts into pieces of at least one character, which gives one token more than there are characters at the most, and
    adds one behind.  Other characters may become many: U+FDFA becomes 18 by NFKC.
    """
    return len(caption) <= limit - SPECIAL_TOKENS and caption.isascii()


def _cut(folder: Path, family: Flux, encoder: CaptionEncoder, data: Data, captions: list[str]) -> Cut:
    limit = family.caption_settings(encoder.kind, folder, data)["max_length"]
    is_limit_set = encoder.kind == "txt"
    long = [caption for caption in captions if not is_surely_short(caption, limit)]
    lined = next(filter(LINE_BREAKS.search, captions), "")
    if not long and not lined:
        return Cut(encoder.label, limit, is_limit_set, {}, False)
    tokenizer = family.load(folder, encoder.tokenizer, None)
    tokens, rest = {}, iter(long)
    with Progress(f"count {encoder.label}'s tokens", len(long), "caption", says_end=False) as progress:
        while batch := list(islice(rest, BATCH)):
            for caption, ids in zip(batch, _ids(tokenizer, batch)):
                if len(ids) > limit:
                    tokens[caption] = len(ids)
            progress.advance(len(batch))
    spaced = LINE_BREAKS.sub(" ", lined)
    joins_lines = bool(lined) and _ids(tokenizer, [lined]) != _ids(tokenizer, [spaced])
    return Cut(encoder.label, limit, is_limit_set, tokens, joins_lines)


def _ids(tokenizer, captions: list[str]) -> list[list[int]]:
    """As `encode.load_caption_encoder` tokenizes them, before they are cut and padded."""
    return tokenizer(captions, truncation=False, padding=False, return_attention_mask=False, verbose=False).input_ids
