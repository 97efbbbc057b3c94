"""What every stage leaves beside its output: records/NAME.json, with versions, device, precision, counts and cost."""

import json
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from cache import write_atomically
from cache.files import make_folder
from pipeline import device
from pipeline.recipes import Plan

VERSIONED = ("mindspore", "mindone", "transformers", "zarr", "numpy")


def write(stage: str, plan: Plan, folder: Path, seconds: float, outcome: dict) -> None:
    """Leave the record of a stage that took ``seconds`` in ``folder``; a later run of the stage there replaces it."""
    make_folder(folder / "records")
    record = {
        "stage": stage,
        "outcome": outcome,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": device.peak_memory_bytes(plan.device),
        "device": plan.device,
        "precision": asdict(plan.precision),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_atomically(folder / "records" / f"{stage}.json", json.dumps(record, indent=2) + "\n")


def exists(stage: str, folder: Path) -> bool:
    return (folder / "records" / f"{stage}.json").is_file()


def read(*folders: Path) -> list[dict]:
    """The records in some folders, in the order in which their stages finished."""
    found = [json.loads(path.read_text()) for folder in folders for path in (folder / "records").glob("*.json")]
    return sorted(found, key=lambda record: record["finished"])
