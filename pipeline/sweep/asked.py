"""What a sweep is asked for, ``--set NAME=VALUE,VALUE`` and ``--with NAME=VALUE,VALUE``, read."""

import difflib
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.runs.differences import DEFAULTS, flattened

Words = Sequence[tuple[str, str]]
"""The options in their order: "--set" or "--with", and what stands behind it."""

SETTINGS: dict[str, Any] = flattened(DEFAULTS)
OURS = "name", "paths"
"""What each experiment of a sweep gets of the sweep itself."""

OPENING, CLOSING, QUOTES = "[{", "]}", "\"'"


@dataclass(frozen=True)
class Axis:
    """Settings that change together: each of ``rows`` has a value for each of ``names``."""

    names: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def axes(words: Words) -> list[Axis]:
    """Raises UserError that lists all that is wrong; values are held against the schema later."""
    found: list[dict[str, list]] = []
    problems: list[str] = []
    for option, text in words:
        name = text.partition("=")[0].strip()
        if option == "--set":
            found.append({})
        try:
            if not found:
                raise ValueError("comes before any --set; it says what changes together with the --set before it")
            values = _values(text)
            _check(name, values, {each for axis in found for each in axis})
            _check_length(values, found[-1])
            found[-1][name] = values
        except ValueError as error:
            problems.append(f"{option} {name}: {error}")
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{len(problems)} {noun} in what is to be swept", *problems]))
    return [Axis(tuple(axis), tuple(zip(*axis.values()))) for axis in found]


def _values(text: str) -> list:
    _, equals, values = text.partition("=")
    if not equals:
        raise ValueError("has no values; write them behind it, as --set lora.rank=4,16")
    return [_value(each) for each in _split(values)]


def _check(name: str, values: list, known: set[str]) -> None:
    if name in known:
        raise ValueError("is there twice; give it all its values at once, separated by commas")
    if name.partition(".")[0] in OURS:
        raise ValueError("is set by the sweep itself; change it in the experiment file")
    if not _is_setting(name):
        meant = _meant(name)
        advice = f"did you mean {meant}?" if meant else "docs/experiment.md lists them all"
        raise ValueError(f"there is no such setting; {advice}")
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"names {twice[0]!r} twice")


def _check_length(values: list, axis: dict[str, list]) -> None:
    for name, others in axis.items():
        if len(values) != len(others):
            raise ValueError(f"{len(values)} values for the {len(others)} of {name}; each of these needs one")


def _is_setting(name: str) -> bool:
    """Whether the schema knows it.  Below a table that is empty unless somebody fills it, as the dtypes of a component
    are, the schema looks itself."""
    parts = name.split(".")
    above = (".".join(parts[:count]) for count in range(1, len(parts)))
    return name in SETTINGS or any(SETTINGS.get(each) == {} for each in above)


def _meant(name: str) -> str:
    last = name.rpartition(".")[2]
    same = [each for each in SETTINGS if each.rpartition(".")[2] == last]
    by_end = {each.rpartition(".")[2]: each for each in reversed(SETTINGS)}
    near = difflib.get_close_matches(name, SETTINGS, 1)
    near = near or [by_end[each] for each in difflib.get_close_matches(last, by_end, 1)]
    return " or ".join(same or near)


def _split(text: str) -> Iterator[str]:
    """At the commas that are outside of brackets and quotes."""
    depth, quote, part = 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        depth += 0 if quote else (character in OPENING) - (character in CLOSING)
        if character == "," and not depth and not quote:
            yield part
            part = ""
        else:
            part += character
    yield part


def _value(text: str) -> Any:
    """A value as TOML writes it; what is none, as cosine, is a text."""
    text = text.strip()
    if not text:
        raise ValueError('has an empty value; write "" for an empty text')
    try:
        document = tomllib.loads(f"value = {text}")
        if list(document) == ["value"]:
            return document["value"]
    except ValueError as error:
        if text[0] in OPENING + QUOTES:
            raise ValueError(f"{text}: not valid TOML: {error}") from None
    return text
