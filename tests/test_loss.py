"""What the model is given of a batch, and its loss, against the recipe recomputed in NumPy; see `recipe`."""

import json

import numpy as np
import pytest
from lab import Lab
from recipe import BATCH_SIZE, a_batch, batches_of, plan_of, predicted, recomputed, tensors

from pipeline.flux import models
from pipeline.flux.prediction import prediction
from pipeline.training import measure
from pipeline.training.loss import flow_loss, item_loss

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def lab(five_photos) -> Lab:
    return five_photos


@pytest.fixture(scope="module")
def base(lab):
    """The transformer without LoRA."""
    return models.load_model(lab.model, "transformer", "fp32")


# --- from batch to tensors ----------------------------------------------------------------------------------------

POLICIES = {"fp32": np.float32, "fp16": np.float16}


@pytest.mark.parametrize("compute", POLICIES)
def test_inputs_are_in_the_transformers_dtype_and_the_target_in_float32(lab, base, compute):
    plan = plan_of(lab, precision={"transformer": {"params": compute, "compute": compute}})
    batch, dtype = a_batch(lab), POLICIES[compute]
    found = {name: tensor.asnumpy() for name, tensor in tensors(plan, base, batch).items()}
    for name in ("x", "txt", "pooled", "timestep"):
        assert found[name].dtype == dtype, name
        np.testing.assert_array_equal(found[name], getattr(batch, name).astype(dtype))
    for name in ("target", "img_ids", "txt_ids", "weight"):
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], getattr(batch, name))
    assert found["guidance"].dtype == dtype


@pytest.mark.parametrize("compute", POLICIES)
@pytest.mark.parametrize("train_settings, scale", [({}, 3.5), ({"guidance_scale": 1.0}, 1), ({"guidance_scale": 7}, 7)])
def test_guidance_is_the_guidance_scale_for_each_item(lab, base, compute, train_settings, scale):
    plan = plan_of(lab, train=train_settings, precision={"transformer": {"params": compute, "compute": compute}})
    guidance = tensors(plan, base, a_batch(lab))["guidance"].asnumpy()
    assert guidance.tolist() == [scale] * BATCH_SIZE and guidance.dtype == POLICIES[compute]


def test_a_checkpoint_without_guidance_gets_none(lab, schnell_model):
    transformer = models.load_model(schnell_model, "transformer", "fp32")
    found = tensors(plan_of(lab), transformer, a_batch(lab))
    assert found["guidance"] is None
    assert np.isfinite(flow_loss(prediction(transformer))(*found.values()).asnumpy())


# --- the loss -----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_of_the_models_prediction(lab, base):
    plan = plan_of(lab)
    for step in range(2):
        batch = batches_of(plan).training(step)
        squares = (predicted(base, vars(batch), guidance=3.5) - batch.target) ** 2
        arguments = tuple(tensors(plan, base, batch).values())
        loss, items = flow_loss(prediction(base))(*arguments), item_loss(prediction(base))(*arguments).asnumpy()
        assert loss.asnumpy() == pytest.approx(squares.mean(), rel=1e-5) and loss.asnumpy().dtype == np.float32
        np.testing.assert_allclose(items, squares.mean(axis=(1, 2)), rtol=1e-5)
        assert items.mean() == pytest.approx(squares.mean(), rel=1e-5)
        assert squares.mean() > 0.1


def test_the_error_of_a_half_precision_prediction_is_taken_in_float32(lab):
    transformer = models.load_model(lab.model, "transformer", "fp16")
    plan = plan_of(lab, precision={"transformer": {"params": "fp16", "compute": "fp16"}})
    arguments = tensors(plan, transformer, a_batch(lab))
    inputs = [arguments[name] for name in ("x", "txt", "pooled", "timestep", "img_ids", "txt_ids", "guidance")]
    velocity = transformer(*inputs)[0].asnumpy()
    assert velocity.dtype == np.float16
    expected = ((velocity.astype(np.float64) - arguments["target"].asnumpy()) ** 2).mean()
    loss = flow_loss(prediction(transformer))(*arguments.values()).asnumpy()
    assert loss.dtype == np.float32 and loss == pytest.approx(expected, rel=1e-5)


def test_training_and_measuring_report_the_losses_of_their_own_batches(lab, base, tmp_path, monkeypatch):
    """With steps too small to change anything, they are the base model's losses."""
    monkeypatch.setattr(measure, "NUM_EVALUATED", 16)
    other = lab.copy(tmp_path / "lab").set("train", learning_rate=1e-12, steps=4, guidance_scale=2.0)
    other.run("TrainLoRA", "MeasureLoss")
    plan = other.plan
    reported = [json.loads(line)["loss"] for line in (other.run_folder / "metrics.jsonl").read_text().splitlines()]
    batches = [recomputed(other, plan, step) for step in range(4)]
    expected = [((predicted(base, batch, guidance=2.0) - batch["target"]) ** 2).mean() for batch in batches]
    np.testing.assert_allclose(reported, expected, rtol=1e-5)
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 1e-3
    fixed = [vars(batches_of(plan).evaluation(index, 8)) for index in range(2)]
    losses = [((predicted(base, batch, guidance=2.0) - batch["target"]) ** 2).mean() for batch in fixed]
    measured = json.loads((other.run_folder / "loss.json").read_text())
    assert measured["before"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert measured["after"] == pytest.approx(np.mean(losses), rel=1e-5)
