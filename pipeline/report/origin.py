"""Where a result comes from: settings, the model, versions, and how to make it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.run import Run
from pipeline.runs import differences
from pipeline.runs.differences import flattened
from pipeline.settings.experiment import settings_of
from pipeline.settings.written import as_toml


@dataclass(frozen=True)
class Setting:
    """A setting that is not at its default."""

    name: str
    value: str
    default: str


def changed(run: Run) -> list[Setting]:
    """The settings that are not at their default."""
    if run.experiment is None:
        return []
    return [
        Setting(name, as_text(value), as_text(DEFAULTS.get(name, "")))
        for name, value in flattened(json.loads(json.dumps(settings_of(run.experiment)))).items()
        if value != DEFAULTS.get(name)
    ]


DEFAULTS = flattened(differences.DEFAULTS)


def as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=list)


def experiment_file(run: Run) -> str:
    """The experiment file with all that is not at its default, as TOML; "" where the settings are not known."""
    return "" if run.experiment is None else as_toml(run.experiment)


def commands(run: Run) -> list[str]:
    """What makes the run, its pictures and its report again from the experiment file."""
    if run.experiment is None:
        return []
    file = f"{run.experiment.name}.toml"
    stages = run.method.stages
    return [f"luigi --module tasks {stages.report} --experiment {file}"]


def lineage(run: Run) -> dict[str, str]:
    """What the result was made from and by, by what it is called."""
    found = {"run": run.name.rpartition("-")[2]}
    if run.experiment is not None:
        model = run.experiment.model
        found["pretrained model"] = model.path or "the small model of this package"
        found |= {"revision": model.revision} if model.revision else {}
    record = run.record(run.method.stages.train)
    if record is not None:
        digests = {f"weights of {name}": each for name, each in record.inputs.items() if isinstance(each, str)}
        when = record.finished.replace("T", " ").replace("Z", " UTC")
        found |= digests | {"device": record.device, "trained": when} | record.versions
    return found


def differing(several: Sequence[Mapping[str, object]]) -> dict[str, list[str]]:
    """What is not the same in all: by name, the values in their order."""
    names = dict.fromkeys(name for each in several for name in each)
    rows = {name: [each.get(name) for each in several] for name in names}
    return {
        name: ["" if value is None else as_text(value) for value in values]
        for name, values in rows.items()
        if any(value != values[0] for value in values)
    }
