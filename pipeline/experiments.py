"""What an experiment file says to the store's tools: where its entries are and which it needs.  Imports no MindSpore.

`python -m cache` finds this module through the entry point `toml` of the group `cache.experiments` in setup.cfg.
All functions take an experiment file (an empty path: the embedded default) and raise StoreError for a UserError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache import Need, Store, StoreError
from pipeline.errors import UserError
from pipeline.methods import method_of
from pipeline.plan.needs import needed
from pipeline.plan.plan import resolve
from pipeline.settings.reading import load_experiment


def stores_of(path: Path | str) -> tuple[Path, ...]:
    """The folders in [paths] store; the first is the one that is written to."""
    with _as_store_error():
        return tuple(load_experiment(path).stores)


def needs_of(path: Path | str) -> tuple[Store, list[Need]]:
    """The store of an experiment and what the experiment needs from it; photos that are new are decoded.

    Conditions are needed where the file has a table of a method that reads some, as [controlnet] is.
    Raises StoreError where the file, the photos or the model are faulty.
    """
    with _as_store_error():
        experiment = load_experiment(path)
        plan = resolve(experiment, method_of(experiment))
        return plan.store, needed(plan)


def runs_of(path: Path | str) -> Path:
    """The folder in [paths] runs."""
    with _as_store_error():
        return load_experiment(path).runs


@contextmanager
def _as_store_error() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise StoreError(str(error)) from error
