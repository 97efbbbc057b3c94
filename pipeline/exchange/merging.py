"""LoRAs merged into a model's weights: tensor by tensor, each in the dtype that it has there."""

import json
import math
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import digest, write_tensors
from cache.core.files import is_taken, named, sync_folder
from cache.terminal.words import count, human_bytes
from pipeline.errors import UserError
from pipeline.exchange import base_models, lora_files, modelspec
from pipeline.exchange.base_models import Base
from pipeline.exchange.change import Change
from pipeline.exchange.fused import fuse
from pipeline.exchange.lora_names import CLIP, TRANSFORMER
from pipeline.exchange.rounding import in_dtype
from pipeline.flux import counts, pretrained, single_file, weights
from pipeline.process.progress import Progress

Scaled = dict[str, list[tuple[float, Change]]]
"""By the name of a weight: each change with what it is multiplied by."""

OF_TENSORS = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that is not true of a file any more when its tensors have changed."""

COPIED_BYTES = 1 << 20
"""Files of other components that are no larger are copied, others linked: a linked file is one on disk."""


@dataclass
class Errors:
    """Sums of squares over all weights: of the change, and of what rounding to the weight's dtype adds to it."""

    change: float = 0.0
    rounding: float = 0.0

    @property
    def share(self) -> float:
        return math.sqrt(self.rounding / self.change) if self.change else 0.0


def merge(loras: Sequence[Path], scales: Sequence[float], into: Path, out: Path) -> str:
    """Write ``into`` with the LoRAs added, each times its scale, to ``out``, a folder or a file as ``into`` is.

    Returns what was done, for people.  One tensor is in memory at a time.  Raises UserError where a LoRA does not fit,
    where ``out`` exists, or where the disk has no room for it.
    """
    if len(scales) not in (1, len(loras)):
        raise UserError(
            f"--scale: {len(scales)} numbers for {count(len(loras), 'LoRA')}; give one for each, or one for all"
        )
    scales = [*scales] * (len(loras) if len(scales) == 1 else 1)
    if is_taken(out):
        raise UserError(f"{out}: exists; choose another name, or remove it first")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.absolute().parent}: no such folder; make it first")
    base = base_models.opened(into)
    scaled, notes = _scaled(base, loras, scales)
    files = {path: component for component in scaled for path in base.files(component)}
    _check_names(into, files, scaled)
    _check_room(out, files)
    errors = Errors()
    with Progress("merge", sum(len(weights.mapped(path)) for path in files), "tensor") as progress:
        if base.kind == "file":
            about = modelspec.About(out.stem, max(path.stat().st_mtime for path in loras), merged_from=notes["names"])
            metadata = modelspec.of_file(about, base.config, "") | {"merged": notes["merged"]}
            _write(into, out, scaled[TRANSFORMER], metadata, errors, progress)
        else:
            with _appearing(out) as folder:
                _write_folder(base, folder, files, scaled, {"merged": notes["merged"]}, errors, progress)
    number = sum(map(len, scaled.values()))
    dtype = next(iter(weights.mapped(next(iter(files))).values())).dtype.name
    return (
        f"{count(number, 'weight')} changed by {count(len(loras), 'LoRA')}; "
        f"rounding to {dtype} is off by {errors.share:.2g} of the change"
    )


def _scaled(base: Base, loras: Sequence[Path], scales: Sequence[float]) -> tuple[dict[str, Scaled], dict[str, str]]:
    """By component, and what the result says of the LoRAs: their names, and their digests with their scales."""
    found: dict[str, Scaled] = {TRANSFORMER: defaultdict(list)}
    merged, names = [], []
    for path, scale in zip(loras, scales):
        changes, metadata = lora_files.read(path, base.config)
        if CLIP in changes and base.kind != "model":
            raise UserError(f"{path}: changes CLIP too; merge it into the model's whole folder, which has CLIP")
        for component, layers in changes.items():
            own = found.setdefault(component, defaultdict(list))
            for name, change in _named(base, component, layers).items():
                own[name].append((scale, change))
        names.append(metadata.get("modelspec.title") or path.stem)
        own_digest = digest(path.read_bytes())
        merged.append({"name": names[-1], "scale": scale, "digest": own_digest, "run_id": metadata.get("run_id", "")})
    return found, {"names": ", ".join(names), "merged": json.dumps(merged)}


