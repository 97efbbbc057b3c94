"""``python -m pipeline runs``: the runs in a folder, and what differs between those of one name."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cache import printable
from cache.terminal.places import shown
from pipeline.errors import UserError
from pipeline.runs.differences import differing_settings
from pipeline.runs.reading import DAMAGED, FINISHED, FOREIGN, MARKS, Run, read_run, runs_in
from pipeline.settings.reading import load_experiment

INDENT = "    "
MOST_OF_A_VALUE = 60
"""Characters of a setting's value, such as a list of prompts."""

Differences = Sequence[dict[str, Any]]


def find(place: str) -> list[Run]:
    """The runs that ``place`` names: an experiment file, whose [paths] runs is looked into; a folder of runs; or a run.

    "" is the embedded default.  Raises UserError where there is none of these.
    """
    folder = Path(place).expanduser()
    if place and folder.is_dir():
        return [read_run(folder)] if any((folder / name).exists() for name in MARKS) else runs_in(folder)
    if place and not place.endswith(".toml") and not folder.exists():
        raise UserError(f"{place}: no such folder of runs, and no experiment file")
    runs = load_experiment(place).runs
    try:
        return runs_in(runs)
    except FileNotFoundError:
        raise UserError(f"{shown(runs)}: no runs yet; a training makes the folder") from None


def differences(runs: Sequence[Run]) -> Differences:
    """What differs between the runs of one name, of each run."""
    groups = itertools.groupby(runs, key=lambda run: run.name)
    return [settings for _, group in groups for settings in differing_settings(list(group))]


def as_json(runs: Sequence[Run]) -> str:
    return json.dumps([_row(run, differs) for run, differs in zip(runs, differences(runs))], indent=2)


def _row(run: Run, differs: dict[str, Any]) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(run.when)) if run.when else None
    return {
        "run": run.path.name,
        "folder": str(run.path),
        "name": run.name,
        "trains": run.method.name if run.method else None,
        "state": run.state,
        "problem": run.problem,
        "when": when,
        "step": run.step,
        "steps": run.steps,
        "loss": run.loss,
        "photos": len(run.photos),
        "picture": str(run.picture) if run.picture else None,
        "differs": differs,
        "settings": run.settings,
    }


def as_lines(runs: Sequence[Run]) -> Iterator[str]:
    """For people: of each run its name, date, state and loss; below them what is wrong, what differs, its picture."""
    names = [printable(run.path.name) for run in runs]
    width = max(map(len, names), default=0)
    for name, run, differs in zip(names, runs, differences(runs)):
        about = run.problem, ", ".join(f"{key} {_value(value)}" for key, value in differs.items())
        picture = shown(run.picture) if run.picture else ""
        yield f"{name:<{width}}  {_state(run)}"
        yield from (INDENT + printable(text) for text in (*about, picture) if text)


def _state(run: Run) -> str:
    if run.state == FOREIGN:
        return FOREIGN
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.when)) if run.when else " " * 16
    of = f" of {run.steps:,}" if run.steps else ""
    far = f"{FINISHED}, {run.step:,} steps" if run.state == FINISHED else f"at step {run.step:,}{of}"
    loss = f"loss {run.loss:.4f}" if run.loss is not None else ""
    return f"{when}  {DAMAGED if run.state == DAMAGED else far:<24}  {loss}".rstrip()


def _value(value: object) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_OF_A_VALUE else f"{text[: MOST_OF_A_VALUE - 3]}..."
