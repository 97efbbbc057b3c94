"""What is looked at before the first encoder runs: the model is here, photos and conditions are sound."""

from collections.abc import Sequence

from cache import FileFacts, Store
from cache.terminal.places import shown
from pipeline.data import findings, indexing
from pipeline.data.indexing import IndexedPhoto
from pipeline.errors import UserError
from pipeline.flux import pretrained
from pipeline.plan import data_report
from pipeline.plan.data_report import DataReport
from pipeline.plan.plan import Plan
from pipeline.process.progress import Progress, say
from pipeline.settings.experiment import Experiment


def model_is_here(experiment: Experiment) -> bool:
    """Whether the pretrained model is on this machine, and the digests of its weights are known or soon are.

    Raises UserError where there is no such model.
    """
    return pretrained.are_weights_known(_model_folder(experiment), _facts(experiment), *experiment.model_weights)


def get_model(experiment: Experiment) -> None:
    """Download the model where it is the Hub's, and read all weights once for their digests."""
    if isinstance(experiment.model_path, str) and not _is_downloaded(experiment):
        pretrained.download(experiment.model_path, experiment.model.revision, *experiment.model_weights)
    folder, facts, weights = _model_folder(experiment), _facts(experiment), experiment.model_weights
    if not pretrained.are_weights_known(folder, facts, *weights):
        pretrained.read_weights(folder, facts, *weights)
        _check_memory(facts, pretrained.are_weights_known(folder, facts, *weights))


def _model_folder(experiment: Experiment):
    return pretrained.local_folder(experiment.model_path, experiment.model.revision, *experiment.model_weights)


def _is_downloaded(experiment: Experiment) -> bool:
    """Whether the Hub's model is here and whole: a machine without network must do with that."""
    try:
        _model_folder(experiment)
    except UserError:
        return False
    return True


def check_data(experiment: Experiment) -> None:
    """Decode every photo that is new or changed, and report all that is wrong at once."""
    if not experiment.data.images and not experiment.images.exists():
        from pipeline.synthetic import shapes

        say(f"pictures of a new word: drawing {shown(shapes.draw_teaching(experiment.images, 'cross'))}")
    report = look_at_data(experiment)
    data_report.refuse(report.findings, experiment)
    say(*data_report.parts(report, experiment))


def look_at_data(experiment: Experiment) -> DataReport:
    """What is found in the photos and captions; every photo that is new or changed is decoded.

    Raises UserError that lists what cannot be used.
    """
    facts = _facts(experiment)
    with Progress("check photos", 0, "photo") as progress:
        photos = indexing.index_photos(experiment.images, experiment.data.prompt, facts, progress.set)
    _check_memory(facts, indexing.remembered(photos, facts) is not None)
    return data_report.of(experiment, photos)


def is_data_accepted(experiment: Experiment, photos: Sequence[IndexedPhoto]) -> bool:
    """Whether nothing that [data] strict forbids is found in photos that are known; captions' tokens are not counted.

    The check of the disks counts them, which comes when the model is here.
    """
    if not experiment.data.strict:
        return True
    found = data_report.of(experiment, photos, with_tokens=False).findings
    return not data_report.forbidden(found, experiment)


def check_captions(plan: Plan) -> None:
    """Raise UserError where captions are cut and [data] strict forbids it."""
    if plan.experiment.data.strict:
        data_report.refuse(findings.cut_captions(plan.photos, plan.cuts), plan.experiment)


def say_cut_captions(plan: Plan) -> None:
    """Say which captions are cut; CheckData may have run before the model was here."""
    if found := findings.cut_captions(plan.photos, plan.cuts):
        say("", data_report.as_table(found), *data_report.advice(found))


def check_controls(experiment: Experiment, has_pairs: bool) -> None:
    """Decode every photo and condition that is new or changed; report all that is wrong, of both, at once.

    has_pairs: whether files are the photos' conditions.
    """
    facts = _facts(experiment)
    indexing.index_files(experiment.folder, experiment.sample.conditions, "sample.conditions", facts)
    if not has_pairs:
        return check_data(experiment)
    with Progress("check pairs", 0, "file") as progress:
        pairs = indexing.index_pairs(experiment.images, experiment.data.prompt, facts, progress.set)
    _check_memory(facts, indexing.remembered_pairs(pairs, facts) is not None)
    say(f"{shown(experiment.images)}: {len(pairs)} captioned photos with their conditions, all sound")


def _facts(experiment: Experiment) -> FileFacts:
    return Store(*experiment.stores).facts


def _check_memory(facts: FileFacts, is_kept: bool) -> None:
    if not is_kept:
        raise UserError(
            f"{facts.path}: cannot keep what was learnt about the files, so that every stage would read all of them "
            "again; put [paths] store where you may write and SQLite can lock files"
        )
