"""Each setting of the training by itself: it changes what it should, and only that.

The formulas of optimizers, schedules, weightings, dropout and orders have tests of their own beside their modules; here
it is shown that what an experiment says reaches them.
"""

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest
from lab import Lab
from safetensors.numpy import load_file

from pipeline.flux import models
from pipeline.flux.prediction import prediction
from pipeline.methods import LORA
from pipeline.methods import lora_layers as lora
from pipeline.plan.plan import resolve
from pipeline.plan.run_folder import RunFolder
from pipeline.settings.fields import Lora, Train
from pipeline.settings.values import WeightingScheme
from pipeline.training import loop, train
from pipeline.training.batches import Batches
from pipeline.training.loss import flow_loss, tensors_of
from pipeline.training.schedules import Schedule

pytestmark = pytest.mark.usefixtures("cpu")

OTHER = {
    "lr_scheduler": "cosine",
    "optimizer": "adam_weight_decay",
    "weighting_scheme": "mode",
    "posterior": "mode",
    "mode": "jit",
    "targets": "all-linear",
    "tracker": "wandb",
}
"""Another value of each setting that is a name."""


@pytest.fixture(scope="module")
def lab(cpu, tiny_model, tmp_path_factory) -> Lab:
    found = Lab(tmp_path_factory.mktemp("knobs") / "lab", tiny_model).set("train", steps=2)
    found.encode()
    return found


@pytest.fixture(scope="module")
def plain(lab, tmp_path_factory) -> dict:
    return results_of(lab.copy(tmp_path_factory.mktemp("plain") / "lab"))


def results_of(lab: Lab) -> dict:
    """The saved LoRA, what the last checkpoint holds, and the metrics by step, after training."""
    lab.run("TrainLoRA")
    folder = lab.run_folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (newest, *_) = RunFolder(folder).list_checkpoints()
    return {"lora": load_file(folder / lora.WEIGHTS_NAME), "state": load_file(newest), "lines": lines}


def changed(lab: Lab, tmp_path, **tables) -> dict:
    other = lab.copy(tmp_path / "other")
    for table, values in tables.items():
        other.set(table, **values)
    other.encode()
    return results_of(other)


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(first[key].tobytes() == second[key].tobytes() for key in first)


def losses(result: dict) -> list[float]:
    return [line["loss"] for line in result["lines"]]


def fresh(lab: Lab, settings: Train, checkpointing: bool = False) -> tuple[loop.Training, list[tuple]]:
    """A training that has not begun, and the tensors of five items: each a batch by itself, then all in one."""
    plan = lab.plan
    cells = plan.load_frozen()
    adapted = lora.Adapted(cells, Lora(), plan.precision.trained, seed=3)
    if checkpointing:
        models.recompute_blocks(cells["transformer"])
    for parameter in adapted.trained:  # else A's gradients were all zero
        if "lora_B" in parameter.name:
            lora.set_values(parameter, np.random.default_rng(5).normal(size=parameter.shape) / 100)
    to_tensors, batches = tensors_of(plan, cells["transformer"]), Batches(plan)
    joined = to_tensors(batches.evaluation(0, 5))
    single = [tuple(split(tensor, i) for tensor in joined) for i in range(5)]
    return loop.Training(flow_loss(prediction(**cells)), adapted.trained, settings), [*single, joined]


def split(tensor, item: int):
    """The tensor of one item of a batch of five; what all items share stays whole."""
    return tensor[item : item + 1] if tensor.shape[0] == 5 else tensor


# --- the run's identity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [Train, Lora])
def test_every_setting_that_decides_weights_is_another_run_and_no_other_is(lab, table):
    experiment = lab.experiment
    name = table.__name__.lower()

    def run_id(**values):
        settings = dataclasses.replace(getattr(experiment, name), **values)
        return resolve(dataclasses.replace(experiment, **{name: settings}), LORA).run_id

    same = []
    for field in dataclasses.fields(table):
        if field.name == "init_from":  # a file, which test_lora_start.py has
            continue
        value = getattr(getattr(experiment, name), field.name)
        other = OTHER.get(field.name, not value if isinstance(value, bool) else None)
        if other is None:
            other = value + 1 if isinstance(value, int) else value / 2 + 0.01
        assert other != value
        if run_id(**{field.name: other}) == run_id():
            same.append(field.name)
    decide_nothing = ["log_every", "checkpoint_every", "keep_checkpoints", "tracker"]
    assert same == (decide_nothing if table is Train else [])


