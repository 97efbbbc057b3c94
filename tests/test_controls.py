"""What ControlNets are conditioned on: what of it is encoded when, and that photo and condition stay together."""

import dataclasses
import shutil

import numpy as np
import pytest
from lab import Lab
from pairs import add_conditions, encode, first_control, plan_of
from PIL import Image

from pipeline import stages
from pipeline.errors import UserError
from pipeline.flux import flow
from pipeline.training.batches import Batches

pytestmark = pytest.mark.usefixtures("cpu")


# --- what is encoded ----------------------------------------------------------------------------------------------


def test_after_a_lora_on_the_same_photos_only_the_conditions_are_encoded(paired, tmp_path):
    lab = paired.copy(tmp_path / "lab")
    lab.encode()
    lab.run("TrainLoRA")
    assert encode(lab) == {"EncodeControls": 3}
    lab.run("TrainControlNet")
    assert lab.done("TrainLoRA") and lab.done("TrainControlNet")
    assert encode(lab) == {}
    lab.set("controlnet", condition="canny")
    assert encode(lab) == {"EncodeControls": 3}
    assert lab.done("TrainLoRA") and not lab.done("TrainControlNet")


def test_a_lora_does_not_ask_for_conditions(encoded_pairs, tmp_path):
    lab = encoded_pairs.copy(tmp_path / "lab")
    shutil.rmtree(lab.pictures / "conditions")
    lab.write_captions([{key: row[key] for key in ("file_name", "text")} for row in lab.captions()])
    assert lab.run("CheckData").done("CheckData") and lab.done("EncodeImages")
    assert not lab.done("CheckControls") and not lab.done("TrainControlNet")


def test_all_that_is_wrong_with_the_pairs_is_reported_together(paired, tmp_path):
    lab = paired.copy(tmp_path / "lab")
    rows = lab.captions()
    names = [row.get("conditioning_image") for row in rows]
    del rows[0]["conditioning_image"]
    Image.new("RGB", (48, 30)).save(lab.pictures / names[1])
    (lab.pictures / names[2]).write_bytes(b"\x89PNG and nothing else")
    lab.write_captions(rows)
    assert not lab.done("CheckControls")
    with pytest.raises(UserError) as caught:
        stages.run("CheckControls", lab.experiment)
    text = str(caught.value)
    assert "3 problems" in text
    assert 'no "conditioning_image"' in text
    assert f"48 x 48, but its conditioning_image {names[1]} is 48 x 30: expected the same shape" in text
    assert f"{names[2]}: damaged or truncated" in text


@pytest.mark.parametrize("condition", ["canny", "grey", "blur", "tile"])
def test_a_computed_condition_needs_no_file_and_has_an_address_of_its_own(encoded_pairs, tmp_path, condition):
    lab = encoded_pairs.copy(tmp_path / "lab").set("controlnet", condition=condition)
    lab.write_captions([{key: row[key] for key in ("file_name", "text")} for row in lab.captions()])
    assert encode(lab) == {"EncodeControls": 3}
    recipe = first_control(plan_of(lab)).recipe
    assert recipe["condition"] == f"{condition}: 1"
    assert {key: value for key, value in recipe.items() if key != "condition"} == lab.latents.recipe


# --- pairs stay pairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"flip": True}, marks=pytest.mark.slow),
        pytest.param({"crops": 3}, marks=pytest.mark.slow),
        {"flip": True, "crops": 2, "buckets": True, "resolution": [32, 48]},
    ],
)
def test_the_condition_of_every_item_is_that_of_its_photo_in_its_variant(tiny_model, tmp_path, settings):
    """Where each condition is the photo itself in another file, both have the same latents, whatever is drawn."""
    lab = Lab(tmp_path / "lab", tiny_model, num_pictures=5)
    for number, row in enumerate(lab.captions()):
        picture = Image.open(lab.pictures / row["file_name"]).resize((48 + 8 * number, 64))
        picture.save(lab.pictures / row["file_name"])
    add_conditions(lab, lambda picture: picture, suffix=".bmp")
    lab.set("data", **settings).set("train", posterior="mode", batch_size=3).set("controlnet", num_double_layers=1)
    encode(lab)
    plan = plan_of(lab)
    batches, photos = Batches(plan), plan.photos
    seen = set()
    for number in range(12):
        batch = batches.training(number)
        latents = batch.x - sigma_of(batch, batches)[:, None, None] * batch.target
        np.testing.assert_allclose(batch.control, latents, atol=2e-5)
        seen |= {row.tobytes() for row in batch.control}
    assert len(seen) >= len(photos)
    others = {tuple(batch.control[0].ravel()[:8]) for batch in map(batches.training, range(12))}
    assert len(others) > 1


def sigma_of(batch, batches: Batches) -> np.ndarray:
    levels = [np.argmin(np.abs(batches.timesteps / 1000 - t)) for t in batch.timestep]
    return batches.sigmas[levels]


def test_flow_of_controls_is_packed_as_latents_are(encoded_pairs):
    plan = plan_of(encoded_pairs)
    batches = Batches(plan)
    batches.train = dataclasses.replace(batches.train, posterior="mode")
    batch = batches.evaluation(0, 3)
    needs = plan.control_needs[0]
    posterior = needs.entries.read_many(needs.items)
    modes = flow.normalized(
        flow.sample_posterior(posterior, None), batches.scaling["shift_factor"], batches.scaling["scaling_factor"]
    )
    expected = {array.tobytes() for array in flow.pack(modes)}
    assert {row.tobytes() for row in batch.control} == expected


def test_with_sampling_the_conditions_posterior_is_drawn_too(encoded_pairs):
    batches = Batches(plan_of(encoded_pairs))
    assert batches.training(0).control.tobytes() == batches.training(0).control.tobytes()
    sampled, batches.train = batches.training(0), dataclasses.replace(batches.train, posterior="mode")
    assert np.abs(sampled.control - batches.training(0).control).max() > 1e-3
    np.testing.assert_array_equal(sampled.timestep, batches.training(0).timestep)
