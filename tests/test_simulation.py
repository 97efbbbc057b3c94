"""bfloat16 simulated on CPU: what is rounded, that it is labelled, and that it has addresses of its own."""

import json

import ml_dtypes
import numpy as np
import pytest
from lab import ENCODERS, Lab
from safetensors import safe_open

from pipeline.devices import device, dtypes, precision, simulation
from pipeline.flux import models
from pipeline.flux.prediction import prediction
from pipeline.methods import CONTROLNET
from pipeline.methods import controlnet_model as controlnet
from pipeline.methods import lora_layers as lora
from pipeline.plan.plan import resolve
from pipeline.settings.fields import PrecisionSettings
from pipeline.training import loss
from pipeline.training.batches import Batches

pytestmark = pytest.mark.usefixtures("cpu")


@pytest.fixture(scope="module")
def trained(cpu, tiny_model, tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("simulation") / "lab", tiny_model).set("precision", preset="bf16", simulate=True)
    lab.encode()
    return lab.run("TrainLoRA")


def rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_rounding_is_that_of_bfloat16_in_both_modes():
    import mindspore as ms

    values = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32)
    values = np.concatenate([values, values * 1e30, values * 1e-30, np.float32([0, 1 + 2**-8, 1 + 3 * 2**-8])])
    rounding = simulation.rounding()
    for function in (rounding, ms.jit(rounding)):
        np.testing.assert_array_equal(function(ms.Tensor(values)).asnumpy(), rounded(values))


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "vae", "transformer"])
def test_parameters_are_those_of_the_file_rounded(trained, component):
    simulated = trained.plan.load(component)
    exact = models.load_model(trained.model, component, "fp32")
    for ours, theirs in zip(simulated.get_parameters(), exact.get_parameters()):
        assert ours.name == theirs.name
        np.testing.assert_array_equal(ours.asnumpy(), rounded(theirs.asnumpy()))


@pytest.mark.parametrize("mode", ["pynative", "jit"])
def test_the_transformer_gives_rounded_velocities_near_the_exact_ones(trained, mode):
    import mindspore as ms

    plan = trained.plan
    simulated, exact = (
        plan.load("transformer"),
        models.load_model(plan.model_folder, "transformer", "fp32"),
    )
    x, _, txt, pooled, timestep, img_ids, txt_ids, _, guidance = loss.tensors_of(plan, exact)(
        Batches(plan).evaluation(0, 2)
    )
    arguments = x, txt, pooled, timestep, img_ids, txt_ids, guidance
    assert all(map(simulation.is_rounded, arguments))
    expected = prediction(exact)(*arguments).asnumpy()
    predict = prediction(simulated)
    found = (ms.jit(predict) if mode == "jit" else predict)(*arguments)
    assert simulation.is_rounded(found)
    error = np.linalg.norm(found.asnumpy() - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 2e-2


def test_what_is_stored_is_bfloat16_under_an_address_of_its_own(trained):
    plan = trained.plan
    for entries in (plan.pooled, plan.txt, plan.image_needs[0].entries):
        assert entries.dtype == "bfloat16" and entries.recipe["simulated"] is True
    real = precision.resolve(PrecisionSettings("bf16"), "Ascend", device.COMPUTES["Ascend"])
    assert real.vae.decisive == {"params": "bf16", "compute": "bf16"} != plan.precision.vae.decisive


def test_records_and_results_say_that_it_was_simulated(trained):
    result = json.loads((trained.run_folder / "result.json").read_text())["precision"]
    for name in ("vae", "text_encoder", "text_encoder_2", "transformer"):
        assert set(result[name]["parameters"]) == {dtypes.SIMULATED} and result[name]["output"] == dtypes.SIMULATED
    assert set(result["lora"]["parameters"]) == {"float32"} and result["lora"]["output"] == dtypes.SIMULATED
    for stage in ENCODERS:
        assert trained.record(stage)["precision"]["vae"]["simulated"] is True
    with safe_open(trained.run_folder / lora.WEIGHTS_NAME, "np") as file:
        assert json.loads(file.metadata()["precision"])["transformer"]["simulated"] is True


@pytest.mark.slow
def test_compiled_training_simulates_the_same(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab").set("train", mode="jit").run("TrainLoRA")
    ours, theirs = (
        [json.loads(line)["loss"] for line in (each.run_folder / "metrics.jsonl").read_text().splitlines()]
        for each in (lab, trained)
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)


def test_a_controlnet_gives_rounded_samples(trained, tmp_path):
    lab = trained.copy(tmp_path / "lab").set("controlnet", num_double_layers=1, num_single_layers=1)
    plan = resolve(lab.experiment, CONTROLNET)
    transformer = plan.load("transformer")
    made = controlnet.make(transformer, plan.experiment, plan.precision.trained)
    for parameter in made.get_parameters():
        parameter.set_data(parameter + 0.01)
    x, _, txt, pooled, timestep, img_ids, txt_ids, _, guidance = loss.tensors_of(plan, transformer)(
        Batches(trained.plan).evaluation(0, 2)
    )
    double, single = made(x, x, None, 1.0, txt, pooled, timestep, img_ids, txt_ids, guidance)
    assert all(simulation.is_rounded(sample) for sample in (*double, *single))
