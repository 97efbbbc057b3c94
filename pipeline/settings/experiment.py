"""An experiment: the settings of one file, and what they are relative to."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.settings.fields import Settings

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""The model that this package brings."""


class ModelWeights(NamedTuple):
    """Which of the model's weights are used: files of a variant, and another transformer than the model's."""

    variant: str
    transformer: Path | None


@dataclass(frozen=True)
class Experiment(Settings):
    """All settings of one experiment.

    ``folder`` is what relative paths in it are relative to, ``tables`` names the tables that its file has.
    """

    folder: Path = Path(".")
    tables: tuple[str, ...] = ()

    @property
    def stores(self) -> tuple[Path, ...]:
        """The folders of the store, the one that is written to first."""
        paths = self.paths.store
        return tuple(map(self._resolve, [paths] if isinstance(paths, str) else paths))

    @property
    def runs(self) -> Path:
        return self._resolve(self.paths.runs)

    @property
    def init_from(self) -> Path | None:
        """The folder of the ControlNet to start from."""
        return self._resolve(self.controlnet.init_from) if self.controlnet.init_from else None

    @property
    def lora_init_from(self) -> Path | None:
        """The LoRA file to begin from."""
        return self._resolve(self.lora.init_from) if self.lora.init_from else None

    @property
    def model_weights(self) -> ModelWeights:
        own = self.model.transformer
        return ModelWeights(self.model.variant, self._resolve(own) if own else None)

    @property
    def images(self) -> Path:
        return self._resolve(self.data.images or "blickets")

    @property
    def has_prior(self) -> bool:
        """Whether pictures of the base model are trained on too."""
        return bool(self.prior.prompts)

    @property
    def sample_resolution(self) -> int:
        """The width and height of sampled pictures, in pixels."""
        own = self.data.resolution
        return self.sample.resolution or (max(own) if isinstance(own, tuple) else own)

    @property
    def sample_conditions(self) -> dict[str, Path]:
        """The files that sampled pictures are conditioned on, by what the experiment file calls them."""
        return {name: self._resolve(name) for name in self.sample.conditions}

    @property
    def model_path(self) -> Path | str:
        """A local folder, or a Hub id as it stands where no such folder exists and it looks like one."""
        if not self.model.path:
            return EMBEDDED
        local = self._resolve(self.model.path)
        return self.model.path if not local.exists() and _looks_like_hub_id(self.model.path) else local

    def _resolve(self, path: str) -> Path:
        return (self.folder / os.path.expanduser(path)).resolve()


def settings_of(experiment: Experiment) -> dict:
    """All that an experiment file can say, by table, as it was read."""
    every = dataclasses.asdict(experiment)
    return {field.name: every[field.name] for field in dataclasses.fields(Settings)}


def _looks_like_hub_id(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and not owner.startswith((".", "~"))
