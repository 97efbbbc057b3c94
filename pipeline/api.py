"""The pipeline as a library, for notebooks and scripts; docs/library.md shows it.

All names here are also those of the package: ``import pipeline; pipeline.load("my.toml")``.  Importing this module
imports no MindSpore; `run` does, in the calling process.  What is wrong with a file, a photo or a device is raised as
UserError or StoreError, with the line that the command line would print.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cache import Entries, StoreError, load_json, opened_tensors
from cache.tools.export import KINDS
from pipeline import records, stage_table, stages
from pipeline.errors import UserError
from pipeline.methods import METHODS, method_of
from pipeline.plan.needs import needed
from pipeline.plan.plan import resolve
from pipeline.plan.run_folder import RunFolder
from pipeline.plan.survey import Survey
from pipeline.process.stopping import Stopped
from pipeline.settings.experiment import Experiment
from pipeline.settings.reading import change_experiment, load_experiment

__all__ = ["Experiment", "Run", "StoreError", "Tensors", "UserError", "change", "load", "open_run", "run", "tensors"]


def load(path: Path | str = "") -> Experiment:
    """Read an experiment file; without one, the embedded default, whose folders are in the working directory.

    Raises UserError that lists every problem of the file.
    """
    return load_experiment(path)


def change(experiment: Experiment, **settings: Any) -> Experiment:
    """The experiment with other settings, checked as a file's are: ``change(own, train={"steps": 100}, seed=1)``.

    A table is given as a dict of the settings to be changed; the others stay.  Raises UserError.
    """
    return change_experiment(experiment, settings)


def run(experiment: Experiment, stage: str) -> None:
    """Do a stage, and before it what it needs and is not done yet, all in this process.

    stage: a name that ``python -m pipeline run --help`` lists, or "EncodePrompts".  The models are loaded one after the
    other, but MindSpore keeps the memory that it once took: run full-size models by Luigi, which starts a process for
    each stage.  Raises UserError or StoreError; KeyboardInterrupt after Ctrl-C or SIGTERM, with what was done kept, so
    that the same call goes on from there.
    """
    if stage not in stage_table.STAGES and stage not in stage_table.GROUPS:
        raise UserError(
            f"stage: must be one of {', '.join([*stage_table.STAGES, *stage_table.GROUPS])}, found {stage!r}"
        )
    survey = Survey(experiment)
    for name in dict.fromkeys(_with_before(stage)):
        if stages.is_done(name, survey.anew()):
            continue
        if (count := stages.num_ranks(name, experiment)) > 1:
            raise UserError(
                f"parallel.ranks = {count}: needs {count} processes; python -m pipeline run {name} starts them"
            )
        try:
            stages.run(name, experiment)
        except Stopped:
            raise KeyboardInterrupt(f"{name} was stopped; what was done is kept") from None


def _with_before(name: str) -> Iterator[str]:
    """A stage or group, after all that has to be done before it."""
    before = stage_table.GROUPS[name][1] if name in stage_table.GROUPS else stage_table.STAGES[name].after
    for each in before:
        yield from _with_before(each)
    if name in stage_table.STAGES:
        yield name


class Tensors(Mapping[str, np.ndarray]):
    """Tensors of the store by caption or file name; each is read, and its checksum verified, when it is asked for.

    A name whose tensor is not encoded yet is listed, and raises MissingEntry, a StoreError, when it is read.
    """

    def __init__(self, places: dict[str, tuple[Entries, str]]):
        self._places = places

    def __getitem__(self, name: str) -> np.ndarray:
        entries, item = self._places[name]
        return entries.read(item)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"Tensors of {', '.join(self) or 'nothing'}"


def tensors(experiment: Experiment, kind: str) -> Tensors:
    """What the store has of an experiment, as NumPy arrays; bfloat16 as ml_dtypes has it.

    kind: "pooled" (CLIP's output) or "prompts" (T5's), by caption; "latents", the VAE's posterior of each photo, means
    and then log-variances; "controls", that of each photo's condition.
    """
    if kind not in KINDS:
        raise UserError(f"kind: must be one of {', '.join(KINDS)}, found {kind!r}")
    plan = resolve(experiment, method_of(experiment))
    several = [need for need in needed(plan) if (need.role or need.recipe["kind"]) == KINDS[kind]]
    with_entries = [(need, plan.entries(need.recipe)) for need in several]
    return Tensors({source.key: (entries, source.item) for need, entries in with_entries for source in need.sources})


@dataclass(frozen=True)
class Run:
    """A run's folder, read: its settings, its numbers and its results.  Nothing is kept open."""

    path: Path

    @property
    def settings(self) -> dict:
        """All settings that the run was started with, by table."""
        return load_json(self._folder.experiment.read_bytes())

    @property
    def is_trained(self) -> bool:
        """Whether the training has ended and its result is whole."""
        return any(self._folder.is_trained(method.result_files) for method in METHODS.values())

    @property
    def result(self) -> dict:
        """What result.json says: last loss, times, the dtypes that were measured.  Raises UserError before the end."""
        return self._folder.read_result()

    @property
    def metrics(self) -> list[dict]:
        """A dict for each line of metrics.jsonl: step, loss, learning rate, times."""
        return [json.loads(line) for line in self._folder.metrics.read_text(encoding="utf-8").splitlines()]

    @property
    def records(self) -> list[dict]:
        """What each stage that worked in the folder recorded: versions, device, precision, time, memory."""
        return records.read(self.path)

    @property
    def pictures(self) -> list[Path]:
        """The pictures that were drawn; ``path / "samples.png"`` shows them side by side."""
        return sorted(path for path in self._folder.samples.glob("*.png") if "-quick-" not in path.name)

    def weights(self) -> dict[str, np.ndarray]:
        """The trained weights by name, as NumPy arrays.  Raises UserError where there are none yet."""
        names = [name for method in METHODS.values() for name in method.result_files if name.endswith(".safetensors")]
        found = [self.path / name for name in names if (self.path / name).is_file()]
        if not found:
            raise UserError(f"{self.path}: no trained weights yet; run TrainLoRA or TrainControlNet first")
        with opened_tensors(found[0]) as file:
            return {name: file.get_tensor(name) for name in file.keys()}

    @cached_property
    def _folder(self) -> RunFolder:
        return RunFolder(self.path)


def open_run(where: Experiment | Path | str) -> Run:
    """The run of an experiment, or the run in a folder, finished or not.  Raises UserError where there is none."""
    if isinstance(where, Experiment):
        path = resolve(where, method_of(where)).run.path
    else:
        path = Path(where).expanduser()
    if not RunFolder(path).experiment.is_file():
        raise UserError(f'{path}: no run; train first, with pipeline.run(experiment, "TrainLoRA")')
    return Run(path)
