"""Beginning a LoRA's training from a LoRA file, of whatever program: what of it fits."""

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.errors import UserError
from pipeline.exchange import lora_files
from pipeline.exchange.change import Change, Changes
from pipeline.exchange.lora_names import CLIP, TRANSFORMER
from pipeline.flux import counts
from pipeline.methods.lora_layers import TEXT_ENCODER_TARGETS, wanted_targets
from pipeline.settings.fields import Lora

SHOWN = 3
"""How many layers a message names."""


def read(path: Path, settings: Lora, config_of: Callable[[str], dict]) -> Changes:
    """The changes of the file's layers, which all are layers that train.  config_of: gives a component's config.

    Raises UserError where the file has a larger rank than the settings, or changes a layer that they do not train.
    """
    config = config_of(TRANSFORMER)
    changes, _ = lora_files.read(path, config)
    _check_layers(path, changes.get(TRANSFORMER, {}), counts.transformer_layers(config), wanted_targets(settings))
    if clip := changes.get(CLIP):
        if not settings.train_text_encoder:
            raise UserError(f"{path}: changes CLIP too; set lora.train_text_encoder = true, or begin from another file")
        layers = counts.text_encoder_layers(config_of(CLIP))
        _check_layers(path, clip, layers, TEXT_ENCODER_TARGETS)
    rank = max(change.rank for layers in changes.values() for change in layers.values())
    if rank > settings.rank:
        raise UserError(
            f"{path}: of rank {rank}, and lora.rank is {settings.rank}; set lora.rank = {rank} and an alpha to it, or "
            f"make the file smaller: python -m pipeline resize --rank {settings.rank} {path.name}"
        )
    return changes


def _check_layers(path: Path, layers: Mapping[str, Change], known: counts.Layers, targets: tuple[str, ...]) -> None:
    others = [name for name in sorted(layers) if not any(counts.is_meant(name, target) for target in targets)]
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise UserError(
            f"{path}: changes layers that lora.targets does not train, {', '.join(others[:SHOWN])}{more}; add them to "
            'lora.targets ("all-linear" is all of the blocks)'
        )
    for name, change in layers.items():
        if (found := (change.down.shape[1], change.up.shape[0])) != known.get(name):
            raise UserError(f"{path}: {name}: {found} inputs and outputs, the model's layer has {known.get(name)}")
