"""The stages by name: when each is done, and what its process does.

`is_done` imports no MindSpore, so that the scheduler can ask; `run` is what a stage's own process calls.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from cache import NEEDS_NAME, Store, StoreError, lease, needs_text, write_atomically
from cache.core.files import make_folder
from pipeline import encode, records
from pipeline.data import indexing, survey_file
from pipeline.data.survey_file import SurveyFile
from pipeline.devices import device
from pipeline.errors import UserError
from pipeline.estimate import preflight, report
from pipeline.flux import checkpoints
from pipeline.plan import pictures
from pipeline.plan.needs import encoded, needed
from pipeline.plan.plan import CONTROLNET, LORA, has_pairs, resolve
from pipeline.plan.survey import Survey
from pipeline.process.progress import Progress
from pipeline.sampling import decode, denoise
from pipeline.settings.fields import Experiment, settings_of
from pipeline.training import measure, train

QUICK_BYTES = 1 << 30
"""Weights that are read in passing; more than that is read by GetModel, which says so."""


@dataclass(frozen=True)
class Stage:
    """``done`` says whether the stage's output is there; ``work`` makes it.

    trains: as of the `Plan` that the stage works on, together with its photos; None where it has neither yet, and may
    change what is known of them.
    """

    done: Callable[[Survey], bool]
    work: Callable
    trains: str | None = None


def is_done(name: str, survey: Survey) -> bool:
    """Whether the stage's output is there, complete, for the experiment and its files as surveyed."""
    try:
        return STAGES[name].done(_own(name, survey))
    except (UserError, StoreError, OSError):  # whatever it is, the stage's own process meets it too, and says it
        return False


def survey_for(name: str, survey: Survey) -> SurveyFile | None:
    """What the stage's process is given, so that it need not look at the photos; None where it has to."""
    own = _own(name, survey)
    is_known = STAGES[name].trains and own.photos is not None
    return own.file if is_known and own.file and own.file.is_whole else None


def _own(name: str, survey: Survey) -> Survey:
    return survey.for_controlnet if STAGES[name].trains == CONTROLNET else survey


def run(name: str, experiment: Experiment, survey: str = "") -> None:
    """Do the work of a stage in this process, and leave its record.  Raises UserError, StoreError or Stopped.

    survey: the path of a file from which photos are taken instead of looking at them.
    """
    stage = STAGES[name]
    if stage.trains is None:
        return stage.work(experiment)
    plan = resolve(experiment, stage.trains)
    of = survey_file.subject(experiment, plan.has_pairs)
    stage.work(plan, survey_file.read(survey, of) if survey else plan.photos())


# --- before the first encoder -------------------------------------------------------------------------------------


def _model_is_here(survey: Survey) -> bool:
    plan = survey.plan
    return checkpoints.unread_bytes(plan.checkpoint, plan.store.facts, plan.experiment.model.variant) < QUICK_BYTES


def _get_model(experiment: Experiment) -> None:
    """Download the model where it is the Hub's, and read all weights once for their digests."""
    if isinstance(experiment.model_path, str) and not _is_downloaded(experiment):
        checkpoints.download(experiment.model_path, experiment.model.revision, experiment.model.variant)
    plan, variant = resolve(experiment), experiment.model.variant
    facts = plan.store.facts
    if checkpoints.unread_bytes(plan.checkpoint, facts, variant) >= QUICK_BYTES:
        checkpoints.read_weights(plan.checkpoint, facts, variant)
        _check_memory(facts, checkpoints.unread_bytes(plan.checkpoint, facts, variant) < QUICK_BYTES)


def _is_downloaded(experiment: Experiment) -> bool:
    """Whether the Hub's checkpoint is here and whole: a machine without network must do with that."""
    try:
        checkpoints.local_folder(experiment.model_path, experiment.model.revision, experiment.model.variant)
    except UserError:
        return False
    return True


