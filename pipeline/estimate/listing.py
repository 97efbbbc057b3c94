"""The photos of an experiment as listed in their folder, before they are decoded."""

from dataclasses import dataclass
from pathlib import Path

from cache import caption_item
from pipeline.data import indexing
from pipeline.data.photos import Photo, Problem, list_photos
from pipeline.plan.plan import Plan
from pipeline.settings.experiment import Experiment

QUICK_PHOTOS = 64
"""How many photos the plan decodes itself; where more are new, it leaves all of them to CheckData."""


@dataclass(frozen=True)
class Listing:
    """A folder's photos, none of them decoded.  problems: what CheckData will complain about, whatever is decoded."""

    folder: Path
    photos: list[Photo]
    problems: list[Problem]

    @property
    def captions(self) -> set[str]:
        """The addresses of the captions."""
        return {caption_item(photo.caption) for photo in self.photos}

    @property
    def conditions(self) -> list[Photo]:
        """The files that the photos name as theirs."""
        return indexing.conditions_of(self.photos)


def listing(experiment: Experiment) -> Listing | None:
    """None where the folder is not there.  Raises UserError where it has no photo; a million take a minute or two."""
    folder = experiment.images
    return Listing(folder, *list_photos(folder, experiment.data.prompt)) if folder.is_dir() else None


def with_photos(plan: Plan, listed: Listing) -> Plan | None:
    """The plan with its photos, of which what is new is decoded; None where that would be more than QUICK_PHOTOS."""
    files = [*listed.photos, *(listed.conditions if plan.has_pairs else ())]
    unseen = indexing.num_unseen(files, plan.store.facts)
    if unseen > QUICK_PHOTOS:
        return None
    if unseen or listed.problems or plan.has_pairs:
        plan.photos  # noqa: B018  (says what is wrong with them)
        return plan
    return plan.of(indexing.by_content(indexing.remembered(listed.photos, plan.store.facts) or ()))
