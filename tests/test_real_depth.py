"""At FLUX.1's depth, 19 + 38 blocks, at a tiny width: trainings of as many tensors as the real model has.

Slow: compiling one step takes minutes there.
"""

import time

import pytest
import ranked
from kills import Killed, kill_at, outcome
from lab import Lab
from pairs import add_conditions, plan_of
from PIL import Image

from pipeline.flux import tiny
from pipeline.training import loop

pytestmark = [pytest.mark.usefixtures("cpu"), pytest.mark.slow]

BLOCKS, WIDTH = (19, 38), 32
MODES = ["pynative", "jit"]
KNOBS = {"accumulate": 2, "ema_decay": 0.9}
LORAS = {
    "attention": ({}, {}, 380),
    "all-linear": ({"targets": "all-linear"}, KNOBS, 836),
    "with-clip": ({"train_text_encoder": True}, {"optimizer": "adam_weight_decay"}, 380 + 16),
}
"""By name: settings of [lora] and of [train], and how many tensors train."""


@pytest.fixture(scope="module")
def deep(cpu, tmp_path_factory) -> Lab:
    """Encoded, with conditions; a prompt to sample."""
    folder = tmp_path_factory.mktemp("deep")
    model = tiny.write_tiny_model(folder / "model", blocks=BLOCKS, width=WIDTH)
    lab = Lab(folder / "lab", model, num_pictures=2)
    add_conditions(lab, lambda picture: Image.eval(picture, lambda value: 255 - value))
    lab.set("train", steps=2, batch_size=1, checkpoint_every=1)
    lab.set("sample", prompts=["a red circle"], num_inference_steps=2)
    lab.encode()
    return lab.run("CheckControls", "EncodeControls")


def broken_and_unbroken(lab: Lab, other: Lab, stage: str, run_folder, monkeypatch) -> tuple[dict, dict]:
    """What a run of two steps makes without a break, and killed after its first step and resumed."""
    unbroken = outcome(run_folder(lab.run(stage)))
    kill_at(monkeypatch, [2])  # its first checkpoint is written then
    with pytest.raises(Killed):
        other.run(stage)
    return unbroken, outcome(run_folder(other.run(stage)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("knobs", LORAS)
def test_a_lora_trains_two_steps_is_killed_and_resumed_bit_for_bit_and_draws(deep, tmp_path, monkeypatch, mode, knobs):
    lora, train, count = LORAS[knobs]
    lab = deep.copy(tmp_path / "lab").set("lora", **lora).set("train", mode=mode, **train)
    other = lab.copy(tmp_path / "other")
    unbroken, resumed = broken_and_unbroken(lab, other, "TrainLoRA", lambda lab: lab.run_folder, monkeypatch)
    assert resumed == unbroken
    assert sum(name.startswith("trained.") for name in unbroken["state"]) == count
    if mode == "pynative":
        assert lab.run("SampleLatents", "Sample").done("Sample")


def test_two_ranks_that_share_the_optimizer_have_the_bits_of_one(deep, tmp_path):
    lab = deep.copy(tmp_path / "lab").set("train", mode="pynative", steps=4, **KNOBS)
    several = lab.copy(tmp_path / "several")
    ranked.run(several, ranks=2, shard_optimizer=True)
    alone = outcome(lab.run("TrainLoRA").run_folder)
    assert outcome(several.run_folder) == alone
    assert sum(name.startswith("trained.") for name in alone["state"]) == 380


@pytest.mark.parametrize("mode", MODES)
def test_a_controlnet_of_four_blocks_is_killed_and_resumed_bit_for_bit(deep, tmp_path, monkeypatch, mode):
    lab = deep.copy(tmp_path / "lab").set("train", mode=mode)
    lab.set("controlnet", num_double_layers=4, num_single_layers=0)
    lab.run("CheckControls")
    other = lab.copy(tmp_path / "other")
    other.run("CheckControls")

    def run_folder(lab):
        plan = plan_of(lab)
        return plan.run.path

    unbroken, resumed = broken_and_unbroken(lab, other, "TrainControlNet", run_folder, monkeypatch)
    assert resumed == unbroken
    assert sum(name.startswith("trained.") for name in unbroken["state"]) == 154


@pytest.mark.parametrize("knobs", [{"gradient_checkpointing": True}, {}], ids=["checkpointing", "fp16"])
def test_checkpointing_and_float16_train_too(deep, tmp_path, knobs):
    lab = deep.copy(tmp_path / "lab").set("train", mode="pynative", **knobs)
    if not knobs:
        lab.set("precision", preset="fp16").encode()
    assert lab.run("TrainLoRA").done("TrainLoRA")


def test_the_first_step_takes_no_longer_than_half_a_minute_in_pynative(deep, tmp_path, monkeypatch):
    lab, seconds = deep.copy(tmp_path / "lab").set("train", mode="pynative"), []
    advance = loop.Training.advance

    def timed(training, batches):
        began = time.process_time()
        outcome = advance(training, batches)
        seconds.append(time.process_time() - began)
        return outcome

    monkeypatch.setattr(loop.Training, "advance", timed)
    lab.run("TrainLoRA")
    assert seconds[0] < 30
