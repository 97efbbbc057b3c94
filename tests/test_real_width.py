"""FLUX.1-dev's width, text length and VAE, with few blocks: every stage runs, within memory and time that are stated.

The transformer is 3072 wide with 24 heads, T5's d_model is 4096 and its length 512, CLIP-L and the VAE are whole, and
pictures have the area of 512 x 512 pixels.  Slow; takes 10 GB of memory and 5 of disk.
"""

import shutil
import time

import pytest
from lab import Lab
from PIL import Image

from pipeline.flux import sized

pytestmark = [pytest.mark.usefixtures("cpu"), pytest.mark.slow]

FEW = {
    "text_encoder": {},
    "text_encoder_2": {"num_layers": 1},
    "vae": {},
    "transformer": {"num_layers": 1, "num_single_layers": 1},
}
"""What is changed in each component's config."""

STAGES = ("EncodeCLIP", "EncodeT5", "EncodeImages", "TrainLoRA", "SampleLatents", "Sample")
BUDGET_GB = {"EncodeCLIP": 1.6, "EncodeT5": 3.0, "EncodeImages": 3.5, "TrainLoRA": 8, "SampleLatents": 6, "Sample": 5}
"""Of each stage's process at its peak, in float32."""
SECONDS = 900
"""For all stages; two quiet cores take a third of it."""


@pytest.fixture
def lab(tiny_model, tmp_path) -> Lab:
    """A portrait and a landscape."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    for component, changed in FEW.items():
        shutil.rmtree(model / component)
        sized.write(model, component, **changed)
    lab = Lab(tmp_path / "lab", model, num_pictures=2)
    for row, size in zip(lab.captions(), ((640, 960), (960, 640))):
        path = lab.pictures / row["file_name"]
        Image.open(path).resize(size).save(path)
    lab.settle()
    lab.set("data", resolution=512, max_sequence_length=512, buckets=True)
    lab.set("train", steps=2, batch_size=1, mode="pynative")
    return lab.set("sample", prompts=["a red circle"], num_inference_steps=2)


def test_every_stage_runs_within_its_memory_and_time(lab):
    began, peaks = time.monotonic(), {}
    lab.run("CheckData")
    for stage in STAGES:
        lab.run_process(stage)
        peaks[stage] = lab.record(stage)["peak_memory_bytes"]["process"] / 1e9
    print(f"{time.monotonic() - began:.0f} s; GB at the peak: {peaks}")
    assert {stage: peak for stage, peak in peaks.items() if peak > BUDGET_GB[stage]} == {}
    assert time.monotonic() - began < SECONDS
    assert (lab.run_folder / "samples.png").is_file()
