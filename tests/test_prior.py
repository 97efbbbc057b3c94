"""Prior preservation: pictures of the base model, drawn once, trained on beside the photos."""

import dataclasses

import numpy as np
import pytest
from kills import Killed, kill_at, outcome
from lab import Lab

from pipeline import stage_table
from pipeline.methods import CONTROLNET
from pipeline.plan import needs, prior
from pipeline.plan.plan import resolve
from pipeline.training.batches import Batches

PRIOR = {"prompts": ["a circle", "a square"], "num_images": 3, "num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def reminded(encoded, tmp_path_factory) -> Lab:
    """Three photos, encoded, and three pictures of the base model, drawn; nothing is trained."""
    lab = encoded.copy(tmp_path_factory.mktemp("reminded") / "lab").set("prior", **PRIOR)
    assert lab.encode() == {"EncodeCLIP": 2, "EncodeT5": 2}
    assert not lab.done("DrawPrior") and not lab.done("TrainLoRA")
    return lab.run("DrawPrior")


def test_the_bases_pictures_are_drawn_once_for_all_experiments(reminded, tmp_path):
    lab = reminded.copy(tmp_path / "lab").set("train", learning_rate=0.5, steps=7).set("lora", rank=2)
    assert lab.done("DrawPrior")
    lab.set("prior", num_images=5)
    assert not lab.done("DrawPrior")
    (series,) = prior.series(lab.run("DrawPrior").plan)
    assert [each.prompt for each in series.pictures.values()] == ["a circle", "a square"] * 2 + ["a circle"]
    assert [each.seed for each in series.pictures.values()] == [5, 6, 7, 8, 9]
    record = stage_table.STAGES["DrawPrior"].place(lab.plan) / "records/DrawPrior.json"
    assert '"drawn": 2' in record.read_text()


def test_several_resolutions_share_the_pictures(reminded, tmp_path):
    lab = reminded.copy(tmp_path / "lab").set("data", resolution=[32, 48]).set("prior", num_images=6)
    several = prior.series(lab.plan)
    found = {each.drawing.size.width: [picture.number for picture in each.pictures.values()] for each in several}
    assert found == {32: [0, 1, 4, 5], 48: [2, 3]}


def test_a_step_has_as_many_batches_of_the_prior_and_its_loss_is_the_sum_of_both(reminded, tmp_path):
    lab = reminded.copy(tmp_path / "lab").set("train", accumulate=2).set("prior", weight=0.25)
    plan = lab.plan
    batches, alone = Batches(plan), Batches(resolve(reminded_without(plan.experiment), plan.method))
    assert batches.in_a_step == 4
    (series,) = prior.series(plan)
    drawn = plan.family.pack(series.entries.read_many(list(series.pictures)))
    for step in range(3):
        for place in range(2):
            own, reminder = (batches.training(4 * step + place + shift) for shift in (0, 2))
            same = alone.training(2 * step + place)  # the photos' batches are those of a training without a prior
            np.testing.assert_array_equal(own.x, same.x)
            assert (own.weight == 2).all() and (reminder.weight == 0.5).all()
            sigma = reminder.timestep[:, None, None]
            found = reminder.x - sigma * reminder.target  # x = latents + sigma (noise - latents)
            distances = np.abs(found[:, None] - drawn[None]).max(axis=(2, 3))
            assert (distances.min(axis=1) < 1e-5).all()
    epoch = [batches.prior.order.batch(number) for number in range(3)]
    assert sorted(sum(epoch, [])) == [0, 0, 1, 1, 2, 2]  # each as often as the others


def reminded_without(experiment):
    return dataclasses.replace(experiment, prior=type(experiment.prior)())


def test_a_training_with_a_prior_goes_on_exactly_where_it_was_killed(reminded, tmp_path, monkeypatch, capsys):
    whole, broken = (reminded.copy(tmp_path / name).set("train", checkpoint_every=1) for name in ("whole", "broken"))
    whole.run("TrainLoRA")
    kill_at(monkeypatch, [2])
    with pytest.raises(Killed):
        broken.run("TrainLoRA")
    broken.run("TrainLoRA")
    assert outcome(broken.run_folder) == outcome(whole.run_folder)
    without = encoded_alone(whole, tmp_path)
    assert outcome(without.run_folder)["result"] != outcome(whole.run_folder)["result"]
    assert "the pictures of [prior]" in capsys.readouterr().out
    kept = {need.stage for need in needs.needed(whole.plan)}
    assert "DrawPrior" in kept and whole.record("TrainLoRA")["inputs"]["entries"].keys() > {"DrawPrior"}


def encoded_alone(lab: Lab, tmp_path) -> Lab:
    other = lab.copy(tmp_path / "alone")
    other.set("prior", prompts=[])
    assert other.run_folder.name != lab.run_folder.name
    return other.run("TrainLoRA")


def test_what_decides_the_pictures_or_their_weight_decides_the_run(reminded):
    plan = reminded.plan
    found = {plan.run_id}
    for change in ({"weight": 0.5}, {"seed": 6}, {"num_images": 4}, {"num_inference_steps": 3}, {"prompts": ("a",)}):
        changed = dataclasses.replace(plan.experiment, prior=dataclasses.replace(plan.experiment.prior, **change))
        found.add(dataclasses.replace(plan, experiment=changed).run_id)
    assert len(found) == 6
    off = dataclasses.replace(plan.experiment.prior, prompts=())
    ids = set()
    for each in (off, type(off)()):
        ids.add(dataclasses.replace(plan, experiment=dataclasses.replace(plan.experiment, prior=each)).run_id)
    assert len(ids) == 1


def test_a_controlnet_is_reminded_with_an_empty_condition(reminded, tmp_path):
    lab = reminded.copy(tmp_path / "lab").set("controlnet", condition="canny")
    lab.run("CheckControls", "EncodeControls")
    batches = Batches(resolve(lab.experiment, CONTROLNET))
    own, reminder = batches.training(0), batches.training(1)
    assert own.control.shape == reminder.control.shape and np.abs(own.control).max() > 0
    assert not reminder.control.any()
