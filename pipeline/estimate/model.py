"""Which model an estimate is for: the one on this machine, or one of which only the configs are known."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.flux import pretrained
from pipeline.settings.experiment import EMBEDDED, Experiment

CONFIGS = pretrained.PUBLISHED_CONFIGS
OWNER = "black-forest-labs"
"""Who publishes the models whose configs ship with this package, on the Hub."""


@dataclass(frozen=True)
class Model:
    """name: what people call it.  configs: a folder in diffusers' layout, with weights where ``is_here``.

    why: where it is not, why it is planned from these configs.  is_to_be_fetched: by GetModel, from the Hub.
    """

    name: str
    configs: Path
    is_here: bool = True
    why: str = ""
    is_to_be_fetched: bool = False


def config_folder(name: str) -> Path:
    """A folder of configs in diffusers' layout: one that ships with this package, by its name, or any other."""
    found = CONFIGS / name if name in shipped() else Path(name).expanduser()
    if not found.is_dir():
        raise UserError(f"{name}: no such folder of configs; known by name: {', '.join(shipped())}")
    return found


def shipped() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir())


def model_of(experiment: Experiment, model_config: str = "") -> Model:
    """model_config: configs to plan with, whatever the experiment's model is; see `config_folder`.

    A Hub id that is not here is planned from the configs that ship with this package, where they are its own.
    Raises UserError where there is no such model.
    """
    settings, path = experiment.model, experiment.model_path
    try:
        folder: Path | None = pretrained.local_folder(path, settings.revision, *experiment.model_weights)
        why = ""
    except UserError as error:
        folder, why = None, str(error)
    is_to_be_fetched = folder is None and isinstance(path, str)
    if model_config:
        return Model(model_config, config_folder(model_config), False, "planned from configs alone", is_to_be_fetched)
    if folder:
        return Model("the small one that comes with this package" if path == EMBEDDED else str(path), folder)
    owner, _, name = str(path).partition("/")
    if isinstance(path, Path) or owner != OWNER or name not in shipped():
        raise UserError(f"{why}, or plan from configs alone: --model-config {', '.join(shipped())} or a folder")
    return Model(path, CONFIGS / name, False, f"{why}; planned from its configs, which come with this package", True)
