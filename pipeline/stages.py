"""The stages by name: when each is done, and what its process does.

`is_done` imports no MindSpore, so that the scheduler can ask; `run` is what a stage's own process calls.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from cache import Store, StoreError, caption_item, write_atomically
from cache.files import make_folder
from pipeline import data, device, models
from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.photos import list_photos
from pipeline.progress import Progress
from pipeline.recipes import Plan, resolve

RESULT_NAMES = ("result.json", "pytorch_lora_weights.safetensors")
LOSS_NAME = "loss.json"


class Survey:
    """An experiment's photos and plan, looked at once: to list a million photos takes a minute or two.

    What the store and the run folder hold is looked up anew each time it is asked for.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

    @cached_property
    def photos(self) -> list[data.IndexedPhoto] | None:
        """The indexed photos, or None while any of them is faulty or has not been checked as it now is."""
        photos, problems = list_photos(self.experiment.images, self.experiment.data.prompt)
        facts = Store(self.experiment.store).facts
        if problems or not data.inspected(photos, facts):
            return None
        return data.inspect(photos, facts)[0]

    @cached_property
    def plan(self) -> Plan:
        return resolve(self.experiment)


@dataclass(frozen=True)
class Stage:
    """``done`` says whether the stage's output is there; ``work`` makes it."""

    done: Callable[[Survey], bool]
    work: Callable[[Experiment], None]


def is_done(name: str, survey: Survey) -> bool:
    """Whether the stage's output is there, complete, for the experiment and its files as surveyed."""
    try:
        return STAGES[name].done(survey)
    except (UserError, StoreError):  # whatever it is, the stage's own process meets it too, and says it
        return False


def run(name: str, experiment: Experiment) -> None:
    """Do the work of a stage in this process, and leave its record.  Raises UserError, StoreError or Stopped."""
    STAGES[name].work(experiment)


# --- before the first encoder -------------------------------------------------------------------------------------


def _model_is_here(survey: Survey) -> bool:
    return bool(survey.plan.checkpoint)


def _get_model(experiment: Experiment) -> None:
    """Write the embedded model, or download the Hub's."""
    if not experiment.model.path:
        from pipeline import tiny

        device.use("CPU")
        print(f"embedded model: writing {tiny.write_tiny_model(experiment.model_path)}", flush=True)
    elif isinstance(experiment.model_path, Path):
        models.local_folder(experiment.model_path)  # raises: a local folder cannot be made
    else:
        models.download(experiment.model_path, experiment.model.revision, experiment.model.variant)


def _check_data(experiment: Experiment) -> None:
    """Decode every photo that is new or changed, and report all that is wrong at once."""
    if not experiment.data.images and not experiment.images.exists():
        from pipeline import shapes

        print(f"embedded pictures: drawing {shapes.draw_shapes(experiment.images)}", flush=True)
    with Progress("check photos", 0, "photo") as progress:
        photos = data.index_photos(
            experiment.images, experiment.data.prompt, Store(experiment.store).facts, progress.set
        )
    print(f"{experiment.images}: {len(photos)} captioned photos, all sound", flush=True)


# --- stages of a plan ---------------------------------------------------------------------------------------------


def _planned(name: str, done: Callable, work: Callable) -> Stage:
    """A stage whose ``done(plan, photos)`` and ``work(plan, photos, folder)`` need a resolved experiment."""

    def is_done(survey):
        return survey.photos is not None and done(survey.plan, survey.photos)

    def do(experiment):
        began = time.time()
        plan = resolve(experiment)
        photos = plan.photos()
        folder = plan.run_folder(photos)
        device.use(plan.device)
        make_folder(folder)
        outcome = work(plan, photos, folder)
        _write_record(name, plan, folder, time.time() - began, outcome)

    return Stage(is_done, do)


def _encoding(kind: str) -> Callable:
    def work(plan, photos, folder):
        from pipeline import encode

        return {"recipe": getattr(plan, kind).id, "encoded": getattr(encode, f"encode_{kind}")(plan, photos)}

    return work


def _train_lora(plan, photos, folder):
    from pipeline import train

    return train.train_lora(plan, photos, folder)


def _measure_loss(plan, photos, folder):
    from pipeline import train

    result = train.measure_lora(plan, photos, folder)
    write_atomically(folder / LOSS_NAME, json.dumps(result, indent=2) + "\n")
    return result


def _captions_are_in(kind: str) -> Callable:
    return lambda plan, photos: not getattr(plan, kind).missing(caption_item(photo.caption) for photo in photos)


def _images_are_in(kind: str) -> Callable:
    return lambda plan, photos: not getattr(plan, kind).missing(photo.digest for photo in photos)


def _files_exist(*names: str) -> Callable:
    return lambda plan, photos: all((plan.run_folder(photos) / name).is_file() for name in names)


STAGES = {
    "GetModel": Stage(_model_is_here, _get_model),
    "CheckData": Stage(lambda survey: survey.photos is not None, _check_data),
    "EncodeCLIP": _planned("EncodeCLIP", _captions_are_in("pooled"), _encoding("pooled")),
    "EncodeT5": _planned("EncodeT5", _captions_are_in("txt"), _encoding("txt")),
    "EncodeImages": _planned("EncodeImages", _images_are_in("latents"), _encoding("latents")),
    "TrainLoRA": _planned("TrainLoRA", _files_exist(*RESULT_NAMES), _train_lora),
    "MeasureLoss": _planned("MeasureLoss", _files_exist(LOSS_NAME), _measure_loss),
}


# --- records ------------------------------------------------------------------------------------------------------


def _write_record(name: str, plan: Plan, folder: Path, seconds: float, outcome: dict) -> None:
    """Leave records/NAME.json in the run folder: versions, device, policy, counts, time, peak memory."""
    make_folder(folder / "records")
    record = {
        "stage": name,
        "outcome": outcome,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": device.peak_memory_bytes(plan.device),
        "device": plan.device,
        "precision": asdict(plan.precision),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomically(folder / "records" / f"{name}.json", json.dumps(record, indent=2) + "\n")


VERSIONED = ("mindspore", "mindone", "transformers", "zarr", "numpy")


def records(folder: Path) -> list[dict]:
    """The records of a run folder, in the order the stages finished."""
    found = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    return sorted(found, key=lambda record: record["finished"])
