"""What `python -m cache` asks about experiment files; the store itself knows nothing of experiments."""

from pathlib import Path

from cache import Need, Store
from pipeline.methods import method_of
from pipeline.plan.needs import needed
from pipeline.plan.plan import resolve
from pipeline.settings.reading import load_experiment


def needs_of(path: Path | str) -> tuple[Store, list[Need]]:
    """The store of an experiment file and what the experiment needs from it; photos that are new are decoded.

    Conditions are needed where the file has a table of a method that reads some.
    Raises UserError where the file, the photos or the checkpoint are faulty.
    """
    experiment = load_experiment(path)
    plan = resolve(experiment, method_of(experiment))
    return plan.store, needed(plan)
