"""Pictures of several shapes, encoded, and the batches of plans for them."""

import dataclasses
from pathlib import Path

import numpy as np
from lab import Lab
from PIL import Image

from pipeline.methods import LORA
from pipeline.plan.plan import Plan, resolve
from pipeline.training.batches import Batch, Batches

SIZES = [(64, 32), (32, 64), (96, 64), (50, 60), (40, 130)]
"""Of the pictures; at 32 pixels, the first two are not scaled, and of the third every second pixel counts."""

NUM, SIDE, SEED = len(SIZES), 32, 5
BUCKETS = {"buckets": True, "resolution": (16, 64)}
"""Four sizes; of these pictures, one is nearest to the square."""


def shaped_lab(folder: Path, model: Path) -> Lab:
    """Pictures of several shapes, encoded without any knob."""
    lab = Lab(folder, model, num_pictures=NUM)
    for number, (row, size) in enumerate(zip(lab.captions(), SIZES)):
        small = np.random.default_rng(number).integers(0, 256, (7, 5, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(lab.pictures / row["file_name"])
    lab.write_captions([row | {"text": f"picture {number}"} for number, row in enumerate(lab.captions())])
    lab.settle()
    assert lab.encode() == dict.fromkeys(("EncodeCLIP", "EncodeT5", "EncodeImages"), NUM)
    return lab


def full_lab(plain: Lab, folder: Path) -> Lab:
    """Everything encoded that any test of batches asks for."""
    lab = plain.copy(folder)
    lab.set("data", flip=True).set("train", caption_dropout=0.5).encode()
    lab.set("data", crops=2).encode()
    lab.set("data", crops=0, resolution=[16, 64], buckets=True).encode()
    return lab.set("data", flip=False, resolution=SIDE, buckets=False).set("train", caption_dropout=0.0)


def plan_of(lab: Lab, seed: int = SEED, **tables) -> Plan:
    """The lab's plan with another seed and other settings, by table; the latents are not sampled, unless asked for."""
    experiment = lab.experiment
    tables["train"] = {"posterior": "mode", **tables.get("train", {})}
    changed = {name: dataclasses.replace(getattr(experiment, name), **values) for name, values in tables.items()}
    return resolve(dataclasses.replace(experiment, seed=seed, **changed), LORA)


def batches_of(plan: Plan) -> Batches:
    return Batches(plan)


def some(plan: Plan, count: int = 12) -> list[Batch]:
    batches = batches_of(plan)
    return [batches.training(number) for number in range(count)]


def assert_same(found: Batch, expected: Batch, *names: str) -> None:
    for name in names or vars(expected):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
