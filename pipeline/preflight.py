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

from pipeline import checkpoints, controlnet, counts, lora, resume, variants
from pipeline.data import IndexedPhoto
from pipeline.errors import UserError
from pipeline.experiment import LORA_TARGETS, Experiment, Train
from pipeline.needs import needed
from pipeline.precision import Precision
from pipeline.recipes import CONTROLNET, RESULT_NAME, Plan

CONFIGS = Path(__file__).with_name("configs")
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "float32": 4, "float16": 2, "bfloat16": 2}
OVERHEAD = 1.02
"""What the store adds to the rows of an entry: checksums, indices, alignment; small vectors take a little more."""


def config_folder(name: str) -> Path:
    """A folder of configs in a checkpoint's layout: one that ships with this package, by its name, or any other."""
    shipped = sorted(path.name for path in CONFIGS.iterdir())
    found = CONFIGS / name if name in shipped else Path(name).expanduser()
    if not found.is_dir():
        raise UserError(f"{name}: no such folder of configs; known by name: {', '.join(shipped)}")
    return found


def encoders(configs: Path, policies: Precision) -> dict[str, dict]:
    """Parameters and bytes of the weights of the models that encode, by component.

    Of the VAE the encoder alone computes, but all of it is loaded.
    """
    size = {
        "text_encoder": counts.text_encoder(checkpoints.checked_config(configs, "text_encoder")),
        "text_encoder_2": counts.text_encoder_2(checkpoints.checked_config(configs, "text_encoder_2")),
        "vae": sum(counts.vae(checkpoints.checked_config(configs, "vae"))),
    }
    return {name: _weights(number, getattr(policies, name).params_on_device) for name, number in size.items()}


def training(configs: Path, experiment: Experiment, policies: Precision, trains: str) -> dict:
    """What a training keeps: of the frozen models and of what trains, which has float32 and two moments.

    checkpoints_bytes: at most at one time, while a new one is written.
    """
    own, settings = checkpoints.checked_config(configs, "transformer"), experiment.train
    frozen = _weights(counts.transformer(own), policies.transformer.params_on_device)
    trained = _trained(configs, experiment, trains)
    copies = 4 if settings.ema_decay else 3
    saved = BYTES[experiment.controlnet.save_dtype] if trains == CONTROLNET else 4
    return {
        "parameters": frozen["parameters"] + trained,
        "trained_parameters": trained,
        "weights_bytes": frozen["weights_bytes"] + 4 * trained,
        "gradients_bytes": 4 * trained * (1 + (settings.accumulate > 1)),
        "optimizer_bytes": 4 * trained * (copies - 1),
        "checkpoints_bytes": checkpoints_bytes(4 * trained, settings),
        "result_bytes": saved * trained,
    }


