"""In which settings runs differ, under names as short as they can be."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.methods import METHODS
from pipeline.plan.run_folder import FOLDER
from pipeline.runs.reading import Run
from pipeline.settings.experiment import Experiment, settings_of

BESIDE = "name", "paths", FOLDER
"""What says where a run is, and nothing of what it is."""

PHOTOS = "photos"


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run, those settings that are not the same in all of them; the number of its photos where these differ.

    A run that an older version made has the defaults of what that version did not know.  Settings of another method
    than the run's are left out, as are all of a run whose settings cannot be read.
    """
    flat = [_flat(run) for run in runs]
    known = [settings for settings in flat if settings]
    keys = {key for settings in known for key in settings}
    varied = [key for key in _ordered(keys) if len({repr(settings[key]) for settings in known if key in settings}) > 1]
    several_methods = len({run.method for run in runs if run.method}) > 1
    if several_methods:  # what the others do not have at all tells nothing of them
        varied = [key for key in varied if key.partition(".")[0] not in METHODS]
    found = [{short_name(key): settings[key] for key in varied if key in settings} for settings in flat]
    for each, run in zip(found, runs):
        if len({other.photos for other in runs if other.photos}) > 1 and run.photos:
            each[PHOTOS] = len(run.photos)
    return found


def short_name(key: str) -> str:
    """The last part of a setting's name, as learning_rate, where no other setting is called so; else all of it."""
    last = key.rpartition(".")[2]
    return last if _ENDINGS[last] == 1 else key


def flattened(settings: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Settings by dotted name, as train.steps."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        is_table = isinstance(value, dict) and value
        found |= flattened(value, f"{before}{key}.") if is_table else {f"{before}{key}": value}
    return found


def _flat(run: Run) -> dict[str, Any]:
    if not run.settings:
        return {}
    others = {name for name, method in METHODS.items() if run.method and method != run.method}
    return flattened({key: value for key, value in _whole(run.settings).items() if key not in {*BESIDE, *others}})


def _whole(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the defaults of those that they do not name."""
    return DEFAULTS | {
        key: DEFAULTS.get(key, {}) | value if isinstance(value, dict) else value for key, value in settings.items()
    }


def _ordered(keys: set[str]) -> list[str]:
    """In the order of the experiment file."""
    places = {key: place for place, key in enumerate(flattened(DEFAULTS))}
    return sorted(keys, key=lambda key: (places.get(key, len(places)), key))


DEFAULTS: dict[str, Any] = json.loads(json.dumps(settings_of(Experiment())))
"""As experiment.json would have them: lists for tuples."""

_ENDINGS = Counter(key.rpartition(".")[2] for key in flattened(DEFAULTS))
