"""Identities that must never change: runs and entries of an older version stay found.

Recorded once from this code, of the model that comes with the package and photos that are no files.
"""

import json
from pathlib import Path

import pytest

from cache import canonical, digest, recipe_id
from pipeline.data.indexing import IndexedPhoto, by_content
from pipeline.methods import CONTROLNET, LORA
from pipeline.plan.method import Method
from pipeline.plan.needs import encoded
from pipeline.plan.plan import Plan, resolve
from pipeline.settings.reading import load_experiment
from pipeline.training import checkpoint as resume

SIZES = ((640, 480), (480, 640), (512, 512), (900, 300))
FLIPS = {"resolution": [32, 64], "buckets": True, "flip": True, "crops": 2}


def photo(number: int, **more) -> IndexedPhoto:
    width, height = SIZES[number % len(SIZES)]
    return IndexedPhoto(
        name=f"{number}.png",
        folder="/photos",
        caption=f"ein Käse, number {number % 5}",
        digest=digest(b"photo %d" % number),
        width=width,
        height=height,
        **more,
    )


def pair(number: int) -> IndexedPhoto:
    return photo(number, conditioning=f"{number + 100}.png", condition=photo(number + 100))


def plan_of(folder: Path, method: Method, **tables) -> Plan:
    tables.setdefault("data", {})
    tables["data"] = {"resolution": 64, "max_sequence_length": 24, "images": "photos"} | tables["data"]
    tables["device"], tables["precision"] = {"target": "CPU"} | tables.get("device", {}), {"preset": "fp32"}
    lines = ["seed = 5"]
    for table, values in tables.items():
        lines += [f"[{table}]"] + [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    (folder / "experiment.toml").write_text("\n".join(lines))
    return resolve(load_experiment(folder / "experiment.toml"), method)


def identities(plan: Plan) -> dict[str, str]:
    """The run, its checkpoints, each recipe by its stage, and the items of all recipes."""
    needs = encoded(plan)
    recipes = {need.stage: [] for need in needs}
    for need in needs:
        recipes[need.stage].append(recipe_id(need.recipe))
    found = {"run": plan.run_id, "checkpoint": digest(canonical(resume.identity_of(plan.decisive)))}
    found |= {stage: digest(canonical(ids)) for stage, ids in recipes.items()}
    return found | {"items": digest(canonical([need.items for need in needs]))}


EXPERIMENTS = {
    "plain": (LORA, photo, {}),
    "buckets, flips, crops": (LORA, photo, {"data": FLIPS}),
    "captions dropped": (LORA, photo, {"train": {"caption_dropout": 0.1}, "data": {"repeats": 3}}),
    "prompts": (LORA, photo, {"sample": {"prompts": ["a cat", "ein Käse, number 1"]}}),
    "ControlNet, files": (CONTROLNET, pair, {"controlnet": {"num_double_layers": 1}, "data": FLIPS}),
    "ControlNet, canny": (CONTROLNET, photo, {"controlnet": {"condition": "canny", "num_double_layers": 4}}),
}

RECORDED = {
    "plain": {
        "run": "407489329cb1eb17e1e6ddfa046d2fa4",
        "checkpoint": "6fbf3334b051489aac59dae7ef02c1fe",
        "EncodeCLIP": "c482c3342691892b5620fcd1837dfc3d",
        "EncodeT5": "d2e229690a62c1e4a06b0ba9e3b9076a",
        "EncodeImages": "c9f18d4968912e9b9a29b5b85f024449",
        "items": "2ccca40e92d37d05d8d72e950bf149d6",
    },
    "buckets, flips, crops": {
        "run": "88fe5b4defc6bb155d4d16bd0384ea7a",
        "checkpoint": "2d069f612a922e90aa15e4e2d5b85104",
        "EncodeCLIP": "c482c3342691892b5620fcd1837dfc3d",
        "EncodeT5": "d2e229690a62c1e4a06b0ba9e3b9076a",
        "EncodeImages": "3fac5e8d24ad3c2685c54316f00d13dc",
        "items": "01d2e2e1b4572739424ffc7c031d1c50",
    },
    "captions dropped": {
        "run": "9878254fdfe4b30c512d5b450753044e",
        "checkpoint": "58214af4c9a6f366019b34f499ddd595",
        "EncodeCLIP": "c482c3342691892b5620fcd1837dfc3d",
        "EncodeT5": "d2e229690a62c1e4a06b0ba9e3b9076a",
        "EncodeImages": "c9f18d4968912e9b9a29b5b85f024449",
        "items": "ba9cdc4219cd0da10151507c77ac7095",
    },
    "prompts": {
        "run": "407489329cb1eb17e1e6ddfa046d2fa4",
        "checkpoint": "6fbf3334b051489aac59dae7ef02c1fe",
        "EncodeCLIP": "c482c3342691892b5620fcd1837dfc3d",
        "EncodeT5": "d2e229690a62c1e4a06b0ba9e3b9076a",
        "EncodeImages": "c9f18d4968912e9b9a29b5b85f024449",
        "items": "03d42697caddd86e18eabe4ee2e08b42",
    },
    "ControlNet, files": {
        "run": "78714962775cf0f8b809abedf8f3b4e8",
        "checkpoint": "18da80de4d0625f5f68f5c4f0a12297f",
        "EncodeCLIP": "c482c3342691892b5620fcd1837dfc3d",
        "EncodeT5": "d2e229690a62c1e4a06b0ba9e3b9076a",
        "EncodeImages": "3fac5e8d24ad3c2685c54316f00d13dc",
        "EncodeControls": "3fac5e8d24ad3c2685c54316f00d13dc",
        "items": "d1cc0ae764b7777ce3d817d6e3ce7829",
    },
    "ControlNet, canny": {
        "run": "eddd683483a119fd2dc8cb07092b1462",
        "checkpoint": "27442bc738f39d213a908a8840ee5057",
        "EncodeCLIP": "c482c3342691892b5620fcd1837dfc3d",
        "EncodeT5": "d2e229690a62c1e4a06b0ba9e3b9076a",
        "EncodeImages": "c9f18d4968912e9b9a29b5b85f024449",
        "EncodeControls": "9d7bc54f519754810e22fa5c15adb907",
        "items": "477eecfc9554d783d4d5d909c96afd89",
    },
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_identities_are_those_of_every_earlier_release(name, tmp_path):
    method, make, tables = EXPERIMENTS[name]
    photos = by_content([make(number % 11) for number in range(12)])
    assert identities(plan_of(tmp_path, method, **tables).of(photos)) == RECORDED[name]


def test_a_run_that_need_not_give_the_same_bits_again_has_an_identity_of_its_own(tmp_path):
    photos = by_content([photo(number % 11) for number in range(12)])
    plans = [plan_of(tmp_path, LORA, device={"deterministic": value}).of(photos) for value in (True, False)]
    asked, not_asked = map(identities, plans)
    assert asked == RECORDED["plain"]
    assert {name for name in asked if asked[name] != not_asked[name]} == {"run", "checkpoint"}
