"""Photos with conditions, for the tests of ControlNets: making and encoding them."""

import json
from pathlib import Path

from lab import Lab
from PIL import Image

from pipeline.methods import CONTROLNET
from pipeline.plan.plan import resolve

STAGES = ("EncodeCLIP", "EncodeT5", "EncodeImages", "EncodeControls")


def paired_lab(folder: Path, model: Path) -> Lab:
    """Drawn pictures, each with its negative as its condition; nothing is encoded yet."""
    lab = Lab(folder, model)
    add_conditions(lab, lambda picture: Image.eval(picture, lambda value: 255 - value))
    return lab.set("controlnet", num_double_layers=1, num_single_layers=1)


def add_conditions(lab: Lab, make, suffix: str = ".png") -> None:
    """A condition beside every picture, ``make`` of it."""
    rows = lab.captions()
    for row in rows:
        row["conditioning_image"] = f"conditions/{row['file_name'].removesuffix('.png')}{suffix}"
        path = lab.pictures / row["conditioning_image"]
        path.parent.mkdir(exist_ok=True)
        make(Image.open(lab.pictures / row["file_name"])).save(path)
    lab.write_captions(rows)
    lab.settle()


def encode(lab: Lab) -> dict[str, int]:
    """Run what a scheduler would before a ControlNet's training.  Returns how many entries each stage wrote."""
    lab.run("CheckData", "CheckControls")
    written = {}
    for name in STAGES:
        if not lab.done(name):
            lab.run(name)
            plan = plan_of(lab)
            entries = {"EncodeCLIP": plan.pooled, "EncodeT5": plan.txt}.get(name, first_control(plan))
            entries = lab.latents if name == "EncodeImages" else entries
            written[name] = json.loads((entries.path / f"records/{name}.json").read_text())["outcome"]["encoded"]
    return written


def first_control(plan):
    return plan.control_needs[0].entries


def plan_of(lab: Lab):
    return resolve(lab.experiment, CONTROLNET)


def run_folder(lab: Lab):
    plan = plan_of(lab)
    return plan.run.path
