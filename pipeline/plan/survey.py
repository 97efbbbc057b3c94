"""The survey: the photos of an experiment, looked at once before any stage runs, and its plans.

Imports no MindSpore, so that the scheduler can ask.
"""

from collections.abc import Mapping
from functools import cached_property

from cache import FileFacts, Store
from pipeline.data import indexing, survey_file
from pipeline.data.photos import list_photos
from pipeline.data.survey_file import SurveyFile
from pipeline.plan.method import Method
from pipeline.plan.plan import Photos, Plan, resolve
from pipeline.process.bulk import made_in_bulk
from pipeline.settings.experiment import Experiment


class Survey:
    """An experiment's photos and plans, looked at once: to find a million photos takes from ten seconds to a minute.

    What the store and the run folder hold is looked up anew each time it is asked for.
    files: where the photos are kept for other processes, by whether they have their conditions there.
    """

    def __init__(self, experiment: Experiment, files: Mapping[bool, SurveyFile] | None = None):
        self.experiment, self.files = experiment, files or {}
        self._photos: dict[bool, Photos | None] = {}
        self._plans: dict[str, Plan] = {}

    def anew(self) -> "Survey":
        """The same, for when more may be known now: photos that were known stay, all else is looked at again."""
        other = Survey(self.experiment, self.files)
        other._photos = {
            with_conditions: photos for with_conditions, photos in self._photos.items() if photos is not None
        }
        return other

    def photos(self, method: Method) -> Photos | None:
        """The indexed photos, or None while any of them is faulty or has not been checked as it now is.

        With their conditions where the method trains with files that are these; listed once for all methods.
        """
        return self._known(method.has_pairs(self.experiment))

    def _known(self, with_conditions: bool) -> Photos | None:
        if with_conditions not in self._photos:
            of, file = survey_file.subject(self.experiment, with_conditions), self.files.get(with_conditions)
            look = self._look_at_pairs if with_conditions else self._look
            with made_in_bulk():
                self._photos[with_conditions] = file.photos(of, look) if file else look()
        return self._photos[with_conditions]

    def file(self, method: Method) -> SurveyFile | None:
        """Where the photos are for other processes, once they are known."""
        return self.files.get(method.has_pairs(self.experiment))

    def _look(self) -> Photos | None:
        photos, problems = list_photos(self.experiment.images, self.experiment.data.prompt)
        known = None if problems else indexing.remembered(photos, self._facts)
        return None if known is None else indexing.by_content(known)

    def _look_at_pairs(self) -> Photos | None:
        photos = self._known(False)
        known = None if photos is None else indexing.remembered_pairs(photos, self._facts)
        return None if known is None else indexing.by_content(known)

    @property
    def has_sample_conditions(self) -> bool:
        """Whether the images that pictures are conditioned on have been checked as they now are."""
        files = indexing.file_photos(self.experiment.folder, self.experiment.sample.conditions)
        return indexing.remembered(files, self._facts) is not None

    @cached_property
    def _facts(self) -> FileFacts:
        return Store(*self.experiment.stores).facts

    def plan(self, method: Method) -> Plan:
        """With its photos where these are known; ask for `photos` before anything that needs them."""
        if method.name not in self._plans:
            self._plans[method.name] = resolve(self.experiment, method, self.photos(method))
        return self._plans[method.name]
