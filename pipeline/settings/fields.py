"""What an experiment can say: all settings, by table, each with its default and the rules that a value must keep."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""The model that this package brings."""

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
LR_END = 1e-7
"""Where ``polynomial`` ends, a rate and not a factor; diffusers' ``get_scheduler`` has no argument for it."""

WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
PRESETS = ("bf16", "fp16", "bf16-text-fp32", "fp16-text-fp32", "fp32")
PRECISION_COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "transformer", "trained")


def setting(default, **rules):
    """A field with rules: ``choices``; ``minimum``, ``maximum``; ``above``, ``below``, exclusive; ``multiple_of``."""
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
    """``images``: a folder; empty: pictures of a new word, drawn on first use.

    ``resolution``: in pixels; of several, a photo is trained on at each.  ``buckets``: at that area, about in the
    photo's own aspect.  ``crops``: how many fixed random crops stand for a photo; 0: its centre does.  ``flip``: its
    mirror image too.  ``repeats``: how often a photo counts in an epoch.
    """

    images: str = setting("")
    prompt: str = setting("")
    resolution: int | tuple = setting(512, minimum=16, maximum=8192, multiple_of=16)
    buckets: bool = setting(False)
    crops: int = setting(0, minimum=0, maximum=1000)
    flip: bool = setting(False)
    repeats: int = setting(1, minimum=1, maximum=100_000)
    max_sequence_length: int = setting(512, minimum=1, maximum=4096)


@dataclass(frozen=True)
class PrecisionSettings:
    """``preset``, and per component a table with ``params``, ``compute`` and ``storage``.

    ``simulate``: bf16 where the device lacks it, by rounding; see `pipeline.devices.simulation`.
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

    The LoRA is scaled by ``alpha`` / ``rank``.  Set alpha when you change rank; the default does not adapt.
    ``train_text_encoder``: CLIP too; T5 stays as it is.
    """

    rank: int = setting(4, minimum=1, maximum=65_536)
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
    num_double_layers: int = setting(4, minimum=0, maximum=1000)
    num_single_layers: int = setting(0, minimum=0, maximum=1000)
    condition: str = setting("file", choices=("file", "canny", "grey", "blur", "tile"))
    conditioning_scale: float = setting(1.0, above=0)
    save_dtype: str = setting("fp32", choices=DTYPES)


@dataclass(frozen=True)
class Train:
    """``epochs``: instead of ``steps``, where it is above 0.  A step is an update: ``accumulate`` batches.

    ``lr_num_cycles``: 0 is diffusers' own default of the scheduler.  ``ema_decay``, ``caption_dropout``,
    ``max_grad_norm`` and ``checkpoint_every``: 0 is off.
    """

    steps: int = setting(500, minimum=1, maximum=1_000_000_000)
    epochs: int = setting(0, minimum=0, maximum=1_000_000)
    batch_size: int = setting(1, minimum=1, maximum=65_536)
    accumulate: int = setting(1, minimum=1, maximum=65_536)
    learning_rate: float = setting(1e-4, above=0)
    text_encoder_lr: float = setting(5e-6, above=0)
    lr_scheduler: str = setting("constant", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = setting(0, minimum=0, maximum=1_000_000_000)
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
    log_every: int = setting(1, minimum=1, maximum=1_000_000_000)
    checkpoint_every: int = setting(500, minimum=0, maximum=1_000_000_000)
    keep_checkpoints: int = setting(2, minimum=1, maximum=1_000_000)


@dataclass(frozen=True)
class Sampling:
    """``prompts``: what is drawn with the result to be looked at, and without it too where ``base`` is true.

    ``seed``: picture i is drawn from the noise of ``seed`` + i.  ``resolution``: 0 is the highest of [data].
    ``conditions``: of a ControlNet's pictures, an image file for each prompt.  Nothing here decides a training.
    """

    prompts: tuple = setting(())
    seed: int = setting(0, minimum=0, below=2**63)
    num_inference_steps: int = setting(28, minimum=1, maximum=10_000)
    guidance_scale: float = setting(3.5, minimum=0)
    batch_size: int = setting(1, minimum=1, maximum=65_536)
    resolution: int = setting(0, minimum=0, maximum=8192, multiple_of=16)
    conditions: tuple = setting(())
    base: bool = setting(True)


@dataclass(frozen=True)
class Device:
    """``memory_gb``: of an NPU, which `pipeline.estimate.preflight` compares with; a CPU's is the machine's."""

    target: str = setting("auto", choices=("auto", "Ascend", "CPU"))
    memory_gb: float = setting(64.0, above=0.0)
    deterministic: bool = setting(True)


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
