"""The experiment file, described from the code: as JSON Schema for editors, and as the page docs/experiment.md."""

import ast
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from pipeline.settings import fields
from pipeline.settings.schema import adapter

HEADING = """# The experiment file

This page is written by `python -m pipeline schema --markdown`: edit the descriptions in `pipeline/settings/fields.py`.

An experiment file is [TOML](https://toml.io). Every setting has a default. A wrong or unknown setting is an error
before anything runs; all of them are listed at once. (Only the module names in `lora.targets` are checked later, once
the model's config is there.) `python -m pipeline schema > experiment.schema.json` writes this page as JSON Schema: with
`#:schema experiment.schema.json` as the first line of a file, editors that know TOML complete its settings and mark
mistakes.

| table | what it says |
|---|---|
"""
WORDS = {"boolean": "true or false", "string": "text", "number": "a number", "integer": "a whole number"}
LOWER = {"minimum": "{:,} or more", "exclusiveMinimum": "above {:,}"}
UPPER = {"maximum": "at most {:,}", "exclusiveMaximum": "below {:,}"}


def json_schema() -> dict:
    """What an experiment file may say, with a description of every setting, as JSON Schema for editors."""
    schema = adapter(fields.Settings).json_schema()
    described = _descriptions(Path(fields.__file__).read_text(encoding="utf-8"))
    for name, definition in {fields.Settings.__name__: schema, **schema["$defs"]}.items():
        for key, found in definition["properties"].items():
            found |= {"description": text} if (text := described.get((name, key))) else {}
            found.pop("title", None)  # pydantic's: the name again, in capitals
    return schema


def _descriptions(source: str) -> dict[tuple[str, str], str]:
    """The texts below the settings in the source of `fields`, by class and setting."""
    return {
        (table.name, setting.target.id): " ".join(below.value.value.split())
        for table in ast.parse(source).body
        if isinstance(table, ast.ClassDef)
        for setting, below in pairwise(table.body)
        if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def as_markdown() -> str:
    """The page docs/experiment.md."""
    schema = json_schema()
    tables = {name: _definition(schema, found) for name, found in schema["properties"].items() if "$ref" in found}
    overview = [f"| [{name}](#{name}) | {_about(table)} |" for name, table in tables.items()]
    plain = {name: found for name, found in schema["properties"].items() if "$ref" not in found}
    lines = [*overview, "", "## Above all tables", "", *_rows(schema, plain)]
    for name, table in tables.items():
        lines += ["", f"## [{name}]", "", _about(table), "", *_rows(schema, table["properties"])]
    return HEADING + "\n".join(lines) + "\n"


def _rows(schema: dict, settings: dict) -> Iterator[str]:
    yield "| setting | default | may be | |"
    yield "|---|---|---|---|"
    for name, found in settings.items():
        default = "" if "$ref" in found else f"`{json.dumps(found['default'], ensure_ascii=False)}`"
        values = _of_table(_definition(schema, found)) if "$ref" in found else _values(found)
        yield f"| `{name}` | {default} | {values} | {found['description']} |"


def _of_table(table: dict) -> str:
    """In words, what may stand in a table within a table, as the dtypes of a component do."""
    several = {key: _values(found) for key, found in table["properties"].items()}
    return f"a table of {', '.join(f'`{key}`' for key in several)}, each {' or '.join(dict.fromkeys(several.values()))}"


def _values(found: dict) -> str:
    """What a setting may be, in words.  An upper bound that no experiment comes near is left out."""
    if "anyOf" in found:
        return "; or ".join(map(_values, found["anyOf"]))
    if "enum" in found or "const" in found:
        return ", ".join(f"`{value}`" for value in found.get("enum", [found.get("const")]))
    if found["type"] == "array":
        return f"a list, each {_values(found['items'])}"
    bounds = [words.format(found[rule]) for rule, words in LOWER.items() if rule in found]
    bounds += [words.format(found[rule]) for rule, words in UPPER.items() if found.get(rule, fields.MOST) < fields.MOST]
    bounds += [f"a multiple of {found['multipleOf']}"] if "multipleOf" in found else []
    return ", ".join([WORDS[found["type"]], *bounds])


def _about(table: dict) -> str:
    return " ".join(table["description"].split())


def _definition(schema: dict, found: dict) -> dict:
    return schema["$defs"][found["$ref"].rpartition("/")[2]]
