"""A model to merge into or to compare with: its whole folder, a transformer's folder, or a transformer in one file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.exchange.lora_names import TRANSFORMER
from pipeline.flux import pretrained, single_file, weights

CONFIG_NAME = "config.json"


def published_configs() -> dict[str, Path]:
    """The folders of configs that ship with this package, by the model's name."""
    return {folder.name: folder for folder in sorted(pretrained.PUBLISHED_CONFIGS.iterdir())}


@dataclass(frozen=True)
class Base:
    """kind: "model", a folder with all components; "transformer", a transformer's folder; "file"."""

    path: Path
    kind: str
    config: Mapping

    def files(self, component: str = TRANSFORMER) -> list[Path]:
        """The safetensors files of a component.  Raises UserError where they are not here."""
        if self.kind == "file":
            return [self.path]
        if self.kind == "transformer":
            return pretrained.weight_files(self.path, TRANSFORMER, transformer=self.path)
        return pretrained.weight_files(self.path, component)

    def arrays(self) -> dict[str, np.ndarray]:
        """The transformer's tensors under diffusers' names, mapped: what is not looked at is not read."""
        found: dict[str, np.ndarray] = {}
        for path in self.files():
            found |= weights.mapped(path)
        return single_file.as_diffusers(found)


def opened(path: Path) -> Base:
    """Raises UserError where there is no FLUX.1 at ``path``."""
    if path.is_file():
        return Base(path, "file", _config_of_file(path))
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name a model's folder, its transformer's, or a single file")
    kind = "transformer" if (path / CONFIG_NAME).is_file() else "model"
    return Base(path, kind, config_of(path))


def config_of(path: Path) -> dict:
    """A transformer's config: of a model's folder, of its own, or as the shapes in a single file say."""
    if path.is_file():
        return _config_of_file(path)
    if (path / CONFIG_NAME).is_file():
        return pretrained.checked_config_of(path, TRANSFORMER)
    return pretrained.checked_config(path, TRANSFORMER)


def _config_of_file(path: Path) -> dict:
    try:
        return single_file.config_of(single_file.as_diffusers(weights.mapped(path)))
    except (KeyError, ValueError, IndexError, StopIteration):
        raise UserError(
            f"{path}: no transformer of FLUX.1 in it, in the layout of Black Forest Labs, ComfyUI or diffusers"
        ) from None
