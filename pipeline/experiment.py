"""The experiment file: TOML with a default for every field, checked as a whole before anything runs."""

import dataclasses
import difflib
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.training.schedules import LR_END

DTYPES = ("bf16", "fp16", "fp32")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LORA_TARGETS = {
    "attention": ATTENTION,
    "all-linear": (
        *ATTENTION,
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "single_transformer_blocks.*.proj_out"),
    ),
}
"""Presets of ``lora.targets``: what mindone's FLUX.1 script trains; and all linear layers of the blocks, which are what
diffusers' script trains and the single blocks' two."""

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
PRESETS = ("bf16", "fp16", "bf16-text-fp32", "fp16-text-fp32", "fp32")
PRECISION_COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "transformer", "trained")


def setting(default, **rules):
    """A field with rules: ``choices``, ``minimum``, ``above`` (exclusive minimum), ``below``, ``multiple_of``."""
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Paths:
    """``store``: a folder, or a list of folders: the first is written to, the others are read too."""

    store: str | tuple = setting("store")
    runs: str = setting("runs")


@dataclass(frozen=True)
class Model:
    """``path``: a local folder in diffusers layout or a Hub id; empty: the model that this package brings."""

    path: str = setting("")
    revision: str = setting("")
    variant: str = setting("")


@dataclass(frozen=True)
class Data:
    """``images``: a folder; empty: a few drawn pictures, written on first use.

    ``resolution``: in pixels; of several, a photo is trained on at each.  ``buckets``: at that area, about in the
    photo's own aspect.  ``crops``: how many fixed random crops stand for a photo; 0: its centre does.  ``flip``: its
    mirror image too.  ``repeats``: how often a photo counts in an epoch.
    """

    images: str = setting("")
    prompt: str = setting("")
    resolution: int | tuple = setting(512, minimum=16, multiple_of=16)
    buckets: bool = setting(False)
    crops: int = setting(0, minimum=0)
    flip: bool = setting(False)
    repeats: int = setting(1, minimum=1)
    max_sequence_length: int = setting(512, minimum=1)


@dataclass(frozen=True)
class PrecisionSettings:
    """``preset``, and per component a table with ``params``, ``compute`` and ``storage``.

    ``simulate``: bf16 where the device lacks it, by rounding; see `pipeline.simulation`.
    """

    preset: str = setting("auto", choices=("auto", *PRESETS))
    simulate: bool = setting(False)
    vae: dict = field(default_factory=dict)
    text_encoder: dict = field(default_factory=dict)
    text_encoder_2: dict = field(default_factory=dict)
    transformer: dict = field(default_factory=dict)
    trained: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Lora:
    """``targets``: a preset, or a list of endings of module names, ``*`` standing for anything.

    ``train_text_encoder``: CLIP too; T5 stays as it is.
    """

    rank: int = setting(4, minimum=1)
    alpha: float = setting(4.0, above=0)
    dropout: float = setting(0.0, minimum=0, below=1)
    targets: str | tuple = setting("attention", choices=tuple(LORA_TARGETS))
    train_text_encoder: bool = setting(False)


@dataclass(frozen=True)
class ControlNet:
    """``init_from``: a ControlNet's folder; empty: the transformer's first blocks, so many of each kind.

    ``condition``: ``file`` is "conditioning_image" in metadata.jsonl; the others are computed from the photos.
    ``save_dtype``: of the saved weights; they train in fp32.
    """

    init_from: str = setting("")
    num_double_layers: int = setting(4, minimum=0)
    num_single_layers: int = setting(0, minimum=0)
    condition: str = setting("file", choices=("file", "canny", "grey", "blur", "tile"))
    conditioning_scale: float = setting(1.0, above=0)
    save_dtype: str = setting("fp32", choices=DTYPES)


