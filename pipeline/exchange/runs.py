"""What a run made, its result or one of its checkpoints, as a file for other programs."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from cache import load_json, opened_tensors
from cache.terminal.words import human_bytes
from pipeline.errors import UserError
from pipeline.exchange import base_models, controlnets, declared, lora_files, modelspec
from pipeline.exchange.change import Change, Changes
from pipeline.exchange.lora_files import WEIGHTS_NAME
from pipeline.exchange.lora_names import CLIP, TRANSFORMER
from pipeline.exchange.modelspec import About
from pipeline.flux import pretrained
from pipeline.plan.run_folder import RunFolder, step_of
from pipeline.plan.whole import is_whole
from pipeline.settings.experiment import EMBEDDED

AVERAGE, TRAINED = "ema.", "trained."
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


@dataclass(frozen=True)
class Wanted:
    """What to write.  layout, dtype: as of `lora_files.write`.  out: None: beside the source, named by both.

    model: whose transformer it is for, a folder, a file, or a name of those whose configs ship with this package; ""
    for what the source says.  title, trigger, thumbnail: of the file's ModelSpec; "" and None: what the source says.
    """

    layout: str
    dtype: str
    out: Path | None = None
    model: str = ""
    title: str = ""
    trigger: str = ""
    thumbnail: Path | None = None

    def target(self, source: Path, stem: str) -> Path:
        return self.out or source.with_name(f"{stem}-{self.layout}-{self.dtype}.safetensors")

    def about(self, source: Path, metadata: dict[str, str], title: str, resolution: str = "") -> About:
        """What to say of a file made of ``source``, which says ``metadata``."""
        kept = {key: value for key, value in metadata.items() if key not in (declared.ADAPTER_METADATA, "format")}
        kept = {key: value for key, value in kept.items() if not key.startswith(("ss_", "sshs_"))}
        said = {key.removeprefix(modelspec.PREFIX): value for key, value in kept.items()}
        picture = modelspec.thumbnail(self.thumbnail) if self.thumbnail else said.get("thumbnail", "")
        return About(
            title=self.title or said.get("title") or title,
            date=source.stat().st_mtime,
            resolution=said.get("resolution") or resolution,
            trigger=self.trigger or said.get("trigger_phrase", ""),
            thumbnail=picture,
            kept=kept,
        )


def export(source: Path, wanted: Wanted, step: int | None = None) -> tuple[Path, str]:
    """Write the LoRA of a run's folder or of a file, or a ControlNet, in a layout.  Returns where, and what it is.

    step: after which it is wanted as it was then, instead of the result: of a step with pictures, or of a checkpoint.
    Raises UserError where any of it cannot be had.
    """
    folder = source if step is None else RunFolder(source).step(step)
    if folder.is_dir() and controlnets.is_here(folder):
        return _controlnet(source, folder, replace(wanted, layout=wanted.layout or "comfyui"))
    wanted = replace(wanted, layout=wanted.layout or "kohya")
    is_kept = step is not None and is_whole(folder / WEIGHTS_NAME)
    if step is None or is_kept:
        path = folder / WEIGHTS_NAME if is_kept else _result(source) if source.is_dir() else source
        metadata = lora_files.metadata_of(path)
        config = config_for(wanted.model, metadata.get("base_model", ""), path)
        changes, _ = lora_files.read(path, config)
        target = wanted.target(source / folder.name, folder.name) if is_kept else wanted.target(path, path.stem)
    else:
        path, stem = RunFolder(source).checkpoint(step), f"step-{step:06}"
        changes, metadata = of_checkpoint(RunFolder(source), step)
        config = config_for(wanted.model, metadata["base_model"], source)
        target = wanted.target(source / stem, stem)
    title, resolution = _of_run(source if step is not None else path.parent)
    about = wanted.about(path, metadata, title or path.stem, resolution)
    lora_files.write(target, changes, wanted.layout, wanted.dtype, config, about)
    return target, lora_files.described(changes)


def _result(run: Path) -> Path:
    path = run / WEIGHTS_NAME
    if not path.is_file():
        checkpoints = RunFolder(run).list_checkpoints()
        hint = f"; --checkpoint {step_of(checkpoints[0])} takes that of its newest checkpoint" if checkpoints else ""
        raise UserError(f"{run}: has no result, a LoRA or a ControlNet{hint}")
    return path


def _controlnet(source: Path, folder: Path, wanted: Wanted) -> tuple[Path, str]:
    """folder: that of the run, or of one of its steps."""
    title, resolution = _of_run(source)
    about = wanted.about(
        controlnets.weights_of(folder), controlnets.metadata_of(folder), title or source.name, resolution
    )
    stem = pretrained.CONTROLNET if folder == source else f"{folder.name}-{pretrained.CONTROLNET}"
    target = wanted.target(source / stem, stem)
    return target, controlnets.write(folder, target, wanted.layout, wanted.dtype, about)


def written(path: Path, what: str) -> str:
    """The line that a command ends with."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return f"{path}: {what}, {human_bytes(sum(each.stat().st_size for each in files))}"


def _of_run(folder: Path) -> tuple[str, str]:
    """Name and resolution of the experiment of a run's folder; "" where it is none."""
    try:
        said = load_json(RunFolder(folder).experiment.read_bytes())
        pixels = said["data"]["resolution"]
        most = max(pixels) if isinstance(pixels, list) else pixels
        return str(said["name"]), f"{most}x{most}"
    except (OSError, ValueError, KeyError, TypeError):
        return "", ""


def config_for(model: str, base_model: str, path: Path) -> dict:
    """The transformer's config of the model that is named, or else of the one that the LoRA says it was trained on."""
    known = base_models.published_configs()
    if model:
        return base_models.config_of(known[model] if model in known else Path(model).expanduser())
    if (name := base_model.rpartition("/")[2]) in known:
        return base_models.config_of(known[name])
    if base_model == EMBEDDED.name:
        return base_models.config_of(EMBEDDED)
    raise UserError(
        f"{path}: made for {base_model or 'a model that it does not name'}: name the model by --model, a folder or "
        f"{', '.join(known)}"
    )


def of_checkpoint(run: RunFolder, step: int) -> tuple[Changes, dict[str, str]]:
    """The LoRA as it was after a step, moving averages where the run keeps them; alpha / rank inside.

    Raises UserError where the run has no such checkpoint, or it is no LoRA's.
    """
    path = run.checkpoint(step)
    if not path.is_file():
        there = sorted({*map(step_of, run.list_checkpoints()), *run.list_steps((WEIGHTS_NAME,))})
        raise UserError(f"{run.path}: no weights of step {step}; there are {', '.join(map(str, there)) or 'none'}")
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
