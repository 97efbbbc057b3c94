"""The experiments of a sweep: every combination of the values that were asked for, each with a name that says them."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from cache import digest
from pipeline.errors import UserError
from pipeline.methods import method_of
from pipeline.runs.differences import short_name
from pipeline.settings.experiment import Experiment, settings_of
from pipeline.settings.questions import questions
from pipeline.settings.reading import examined
from pipeline.settings.values import MOST_OF_A_NAME
from pipeline.sweep.asked import Axis

MOST_COMBINATIONS = 1000
MOST_OF_A_VALUE = 30
"""Bytes of a value in a name."""


@dataclass(frozen=True)
class Combination:
    """values: by the setting's name.  name: what tells it from others, "rank=4,seed=1"; fit for a file's name."""

    name: str
    values: dict[str, Any]
    experiment: Experiment


def combinations(experiment: Experiment, axes: Sequence[Axis]) -> list[Combination]:
    """Every combination, the last axis fastest.  Raises UserError that lists every problem of any of them."""
    count = len(list(itertools.islice(itertools.product(*(axis.rows for axis in axes)), MOST_COMBINATIONS + 1)))
    if count > MOST_COMBINATIONS:
        raise UserError(
            f"more than {MOST_COMBINATIONS:,} combinations; a training each is hardly meant, name fewer values"
        )
    found, problems = [], dict[str, None]()
    for rows in itertools.product(*(axis.rows for axis in axes)):
        values = {name: value for axis, row in zip(axes, rows) for name, value in zip(axis.names, row)}
        changed, wrong = _changed(experiment, values)
        problems |= dict.fromkeys(wrong)
        if changed is not None:
            found.append(_named(changed, values))
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{len(problems)} {noun} in what is to be swept", *problems]))
    return found


def asked_about(several: Sequence[Combination]) -> list[str]:
    """What may not be meant, each line once, whichever combinations it is about."""
    lines = dict.fromkeys(
        line for each in several for line in questions(each.experiment, method_of(each.experiment).name)
    )
    swept = {name for each in several for name in each.values}
    if "lora.rank" in swept and "lora.alpha" not in swept:
        ranks = list(dict.fromkeys(str(each.values["lora.rank"]) for each in several))
        alpha = several[0].experiment.lora.alpha
        lines = {line: None for line in lines if not line.startswith("lora.alpha")}
        lines[
            f"lora.alpha stays {alpha:g} while lora.rank changes, so the LoRA's scale, alpha / rank, changes too; "
            f"--with lora.alpha={','.join(ranks)} behind --set lora.rank keeps it at 1"
        ] = None
    return list(lines)


def _changed(experiment: Experiment, values: Mapping[str, Any]) -> tuple[Experiment | None, list[str]]:
    document = settings_of(experiment)
    for name, value in values.items():
        *tables, last = name.split(".")
        table = document
        for each in tables:
            table[each] = dict(table[each]) if isinstance(table.get(each), dict) else {}
            table = table[each]
        table[last] = value
    settings, problems = examined(document)
    if problems:
        return None, problems
    every = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    tables = [*experiment.tables, *(name.partition(".")[0] for name in values)]
    return Experiment(**every, folder=experiment.folder, tables=tuple(dict.fromkeys(tables))), []


def _word(value: Any) -> str:
    """A value in a name, no two values with the same: a digest stands behind what is not all there."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        number = Decimal(repr(value)).normalize()
        return f"{number:e}" if 0 < abs(value) < 1e-2 else f"{number:f}"
    if isinstance(value, list | tuple) and value:
        words = "+".join(map(_word, value))
        return words if len(value) > 1 else f"{words}+"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    word = re.sub(r"[^\w.-]+", "_", text)
    return word if word == text and len(word) <= MOST_OF_A_VALUE else _cut(word, MOST_OF_A_VALUE, text)


def _cut(word: str, room: int, text: str) -> str:
    """At most ``room`` bytes of a word, with some letters of the digest of what it stands for."""
    digits = digest(text.encode())[:6]
    return f"{word.encode()[: max(0, room - 7)].decode(errors='ignore')}-{digits}"


def _named(experiment: Experiment, values: Mapping[str, Any]) -> Combination:
    """With the values as the schema has read them: 4 and 4.0 are the same alpha, and 1e-4 is 0.0001."""
    read = {name: _setting(settings_of(experiment), name) for name in values}
    name = ",".join(f"{short_name(key)}={_word(value)}" for key, value in read.items())
    room = MOST_OF_A_NAME - len(f"{experiment.name}-".encode())
    name = name if len(name.encode()) <= room else _cut(name, room, json.dumps(read))
    return Combination(name, read, dataclasses.replace(experiment, name=f"{experiment.name}-{name}"))


def _setting(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings[part]
    return settings
