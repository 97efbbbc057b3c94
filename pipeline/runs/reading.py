"""A run as its folder tells it: what it trains, how far it came, its settings and numbers.  Imports no MindSpore.

What is damaged or cannot be read is said in `Run.problem`; only what is asked for later, as `Run.metrics`, raises.
"""

import calendar
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache import NEEDS_NAME, StoreError, load_json, opened_tensors
from cache.core.needs import noted_needs
from pipeline.errors import UserError
from pipeline.methods import METHODS
from pipeline.plan.method import Method
from pipeline.plan.needs import IMAGES
from pipeline.plan.run_folder import RunFolder, step_of
from pipeline.plan.whole import is_whole
from pipeline.runs import metrics_file

FINISHED, UNFINISHED, DAMAGED, FOREIGN = "finished", "unfinished", "damaged", "not a run"
FOLDER_NAME = re.compile(r"(?P<name>.+)-[0-9a-f]{12}")
MARKS = "experiment.json", "result.json", "checkpoints", NEEDS_NAME
"""What a run's folder has from its beginning or has kept; a folder without any of them is none of ours."""


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    state: one of those above.  problem: what is damaged or cannot be read, empty where all is well.
    method: what it trains; None where nothing of the run says so.  settings: by table, as in experiment.json; empty
    where that cannot be read.  step, steps: how far it came, of how many; None where that is not known, as with
    ``epochs`` before the end.  loss: of the last step that was written.  result: what result.json says, empty before
    the end.  when: when it was trained last, in seconds since 1970.  photos: digests of the files it trains on.
    """

    folder: RunFolder
    state: str
    problem: str = ""
    method: Method | None = None
    settings: dict[str, Any] = field(default_factory=dict, repr=False)
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    result: dict[str, Any] = field(default_factory=dict, repr=False)
    when: float = 0.0
    photos: frozenset[str] = field(default_factory=frozenset, repr=False)

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        """That of the experiment; of a folder that is called otherwise, the folder's."""
        match = FOLDER_NAME.fullmatch(self.path.name)
        return match["name"] if match else self.path.name

    @property
    def checkpoint(self) -> int | None:
        """The step of the newest checkpoint."""
        return max(map(step_of, self.folder.list_checkpoints()), default=None)

    @property
    def picture(self) -> Path | None:
        """The pictures side by side, or quick looks that are newer; None where nothing has been drawn."""
        found = [path for path in (self.folder.samples_grid, self.folder.quick_grid) if is_whole(path)]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All that was written of its steps: "step", "loss", "lr", "grad_norm", ...  Raises OSError."""
        return metrics_file.read(self.folder.metrics)


def runs_in(folder: Path) -> list[Run]:
    """What is in a folder of runs, by name and then by time; with a line for each folder that is none of ours.

    Raises OSError where the folder is not there or cannot be looked into.
    """
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    found = [read_run(folder / name) for name in names if (folder / name).is_dir()]
    return sorted(found, key=lambda run: (run.state == FOREIGN, run.name, run.when, run.path.name))


def read_run(path: Path) -> Run:
    """The run in a folder; raises nothing: what cannot be read is its ``problem``."""
    folder = RunFolder(path)
    try:
        names = os.listdir(path)
        if not set(MARKS) & set(names):
            return Run(folder, FOREIGN)
        return _read(folder)
    except OSError as error:
        name = Path(error.filename or path).name
        return Run(folder, DAMAGED, f"{name}: cannot be read: {error.strerror}")


def _read(folder: RunFolder) -> Run:
    problems: list[str] = []
    settings = _kept(problems, lambda: _settings(folder)) or {}
    result = _kept(problems, folder.read_result) or {} if folder.result.exists() else {}
    photos = _kept(problems, lambda: photos_in(folder)) or frozenset()
    method, line = _method(folder, result), metrics_file.last(folder.metrics) or {}
    if result and not (method and folder.is_trained(method.result_files)):
        files = method.result_files if method else ()
        missing = [name for name in files if not is_whole(folder.path / name)] or ["the result"]
        problems.append(f"{', '.join(missing)}: missing or damaged")
    state = DAMAGED if problems else FINISHED if result else UNFINISHED
    train = settings.get("train", {})
    asked = None if train.get("epochs") else _number(train.get("steps"))
    checkpoints = [step_of(each) for each in folder.list_checkpoints()]
    of = _number(result.get("steps")) or asked
    return Run(
        folder,
        state,
        "; ".join(problems),
        method,
        settings,
        step=int(_number(result.get("steps")) or max([*checkpoints, line.get("step", 0)])),
        steps=int(of) if of else None,
        loss=_number(result.get("loss", line.get("loss"))),
        result=result,
        when=_when(folder, method),
        photos=photos,
    )


def _number(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _kept(problems: list[str], read: Callable) -> Any:
    """What ``read`` returns; where it cannot, None, and why is added to the problems."""
    try:
        return read()
    except (UserError, StoreError) as error:
        problems.append(_without_folder(str(error)))
        return None


def _without_folder(message: str) -> str:
    """A message about a file, with the file's name alone: whoever shows it has named the folder."""
    path, colon, what = message.partition(": ")
    return f"{Path(path).name}{colon}{what}"


def _settings(folder: RunFolder) -> dict[str, Any]:
    try:
        found = load_json(folder.experiment.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        why = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise UserError(f"{folder.experiment}: {why}; running the training again writes it") from None
    if not (isinstance(found, dict) and isinstance(found.get("train"), dict)):
        raise UserError(f"{folder.experiment}: has no settings; running the training again writes it")
    return found


def photos_in(folder: RunFolder) -> frozenset[str]:
    """The digests of the photos that a run trains on, by its needs.json; none where it has none yet.

    Raises StoreError where the file is damaged, OSError where it cannot be read.
    """
    try:
        rows = noted_needs(folder.needs)
    except FileNotFoundError:
        return frozenset()
    return frozenset(item for row in rows if row.stage == IMAGES for item in row.items)


def _method(folder: RunFolder, result: dict) -> Method | None:
    """By what the result says was measured, else by a checkpoint, else by the files that are there."""
    measured = result.get("precision")
    told = [*(measured if isinstance(measured, dict) else ()), *(key.partition(".")[0] for key in identity_in(folder))]
    named = [METHODS[name] for name in told if name in METHODS]
    made = [each for each in METHODS.values() if any((folder.path / name).exists() for name in each.result_files)]
    return next(iter([*named, *made]), None)


def identity_in(folder: RunFolder) -> dict[str, str]:
    """What the newest checkpoint that can be read says the run is, by dotted field; nothing where there is none."""
    from safetensors import SafetensorError

    for path in folder.list_checkpoints():
        try:
            with opened_tensors(path) as file:
                found = load_json((file.metadata() or {})["identity"])
            if isinstance(found, dict):
                return found
        except (OSError, ValueError, KeyError, SafetensorError):
            continue
    return {}


def _when(folder: RunFolder, method: Method | None) -> float:
    """As the training's record has it; of one that has not ended, when a file of it was last written."""
    try:
        record = load_json((folder.path / "records" / f"{method.stages.train}.json").read_bytes()) if method else {}
        return calendar.timegm(time.strptime(record["finished"], "%Y-%m-%dT%H:%M:%SZ"))
    except (OSError, ValueError, KeyError, TypeError):
        files = folder.metrics, folder.experiment, folder.result
        return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)
