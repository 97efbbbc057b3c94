"""The folder of a run: what its files are called, and what says that the run is done.  Imports no MindSpore.

RUNS/NAME-0123456789ab/
    experiment.json      all settings, as they were read; the folder that paths in them are relative to
    needs.json           what the run needs of the store; the collector keeps that
    metrics.jsonl        a line of numbers every few steps; tensorboard/ has them too
    checkpoints/         step-000500.safetensors, see `pipeline.training.checkpoint`
    records/             STAGE.json of every stage that worked here
    result.json          written last: a run that has it, and its method's files, is trained
    loss.json            what MeasureLoss found
    steps/               step-000100/ and so on: the result as it was then, where pictures are drawn while it trains
    samples/             the pictures; samples.json lists them, samples.png shows them side by side; quick.json and
                         quick.png: quick looks, until there are pictures
    report.html          all of it on one page
and the method's files: pytorch_lora_weights.safetensors of a LoRA, controlnet/ of a ControlNet.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cache import NEEDS_NAME, load_json
from pipeline.errors import UserError
from pipeline.plan.whole import is_whole

VERSION = 1
"""Of the formats in a run's folder, in result.json.  Raise it when an older version could misread a file."""

FOLDER = "folder"
"""Key of experiment.json besides the settings: what relative paths in them are relative to."""

CHECKPOINT = re.compile(r"step-(\d{6,})\.safetensors")
STEP = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class RunFolder:
    """Paths in the folder ``path``, which need not be there."""

    path: Path

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.json"

    @property
    def needs(self) -> Path:
        return self.path / NEEDS_NAME

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def meeting(self) -> Path:
        """By which several ranks find each other, while they start."""
        return self.path / ".ranks"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def loss(self) -> Path:
        return self.path / "loss.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def samples_list(self) -> Path:
        return self.path / "samples.json"

    @property
    def samples_grid(self) -> Path:
        return self.path / "samples.png"

    @property
    def quick_list(self) -> Path:
        return self.path / "quick.json"

    @property
    def quick_grid(self) -> Path:
        return self.path / "quick.png"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def is_trained(self, result_files: Iterable[str]) -> bool:
        """Whether the training has ended and all that it made is there, whole.  result_files: of its method."""
        return is_whole(self.result) and all(is_whole(self.path / name) for name in result_files)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06}.safetensors"

    def list_checkpoints(self) -> list[Path]:
        """The checkpoint files, newest first.  Raises OSError where the folder is there and cannot be looked into."""
        try:
            names = os.listdir(self.checkpoints)
        except FileNotFoundError:
            return []
        return sorted(map(self.checkpoints.joinpath, filter(CHECKPOINT.fullmatch, names)), key=step_of, reverse=True)

    def step(self, step: int) -> Path:
        """The folder of the result as it was after a step; as the run's own folder, to whoever reads results."""
        return self.path / "steps" / f"step-{step:06}"

    def list_steps(self, result_files: Iterable[str]) -> list[int]:
        """The steps of which there is a result, whole, in order."""
        files = tuple(result_files)
        found = [(int(match[1]), path) for path in self.path.glob("steps/*") if (match := STEP.fullmatch(path.name))]
        return sorted(step for step, path in found if all(is_whole(path / name) for name in files))

    def others(self) -> list["RunFolder"]:
        """The runs beside this one that have checkpoints."""
        found = {path.parent for path in self.path.parent.glob("*/checkpoints")}
        return [RunFolder(path) for path in sorted(found) if path != self.path]

    def read_result(self) -> dict:
        """What result.json says.  Raises UserError where it is damaged, or of a newer version of this package."""
        try:
            found = load_json(self.result.read_bytes())
            if not isinstance(version := found.get("version", 1), int):
                raise ValueError(f"version {version!r} is no number")
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{self.result}: cannot be read: {error}; remove it and run the training again") from None
        if version > VERSION:
            raise UserError(
                f"{self.result}: format {version} of a newer version of this package, which reads up to {VERSION}; "
                "update it"
            )
        return found


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint file, by its name."""
    match = CHECKPOINT.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])
