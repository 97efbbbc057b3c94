"""What an experiment can say: all settings, by table, each with its default and the rules that a value must keep."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, with_config
from typing_extensions import TypedDict

from pipeline.settings.schema import DISTINCT, Flag, Number, Text, Whole, Word, between

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""The model that this package brings."""

Dtype = Literal["bf16", "fp16", "fp32"]
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

LRScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
LR_END = 1e-7
"""Where ``polynomial`` ends, a rate and not a factor; diffusers' ``get_scheduler`` has no argument for it."""

WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
Preset = Literal["bf16", "fp16", "bf16-text-fp32", "fp16-text-fp32", "fp32"]
PRESETS: tuple[str, ...] = get_args(Preset)
Mode = Literal["auto", "pynative", "jit"]
PRECISION_COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "transformer", "trained")

BILLION = 1_000_000_000
MOST = 65_536
"""More than any machine holds of what it is said of."""

OnlyKnown = with_config({"extra": "forbid"})


def _plain_name(name: str) -> str:
    is_plain = name and name[0] not in ".-" and all(c.isalnum() or c in "._-" for c in name)
    if not is_plain or len(name.encode()) > 100:
        wanted = "letters, digits, '.', '_', '-', not first a '.' or '-'; 100 bytes at most"
        raise ValueError(f"must be a plain name ({wanted}), found {name!r}")
    return name


def _number_or_auto(value: object) -> object:
    if value != "auto" and (type(value) is not int or not 1 <= value <= MOST):
        raise ValueError(f'must be a whole number from 1 to {MOST}, or "auto", found {value!r}')
    return value


Names = Annotated[tuple[Word, ...], *DISTINCT]
Size = Annotated[Whole, between(16, 8192, multiple_of=16)]
Seed = Annotated[Whole, between(0, 2**63 - 1)]
Share = Annotated[Number, Field(ge=0, lt=1)]
UpToAThousand = Annotated[Number, Field(gt=0, le=1000)]
UpToAMillion = Annotated[Number, Field(gt=0, le=1_000_000)]


@OnlyKnown
class Dtypes(TypedDict, total=False):
    """What a component's parameters are held in, computes in, and is stored in."""

    params: Dtype
    compute: Dtype
    storage: Dtype


@OnlyKnown
@dataclass(frozen=True)
class Paths:
    """``store``: a folder, or a list of folders: the first is written to, the others are read too."""

    store: Word | Names = "store"
    runs: Text = "runs"


@OnlyKnown
@dataclass(frozen=True)
class Model:
    """``path``: a local folder in diffusers layout or a Hub id; empty: the model that this package brings."""

    path: Text = ""
    revision: Text = ""
    variant: Text = ""


@OnlyKnown
@dataclass(frozen=True)
class Data:
    """``images``: a folder; empty: pictures of a new word, drawn on first use.

    ``resolution``: in pixels; of several, a photo is trained on at each.  ``buckets``: at that area, about in the
    photo's own aspect.  ``crops``: how many fixed random crops stand for a photo; 0: its centre does.  ``flip``: its
    mirror image too.  ``repeats``: how often a photo counts in an epoch.
    """

    images: Text = ""
    prompt: Text = ""
    resolution: Size | Annotated[tuple[Size, ...], *DISTINCT] = 512
    buckets: Flag = False
    crops: Annotated[Whole, between(0, 1000)] = 0
    flip: Flag = False
    repeats: Annotated[Whole, between(1, 100_000)] = 1
    max_sequence_length: Annotated[Whole, between(1, 4096)] = 512


@OnlyKnown
@dataclass(frozen=True)
class PrecisionSettings:
    """``preset``, and per component a table with ``params``, ``compute`` and ``storage``.

    ``simulate``: bf16 where the device lacks it, by rounding; see `pipeline.devices.simulation`.
    """

    preset: Literal["auto", Preset] = "auto"
    simulate: Flag = False
    vae: Dtypes = field(default_factory=Dtypes)
    text_encoder: Dtypes = field(default_factory=Dtypes)
    text_encoder_2: Dtypes = field(default_factory=Dtypes)
    transformer: Dtypes = field(default_factory=Dtypes)
    trained: Dtypes = field(default_factory=Dtypes)


@OnlyKnown
@dataclass(frozen=True)
class Lora:
    """``targets``: a preset, or a list of endings of module names, ``*`` standing for anything.

    The LoRA is scaled by ``alpha`` / ``rank``.  Set alpha when you change rank; the default does not adapt.
    ``train_text_encoder``: CLIP too; T5 stays as it is.
    """

    rank: Annotated[Whole, between(1, MOST)] = 4
    alpha: UpToAMillion = 4.0
    dropout: Share = 0.0
    targets: Literal["attention", "all-linear"] | Names = "attention"
    train_text_encoder: Flag = False


@OnlyKnown
@dataclass(frozen=True)
class ControlNet:
    """``init_from``: a ControlNet's folder; empty: the transformer's first blocks, so many of each kind.

    ``condition``: ``file`` is "conditioning_image" in metadata.jsonl; the others are computed from the photos.
    ``save_dtype``: of the saved weights; they train in fp32.
    """

    init_from: Text = ""
    num_double_layers: Annotated[Whole, between(0, 1000)] = 4
    num_single_layers: Annotated[Whole, between(0, 1000)] = 0
    condition: Literal["file", "canny", "grey", "blur", "tile"] = "file"
    conditioning_scale: UpToAThousand = 1.0
    save_dtype: Dtype = "fp32"


