"""A plan works each of its answers out once: with a million photos every one of them takes seconds."""

import inspect
from collections import Counter
from functools import cached_property

import pytest

from pipeline import stages
from pipeline.plan import identity
from pipeline.plan.plan import Plan
from pipeline.plan.survey import Survey
from pipeline.training import loop

ANSWERS = [name for name, value in vars(Plan).items() if isinstance(value, cached_property)]


@pytest.fixture
def worked_out(monkeypatch) -> Counter:
    """How often the answers were worked out, by name."""
    counts: Counter = Counter()

    def count(name, work):
        return lambda *given: (counts.update([name]), work(*given))[1]

    for name in ANSWERS:
        monkeypatch.setattr(vars(Plan)[name], "func", count(name, vars(Plan)[name].func))
    monkeypatch.setattr(Plan, "_needs_by_variant", count("_needs_by_variant", Plan._needs_by_variant))
    monkeypatch.setattr(identity, "_spelled_samples", count("_spelled_samples", identity._spelled_samples))
    return counts


def test_luigis_process_works_each_answer_out_once_for_all_stages(encoded, tmp_path, worked_out):
    lab = encoded.copy(tmp_path / "lab")
    survey = Survey(lab.experiment)
    worked_out.clear()
    for _ in range(2):
        assert [stages.is_done(name, survey) for name in ("CheckRoom", "EncodeImages", "TrainLoRA")] == [1, 1, 0]
    assert {"photos", "captions", "image_needs", "run_id", "_spelled_samples"} <= worked_out.keys()
    assert set(worked_out.values()) == {1}, worked_out


def test_a_whole_training_works_each_answer_out_once_and_nothing_stands_between_stage_and_step(
    encoded, tmp_path, worked_out, monkeypatch
):
    lab, advance, callers = encoded.copy(tmp_path / "lab"), loop.Training.advance, set()

    def advanced(self, batches):
        callers.add(tuple(frame.function for frame in inspect.stack()[1:] if "/pipeline/" in frame.filename))
        return advance(self, batches)

    monkeypatch.setattr(loop.Training, "advance", advanced)
    worked_out.clear()
    lab.run("TrainLoRA")
    assert callers == {("run", "train", "_work", "run")}  # of the loop, of the training, of the stage
    assert {"photos", "captions", "examples", "image_needs", "run_id", "_spelled_samples"} <= worked_out.keys()
    assert set(worked_out.values()) == {1}, worked_out