def _named(base: Base, component: str, layers: Mapping[str, Change]) -> dict[str, Change]:
    """The changes by the names of the weights in the base's files."""
    prefix = ""
    if base.kind == "file":
        names = weights.mapped(base.path)
        prefix = single_file.prefix_of(names)
        if single_file.is_published(names):
            sizes = counts.transformer_layers(dict(base.config)).items()
            layers = fuse(layers, {name: outputs for name, (_, outputs) in sizes})
    return {f"{prefix}{name}.weight": change for name, change in layers.items()}


def _check_names(into: Path, files: Mapping[Path, str], scaled: Mapping[str, Scaled]) -> None:
    there = {(component, name) for path, component in files.items() for name in weights.mapped(path)}
    missing = [name for component, own in scaled.items() for name in own if (component, name) not in there]
    if missing:
        raise UserError(f"{into}: has no {missing[0]}, which a LoRA changes; the model is incomplete")


def _check_room(out: Path, files: Mapping[Path, str]) -> None:
    needed = sum(path.stat().st_size for path in files)
    free = shutil.disk_usage(out.absolute().parent).free
    if needed > free:
        raise UserError(f"{out}: takes {human_bytes(needed)}, and its disk has {human_bytes(free)} free; make room")


def _write(path: Path, out: Path, scaled: Scaled, metadata: Mapping, errors: Errors, progress: Progress) -> None:
    """Write one file of a model with its changes added."""
    arrays = weights.mapped(path)
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}

    def values() -> Iterator[np.ndarray]:
        for name in shapes:
            array = arrays.pop(name)
            yield _added(out, name, array, scaled[name], errors) if name in scaled else np.ascontiguousarray(array)
            progress.advance()

    said = {key: value for key, value in weights.metadata_of(path).items() if key not in OF_TENSORS}
    write_tensors(out, shapes, values(), said | dict(metadata))


def _added(out: Path, name: str, array: np.ndarray, changes: list[tuple[float, Change]], errors: Errors) -> np.ndarray:
    """In float32, rounded once."""
    own = array.astype(np.float32)
    delta = np.zeros_like(own)
    for scale, change in changes:
        delta += np.float32(scale) * (change.up @ change.down)
    rounded = in_dtype(out, name, own + delta, array.dtype)
    errors.change += float(np.square(delta, dtype=np.float64).sum())
    errors.rounding += float(np.square(rounded.astype(np.float64) - own - delta).sum())
    return rounded


def _write_folder(
    base: Base,
    folder: Path,
    files: Mapping[Path, str],
    scaled: Mapping[str, Scaled],
    metadata: Mapping,
    errors: Errors,
    progress: Progress,
) -> None:
    """Shard by shard under their names; what else belongs to the model is copied or linked."""
    for path in _belonging(base):
        target = folder / path.relative_to(base.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in files:
            _write(path, target, scaled[files[path]], metadata, errors, progress)
        elif path.stat().st_size <= COPIED_BYTES:
            shutil.copyfile(path, target)
        else:
            _link(path, target)


def _belonging(base: Base) -> list[Path]:
    """The files of a model's folder that its components are made of."""
    if base.kind == "transformer":
        return [*base.files(), *sorted(base.path.glob("*.json"))]
    files = [base.path / "model_index.json"]
    for component in pretrained.COMPONENTS:
        own = base.files(component) if component in pretrained.WEIGHTS else []
        part = pretrained.part_of(base.path, component)
        files += [*own, *sorted(each for each in part.glob("*") if each.suffix in (".json", ".txt", ".model"))]
    return files


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(path, target)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write to that gets its name at the end of the block, or leaves nothing behind."""
    temporary = out.absolute().with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        with named(out):
            os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.absolute().parent)
