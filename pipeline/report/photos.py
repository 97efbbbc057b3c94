"""The photos and captions that a run was trained on, as they lie in their folder now, and what is noticed there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache import Store, StoreError
from cache.terminal.words import count
from pipeline.data import indexing
from pipeline.data.findings import Finding
from pipeline.data.photos import Photo, list_photos
from pipeline.errors import UserError
from pipeline.page.pictures import Shown, embed
from pipeline.plan import data_report
from pipeline.report.run import Run
from pipeline.settings.experiment import Experiment
from pipeline.study.subject import evenly

MOST_SHOWN, MOST_FAULTS = 36, 20
SIDE = 192
"""The longest side of a thumbnail, in pixels."""

BUDGET_BYTES = 1_500_000

LOOK_AGAIN = "{}; `python -m pipeline data EXPERIMENT.toml` looks at them"


@dataclass(frozen=True)
class Thumbnail:
    name: str
    caption: str
    picture: Shown
    condition: Shown | None


@dataclass(frozen=True)
class Noticed:
    """What CheckData would say of the photos that are known, at most `data_report.SHOWN` of each finding by name.

    unknown: what could not be looked at, a line each.
    """

    num_photos: int
    findings: Sequence[Finding]
    unknown: Sequence[str]


@dataclass(frozen=True)
class DataSet:
    """shown: some photos at even distances.  problems: what is wrong with files, the first ones; of num_problems."""

    folder: str
    num_photos: int
    num_captions: int
    shown: Sequence[Thumbnail]
    problems: Sequence[str]
    num_problems: int
    noticed: Noticed | None


def of_run(run: Run) -> DataSet | None:
    """None where the photos cannot be looked at, which is noted in the run."""
    if run.experiment is None:
        return None
    if not run.has_origin:
        run.missing.append("Photos: this run does not say where its experiment file was; newer ones do")
        return None
    try:
        photos, problems = list_photos(run.experiment.images, run.experiment.data.prompt)
    except (UserError, OSError) as error:
        run.missing.append(f"Photos: {error}")
        return None
    faults = [f"{problem.name}: {problem.reason}" for problem in problems]
    return DataSet(
        str(run.experiment.images),
        len(photos),
        len({photo.caption for photo in photos}),
        _thumbnails(evenly(photos, MOST_SHOWN), run),
        faults[:MOST_FAULTS],
        len(faults),
        _noticed(photos, run, run.experiment),
    )


def _noticed(photos: Sequence[Photo], run: Run, experiment: Experiment) -> Noticed | None:
    """None where nothing can be said of any photo, which is noted in the run.  No photo is decoded for it."""
    try:
        known = indexing.known(photos, Store(*experiment.stores).facts)
        report = data_report.of(experiment, known) if known else None
    except (UserError, StoreError, OSError) as error:
        run.missing.append(f"What CheckData notices: {error}")
        return None
    if report is None:
        if photos:
            run.missing.append(f"What CheckData notices: {LOOK_AGAIN.format('the store knows none of the photos')}")
        return None
    findings = [replace(finding, worst=finding.worst[: data_report.SHOWN]) for finding in report.findings]
    unknown = [] if report.are_tokens_counted else ["whether captions are cut: the model is not on this machine"]
    if len(photos) > len(known):
        new = count(len(photos) - len(known), "photo is", "photos are")
        unknown.append(LOOK_AGAIN.format(f"{new} new or changed"))
    return Noticed(len(known), findings, unknown)


def _thumbnails(photos: Sequence[Photo], run: Run) -> list[Thumbnail]:
    has_pairs = run.experiment is not None and run.method.has_pairs(run.experiment)
    conditions = {photo: Path(photo.folder, photo.conditioning) for photo in photos if has_pairs and photo.conditioning}
    pictures = embed([*(photo.path for photo in photos), *conditions.values()], BUDGET_BYTES, SIDE)
    return [
        Thumbnail(photo.name, photo.caption, pictures[photo.path], pictures.get(conditions.get(photo, Path())))
        for photo in photos
    ]
