"""The lab that an older version left: see floor/write.py."""

import json
import tarfile
from pathlib import Path

from lab import Lab

LAB = Path(__file__).parent / "floor/lab.tar.gz"
MODEL = {"blocks": (1, 1), "width": 32}
SETTINGS = {
    "paths": {"store": "store", "runs": "runs"},
    "model": {"path": "../model"},
    "data": {"images": "pictures", "resolution": [32, 48], "flip": True, "max_sequence_length": 8},
    "precision": {"preset": "fp32"},
    "lora": {"rank": 1, "alpha": 2.0},
    "controlnet": {"num_double_layers": 0, "num_single_layers": 1},
    "train": {
        "steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "mode": "pynative",
        "checkpoint_every": 2,
        "caption_dropout": 0.1,
    },
    "sample": {"prompts": ["a cat"], "num_inference_steps": 2, "resolution": 32, "conditions": ["pictures/00001.png"]},
    "device": {"target": "CPU"},
}


def write_model(folder: Path) -> Path:
    from pipeline.flux import tiny

    return tiny.write_tiny_model(folder, **MODEL)


def unpack(folder: Path, model: Path) -> dict[str, Lab]:
    """Both labs, by name, with the model beside them, as files that are an hour old."""
    with tarfile.open(LAB) as tar:
        tar.extractall(folder, filter="data")
    (folder / "model").symlink_to(model)
    labs = {}
    for name in ("finished", "interrupted"):
        lab = labs[name] = object.__new__(Lab)
        lab.folder, lab.model = folder / name, model
        lab.settings = json.loads(json.dumps(SETTINGS))
    return labs