def _check_data(experiment: Experiment) -> None:
    """Decode every photo that is new or changed, and report all that is wrong at once."""
    if not experiment.data.images and not experiment.images.exists():
        from pipeline.synthetic import shapes

        print(f"pictures of a new word: drawing {shapes.draw_teaching(experiment.images, 'cross')}", flush=True)
    facts = Store(*experiment.stores).facts
    with Progress("check photos", 0, "photo") as progress:
        photos = indexing.index_photos(experiment.images, experiment.data.prompt, facts, progress.set)
    _check_memory(facts, indexing.remembered(photos, facts) is not None)
    print(f"{experiment.images}: {len(photos)} captioned photos, all sound", flush=True)


def _check_controls(experiment: Experiment) -> None:
    """Decode every photo and condition that is new or changed; report all that is wrong, of both, at once."""
    facts = Store(*experiment.stores).facts
    indexing.index_files(experiment.folder, experiment.sample.conditions, "sample.conditions", facts)
    if not has_pairs(experiment, CONTROLNET):
        return _check_data(experiment)
    with Progress("check pairs", 0, "file") as progress:
        pairs = indexing.index_pairs(experiment.images, experiment.data.prompt, facts, progress.set)
    _check_memory(facts, indexing.remembered_pairs(pairs, facts) is not None)
    print(f"{experiment.images}: {len(pairs)} captioned photos with their conditions, all sound", flush=True)


def _check_memory(facts, is_kept: bool) -> None:
    if not is_kept:
        raise UserError(
            f"{facts.path}: cannot keep what was learnt about the files, so that every stage would read all of them "
            "again; put [paths] store where you may write and SQLite can lock files"
        )


def _room(trains: str) -> Stage:
    """A stage that says what a training will take, and fails where a disk has no room for it."""

    def has_room(survey):
        if not _model_is_here(survey) or survey.photos is None:  # else the weights would be read here, unseen
            return False
        preflight.check_room(survey.plan, survey.photos)
        return True

    def check(plan, photos):
        print(report.as_table(preflight.of_plan(plan, photos)), flush=True)
        preflight.check_room(plan, photos)

    return Stage(has_room, check, trains)


# --- stages of a plan ---------------------------------------------------------------------------------------------


COUNTED = ("encoded", "drawn", "decoded", "steps")
"""What a stage says how many of it made."""


def _planned(
    name: str,
    done: Callable,
    work: Callable,
    trains: str = LORA,
    needs: Callable = encoded,
    again: Callable | None = None,
) -> Stage:
    """A stage whose ``done(plan, photos)`` needs a resolved experiment too; it is not done while there is none.

    The ``work(plan, photos)`` returns a folder and what the record that is left there says.  trains: as of `Plan`.
    needs: what of the store is kept from the collector while it works.  again: called in its place where it is done.
    """

    def is_done(survey):
        return _model_is_here(survey) and survey.photos is not None and done(survey.plan, survey.photos)

    def do(plan, photos):
        began = time.time()
        if done(plan, photos):
            place = plan.store.path if name.startswith("Encode") else plan.run_folder(photos)
            print(f"{name}: done already, in {place}", flush=True)
            return again(plan, photos) if again else None
        device.use(plan.device)
        with lease(plan.store.path, needs(plan, photos)):
            folder, outcome = work(plan, photos)
        if 0 in map(outcome.get, COUNTED) and records.exists(name, folder):
            return  # what it says was found when there was something to do
        records.write(name, plan, photos, folder, time.time() - began, outcome)

    return Stage(is_done, do, trains)


def _encode_clip(plan, photos):
    return plan.pooled.path, encode.encode_pooled(plan, photos)


def _encode_t5(plan, photos):
    return plan.txt.path, encode.encode_txt(plan, photos)


def _encode_images(plan, photos):
    return plan.image_needs(photos)[0].entries.path, encode.encode_latents(plan, photos)


def _encode_controls(plan, photos):
    return plan.control_needs(photos)[0].entries.path, encode.encode_controls(plan, photos)


def _train(plan, photos):
    folder = plan.run_folder(photos)
    make_folder(folder)
    write_atomically(folder / "experiment.json", json.dumps(settings_of(plan.experiment), indent=2) + "\n")
    _note_needs(plan, photos)
    return folder, train.train(plan, photos, folder)


