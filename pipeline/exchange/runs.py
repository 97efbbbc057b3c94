"""A run's LoRA, its result or one of its checkpoints, for other programs."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from cache import load_json, opened_tensors
from pipeline.errors import UserError
from pipeline.exchange import lora_files
from pipeline.exchange.layers import Change
from pipeline.exchange.lora_files import CLIP, TRANSFORMER, Changes
from pipeline.flux import pretrained
from pipeline.methods.lora_layers import WEIGHTS_NAME
from pipeline.plan.run_folder import RunFolder
from pipeline.settings.fields import EMBEDDED

AVERAGE, TRAINED = "ema.", "trained."
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


def export(source: Path, layout: str, dtype: str, out: Path | None, model: str, step: int | None) -> Path:
    """Write the LoRA of a run's folder, or of a file, in a layout.  Returns where.

    out: the file; None: beside the LoRA, with layout and dtype in its name.  model: whose transformer it is for, a
    folder, or a name of those whose configs ship with this package; "" for what the file says.  step: of the checkpoint
    to take instead of the result.  Raises UserError where any of it cannot be had.
    """
    path = source / WEIGHTS_NAME if source.is_dir() else source
    if step is not None:
        changes, metadata = of_checkpoint(RunFolder(source), step)
        config = _config(model, metadata.get("base_model", ""), source)
    else:
        config = _config(model, _base_model(path), path)
        changes, metadata = lora_files.read(path, config)
    stem = path.stem if step is None else f"step-{step:06}"
    target = out or path.with_name(f"{stem}-{layout}-{dtype}.safetensors")
    lora_files.write(target, changes, layout, dtype, config, _kept(metadata))
    return target


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is still true of the LoRA in another layout."""
    return {key: value for key, value in metadata.items() if key not in ("lora_adapter_metadata", "format")}


def _base_model(path: Path) -> str:
    try:
        with opened_tensors(path) as file:
            return (file.metadata() or {}).get("base_model", "")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}") from None


def _config(model: str, base_model: str, path: Path) -> dict:
    """The transformer's config of the model that is named, or else of the one that the LoRA says it was trained on."""
    known = sorted(folder.name for folder in pretrained.PUBLISHED_CONFIGS.iterdir())
    if model:
        folder = pretrained.PUBLISHED_CONFIGS / model if model in known else Path(model).expanduser()
    elif (name := base_model.rpartition("/")[2]) in known:
        folder = pretrained.PUBLISHED_CONFIGS / name
    elif base_model == EMBEDDED.name:
        folder = EMBEDDED
    else:
        raise UserError(
            f"{path}: made for {base_model or 'a model that it does not name'}: name the model by --model, a folder or "
            f"{', '.join(known)}"
        )
    return pretrained.checked_config(folder, "transformer")


def of_checkpoint(run: RunFolder, step: int) -> tuple[Changes, dict[str, str]]:
    """The LoRA as it was after a step, moving averages where the run keeps them; alpha / rank inside.

    Raises UserError where the run has no such checkpoint, or it is no LoRA's.
    """
    path = run.checkpoint(step)
    if not path.is_file():
        there = ", ".join(str(int(each.stem.split("-")[1])) for each in reversed(run.list_checkpoints()))
        raise UserError(f"{run.path}: no checkpoint of step {step}; there are {there or 'none'}")
    try:
        with opened_tensors(path) as file:
            identity = load_json((file.metadata() or {})["identity"])
            asked = {name: float(identity[f"lora.{name}"]) for name in ("rank", "alpha")}
            scale = np.float32(asked["alpha"] / asked["rank"])
            own = AVERAGE if any(key.startswith(AVERAGE) for key in file.keys()) else TRAINED
            tensors = {key.removeprefix(own): file.get_tensor(key) for key in file.keys() if key.startswith(own)}
            settings = load_json(run.experiment.read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: no checkpoint of a LoRA: it has no {error.args[0]}") from None
    changes: Changes = {}
    for key in tensors:
        if key.endswith(DOWN):
            layer = key.removesuffix(DOWN)
            component = CLIP if layer.startswith("text_model.") else TRANSFORMER
            changes.setdefault(component, {})[layer] = Change(tensors[key], tensors[layer + UP] * scale)
    base = settings["model"]["path"] or EMBEDDED.name
    return changes, {"base_model": base, "step": str(step), "lora": json.dumps(asked)}
