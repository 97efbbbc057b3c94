"""What is known of an experiment before any of its stages runs: its photos, looked at once, and its plan.

Imports no MindSpore, so that the scheduler can ask.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

from cache import FileFacts, Store
from pipeline.data import indexing, survey_file
from pipeline.data.photos import list_photos
from pipeline.data.survey_file import SurveyFile
from pipeline.plan.plan import CONTROLNET, LORA, Plan, has_pairs, resolve
from pipeline.process.bulk import made_in_bulk
from pipeline.settings.fields import Experiment

Photos = Sequence[indexing.IndexedPhoto]


class Survey:
    """An experiment's photos and plan, looked at once: to find a million photos takes from ten seconds to a minute.

    What the store and the run folder hold is looked up anew each time it is asked for.
    files: where the photos are kept for other processes, by whether they have their conditions there.
    """

    trains, with_conditions = LORA, False

    def __init__(self, experiment: Experiment, files: Mapping[bool, SurveyFile] | None = None):
        self.experiment, self.files = experiment, files or {}

    def anew(self) -> "Survey":
        """The same, for when more may be known now: photos that were known stay, all else is looked at again."""
        other = Survey(self.experiment, self.files)
        if vars(self).get("photos") is not None:
            other.photos = self.photos
        return other

    @cached_property
    def photos(self) -> Photos | None:
        """The indexed photos, or None while any of them is faulty or has not been checked as it now is."""
        of = survey_file.subject(self.experiment, self.with_conditions)
        with made_in_bulk():
            return self.file.photos(of, self._look) if self.file else self._look()

    @property
    def file(self) -> SurveyFile | None:
        """Where the photos are for other processes, once they are known."""
        return self.files.get(self.with_conditions)

    def _look(self) -> Photos | None:
        photos, problems = list_photos(self.experiment.images, self.experiment.data.prompt)
        known = None if problems else indexing.remembered(photos, self._facts)
        return None if known is None else indexing.by_content(known)

    @property
    def has_sample_conditions(self) -> bool:
        """Whether the images that pictures are conditioned on have been checked as they now are."""
        files = indexing.file_photos(self.experiment.folder, self.experiment.sample.conditions)
        return indexing.remembered(files, self._facts) is not None

    @property
    def _facts(self) -> FileFacts:
        return Store(*self.experiment.stores).facts

    @cached_property
    def for_controlnet(self) -> "Survey":
        """The same experiment, looked at for its ControlNet."""
        return _ForControlNet(self)

    @cached_property
    def plan(self) -> Plan:
        return resolve(self.experiment, self.trains)


class _ForControlNet(Survey):
    """Photos have their conditions where these are files; they are listed once for both trainings."""

    trains = CONTROLNET

    def __init__(self, plain: Survey):
        super().__init__(plain.experiment, plain.files)
        self._plain, self.with_conditions = plain, has_pairs(plain.experiment, CONTROLNET)

    @cached_property
    def photos(self) -> Photos | None:
        return super().photos if self.with_conditions else self._plain.photos

    def _look(self) -> Photos | None:
        photos = self._plain.photos
        known = None if photos is None else indexing.remembered_pairs(photos, self._facts)
        return None if known is None else indexing.by_content(known)
