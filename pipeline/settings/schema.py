"""Documents that others wrote, TOML or JSON, held against a dataclass by pydantic; every problem is said, by its field.

A number is no text and a fraction no whole number here, unlike in pydantic by itself.
"""

import difflib
import json
import re
import reprlib
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import AfterValidator, AllowInfNan, Field, Strict, StringConstraints, TypeAdapter, ValidationError


def _without_null(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"must not hold a null character, found {text!r}")
    return text


def _distinct(values: tuple) -> tuple:
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise ValueError(f"names {twice[0]!r} twice")
    return values


Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), AllowInfNan(False)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), AfterValidator(_without_null)]
Word = Annotated[Text, StringConstraints(min_length=1)]
"""A text that is not empty."""

DISTINCT = Field(min_length=1, json_schema_extra={"uniqueItems": True}), AfterValidator(_distinct)
"""The rules of a list that is not empty and has nothing twice."""


def between(minimum: int, maximum: int, multiple_of: int | None = None) -> Any:
    """The rule of a number that is one of the two, or between them."""
    return Field(ge=minimum, le=maximum, multiple_of=multiple_of)


EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "finite",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "a text that is not empty",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "greater_than": "above {gt}",
    "less_than": "below {lt}",
    "multiple_of": "a multiple of {multiple_of}",
}
"""What a value must be, by the type of pydantic's error."""

LONGEST_NAME = 100
"""Characters of a wrong value that are looked at for what was meant."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200


def checked(cls, document: dict) -> tuple[Any, list[str]]:
    """``document`` as the dataclass ``cls``, or None; and its problems, a line each that begins with the field."""
    try:
        return adapter(cls).validate_python(document), []
    except ValidationError as error:
        return None, [line for each in error.errors(include_url=False) for line in _problem(cls, document, each)]


@cache
def adapter(cls) -> TypeAdapter:
    return TypeAdapter(cls)


def _problem(cls, document: dict, error) -> Iterator[str]:
    """The line of one of pydantic's errors; none where it follows from others, or is of a reading that nobody meant."""
    name, known = "", dict[str, Any]()
    value: Any = document
    here: Any = cls
    for part in error["loc"]:
        if isinstance(value, dict) and isinstance(here, type):
            known = get_type_hints(here)
            key = str(part) if re.fullmatch(r"[\w-]+", str(part)) else json.dumps(part)
            name, value, here = f"{name}.{key}" if name else key, value.get(part), known.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            name, value = f"{name}[{part}]", value[part]
        elif isinstance(value, list) != part.startswith(("tuple", "function-after[_distinct")):
            return  # a field that may be one or a list: what is wrong with a list as one
    if error["type"] == "too_short" and value:
        return  # pydantic counts those that are right
    said = _said(error, name, list(known), value)
    yield f"{name}: {said}" if name else said


def _said(error, name: str, known: list[str], value) -> str:
    kind, rules = error["type"], error.get("ctx", {})
    match kind:
        case "value_error":
            return str(rules["error"])
        case "missing":
            return "missing"
        case "dataclass_type" | "dict_type":
            return f"must be a table, [{name}]"
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown field{_meant(error['loc'][-1], known) or '; known here: ' + ', '.join(known)}"
        case "literal_error":
            choices = re.findall("'([^']*)'", rules["expected"])
            return f"must be one of {', '.join(choices)}, found {_short.repr(value)}{_meant(value, choices)}"
        case "float_type" if type(value) is int:  # of more digits than a float has
            expected = EXPECTED["finite_number"]
        case _:
            whole = {name: int(rule) for name, rule in rules.items() if isinstance(rule, float) and rule.is_integer()}
            expected = EXPECTED[kind].format(**rules | whole)
    return f"must be {expected}, found {_short.repr(value)}"


def _meant(value, known: list[str]) -> str:
    """What nearly has the name of a wrong value, if anything; "Cut by T5" means cut-by-t5."""
    written = str(value)[:LONGEST_NAME].lower().replace(" ", "-").replace("_", "-")
    plain = {name.lower().replace("_", "-"): name for name in known}
    return "".join(f"; did you mean {plain[near]}?" for near in difflib.get_close_matches(written, plain, 1))
