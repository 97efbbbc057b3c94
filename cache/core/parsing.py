"""JSON from files that others may have written, or a disk has damaged: whatever is in them, a value or a ValueError."""

import json
import re
from typing import Any

MOST_LEVELS = 64
"""Nothing that is written here is nested a tenth as deep."""

HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def load_json(data: bytes | str) -> Any:
    """The value of a JSON text, UTF-8 where it is bytes.

    Raises ValueError where it is none, is nested too deep, has NaN or Infinity, which are no JSON, or half of a
    surrogate pair, which no file or terminal takes.
    """
    text = data.decode() if isinstance(data, bytes) else data
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if text.count("[") + text.count("{") > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise ValueError(f"nested more than {MOST_LEVELS} levels deep")
    if HALF_A_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _levels(value: Any) -> int:
    """How deep lists and objects lie in each other, counted no further than it matters."""
    level, inside = 0, [value]
    while level <= MOST_LEVELS:
        inside = [each for each in inside if isinstance(each, dict | list)]
        if not inside:
            return level
        level += 1
        inside = [below for each in inside for below in (each.values() if isinstance(each, dict) else each)]
    return level
