"""The photos and captions that a run was trained on, as they lie in their folder now, and what is wrong there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.photos import Photo, list_photos
from pipeline.errors import UserError
from pipeline.page.pictures import Shown, embed
from pipeline.report.run import Run
from pipeline.study.subject import evenly

MOST_SHOWN, MOST_NOTICED = 36, 20
SIDE = 192
"""The longest side of a thumbnail, in pixels."""

BUDGET_BYTES = 1_500_000


@dataclass(frozen=True)
class Thumbnail:
    name: str
    caption: str
    picture: Shown
    condition: Shown | None


@dataclass(frozen=True)
class DataSet:
    """shown: some photos at even distances.  noticed: what is wrong with files, the first ones; of num_noticed."""

    folder: str
    num_photos: int
    num_captions: int
    shown: Sequence[Thumbnail]
    noticed: Sequence[str]
    num_noticed: int


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
    noticed = [f"{problem.name}: {problem.reason}" for problem in problems]
    return DataSet(
        str(run.experiment.images),
        len(photos),
        len({photo.caption for photo in photos}),
        _thumbnails(evenly(photos, MOST_SHOWN), run),
        noticed[:MOST_NOTICED],
        len(noticed),
    )


def _thumbnails(photos: Sequence[Photo], run: Run) -> list[Thumbnail]:
    has_pairs = run.experiment is not None and run.method.has_pairs(run.experiment)
    conditions = {photo: Path(photo.folder, photo.conditioning) for photo in photos if has_pairs and photo.conditioning}
    pictures = embed([*(photo.path for photo in photos), *conditions.values()], BUDGET_BYTES, SIDE)
    return [
        Thumbnail(photo.name, photo.caption, pictures[photo.path], pictures.get(conditions.get(photo, Path())))
        for photo in photos
    ]
