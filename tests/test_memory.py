"""Estimates of memory: what they depend on, and how near they come to the peak of a process that trains."""

import dataclasses

import pytest
from lab import Lab

from benchmarks import inference
from pipeline.estimate import memory, preflight
from pipeline.settings.fields import Train

SHAPE = memory.Shape(batch_size=2, tokens=320, width=256, heads=8, blocks=8)
HELD = {"weights_bytes": 100 * memory.MIB, "gradients_bytes": memory.MIB, "optimizer_bytes": 2 * memory.MIB}


def estimated(device="CPU", element_bytes=4, num_sizes=1, shape=SHAPE, **settings) -> dict:
    settings = Train(**{"steps": 10} | settings)
    return memory.of_training(HELD, shape, settings, device, element_bytes, num_sizes)


def test_checkpointing_takes_less_and_compiling_more():
    plain, recomputing, compiled = (
        estimated(mode="pynative"),
        estimated(mode="pynative", gradient_checkpointing=True),
        estimated(mode="jit"),
    )
    assert recomputing["peak_bytes"] < plain["peak_bytes"] < compiled["peak_bytes"]
    assert plain["activations_with_checkpointing_bytes"] == recomputing["activations_bytes"]
    assert recomputing["activations_without_checkpointing_bytes"] == plain["activations_bytes"]


def test_checkpointing_saves_nothing_in_compiled_steps_on_cpu():
    assert len({estimated(mode="jit", gradient_checkpointing=each)["peak_bytes"] for each in (False, True)}) == 1


@pytest.mark.parametrize("field", ["batch_size", "tokens", "width", "blocks"])
@pytest.mark.parametrize("device", ["CPU", "Ascend"])
def test_more_of_anything_takes_more(field, device):
    larger = dataclasses.replace(SHAPE, **{field: 2 * getattr(SHAPE, field)})
    assert estimated(device, shape=larger)["activations_bytes"] > estimated(device)["activations_bytes"]


def test_flash_attention_keeps_no_matrices_on_ascend_and_there_is_none_in_float32():
    more_heads = dataclasses.replace(SHAPE, heads=64)
    for compute in (steps_bytes, memory.of_prediction):
        half, float32 = ([compute(shape, 2, "Ascend", size) for shape in (SHAPE, more_heads)] for size in (2, 4))
        assert half[0] == half[1] and float32[0] < float32[1]


def steps_bytes(shape, num_kept, device, element_bytes):
    return estimated(device, element_bytes, shape=shape)["peak_bytes"]


def test_half_precision_halves_activations_on_ascend_alone():
    no_heads = dataclasses.replace(SHAPE, heads=0)
    half, float32 = (estimated("Ascend", size, shape=no_heads)["activations_bytes"] for size in (2, 4))
    assert half * 2 == float32 < estimated("Ascend")["activations_bytes"]
    assert estimated("CPU", element_bytes=2)["activations_bytes"] == estimated("CPU")["activations_bytes"]


def test_the_mode_is_the_one_that_the_training_chooses():
    assert [estimated(steps=steps)["mode"] for steps in (99, 100)] == ["pynative", "jit"]
    assert estimated(steps=150, num_sizes=2)["mode"] == "pynative"


@pytest.fixture(scope="module")
def lab(tiny_model, tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("memory") / "lab", tiny_model).set("data", resolution=128)
    lab.encode()
    return lab


@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"mode": "pynative", "batch_size": 16}, marks=pytest.mark.slow),
        pytest.param({"mode": "pynative", "batch_size": 16, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_training_is_near_the_estimate(lab, tmp_path, train):
    """`python -m benchmarks.peak` has more of these, each within 15 %; here other programs may disturb."""
    other = lab.copy(tmp_path / "lab").set("train", **train)
    other.run_process("TrainLoRA")
    estimate = preflight.of_plan(other.plan)["training"]["peak_bytes"]
    assert estimate == pytest.approx(other.record("TrainLoRA")["peak_memory_bytes"]["process"], rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["encode 256 px", "decode 512 px", "predict 4 1 1152 2"])
def test_the_peak_of_work_without_gradients_is_near_the_estimate(case):
    """`python -m benchmarks.inference` has more of these, up to 1024 px."""
    assert inference.estimated(*inference.CASES[case]) == pytest.approx(inference.run_child(case), rel=0.25)
