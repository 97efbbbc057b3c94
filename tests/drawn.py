"""A trained LoRA and what is drawn with it, for the tests of sampling."""

import json
from pathlib import Path

import numpy as np
import pytest
from lab import Lab

from pipeline.flux import models
from pipeline.plan import pictures

PROMPTS = ["a red circle on a blue background", "a photo of a green cat in the snow"]


def trained_lab(folder: Path, model: Path) -> Lab:
    """A LoRA, trained, and two prompts, encoded; nothing is drawn yet."""
    lab = Lab(folder, model, num_pictures=2)
    lab.set("train", steps=2, learning_rate=0.1).set("sample", prompts=PROMPTS, num_inference_steps=3)
    lab.encode()
    return lab.run("TrainLoRA")


def sampled_lab(trained: Lab, folder: Path) -> Lab:
    """``loaded``: the models that each stage loaded."""
    lab = trained.copy(folder)
    lab.loaded, load = {}, models.load_model
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("SampleLatents", "Sample"):
            found = lab.loaded[stage] = []
            patch.setattr(models, "load_model", lambda *args, to=found: to.append(args[1]) or load(*args))
            lab.run(stage)
    return lab


def latents_of(lab: Lab, name: str) -> np.ndarray:
    """(pictures, channels, height, width), in the order of the prompts."""
    plan = lab.plan
    (series,) = (each for each in pictures.all_series(plan) if each.name == name)
    return series.entries.read_many(list(series.pictures))


def outcome(lab: Lab, name: str) -> dict:
    return lab.record(name)["outcome"]


def listing_of(lab: Lab) -> dict:
    return json.loads((lab.run_folder / "samples.json").read_text())