@dataclass(frozen=True)
class Train:
    """``epochs``: instead of ``steps``, where it is above 0.  A step is an update: ``accumulate`` batches.

    ``lr_num_cycles``: 0 is diffusers' own default of the scheduler.  ``ema_decay``, ``caption_dropout``,
    ``max_grad_norm`` and ``checkpoint_every``: 0 is off.
    """

    steps: int = setting(500, minimum=1)
    epochs: int = setting(0, minimum=0)
    batch_size: int = setting(1, minimum=1)
    accumulate: int = setting(1, minimum=1)
    learning_rate: float = setting(1e-4, above=0)
    text_encoder_lr: float = setting(5e-6, above=0)
    lr_scheduler: str = setting("constant", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = setting(0, minimum=0)
    lr_num_cycles: float = setting(0.0, minimum=0)
    lr_power: float = setting(1.0, above=0)
    optimizer: str = setting("adamw", choices=("adamw", "adam_weight_decay"))
    adam_beta1: float = setting(0.9, minimum=0, below=1)
    adam_beta2: float = setting(0.999, minimum=0, below=1)
    adam_epsilon: float = setting(1e-8, above=0)
    weight_decay: float = setting(1e-4, minimum=0)
    max_grad_norm: float = setting(1.0, minimum=0)
    ema_decay: float = setting(0.0, minimum=0, below=1)
    weighting_scheme: str = setting("none", choices=WEIGHTING_SCHEMES)
    logit_mean: float = setting(0.0)
    logit_std: float = setting(1.0, above=0)
    mode_scale: float = setting(1.29, minimum=-1, below=1.75)
    caption_dropout: float = setting(0.0, minimum=0, below=1)
    guidance_scale: float = setting(3.5, minimum=0)
    posterior: str = setting("sample", choices=("sample", "mode"))
    gradient_checkpointing: bool = setting(False)
    mode: str = setting("auto", choices=("auto", "pynative", "jit"))
    log_every: int = setting(1, minimum=1)
    checkpoint_every: int = setting(500, minimum=0)
    keep_checkpoints: int = setting(2, minimum=1)


@dataclass(frozen=True)
class Sampling:
    """``prompts``: what is drawn with the result to be looked at, and without it too where ``base`` is true.

    ``seed``: picture i is drawn from the noise of ``seed`` + i.  ``resolution``: 0 is the highest of [data].
    ``conditions``: of a ControlNet's pictures, an image file for each prompt.  Nothing here decides a training.
    """

    prompts: tuple = setting(())
    seed: int = setting(0, minimum=0, below=2**63)
    num_inference_steps: int = setting(28, minimum=1)
    guidance_scale: float = setting(3.5, minimum=0)
    batch_size: int = setting(1, minimum=1)
    resolution: int = setting(0, minimum=0, multiple_of=16)
    conditions: tuple = setting(())
    base: bool = setting(True)


@dataclass(frozen=True)
class Device:
    """``memory_gb``: of an NPU, which `pipeline.planning.preflight` compares with; a CPU's is the machine's."""

    target: str = setting("auto", choices=("auto", "Ascend", "CPU"))
    memory_gb: float = setting(64.0, above=0.0)


@dataclass(frozen=True)
class Experiment:
    """All settings of one experiment.

    ``folder`` is what relative paths in it are relative to, ``tables`` names the tables that its file has.
    """

    name: str = setting("experiment")
    seed: int = setting(0, minimum=0, below=2**63)
    paths: Paths = Paths()
    model: Model = Model()
    data: Data = Data()
    precision: PrecisionSettings = PrecisionSettings()
    lora: Lora = Lora()
    controlnet: ControlNet = ControlNet()
    train: Train = Train()
    sample: Sampling = Sampling()
    device: Device = Device()
    folder: Path = field(default=Path("."), metadata={"internal": True})
    tables: tuple = field(default=(), metadata={"internal": True})

    @property
    def stores(self) -> tuple[Path, ...]:
        """The folders of the store, the one that is written to first."""
        paths = self.paths.store
        return tuple(map(self._resolve, [paths] if isinstance(paths, str) else paths))

    @property
    def runs(self) -> Path:
        return self._resolve(self.paths.runs)

    @property
    def init_from(self) -> Path | None:
        """The folder of the ControlNet to start from."""
        return self._resolve(self.controlnet.init_from) if self.controlnet.init_from else None

    @property
    def images(self) -> Path:
        return self._resolve(self.data.images or "blickets")

    @property
    def sample_resolution(self) -> int:
        """The width and height of sampled pictures, in pixels."""
        own = self.data.resolution
        return self.sample.resolution or (max(own) if isinstance(own, tuple) else own)

    @property
    def sample_conditions(self) -> dict[str, Path]:
        """The files that sampled pictures are conditioned on, by what the experiment file calls them."""
        return {name: self._resolve(name) for name in self.sample.conditions}

    @property
    def model_path(self) -> Path | str:
        """A local folder, or a Hub id as it stands where no such folder exists and it looks like one."""
        if not self.model.path:
            return EMBEDDED
        local = self._resolve(self.model.path)
        return self.model.path if not local.exists() and _looks_like_hub_id(self.model.path) else local

    def _resolve(self, path: str) -> Path:
        return (self.folder / os.path.expanduser(path)).resolve()


def settings_of(experiment: Experiment) -> dict:
    """All that an experiment file can say, by table, as it was read."""
    own = {field.name for field in dataclasses.fields(Experiment) if "internal" not in field.metadata}
    return {name: value for name, value in dataclasses.asdict(experiment).items() if name in own}


def _looks_like_hub_id(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and not owner.startswith((".", "~"))


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return _build(document, path, folder=path.resolve().parent)


DEFAULT = Path(__file__).with_name("default.toml")
EMBEDDED = Path(__file__).with_name("embedded")


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
        return f"must be {_article(spec.type)}, found {value!r}", value
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
    if "below" in rules and value >= rules["below"]:
        return f"must be below {rules['below']}, found {value}"
    if "multiple_of" in rules and value % rules["multiple_of"]:
        return f"must be a multiple of {rules['multiple_of']}, found {value}"
    if spec.name == "name" and not _is_plain_name(value):
        return f"must be a plain name (letters, digits, '.', '_', '-', not first a '.' or '-'), found {value!r}"
    return ""


def _is_plain_name(name: str) -> bool:
    return bool(name) and name[0] not in ".-" and all(c.isalnum() or c in "._-" for c in name) and len(name) <= 100


def _precision_table_problem(table: Any) -> str:
    if not isinstance(table, dict):
        return 'must be a table such as { params = "fp32", compute = "fp32" }'
    wrong = [key for key in table if key not in ("params", "compute", "storage")]
    if wrong:
        return f"unknown field {', '.join(wrong)}; known here: params, compute, storage"
    wrong = [f"{key} = {value!r}" for key, value in table.items() if value not in DTYPES]
    return f"{', '.join(wrong)}: must be one of {', '.join(DTYPES)}" if wrong else ""


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
