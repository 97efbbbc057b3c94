"""The experiment file: TOML with a default for every field, checked as a whole before anything runs."""

import dataclasses
import difflib
import functools
import tomllib
from pathlib import Path

from pipeline.errors import UserError
from pipeline.settings.experiment import Experiment, settings_of
from pipeline.settings.fields import Settings
from pipeline.settings.schema import checked
from pipeline.settings.values import LR_END

DEFAULT = Path(__file__).with_name("default.toml")

EXPERIMENT_HELP = "experiment file (TOML); without it, the embedded default"


def load_experiment(path: Path | str | None = None) -> Experiment:
    """Read ``path``; without one, the embedded default, whose relative paths are relative to the working directory.

    Raises UserError that lists every problem of the file, each with its field.
    """
    if not path:
        return _build(tomllib.loads(DEFAULT.read_text()), DEFAULT, folder=Path.cwd())
    path = Path(path).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
        tomllib.loads(content)
    except OSError as error:
        meant = "".join(f"; did you mean {name}?" for name in _named_like(path))
        meant = "; name a TOML file" if isinstance(error, IsADirectoryError) else meant
        raise UserError(f"{path}: cannot read the experiment file: {error.strerror}{meant}") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and that of a number of thousands of digits
        hint = "; texts need quotes" if str(error).startswith("Invalid value") else ""
        raise UserError(f"{path}: not valid TOML: {error}{hint}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deep") from None
    return _built(content, path, path.resolve().parent)


@functools.lru_cache(maxsize=8)
def _built(content: str, path: Path, folder: Path) -> Experiment:
    """The experiment of a file with this content, for which Luigi's process asks a dozen times."""
    return _build(tomllib.loads(content), path, folder)


def change_experiment(experiment: Experiment, changes: dict) -> Experiment:
    """The experiment with other settings, checked as those of a file; of a table, those that are not named stay.

    Raises UserError that lists every problem, each with its field.
    """
    document = settings_of(experiment)
    for name, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(document.get(name), dict)
        document[name] = document[name] | value if is_part else value
    changed = _build(document, Path(f"{experiment.name}, changed"), experiment.folder)
    return dataclasses.replace(changed, tables=tuple({**dict.fromkeys(experiment.tables), **changes}))


def _named_like(path: Path) -> list[str]:
    """The experiment file beside a path that has nearly its name; none where there is no such file, or the very one."""
    files = [each.name for each in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, files, 1)
    return [str(path.with_name(name)) for name in near if name != path.name]


def examined(document: dict) -> tuple[Settings, list[str]]:
    """The settings in a document, and what is wrong with them, a line each that begins with the field.

    Where anything is wrong, the settings are of no use.
    """
    settings, problems = checked(Settings, document)
    return settings, problems or _contradictions(settings)


def _build(document: dict, path: Path, folder: Path) -> Experiment:
    settings, problems = examined(document)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{path}: {len(problems)} {noun} in the experiment file", *problems]))
    every = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return Experiment(**every, folder=folder, tables=tuple(document))


def unshared(settings: Settings, num_ranks: int | None = None) -> str:
    """What to write where ranks cannot share a step's batches evenly; empty where they can.

    num_ranks: what ``ranks = "auto"`` comes to; None: not known yet.
    """
    own, train = settings.parallel.ranks, settings.train
    count = num_ranks or (1 if own == "auto" else own)
    if train.accumulate % count == 0:
        return ""
    more = -(-train.accumulate // count) * count
    return (
        f"train.accumulate = {more}: {count} ranks share the batches of a step evenly, found {train.accumulate}; a "
        f"step then has {more * train.batch_size} samples, {more // count} x {train.batch_size} on each rank"
    )


def _contradictions(settings: Settings) -> list[str]:
    """What is wrong with fields that are each right by themselves."""
    train, sample, controlnet = settings.train, settings.sample, settings.controlnet
    problems = []
    if train.lr_scheduler == "constant" and train.lr_warmup_steps:
        problems.append("train.lr_warmup_steps: constant has none; set train.lr_scheduler = 'constant_with_warmup'")
    if controlnet.num_double_layers == controlnet.num_single_layers == 0:
        problems.append("controlnet.num_double_layers, controlnet.num_single_layers: both are 0; set one above it")
    if uneven := unshared(settings):
        problems.append(uneven)
    if sample.conditions and len(sample.conditions) != len(sample.prompts):
        found = f"{len(sample.conditions)} for {len(sample.prompts)} prompts"
        problems.append(
            f"sample.conditions: {found}; name an image file for each prompt, in the prompts' order, or none"
        )
    for name in ("learning_rate", "text_encoder_lr") if train.lr_scheduler == "polynomial" else ():
        if getattr(train, name) <= LR_END:
            problems.append(f"train.{name}: polynomial ends at {LR_END}; set it above that")
    return problems
