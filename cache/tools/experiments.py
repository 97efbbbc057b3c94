"""What experiment files say. The store cannot read them, so it asks an installed package that can.

The package registers a module with the functions of `Experiments` as the entry point `toml` of the group
`cache.experiments`.
"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from cache.core.errors import StoreError
from cache.core.needs import Need
from cache.core.store import Store

GROUP, NAME = "cache.experiments", "toml"


class Experiments(Protocol):
    """The functions of a module that reads experiment files. All raise StoreError where the file is faulty."""

    def stores_of(self, path: str) -> tuple[Path, ...]:
        """The folders of the stores that the experiment uses; it writes to the first."""

    def needs_of(self, path: str) -> tuple[Store, list[Need]]:
        """The experiment's store and the entries that it needs from it."""

    def runs_of(self, path: str) -> Path:
        """The folder of the experiment's runs."""


def reader_of(path: str) -> Experiments:
    """The module that reads an experiment file. Raises StoreError where none is installed."""
    found = entry_points(group=GROUP, name=NAME)
    if not found:
        raise StoreError(
            f"{path or 'the default experiment'}: nothing is installed that reads experiment files (entry point {NAME} "
            f"of the group {GROUP}); install the project again (pip install -e .), or name a store's folder"
        )
    return next(iter(found)).load()


def stores_of(path: str) -> tuple[Path, ...]:
    """The folders of the stores that an experiment uses; it writes to the first."""
    return reader_of(path).stores_of(path)


def needs_of(path: str) -> tuple[Store, list[Need]]:
    """An experiment's store and the entries that it needs from it."""
    return reader_of(path).needs_of(path)


def runs_of(path: str) -> Path:
    """The folder of an experiment's runs."""
    return reader_of(path).runs_of(path)
