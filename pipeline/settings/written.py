"""An experiment as a file: TOML with what is not at its default, also in another folder than it was read from."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from pipeline.settings.experiment import Experiment, settings_of


def as_toml(experiment: Experiment) -> str:
    """Its settings that are not at their default, and the tables that it names, as these say what it trains."""
    every, defaults = settings_of(experiment), settings_of(Experiment())
    named: dict[str, Any] = {name: {} for name in experiment.tables if isinstance(every.get(name), Mapping)}
    return tomli_w.dumps(named | _without_defaults(every, defaults))


def _without_defaults(tables: Mapping, defaults: Mapping) -> dict:
    found = {}
    for name, value in tables.items():
        default = defaults.get(name)
        if value == default:
            continue
        found[name] = _without_defaults(value, default) if isinstance(default, Mapping) else value
    return found


def moved(experiment: Experiment, folder: Path) -> Experiment:
    """The same experiment with a file in ``folder``: its relative paths lead to where they led."""

    def path(text: str) -> str:
        is_relative = text and not os.path.isabs(os.path.expanduser(text))
        return os.path.relpath(experiment.folder.resolve() / text, folder.resolve()) if is_relative else text

    store, model = experiment.paths.store, experiment.model
    stores = path(store) if isinstance(store, str) else tuple(map(path, store))
    is_local = isinstance(experiment.model_path, Path)
    changed: dict[str, dict[str, Any]] = {
        "paths": {"store": stores, "runs": path(experiment.paths.runs or ".")},
        "model": {"path": path(model.path) if is_local else model.path, "transformer": path(model.transformer)},
        "data": {"images": path(experiment.data.images)},
        "lora": {"init_from": path(experiment.lora.init_from)},
        "controlnet": {"init_from": path(experiment.controlnet.init_from)},
        "sample": {"conditions": tuple(map(path, experiment.sample.conditions))},
    }
    tables: dict[str, Any] = {
        name: dataclasses.replace(getattr(experiment, name), **paths) for name, paths in changed.items()
    }
    return dataclasses.replace(experiment, **tables, folder=folder)
