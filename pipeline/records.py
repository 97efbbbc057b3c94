"""What every stage leaves beside its output: records/NAME.json, with versions, device, precision, counts and cost."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from cache import Need, canonical, digest, recipe_id, write_atomically
from cache.core.files import make_folder
from pipeline.devices import device
from pipeline.plan.needs import sampled, trained_on
from pipeline.plan.plan import Plan
from pipeline.plan.shard import WHOLE, Shard

VERSIONED = ("mindspore", "mindone", "transformers", "zarr", "numpy")


def write(
    stage: str, plan: Plan, addresses: dict, folder: Path, seconds: float, outcome: dict, shard: Shard = WHOLE
) -> None:
    """Leave the record of a stage that took ``seconds`` in ``folder``; a later run of the stage there replaces it.

    addresses: what the stage computed from, and where the result is; as one of the functions below gives it.
    """
    make_folder(folder / "records")
    record = {
        "stage": stage,
        **({} if shard == WHOLE else {"shard": str(shard)}),
        **addresses,
        "outcome": outcome,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": device.peak_memory_bytes(plan.device),
        "device": plan.device,
        "device_details": device.details(plan.device, plan.experiment.device),
        "precision": asdict(plan.precision),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomically(path_of(stage, folder, shard), json.dumps(record, indent=2) + "\n")


def of_entries(stage: str, needs: Sequence[Need], shard: Shard = WHOLE) -> dict:
    """The addresses of a stage that makes the entries, in the shard, of those of the needs that name it."""
    own = [need for need in needs if need.stage == stage]
    items = sorted({item for need in own for item in need.items if item in shard})
    inputs = {"items": len(items), "items_digest": digest(canonical(items)), own[0].component: own[0].recipe["encoder"]}
    return {"inputs": inputs, "outputs": {"entries": [recipe_id(need.recipe) for need in own]}}


def of_run(plan: Plan) -> dict:
    """Of a stage that reads what the encoders made, and writes to the run's folder."""
    ids: dict[str, list[str]] = {}
    for need in trained_on(plan):
        ids.setdefault(need.stage, []).append(recipe_id(need.recipe))
    inputs = {"entries": ids, plan.family.network: plan.network_digest["weights"]}
    return {"inputs": inputs, "outputs": {"run": plan.run_id}}


def of_pictures(plan: Plan) -> dict:
    """Of a stage that decodes final latents to the run's folder."""
    entries = [recipe_id(need.recipe) for need in sampled(plan)]
    inputs = {"entries": entries, plan.family.image_encoder: plan.image_encoder_digest}
    return {"inputs": inputs, "outputs": {"run": plan.run_id}}


def path_of(stage: str, folder: Path, shard: Shard = WHOLE) -> Path:
    """The record of a stage, or of a shard of it, that keeps its records in ``folder``."""
    return folder / "records" / f"{shard.file_name(stage)}.json"


def read(*folders: Path) -> list[dict]:
    """The records in some folders, in the order in which their stages finished."""
    found = [json.loads(path.read_text()) for folder in folders for path in (folder / "records").glob("*.json")]
    return sorted(found, key=lambda record: record["finished"])