@OnlyKnown
@dataclass(frozen=True)
class Train:
    """``epochs``: instead of ``steps``, where it is above 0.  A step is an update: ``accumulate`` batches.

    ``lr_num_cycles``: 0 is diffusers' own default of the scheduler.  ``ema_decay``, ``caption_dropout``,
    ``max_grad_norm`` and ``checkpoint_every``: 0 is off.
    """

    steps: Annotated[Whole, between(1, BILLION)] = 500
    epochs: Annotated[Whole, between(0, 1_000_000)] = 0
    batch_size: Annotated[Whole, between(1, MOST)] = 1
    accumulate: Annotated[Whole, between(1, MOST)] = 1
    learning_rate: UpToAThousand = 1e-4
    text_encoder_lr: UpToAThousand = 5e-6
    lr_scheduler: LRScheduler = "constant"
    lr_warmup_steps: Annotated[Whole, between(0, BILLION)] = 0
    lr_num_cycles: Annotated[Number, Field(ge=0, le=1_000_000)] = 0.0
    lr_power: UpToAThousand = 1.0
    optimizer: Literal["adamw", "adam_weight_decay"] = "adamw"
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Annotated[Number, Field(ge=1e-30, le=1)] = 1e-8
    weight_decay: Annotated[Number, Field(ge=0, le=1000)] = 1e-4
    max_grad_norm: Annotated[Number, Field(ge=0, le=1e30)] = 1.0
    ema_decay: Share = 0.0
    weighting_scheme: WeightingScheme = "none"
    logit_mean: Annotated[Number, Field(ge=-1000, le=1000)] = 0.0
    logit_std: UpToAThousand = 1.0
    mode_scale: Annotated[Number, Field(ge=-1, lt=1.75)] = 1.29
    caption_dropout: Share = 0.0
    guidance_scale: Annotated[Number, Field(ge=0, le=1_000_000)] = 3.5
    posterior: Literal["sample", "mode"] = "sample"
    gradient_checkpointing: Flag = False
    mode: Mode = "auto"
    log_every: Annotated[Whole, between(1, BILLION)] = 1
    checkpoint_every: Annotated[Whole, between(0, BILLION)] = 500
    keep_checkpoints: Annotated[Whole, between(1, 1_000_000)] = 2


@OnlyKnown
@dataclass(frozen=True)
class Sampling:
    """``prompts``: what is drawn with the result to be looked at, and without it too where ``base`` is true.

    ``seed``: picture i is drawn from the noise of ``seed`` + i.  ``resolution``: 0 is the highest of [data].
    ``conditions``: of a ControlNet's pictures, an image file for each prompt.  Nothing here decides a training.
    """

    prompts: tuple[Text, ...] = ()
    seed: Seed = 0
    num_inference_steps: Annotated[Whole, between(1, 10_000)] = 28
    guidance_scale: Annotated[Number, Field(ge=0, le=1_000_000)] = 3.5
    batch_size: Annotated[Whole, between(1, MOST)] = 1
    resolution: Annotated[Whole, between(0, 8192, multiple_of=16)] = 0
    conditions: tuple[Text, ...] = ()
    base: Flag = True


@OnlyKnown
@dataclass(frozen=True)
class Device:
    """``memory_gb``: of an NPU, which `pipeline.estimate.preflight` compares with; a CPU's is the machine's.

    The others are for an NPU alone, and MindSpore's own: ``jit_level`` and ``exec_order`` of compiled steps,
    ``memory_pool_gb`` the most that MindSpore takes there (0: all), ``cpu_affinity`` its threads bound to cores.
    """

    target: Literal["auto", "Ascend", "CPU"] = "auto"
    memory_gb: UpToAMillion = 64.0
    deterministic: Flag = True
    jit_level: Literal["O0", "O1"] = "O0"
    exec_order: Literal["bfs", "dfs"] = "bfs"
    memory_pool_gb: Annotated[Number, Field(ge=0, le=1_000_000)] = 0.0
    cpu_affinity: Flag = False


@OnlyKnown
@dataclass(frozen=True)
class Parallel:
    """``encoders``: into how many shards encoding and drawing are divided, for as many workers of Luigi.
    ``ranks``: how many devices of this machine share the batches of a step; ``auto``: all NPUs, or one CPU.

    ``reduce``: how their gradients are added up.  ``ordered``: in the order of the batches, so that the bits are those
    of one device.  ``fast``: as the communication library does, which moves less; other bits for each number of ranks.
    ``shard_optimizer``: each rank keeps a share of the moments and averages, which takes less memory and more exchange.
    """

    ranks: Annotated[Annotated[Whole, between(1, MOST)] | Literal["auto"], BeforeValidator(_number_or_auto)] = 1
    reduce: Literal["ordered", "fast"] = "ordered"
    shard_optimizer: Flag = False
    encoders: Annotated[Whole, between(1, MOST)] = 1


@OnlyKnown
@dataclass(frozen=True)
class Settings:
    """All that an experiment file can say."""

    name: Annotated[Text, AfterValidator(_plain_name)] = "experiment"
    seed: Seed = 0
    paths: Paths = Paths()
    model: Model = Model()
    data: Data = Data()
    precision: PrecisionSettings = PrecisionSettings()
    lora: Lora = Lora()
    controlnet: ControlNet = ControlNet()
    train: Train = Train()
    sample: Sampling = Sampling()
    device: Device = Device()
    parallel: Parallel = Parallel()


@dataclass(frozen=True)
class Experiment(Settings):
    """All settings of one experiment.

    ``folder`` is what relative paths in it are relative to, ``tables`` names the tables that its file has.
    """

    folder: Path = Path(".")
    tables: tuple[str, ...] = ()

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
    every = dataclasses.asdict(experiment)
    return {field.name: every[field.name] for field in dataclasses.fields(Settings)}


def _looks_like_hub_id(text: str) -> bool:
    owner, slash, name = text.partition("/")
    return bool(slash and owner and name) and "/" not in name and not owner.startswith((".", "~"))