def _measure_loss(plan, photos):
    folder = plan.run_folder(photos)
    if not pictures.is_trained(folder, plan.trains):
        name = train.NAMES[plan.trains]
        raise UserError(f"{folder}: there is no trained {name} to measure yet; run Train{name} first")
    result, path = measure.measure(plan, photos, folder), folder / measure.LOSS_NAME
    write_atomically(path, json.dumps(result, indent=2) + "\n")
    print("loss: {before:.4f} before, {after:.4f} after, ".format(**result), end="")
    print("a gain of {gain:.4f} +- {standard_error:.4f}; in ".format(**result) + str(path), flush=True)
    return folder, result


def _sample_latents(plan, photos):
    pictures.check(plan.experiment, plan.trains)
    folder = plan.run_folder(photos)
    outcome = denoise.sample(plan, photos, folder)
    _note_needs(plan, photos)
    return folder, outcome


def _note_needs(plan, photos):
    """Say in the run's folder what it needs of the store: the pictures of the experiment that was drawn last too."""
    path, text = plan.run_folder(photos) / NEEDS_NAME, needs_text(needed(plan, photos))
    if not path.is_file() or path.read_text() != text:
        write_atomically(path, text)


def _sample(plan, photos):
    pictures.check(plan.experiment, plan.trains)
    folder = plan.run_folder(photos)
    return folder, decode.decode(plan, photos, folder)


def _latents_are_in(plan, photos) -> bool:
    return pictures.is_asked(plan.experiment, plan.trains) and not any(
        each.missing() for each in pictures.all_series(plan, photos)
    )


def _pictures_are_there(plan, photos) -> bool:
    return pictures.is_asked(plan.experiment, plan.trains) and decode.is_done(plan, photos)


def _captions_are_in(kind: str) -> Callable:
    return lambda plan, photos: not getattr(plan, kind).missing(plan.captions(photos).items)


def _images_are_in(plan, photos) -> bool:
    return not any(need.entries.missing(need.items) for need in plan.image_needs(photos))


def _controls_are_in(plan, photos) -> bool:
    return not any(need.entries.missing(need.items) for need in pictures.control_needs(plan, photos))


def _is_trained(plan, photos) -> bool:
    return pictures.is_trained(plan.run_folder(photos), plan.trains)


def _is_measured(plan, photos) -> bool:
    return (plan.run_folder(photos) / measure.LOSS_NAME).is_file()


STAGES = {
    "GetModel": Stage(_model_is_here, _get_model),
    "CheckData": Stage(lambda survey: survey.photos is not None, _check_data),
    "CheckControls": Stage(
        lambda survey: survey.for_controlnet.photos is not None and survey.has_sample_conditions, _check_controls
    ),
    "CheckRoom": _room(LORA),
    "CheckControlNetRoom": _room(CONTROLNET),
    "EncodeCLIP": _planned("EncodeCLIP", _captions_are_in("pooled"), _encode_clip),
    "EncodeT5": _planned("EncodeT5", _captions_are_in("txt"), _encode_t5),
    "EncodeImages": _planned("EncodeImages", _images_are_in, _encode_images),
    "EncodeControls": _planned("EncodeControls", _controls_are_in, _encode_controls, CONTROLNET),
    "TrainLoRA": _planned("TrainLoRA", _is_trained, _train),
    "TrainControlNet": _planned("TrainControlNet", _is_trained, _train, CONTROLNET),
    "MeasureLoss": _planned("MeasureLoss", _is_measured, _measure_loss),
    "MeasureControlNet": _planned("MeasureControlNet", _is_measured, _measure_loss, CONTROLNET),
    "SampleLatents": _planned("SampleLatents", _latents_are_in, _sample_latents, LORA, needed, _note_needs),
    "SampleControlNetLatents": _planned(
        "SampleControlNetLatents", _latents_are_in, _sample_latents, CONTROLNET, needed, _note_needs
    ),
    "Sample": _planned("Sample", _pictures_are_there, _sample, needs=needed),
    "SampleControlNet": _planned("SampleControlNet", _pictures_are_there, _sample, CONTROLNET, needed),
}
