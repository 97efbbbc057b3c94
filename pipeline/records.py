"""What every stage leaves beside its output: records/NAME.json, with versions, device, precision, counts and cost."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from cache import canonical, digest, recipe_id, write_atomically
from cache.core.files import make_folder
from pipeline.data.indexing import IndexedPhoto
from pipeline.devices import device
from pipeline.plan.needs import encoded, sampled
from pipeline.plan.plan import Plan

DECODE = ("Sample", "SampleControlNet")
VERSIONED = ("mindspore", "mindone", "transformers", "zarr", "numpy")


def write(stage: str, plan: Plan, photos: Sequence[IndexedPhoto], folder: Path, seconds: float, outcome: dict) -> None:
    """Leave the record of a stage that took ``seconds`` in ``folder``; a later run of the stage there replaces it."""
    make_folder(folder / "records")
    record = {
        "stage": stage,
        **addresses(stage, plan, photos),
        "outcome": outcome,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": device.peak_memory_bytes(plan.device),
        "device": plan.device,
        "precision": asdict(plan.precision),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomically(folder / "records" / f"{stage}.json", json.dumps(record, indent=2) + "\n")


def addresses(stage: str, plan: Plan, photos: Sequence[IndexedPhoto]) -> dict:
    """What the stage computed from, and where what it computed is: recipes by their ids in the store, and the run's."""
    if stage in DECODE:
        entries = [recipe_id(need.recipe) for need in sampled(plan, photos)]
        return {"inputs": {"entries": entries, "vae": plan.vae_digest}, "outputs": {"run": plan.run_id(photos)}}
    needs = (sampled if stage.startswith("Sample") else encoded)(plan, photos)
    ids = {need.stage: [] for need in needs}
    for need in needs:
        ids[need.stage].append(recipe_id(need.recipe))
    if stage not in ids:
        inputs = {"entries": ids, "transformer": plan.transformer_digest["weights"]}
        return {"inputs": inputs, "outputs": {"run": plan.run_id(photos)}}
    own = [need for need in needs if need.stage == stage]
    items = sorted({item for need in own for item in need.items})
    inputs = {"items": len(items), "items_digest": digest(canonical(items)), own[0].component: own[0].recipe["encoder"]}
    return {"inputs": inputs, "outputs": {"entries": ids[stage]}}


def exists(stage: str, folder: Path) -> bool:
    return (folder / "records" / f"{stage}.json").is_file()


def read(*folders: Path) -> list[dict]:
    """The records in some folders, in the order in which their stages finished."""
    found = [json.loads(path.read_text()) for folder in folders for path in (folder / "records").glob("*.json")]
    return sorted(found, key=lambda record: record["finished"])
