"""A LoRA of what two transformers differ in, and LoRAs of a lower rank."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.exchange import base_models, lora_files, low_rank, modelspec
from pipeline.exchange.change import Change, Changes
from pipeline.exchange.lora_names import TRANSFORMER
from pipeline.exchange.runs import Wanted, config_for
from pipeline.flux import counts
from pipeline.process.progress import Progress


def extract(base: Path, tuned: Path, rank: int, targets: Sequence[str], wanted: Wanted) -> tuple[Path, str]:
    """Write the LoRA of at most this rank that comes nearest to what ``tuned`` changed of ``base``.

    targets: endings of layers' names, or patterns; none: all linear layers.  Returns where, and what it holds, for
    people.  One layer is in memory at a time.  Raises UserError where the two are not of the same shape, or equal.
    """
    one, other = base_models.opened(base), base_models.opened(tuned)
    before, after = one.arrays(), other.arrays()
    _check_same(base, tuned, before, after)
    layers = [name for name in counts.transformer_layers(dict(one.config)) if _is_meant(name, targets)]
    if not layers:
        raise UserError(f"--targets: no linear layer of the transformer is named {' or '.join(targets)}")
    changes: dict[str, Change] = {}
    total = rest = 0.0
    with Progress("extract", len(layers), "layer") as progress:
        for name in layers:
            delta = after[f"{name}.weight"].astype(np.float32) - before[f"{name}.weight"].astype(np.float32)
            if delta.any():
                change = changes[name] = low_rank.of_matrix(delta, rank)
                total += float(np.square(delta, dtype=np.float64).sum())
                rest += float(np.square(delta - change.up @ change.down, dtype=np.float64).sum())
            progress.advance()
    others = sum(_differs(before[name], after[name]) for name in before if name.removesuffix(".weight") not in changes)
    if not changes:
        raise UserError(f"{tuned}: no linear layer differs from that of {base}; nothing to extract")
    about = modelspec.About(
        title=wanted.title or tuned.stem,
        date=max(path.stat().st_mtime for path in other.files()),
        trigger=wanted.trigger,
        thumbnail=modelspec.thumbnail(wanted.thumbnail) if wanted.thumbnail else "",
        description=f"Extracted from {tuned.name} and {base.name}",
    )
    path = wanted.out or tuned.with_name(f"{tuned.stem}-rank-{rank}.safetensors")
    found: Changes = {TRANSFORMER: changes}
    lora_files.write(path, found, wanted.layout, wanted.dtype, one.config, about)
    said = f"{lora_files.described(found)}; {_left_out(rest, total)}"
    if others:
        said += f"; {others} biases, norms or other layers differ too, which are not in it"
    return path, said


def resize(source: Path, rank: int, wanted: Wanted) -> tuple[Path, str]:
    """Write a LoRA with ranks of at most ``rank``, each layer's change as near to what it was as that allows.

    Returns where, and what it holds, for people.
    """
    metadata = lora_files.metadata_of(source)
    config = config_for(wanted.model, metadata.get("base_model", ""), source)
    changes, _ = lora_files.read(source, config)
    total = rest = 0.0
    found: Changes = {}
    for component, layers in changes.items():
        for name, change in layers.items():
            smaller, left_out, whole = low_rank.of_product(change, rank)
            found.setdefault(component, {})[name] = smaller
            total, rest = total + whole, rest + left_out
    about = wanted.about(source, {key: value for key, value in metadata.items() if key != "lora"}, source.stem)
    path = wanted.out or source.with_name(f"{source.stem}-rank-{rank}.safetensors")
    lora_files.write(path, found, wanted.layout, wanted.dtype, config, about)
    return path, f"{lora_files.described(found)}; {_left_out(rest, total)}"


def _is_meant(name: str, targets: Sequence[str]) -> bool:
    return not targets or any(counts.is_meant(name, target) for target in targets)


def _check_same(base: Path, tuned: Path, before: dict, after: dict) -> None:
    wrong = sorted(before.keys() ^ after.keys())
    wrong += [name for name in before.keys() & after.keys() if before[name].shape != after[name].shape]
    if wrong:
        raise UserError(f"{tuned}: another model than {base}: {wrong[0]} differs, or is in one of them alone")


def _differs(one: np.ndarray, other: np.ndarray) -> bool:
    return not np.array_equal(one.astype(np.float32), other.astype(np.float32))


def _left_out(rest: float, total: float) -> str:
    """How large what is left out is, beside the whole, in the Frobenius norm over all layers."""
    share = math.sqrt(max(rest, 0.0) / total) if total else 0.0
    return f"what is left out is {share:.2g} of the change"