def checkpoints_bytes(trained_bytes: int, settings: Train) -> int:
    """The most that a run's checkpoints take at one time: those that are kept, and one that is being written.

    Where the run's length is in epochs, as many as that are taken to be written.
    """
    every = settings.checkpoint_every or settings.steps
    written = settings.keep_checkpoints + 1 if settings.epochs else -(-settings.steps // every)
    copies = 4 if settings.ema_decay else 3  # the parameters, two moments, and their moving average
    return trained_bytes * copies * min(settings.keep_checkpoints + 1, written)


def _trained(configs: Path, experiment: Experiment, trains: str) -> int:
    own = checkpoints.checked_config(configs, "transformer")
    if trains == CONTROLNET:
        controlnet.check(experiment, own)
        return counts.controlnet(own, *controlnet.depths(experiment))
    wanted, layers = LORA_TARGETS.get(experiment.lora.targets, experiment.lora.targets), counts.transformer_layers(own)
    for target in wanted:
        if not any(counts.is_meant(name, target) for name in layers):
            raise UserError(f"lora.targets: no linear layer of the transformer is named {target}")
    trained = counts.lora(layers, experiment.lora.rank, wanted)
    if experiment.lora.train_text_encoder:
        layers = counts.text_encoder_layers(checkpoints.checked_config(configs, "text_encoder"))
        trained += counts.lora(layers, experiment.lora.rank, lora.TEXT_ENCODER_TARGETS)
    return trained


def _weights(parameters: int, dtype: str) -> dict:
    return {"parameters": parameters, "weights_bytes": parameters * BYTES[dtype]}


# --- an experiment ------------------------------------------------------------------------------------------------


def of_plan(plan: Plan, photos: Sequence[IndexedPhoto]) -> dict:
    """What each stage of an experiment has, lacks and takes; see `table` for people."""
    models, stages = encoders(plan.checkpoint, plan.precision), {}
    for need in needed(plan, photos):
        entries = plan.store.entries(need.recipe)
        missing = len(entries.missing(need.items))
        stage = stages.setdefault(need.stage, models[need.component] | {"items": 0, "missing": 0, "store_bytes": 0})
        stage["items"] += len(need.items)
        stage["missing"] += missing
        stage["store_bytes"] += math.ceil(missing * _row_bytes(entries.shape, entries.dtype) * OVERHEAD)
    taken = training(plan.checkpoint, plan.experiment, plan.precision, plan.trains)
    is_done = (plan.run_folder(photos) / RESULT_NAME).is_file()
    there = sum(path.stat().st_size for path in resume.list_checkpoints(plan.run_folder(photos)))
    runs_bytes = 0 if is_done else max(0, taken["checkpoints_bytes"] - there) + taken["result_bytes"]
    shapes = {size for photo in photos for size in variants.sizes(plan.experiment.data, photo)}
    return {
        "device": plan.device,
        "preset": plan.precision.label,
        "stages": stages,
        "training": {"trains": plan.trains, "is_done": is_done, **taken, "num_shapes": len(shapes)},
        "disks": disks(plan, sum(stage["store_bytes"] for stage in stages.values()), runs_bytes),
    }


def of_configs(configs: Path, experiment: Experiment, policies: Precision, device: str, trains: str) -> dict:
    """As `of_plan`, for a model that is not here: nothing is known of photos and of what is cached."""
    return {
        "device": device,
        "preset": policies.label,
        "stages": encoders(configs, policies),
        "training": {"trains": trains, **training(configs, experiment, policies, trains)},
    }


def _row_bytes(shape: Iterable[int], dtype: str) -> int:
    return math.prod(shape) * BYTES[dtype] + 4


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
                f"{' and '.join(disk['folders'])}: {_bytes(disk['needed_bytes'])} will be written there, "
                f"{_bytes(disk['free_bytes'])} are free; make room, or change [paths]"
            )


def table(found: dict) -> str:
    """What `of_plan` or `of_configs` found, for people."""
    lines = [f"device {found['device']}, precision {found['preset']}", ""]
    lines += [f"{'':<16}{'parameters':>16}{'weights':>11}{'items':>9}{'missing':>9}{'to the store':>14}"]
    for name, row in found["stages"].items():
        cells = [f"{row['parameters']:>16,}", f"{_bytes(row['weights_bytes']):>11}"]
        if "items" in row:
            cells += [f"{row['items']:>9,}", f"{row['missing']:>9,}", f"{_bytes(row['store_bytes']):>14}"]
        lines.append(f"{name:<16}" + "".join(cells))
    own = found["training"]
    done = ", which is done" if own.get("is_done") else ""
    lines += ["", f"training a {'ControlNet' if own['trains'] == CONTROLNET else 'LoRA'}{done}:"]
    lines += [f"  parameters           {own['parameters']:>16,}, of which {own['trained_parameters']:,} train"]
    parts = ("weights", "gradients", "optimizer", "checkpoints", "result")
    lines += [f"  {part:<21}{_bytes(own[f'{part}_bytes']):>16}" for part in parts]
    if "num_shapes" in own:
        lines += [f"  sizes of batches     {own['num_shapes']:>16}, each compiled once where steps are compiled"]
    for disk in found.get("disks", ()):
        lines += ["", f"{' and '.join(disk['folders'])}:"]
        lines += [f"  {_bytes(disk['needed_bytes'])} will be written, {_bytes(disk['free_bytes'])} are free"]
    return "\n".join(lines)


def as_json(found: dict) -> str:
    return json.dumps(found, indent=2)


def _bytes(number: int) -> str:
    power = min(4, max(0, (len(str(number)) - 1) // 3))
    return f"{number / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
