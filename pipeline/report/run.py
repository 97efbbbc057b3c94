"""What a run's folder says of itself, as far as it can be read; what is missing or damaged is named."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cache import StoreError, load_json
from cache.core.needs import NotedNeed, noted_needs
from pipeline.errors import UserError
from pipeline.methods import LORA
from pipeline.plan.method import Method
from pipeline.plan.run_folder import FOLDER, RunFolder
from pipeline.report.metrics import Metrics, read_metrics
from pipeline.runs import reading
from pipeline.settings.experiment import Experiment
from pipeline.settings.fields import Settings
from pipeline.settings.schema import adapter, checked

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What result.json says."""

    loss: float | None = None
    steps: int | None = None
    step_seconds: float | None = None
    data_wait_share: float | None = None
    trained_parameters: int | None = None
    mode: str = ""


@dataclass(frozen=True)
class Measured:
    """What loss.json says: means over pairs of noise and noise level."""

    pairs: int
    before: float
    after: float
    gain: float
    standard_error: float


@dataclass(frozen=True)
class Row:
    """A line of samples.json: files are named relative to the run's folder.  steps: before the last one, by number."""

    prompt: str
    seed: int
    base: str = ""
    trained: str = ""
    condition: str = ""
    steps: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """What samples.json says, or quick.json."""

    pictures: list[Row]
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    resolution: int | None = None


@dataclass(frozen=True)
class Record:
    """What a stage has left; see `pipeline.records`."""

    stage: str
    seconds: float
    finished: str
    device: str = ""
    shard: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """A run for its report.  known: what its folder says.  experiment: None where experiment.json cannot be read.

    has_origin: whether the folder is known that relative paths of the experiment are relative to.
    looks: quick looks, of what is not decoded yet.
    missing: a line for each thing that cannot be shown, for people.
    """

    known: reading.Run
    experiment: Experiment | None
    has_origin: bool
    metrics: Metrics
    result: Result | None
    measured: Measured | None
    listing: Listing | None
    looks: Listing | None
    records: list[Record]
    needs: list[NotedNeed]
    missing: list[str]

    @property
    def folder(self) -> RunFolder:
        return self.known.folder

    @property
    def method(self) -> Method:
        return self.known.method or LORA

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def last_step(self) -> int:
        return self.known.step

    def record(self, stage: str) -> Record | None:
        return next((record for record in self.records if record.stage == stage), None)


def read_run(path: Path) -> Run:
    """Raises UserError where the folder is none, or is no run's."""
    known = reading.read_run(Path(os.path.abspath(path.expanduser())))
    folder = known.folder
    if not folder.path.is_dir():
        raise UserError(f"{folder.path}: no such folder; name a run's folder, as RUNS/NAME-0123456789ab")
    if known.state == reading.FOREIGN:
        raise UserError(f"{folder.path}: no run's folder; name one as RUNS/NAME-0123456789ab")
    missing = [known.problem] if known.problem else []
    experiment, has_origin = _experiment(known, missing)
    metrics = read_metrics(folder.metrics)
    missing += metrics.problems
    run = Run(
        known,
        experiment,
        has_origin,
        metrics,
        _read(folder.result, Result, missing),
        _read(folder.loss, Measured, missing),
        _read(folder.samples_list, Listing, missing),
        _read(folder.quick_list, Listing, missing),
        read_records(folder.path, missing),
        _needs(folder, missing),
        missing,
    )
    _note_absent(run)
    return run


def _experiment(known: reading.Run, missing: list[str]) -> tuple[Experiment | None, bool]:
    """Of a version that knew fewer settings, with the defaults of the others."""
    if not known.settings:
        return None, False
    document = {key: value for key, value in known.settings.items() if key != FOLDER}
    settings, problems = checked(Settings, document)
    if problems:
        missing.append(f"experiment.json: {problems[0]}; settings, photos and the command are left out")
        return None, False
    origin = known.settings.get(FOLDER)
    folder = Path(origin) if isinstance(origin, str) else None
    return Experiment(**vars(settings), folder=folder or Path(".")), folder is not None


def _needs(folder: RunFolder, missing: list[str]) -> list[NotedNeed]:
    try:
        return noted_needs(folder.needs)
    except FileNotFoundError:
        return []
    except (StoreError, OSError) as error:
        missing.append(f"needs.json: cannot be read, so that nothing is known of the encoders: {error}")
        return []


def read_records(folder: Path, missing: list[str]) -> list[Record]:
    """The records in a folder, of a run or of entries of the store, in the order in which their stages finished."""
    found = [_read(path, Record, missing) for path in sorted((folder / "records").glob("*.json"))]
    return sorted(filter(None, found), key=lambda record: record.finished)


def _read(path: Path, kind: Callable[..., T], missing: list[str]) -> T | None:
    """None where there is no such file, and where it cannot be read, which is noted."""
    try:
        return adapter(kind).validate_python(load_json(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        missing.append(f"{path.name}: cannot be read: {error.strerror}")
    except ValueError as error:  # pydantic's too
        missing.append(f"{path.name}: damaged: {' '.join(str(error).split())[:160]}")
    return None


def _note_absent(run: Run) -> None:
    """What a whole run has and this one has not, in the order in which it would come."""
    stages, folder = run.method.stages, run.folder
    if not folder.metrics.exists():
        run.missing.append("metrics.jsonl: not there; there are no curves")
    if run.result is None and not folder.result.exists():
        run.missing.append(f"The training has not ended: {stages.train} goes on from its newest checkpoint.")
    elif run.listing is None and not folder.samples_list.exists():
        run.missing.append(f"No samples: {stages.decode} draws the prompts of [sample].")
    if run.measured is None and run.result is not None and not folder.loss.exists():
        run.missing.append(f"The loss before and after is not measured: {stages.measure} does.")
