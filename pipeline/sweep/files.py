"""The folder of a sweep, beside the experiment file: a file for each experiment, and the list that Luigi's task reads.

NAME-sweep/
    learning_rate=1e-4,rank=4.toml   one experiment, which runs by itself too
    sweep.json                       the tasks and the files of the last command
    report.html                      all of its runs on one page
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cache import load_json, write_atomically
from cache.terminal.places import shown
from pipeline.errors import UserError
from pipeline.settings.experiment import Experiment
from pipeline.settings.written import as_toml, moved
from pipeline.sweep.combinations import Combination

LIST = "sweep.json"


@dataclass(frozen=True)
class Sweep:
    """path: of the list.  tasks: what is run of each experiment.  experiments: their files."""

    path: Path
    tasks: tuple[str, ...]
    experiments: tuple[Path, ...]

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def report(self) -> Path:
        return self.path.with_name("report.html")


def folder_of(experiment: Experiment) -> Path:
    return experiment.folder / f"{experiment.name}-sweep"


def write(experiment: Experiment, several: Sequence[Combination], tasks: Sequence[str]) -> Sweep:
    """Write the files of a sweep; those of other sweeps of the same experiment stay."""
    folder = folder_of(experiment)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{each.name}.toml" for each in several]
    for path, each in zip(paths, several):
        command = f"luigi --module tasks {tasks[0]} --experiment {shlex.quote(shown(path))}"
        head = f"# Written by python -m tasks sweep, and again by the next one.  By itself:\n# {command}\n\n"
        write_atomically(path, head + as_toml(moved(each.experiment, folder)))
    sweep = Sweep(folder / LIST, tuple(tasks), tuple(paths))
    said = {"tasks": sweep.tasks, "experiments": [path.name for path in paths]}
    write_atomically(sweep.path, json.dumps(said, indent=2) + "\n")
    return sweep


def read(path: Path) -> Sweep:
    """Raises UserError where it cannot be read."""
    try:
        found = load_json(path.read_bytes())
        return Sweep(path, tuple(found["tasks"]), tuple(path.with_name(name) for name in found["experiments"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {why}; python -m tasks sweep writes it") from None
