"""What photos cost before anything is done with them, set against listing their folder and looking at each file.

Seconds and bytes are of 50,000 photos; both grow with their number and with nothing else.
"""

import os
import time
from pathlib import Path

import pytest
from test_identity import plan_of

from benchmarks.index import watched
from benchmarks.photos import write_photos
from cache import FileFacts, needs_text
from pipeline.data import survey_file
from pipeline.data.indexing import index_photos
from pipeline.methods import LORA
from pipeline.plan.needs import encoded
from pipeline.plan.survey import Survey

pytestmark = pytest.mark.slow
NUMBER = 50_000


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Its photos have been looked at, as CheckData does."""
    folder = tmp_path_factory.mktemp("many")
    write_photos(folder / "photos", NUMBER, in_files=False)
    experiment = plan_of(folder, LORA).experiment
    assert len(index_photos(experiment.images, "", FileFacts(folder / "store" / "facts.sqlite"))) == NUMBER
    return experiment


def seconds_of(work) -> float:
    """The processor's, the least of three."""
    return min(_busy(work) for _ in range(3))


def _busy(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def look_at_each(folder: Path) -> list:
    """The least that can be done to see whether files have changed."""
    return [os.stat(file) for each in os.scandir(folder) if each.is_dir() for file in os.scandir(each)]


@pytest.fixture(scope="module")
def least(experiment) -> float:
    return seconds_of(lambda: look_at_each(experiment.images))


def test_to_survey_photos_takes_a_small_multiple_of_looking_at_each(experiment, least):
    assert len(Survey(experiment).photos(LORA)) == NUMBER
    assert seconds_of(lambda: Survey(experiment).photos(LORA)) < 10 * least


def answers(folder: Path, path: Path, of: dict) -> tuple:
    """What a stage's process works out of the photos that it is given."""
    plan = plan_of(folder, LORA).of(survey_file.read(path, of))
    needs = encoded(plan)
    return plan, needs, plan.run_id, needs_text(needs), plan.examples.sizes


def test_all_that_a_stage_works_out_takes_less_and_needs_little_memory(experiment, least, tmp_path):
    of = survey_file.subject(experiment, False)
    with open(tmp_path / "survey", "wb") as file:
        survey_file.write(file, of, Survey(experiment).photos(LORA))
    arguments = experiment.folder, tmp_path / "survey", of
    assert seconds_of(lambda: answers(*arguments)) < 4 * least
    assert watched(answers, *arguments)["peak_MiB"] < NUMBER * 1500 / 2**20