# --- the gradient -------------------------------------------------------------------------------------------------


def test_accumulated_batches_have_the_gradient_of_one_large_batch(lab):
    training, (*single, joined) = fresh(lab, Train(mode="pynative", accumulate=5))
    _, sums = training.gradients(single)
    accumulated = [each.asnumpy() / 5 for each in sums]
    whole, _ = fresh(lab, Train(mode="pynative"))
    (loss,), gradients = whole.gradients([joined])
    for mine, theirs in zip(accumulated, gradients):
        np.testing.assert_allclose(mine, theirs.asnumpy(), atol=1e-5 * np.abs(theirs.asnumpy()).max())
        assert np.abs(mine).max() > 0
    assert np.mean([training.gradients([each])[0][0].asnumpy() for each in single]) == pytest.approx(loss.asnumpy())


@pytest.mark.parametrize("mode", ["pynative", pytest.param("jit", marks=pytest.mark.slow)])
def test_gradient_checkpointing_changes_no_gradient(lab, mode):
    found = []
    for checkpointing in (False, True):
        training, (*_, joined) = fresh(lab, Train(mode=mode), checkpointing)
        (loss,), gradients = training.gradients([joined])
        found.append([loss.asnumpy(), *(each.asnumpy() for each in gradients)])
    for plain, recomputed in zip(*found):
        np.testing.assert_allclose(plain, recomputed, rtol=0, atol=1e-6 * np.abs(plain).max())


def test_clipping_bounds_the_step_and_leaves_what_is_reported(lab, tmp_path, plain):
    """Adam's step hardly depends on the gradient's size: its first moment does."""
    limit = plain["lines"][0]["grad_norm"] / 4
    one, other = (changed(lab, tmp_path / str(n), train={"max_grad_norm": n, "steps": 1}) for n in (0.0, limit))
    assert one["lines"][0]["grad_norm"] == other["lines"][0]["grad_norm"] > limit
    for key in (key for key in one["state"] if key.startswith("m.")):
        np.testing.assert_allclose(other["state"][key], one["state"][key] / 4, rtol=1e-4, atol=1e-12)


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", get_args(WeightingScheme))
def test_the_loss_is_the_weighted_mean_of_squared_errors(lab, tmp_path, scheme):
    """Recomputed in NumPy from the model's own prediction; the weights are arXiv:2403.03206's and diffusers'."""
    other = lab.copy(tmp_path / "lab").set("train", weighting_scheme=scheme)
    plan = other.plan
    transformer = models.load_model(plan.model_folder, "transformer", "fp32")
    batch = Batches(plan).training(1)
    arguments = tensors_of(plan, transformer)(batch)
    x, target, txt, pooled, timestep, img_ids, txt_ids, _, guidance = arguments
    velocity = transformer(x, txt, pooled, timestep, img_ids, txt_ids, guidance)[0].asnumpy().astype(np.float64)
    sigma = batch.timestep.astype(np.float64)
    weight = {
        "sigma_sqrt": sigma**-2.0,
        "cosmap": 2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2)),
    }.get(scheme, np.ones_like(sigma))
    expected = (((velocity - batch.target) ** 2) * weight[:, None, None]).mean()
    assert flow_loss(prediction(transformer))(*arguments).asnumpy() == pytest.approx(expected, rel=1e-5)


def test_guidance_reaches_the_model(lab, tmp_path, plain):
    assert losses(changed(lab, tmp_path, train={"guidance_scale": 1.0})) != losses(plain)


# --- the step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 2e-3),
        ("optimizer", "adam_weight_decay"),
        ("adam_beta1", 0.5),
        ("adam_beta2", 0.5),
        ("adam_epsilon", 1e-3),
        ("weight_decay", 0.5),
    ],
)
def test_settings_of_the_optimizer_change_the_step_and_not_the_first_loss(lab, tmp_path, plain, setting, value):
    found = changed(lab, tmp_path, train={setting: value})
    assert losses(found)[0] == losses(plain)[0] and not equal(found["lora"], plain["lora"])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_settings_of_the_schedule_reach_it(name):
    settings = Train(lr_scheduler=name, lr_warmup_steps=3, lr_num_cycles=2.0, lr_power=2.0, steps=20)
    found, expected = loop.schedule_of(settings, 1e-3), Schedule(name, 1e-3, 3, 20, 2.0, 2.0)
    assert [found.at(step) for step in range(20)] == [expected.at(step) for step in range(20)]


