"""The experiment file: TOML with a default for every field, checked as a whole before anything runs."""

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.settings.fields import DTYPES, LR_END, Experiment

ARTICLES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
DEFAULT = Path(__file__).with_name("default.toml")


def load_experiment(path: Path | str | None = None) -> Experiment:
    """Read ``path``; without one, the embedded default, whose relative paths are relative to the working directory.

    Raises UserError that lists every problem of the file, each with its field.
    """
    if not path:
        return _build(tomllib.loads(DEFAULT.read_text()), DEFAULT, folder=Path.cwd())
    path = Path(path).expanduser()
    try:
        with open(path, "rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot read the experiment file: {error.strerror}") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and that of a number of thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deep") from None
    return _build(document, path, folder=path.resolve().parent)


def _build(document: dict, path: Path, folder: Path) -> Experiment:
    problems: list[str] = []
    experiment = _table(Experiment, document, "", problems)
    problems += [] if problems else _contradictions(experiment)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{path}: {len(problems)} {noun} in the experiment file", *problems]))
    return dataclasses.replace(experiment, folder=folder, tables=tuple(document))


def _contradictions(experiment: Experiment) -> list[str]:
    """What is wrong with fields that are each right by themselves."""
    train, sample, problems = experiment.train, experiment.sample, []
    if train.lr_scheduler == "constant" and train.lr_warmup_steps:
        problems.append("train.lr_warmup_steps: constant has none; set train.lr_scheduler = 'constant_with_warmup'")
    if not experiment.controlnet.num_double_layers + experiment.controlnet.num_single_layers:
        problems.append("controlnet.num_double_layers, controlnet.num_single_layers: both are 0; set one above it")
    if sample.conditions and len(sample.conditions) != len(sample.prompts):
        found = f"{len(sample.conditions)} for {len(sample.prompts)} prompts"
        problems.append(
            f"sample.conditions: {found}; name an image file for each prompt, in the prompts' order, or none"
        )
    for name in ("learning_rate", "text_encoder_lr") if train.lr_scheduler == "polynomial" else ():
        if getattr(train, name) <= LR_END:
            problems.append(f"train.{name}: polynomial ends at {LR_END}; set it above that")
    return problems


def _table(cls, table: dict, prefix: str, problems: list[str]):
    fields = {f.name: f for f in dataclasses.fields(cls) if "internal" not in f.metadata}
    values = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in fields:
            meant = "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(key, fields, 1))
            problems.append(f"{name}: unknown field; known here: {', '.join(fields)}{meant}")
        elif dataclasses.is_dataclass(fields[key].type):
            if isinstance(value, dict):
                values[key] = _table(fields[key].type, value, f"{name}.", problems)
            else:
                problems.append(f"{name}: must be a table, [{name}]")
        else:
            problem, values[key] = _check(fields[key], value)
            if problem:
                problems.append(f"{name}: {problem}")
    return cls(**values)


def _check(spec: dataclasses.Field, value: Any) -> tuple[str, Any]:
    """The problem with ``value`` ("" for none) and the value as the field keeps it."""
    if spec.type is float and type(value) is int:
        value = float(value) if abs(value) < 2**63 else float("inf")
    if spec.type is dict:
        return _precision_table_problem(value), value
    if spec.type == str | tuple:
        is_list = isinstance(value, list) and value and all(isinstance(item, str) and item for item in value)
        if not (is_list or (isinstance(value, str) and value)):
            return f"must be a name or a list of names, found {value!r}", value
        return (_list_problem(value), tuple(value)) if is_list else (_rule_problem(spec, value), value)
    if spec.type is tuple:
        is_list = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        if not is_list:
            return f"must be a list of texts, found {value!r}", value
        return _null_problem(value), tuple(value)
    if spec.type == int | tuple:
        values = value if isinstance(value, list) else [value]
        if not values or any(type(each) is not int for each in values):
            return f"must be a whole number or a list of whole numbers, found {value!r}", value
        problem = next(filter(None, (_rule_problem(spec, each) for each in values)), "") or _list_problem(values)
        return problem, tuple(value) if isinstance(value, list) else value
    if type(value) is not spec.type:
        return f"must be {ARTICLES[spec.type]}, found {value!r}", value
    return _rule_problem(spec, value), value


def _list_problem(values: list) -> str:
    if problem := _null_problem(values):
        return problem
    twice = [value for number, value in enumerate(values) if value in values[:number]]
    return f"names {twice[0]!r} twice" if twice else ""


def _null_problem(values: list) -> str:
    wrong = [value for value in values if isinstance(value, str) and "\0" in value]
    return f"must not hold a null character, found {wrong[0]!r}" if wrong else ""


def _rule_problem(spec: dataclasses.Field, value: Any) -> str:
    rules = spec.metadata
    if isinstance(value, str) and "\0" in value:
        return f"must not hold a null character, found {value!r}"
    if isinstance(value, float) and value != value or value in (float("inf"), float("-inf")):
        return f"must be finite, found {value}"
    if "choices" in rules and value not in rules["choices"]:
        return f"must be one of {', '.join(rules['choices'])}, found {value!r}"
    if "minimum" in rules and value < rules["minimum"]:
        return f"must be at least {rules['minimum']}, found {value}"
    if "above" in rules and value <= rules["above"]:
        return f"must be above {rules['above']}, found {value}"
    if "maximum" in rules and value > rules["maximum"]:
        return f"must be at most {rules['maximum']}, found {value}"
    if "below" in rules and value >= rules["below"]:
        return f"must be below {rules['below']}, found {value}"
    if "multiple_of" in rules and value % rules["multiple_of"]:
        return f"must be a multiple of {rules['multiple_of']}, found {value}"
    if spec.name == "name" and not _is_plain_name(value):
        wanted = "letters, digits, '.', '_', '-', not first a '.' or '-'; 100 bytes at most"
        return f"must be a plain name ({wanted}), found {value!r}"
    return ""


def _is_plain_name(name: str) -> bool:
    return (
        bool(name)
        and name[0] not in ".-"
        and all(c.isalnum() or c in "._-" for c in name)
        and len(name.encode()) <= 100
    )


def _precision_table_problem(table: Any) -> str:
    if not isinstance(table, dict):
        return 'must be a table such as { params = "fp32", compute = "fp32" }'
    wrong = [key for key in table if key not in ("params", "compute", "storage")]
    if wrong:
        return f"unknown field {', '.join(wrong)}; known here: params, compute, storage"
    wrong = [f"{key} = {value!r}" for key, value in table.items() if value not in DTYPES]
    return f"{', '.join(wrong)}: must be one of {', '.join(DTYPES)}" if wrong else ""
