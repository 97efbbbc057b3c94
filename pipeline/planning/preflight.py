"""What an experiment will take, before any weight is read: parameters, bytes, what is cached, room on the disks.

From configs and the store's indices alone; imports no MindSpore.
"""

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.data import variants
from pipeline.data.indexing import IndexedPhoto
from pipeline.errors import UserError
from pipeline.needs import encoded
from pipeline.planning import estimates
from pipeline.precision import Precision
from pipeline.recipes import CONTROLNET, RESULT_NAME, Plan
from pipeline.settings import Experiment
from pipeline.training import resume

CONFIGS = Path(__file__).parent.with_name("configs")
OVERHEAD = 1.02
"""What the store adds to the rows of an entry: checksums, indices, alignment; small vectors take a little more."""


def config_folder(name: str) -> Path:
    """A folder of configs in a checkpoint's layout: one that ships with this package, by its name, or any other."""
    shipped = sorted(path.name for path in CONFIGS.iterdir())
    found = CONFIGS / name if name in shipped else Path(name).expanduser()
    if not found.is_dir():
        raise UserError(f"{name}: no such folder of configs; known by name: {', '.join(shipped)}")
    return found


# --- an experiment ------------------------------------------------------------------------------------------------


def of_plan(plan: Plan, photos: Sequence[IndexedPhoto]) -> dict:
    """What each stage of an experiment has, lacks and takes; see `table` for people."""
    models, stages = estimates.encoders(plan.checkpoint, plan.experiment, plan.precision, plan.device), {}
    for need in encoded(plan, photos):
        entries = plan.entries(need.recipe)
        missing = len(entries.missing(need.items))
        stage = stages.setdefault(need.stage, models[need.component] | {"items": 0, "missing": 0, "store_bytes": 0})
        stage["items"] += len(need.items)
        stage["missing"] += missing
        stage["store_bytes"] += math.ceil(missing * _row_bytes(entries.shape, entries.dtype) * OVERHEAD)
    sizes = plan.samples(photos).sizes
    taken = estimates.training(plan.checkpoint, plan.experiment, plan.precision, plan.device, plan.trains, sizes)
    is_done = (plan.run_folder(photos) / RESULT_NAME).is_file()
    there = sum(path.stat().st_size for path in resume.list_checkpoints(plan.run_folder(photos)))
    runs_bytes = 0 if is_done else max(0, taken["checkpoints_bytes"] - there) + taken["result_bytes"]
    return {
        "device": plan.device,
        "preset": plan.precision.label,
        "stages": stages,
        "training": {
            "trains": plan.trains,
            "is_done": is_done,
            "run_folder": str(plan.run_folder(photos)),
            **taken,
        },
        "disks": disks(plan, sum(stage["store_bytes"] for stage in stages.values()), runs_bytes),
    }


def of_configs(configs: Path, experiment: Experiment, policies: Precision, target: str, trains: str) -> dict:
    """As `of_plan`, for a model that is not here: nothing is known of photos and of what is cached."""
    sizes = variants.squares(experiment.data)
    return {
        "device": target,
        "preset": policies.label,
        "stages": estimates.encoders(configs, experiment, policies, target),
        "training": {"trains": trains, **estimates.training(configs, experiment, policies, target, trains, sizes)},
    }


def _row_bytes(shape: Iterable[int], dtype: str) -> int:
    return math.prod(shape) * estimates.BYTES[dtype] + 4


def disks(plan: Plan, store_bytes: int, runs_bytes: int) -> list[dict]:
    """By file system: what will be written to it, and what is free there."""
    needs = defaultdict(lambda: {"folders": [], "needed_bytes": 0})
    for folder, num_bytes in ((plan.store.path, store_bytes), (plan.experiment.runs, runs_bytes)):
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        disk = needs[os.stat(existing).st_dev]
        disk["folders"].append(str(folder))
        disk["needed_bytes"] += num_bytes
        disk["free_bytes"] = shutil.disk_usage(existing).free
    return list(needs.values())


def check_room(plan: Plan, photos: Sequence[IndexedPhoto]) -> None:
    """Raise UserError where a disk has no room for what the experiment will write to it."""
    for disk in of_plan(plan, photos)["disks"]:
        if disk["needed_bytes"] > disk["free_bytes"]:
            raise UserError(
                f"{' and '.join(disk['folders'])}: {in_units(disk['needed_bytes'])} will be written there, "
                f"{in_units(disk['free_bytes'])} are free; make room, or change [paths]"
            )


def table(found: dict) -> str:
    """What `of_plan` or `of_configs` found, for people."""
    lines = [f"device {found['device']}, precision {found['preset']}", ""]
    lines += [f"{'':<16}{'parameters':>16}{'weights':>11}{'peak':>11}{'items':>9}{'missing':>9}{'to the store':>14}"]
    for name, row in found["stages"].items():
        cells = [f"{row['parameters']:>16,}"]
        cells += [f"{in_units(row[f'{part}_bytes']):>11}" for part in ("weights", "peak")]
        if "items" in row:
            cells += [f"{row['items']:>9,}", f"{row['missing']:>9,}", f"{in_units(row['store_bytes']):>14}"]
        lines.append(f"{name:<16}" + "".join(cells))
    lines += _training_lines(found["training"])
    for disk in found.get("disks", ()):
        lines += ["", f"{' and '.join(disk['folders'])}:"]
        lines += [f"  {in_units(disk['needed_bytes'])} will be written, {in_units(disk['free_bytes'])} are free"]
    return "\n".join(lines)


def _training_lines(own: dict) -> list[str]:
    said = {name: in_units(value) for name, value in own.items() if name.endswith("_bytes")}
    done = ", which is done" if own.get("is_done") else ""
    both = [said[f"activations_{each}_checkpointing_bytes"] for each in ("without", "with")]
    lines = ["", f"training a {'ControlNet' if own['trains'] == CONTROLNET else 'LoRA'}{done}:"]
    lines += [f"  parameters           {own['parameters']:>16,}, of which {own['trained_parameters']:,} train"]
    lines += [f"  sizes of batches     {own['num_shapes']:>16}, each compiled once where steps are compiled"]
    lines += [f"  {part:<21}{said[f'{part}_bytes']:>16}" for part in ("weights", "gradients", "optimizer")]
    lines += [
        f"  activations          {said['activations_bytes']:>16}, {both[0]} without checkpointing, {both[1]} with"
    ]
    lines += [f"  at its peak          {said['peak_bytes']:>16} of {said['memory_bytes']}, estimated{_too_much(own)}"]
    return lines + [f"  {part:<21}{said[f'{part}_bytes']:>16}" for part in ("checkpoints", "result")]


def _too_much(own: dict) -> str:
    """What to do where a training takes more memory than there is; nothing where it does not."""
    if own["peak_bytes"] <= own["memory_bytes"]:
        return ""
    saved = own["activations_bytes"] - own["activations_with_checkpointing_bytes"]
    if saved > 0:
        return f": too much; [train] gradient_checkpointing = true makes it {in_units(own['peak_bytes'] - saved)}"
    return ": too much; lower [train] batch_size or [data] resolution"


def as_json(found: dict) -> str:
    return json.dumps(found, indent=2)


def in_units(number: int) -> str:
    power = min(4, max(0, (len(str(number)) - 1) // 3))
    return f"{number / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