def test_the_schedules_rate_is_the_one_that_is_used_and_reported(lab, tmp_path):
    found = changed(lab, tmp_path, train={"lr_scheduler": "linear", "lr_warmup_steps": 4, "learning_rate": 1e-2})
    assert [line["lr"] for line in found["lines"]] == pytest.approx([0.0, 2.5e-3])
    warm = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 4, "steps": 1}
    before = changed(lab, tmp_path / "one", train=warm)
    assert not any(array.any() for key, array in before["lora"].items() if "lora_B" in key)  # a step with rate 0


def test_the_moving_average_is_saved_and_trains_nothing_else(lab, tmp_path, plain):
    found = changed(lab, tmp_path, train={"ema_decay": 0.5})
    assert losses(found) == losses(plain) and not equal(found["lora"], plain["lora"])
    averages = {key: array for key, array in found["state"].items() if key.startswith("ema.")}
    assert equal({k: v for k, v in found["state"].items() if k not in averages}, plain["state"])
    saved = sorted(array.tobytes() for array in found["lora"].values())
    assert saved == sorted(array.tobytes() for array in averages.values())


@pytest.mark.parametrize(
    ("epochs", "batch_size", "accumulate", "steps"), [(0, 2, 1, 7), (2, 2, 1, 3), (2, 1, 3, 2), (1, 1, 9, 1)]
)
def test_epochs_of_three_photos_are_so_many_steps(lab, tmp_path, epochs, batch_size, accumulate, steps):
    other = lab.copy(tmp_path / "lab")
    other.set("train", epochs=epochs, batch_size=batch_size, accumulate=accumulate, steps=7, mode="pynative")
    plan = other.plan
    assert train.with_steps_and_mode(plan, Batches(plan)).steps == steps


@pytest.mark.parametrize(
    ("steps", "crops", "mode"), [(99, 1, "pynative"), (100, 1, "jit"), (199, 2, "pynative"), (200, 2, "jit")]
)
def test_auto_compiles_where_the_steps_repay_it_for_every_size_and_says_so(lab, tmp_path, capsys, steps, crops, mode):
    other = lab.copy(tmp_path / "lab").set("train", steps=steps).set("data", resolution=[32, 48][:crops])
    plan = other.plan
    assert train.with_steps_and_mode(plan, Batches(plan)).mode == mode
    assert f"mode: {mode}, as" in capsys.readouterr().out


def test_auto_does_not_compile_with_checkpointing_which_saves_no_memory_then(lab, tmp_path, capsys):
    other = lab.copy(tmp_path / "lab").set("train", steps=1000, gradient_checkpointing=True)
    plan = other.plan
    assert train.with_steps_and_mode(plan, Batches(plan)).mode == "pynative"
    assert "gradient checkpointing saves memory there alone" in capsys.readouterr().out


def test_a_line_of_metrics_every_so_many_steps_and_for_the_last(lab, tmp_path, plain):
    found = changed(lab, tmp_path, train={"log_every": 3, "steps": 5})
    assert [line["step"] for line in found["lines"]] == [3, 5]


# --- CLIP ---------------------------------------------------------------------------------------------------------


def test_clip_trains_with_a_rate_of_its_own_and_is_saved_beside_the_transformer(lab, tmp_path, plain):
    settings = {"lora": {"train_text_encoder": True}}
    slow, fast = (
        changed(lab, tmp_path / str(rate), **settings, train={"text_encoder_lr": rate, "steps": 1, "weight_decay": 0.0})
        for rate in (1e-4, 1e-3)
    )
    ours = {key for key in slow["lora"] if key.startswith("text_encoder.")}
    assert slow["lora"].keys() - ours == plain["lora"].keys()
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in ours
    assert equal(*({key: r["lora"][key] for key in plain["lora"]} for r in (slow, fast)))
    for key in (key for key in ours if "lora_B" in key):
        np.testing.assert_allclose(fast["lora"][key], 10 * slow["lora"][key], rtol=1e-4)
        assert np.abs(slow["lora"][key]).max() == pytest.approx(1e-4, rel=1e-2)  # Adam's first step is the rate
