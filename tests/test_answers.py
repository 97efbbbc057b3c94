"""What a plan says of its photos is worked out once in a process."""

from collections import Counter

import pytest
from test_identity import photo, plan_of

from pipeline import stages
from pipeline.plan.answers import once
from pipeline.plan.plan import LORA, Plan
from pipeline.plan.survey import Survey
from pipeline.training import train

PHOTOS = tuple(photo(number) for number in range(5))


class Asked:
    """Something like a plan that counts how often it works an answer out."""

    def __init__(self):
        self.count = 0

    @once
    def number(self, photos):
        self.count += 1
        return len(photos)

    @once
    def doubled(self, photos):
        return 2 * self.number(photos)


def test_an_answer_is_kept_for_the_very_same_photos():
    asked = Asked()
    assert [asked.number(PHOTOS), asked.doubled(PHOTOS), asked.number(PHOTOS)] == [5, 10, 5] and asked.count == 1


def test_other_photos_and_photos_that_may_change_are_looked_at():
    asked, several = Asked(), list(PHOTOS)
    assert asked.number(PHOTOS) == 5 and asked.number(PHOTOS[:3]) == 3 and asked.number(PHOTOS) == 5
    assert asked.number(several) == 5
    several.pop()
    assert asked.number(several) == 4
    assert Asked().number(PHOTOS[1:]) == 4


@pytest.mark.parametrize("answer", ["captions", "image_needs", "control_needs", "run_id"])
def test_answers_about_a_tuple_are_those_about_a_list(answer, tmp_path):
    plan = plan_of(tmp_path, LORA, data={"resolution": [32, 64], "buckets": True})
    found = getattr(plan, answer)(PHOTOS)
    assert getattr(plan, answer)(list(PHOTOS)) == found and getattr(plan, answer)(PHOTOS) is found


@pytest.fixture
def worked_out(monkeypatch) -> Counter:
    """How often the answers that take long were worked out."""
    counts = Counter()

    def count(name, work):
        monkeypatch.setattr(Plan, name, lambda self, *given: (counts.update([name]), work(self, *given))[1])

    for name in ("_needs_by_variant", "_spelled_samples"):
        count(name, getattr(Plan, name))
    return counts


def test_luigis_process_works_each_answer_out_once_for_all_stages(encoded, tmp_path, worked_out):
    lab = encoded.copy(tmp_path / "lab")
    survey = Survey(lab.experiment)
    worked_out.clear()
    for _ in range(2):
        assert [stages.is_done(name, survey) for name in ("CheckRoom", "EncodeImages", "TrainLoRA")] == [1, 1, 0]
    assert worked_out == {"_needs_by_variant": 1, "_spelled_samples": 1}


def test_a_training_works_each_answer_out_once_before_it_loads_its_model(encoded, tmp_path, worked_out, monkeypatch):
    class Reached(Exception):
        pass

    def load(plan):
        raise Reached

    lab = encoded.copy(tmp_path / "lab")
    worked_out.clear()
    monkeypatch.setattr(train, "load_frozen", load)
    with pytest.raises(Reached):
        lab.run("TrainLoRA")
    assert worked_out == {"_needs_by_variant": 1, "_spelled_samples": 1}
