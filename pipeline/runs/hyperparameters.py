"""A run's settings as other programs want its hyperparameters: flat, of numbers, texts, and true or false."""

import json

from cache import load_json
from pipeline.plan.run_folder import FOLDER, RunFolder
from pipeline.runs.differences import DEFAULTS, flattened

ELSEWHERE = {"name", "paths", "sample", "device", "parallel", FOLDER}
"""What decides where a run is, what it runs on, and what is drawn with it."""


def of_run(run: RunFolder) -> dict[str, bool | int | float | str]:
    """By dotted name, as train.learning_rate; without the table [controlnet] where all of it is at its default.

    Empty where the run's experiment.json cannot be read.
    """
    try:
        settings = load_json(run.experiment.read_bytes())
        kept = {key: value for key, value in settings.items() if key not in ELSEWHERE and not _is_unused(key, value)}
    except (OSError, ValueError, AttributeError):
        return {}
    return {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value, ensure_ascii=False)
        for name, value in flattened(kept).items()
    }


def _is_unused(table: str, value: object) -> bool:
    return table == "controlnet" and value == DEFAULTS["controlnet"]
