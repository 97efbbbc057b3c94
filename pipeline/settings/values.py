"""What the value of a setting may be: the names that it is chosen from, and the rules that it keeps."""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from pipeline.settings.schema import DISTINCT, Number, Whole, Word, between

Dtype = Literal["bf16", "fp16", "fp32"]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
DIFFUSERS = (
    *ATTENTION,
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
LORA_TARGETS = {
    "attention": ATTENTION,
    "diffusers": DIFFUSERS,
    "all-linear": (*DIFFUSERS, "proj_mlp", "single_transformer_blocks.*.proj_out"),
}
"""Presets of ``lora.targets``: what mindone's FLUX.1 script trains; what diffusers' ``train_dreambooth_lora_flux.py``
(0.35.2) trains unless it is told otherwise; and all linear layers of the blocks."""

LRScheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
LR_END = 1e-7
"""Where ``polynomial`` ends, a rate and not a factor; diffusers' ``get_scheduler`` has no argument for it."""

WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]
Preset = Literal["bf16", "fp16", "bf16-text-fp32", "fp16-text-fp32", "fp32"]
PRESETS: tuple[str, ...] = get_args(Preset)
Mode = Literal["auto", "pynative", "jit"]
FindingKind = Literal[
    "cut-by-clip",
    "cut-by-t5",
    "enlarged",
    "cropped",
    "twice",
    "profile-ignored",
    "caption-repeated",
    "control-characters",
    "several-lines",
    "blank",
]
"""What `CheckData` may find, as `python -m pipeline data --json` calls it; `data.findings` looks for it."""

PRECISION_COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "transformer", "trained")

BILLION = 1_000_000_000
MOST = 65_536
"""More than any machine holds of what it is said of."""

MOST_OF_A_NAME = 100
"""Bytes of an experiment's name: file systems take 255 for a folder's, to which the run's ID is added."""


def plain_name(name: str) -> str:
    is_plain = name and name[0] not in ".-=,+" and all(c.isalnum() or c in "._-=,+" for c in name)
    if not is_plain or len(name.encode()) > MOST_OF_A_NAME:
        wanted = "letters, digits, any of ._-=,+ but only _ in front; 100 bytes at most"
        raise ValueError(f"must be a plain name ({wanted}), found {name!r}")
    return name


def number_or_auto(minimum: int, maximum: int) -> BeforeValidator:
    """The rule of a whole number that is one of the two or between them, or ``auto``."""

    def check(value: object) -> object:
        if value != "auto" and (type(value) is not int or not minimum <= value <= maximum):
            raise ValueError(f'must be a whole number from {minimum} to {maximum}, or "auto", found {value!r}')
        return value

    return BeforeValidator(check)


def flag_or_list(value: object) -> object:
    if type(value) is not bool and not isinstance(value, list | tuple):
        raise ValueError(f'must be true, false or a list such as ["enlarged", "twice"], found {value!r}')
    return value


Names = Annotated[tuple[Word, ...], *DISTINCT]
Size = Annotated[Whole, between(16, 8192, multiple_of=16)]
NumberOfBlocks = Annotated[Whole, between(0, 1000)]
Seed = Annotated[Whole, between(0, 2**63 - 1)]
Share = Annotated[Number, Field(ge=0, lt=1)]
UpToAThousand = Annotated[Number, Field(gt=0, le=1000)]
UpToAMillion = Annotated[Number, Field(gt=0, le=1_000_000)]
