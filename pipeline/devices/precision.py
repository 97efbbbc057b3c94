"""Which dtype every component keeps, computes and stores.  All dtype decisions are made here."""

import dataclasses
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.settings.fields import Dtypes, PrecisionSettings
from pipeline.settings.values import PRECISION_COMPONENTS

NOT_STORED = ("transformer", "trained")
LONG_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "float32": 4, "float16": 2, "bfloat16": 2}
"""Of a number, by the dtype's short and long name."""


@dataclass(frozen=True)
class Policy:
    """``params``: dtype of the parameters.  ``compute``: of the arithmetic.  ``storage``: of what the store keeps.

    ``simulated``: on a device without bf16, parameters and outputs are rounded to it, but kept and computed in fp32.
    """

    params: str
    compute: str
    storage: str
    simulated: bool = False

    @property
    def storage_dtype(self) -> str:
        """The store's name of the storage dtype, such as ``"bfloat16"``."""
        return LONG_NAMES[self.storage]

    @property
    def params_on_device(self) -> str:
        return "fp32" if self.simulated else self.params

    @property
    def compute_on_device(self) -> str:
        return "fp32" if self.simulated else self.compute

    @property
    def decisive(self) -> dict:
        """What of it decides bytes: a simulation is never mistaken for the real thing, nor the real thing renamed."""
        own = {"params": self.params, "compute": self.compute}
        return own | ({"simulated": True} if self.simulated else {})


@dataclass(frozen=True)
class Precision:
    preset: str
    vae: Policy
    text_encoder: Policy
    text_encoder_2: Policy
    transformer: Policy
    trained: Policy

    @property
    def simulated(self) -> tuple[str, ...]:
        """The components that are simulated."""
        return tuple(name for name in PRECISION_COMPONENTS if getattr(self, name).simulated)

    @property
    def label(self) -> str:
        """The preset, and that it is simulated where it is."""
        return f"{self.preset}, simulated" if self.simulated else self.preset


def resolve(settings: PrecisionSettings, device: str, computes: tuple[str, ...]) -> Precision:
    """The policy of every component on ``device``, which computes the dtypes ``computes``.

    ``preset = "auto"`` is bf16 where the device computes it and fp32 elsewhere.  With ``simulate``, a device without
    bf16 simulates it.  Raises UserError that lists every component whose policy the device cannot run.
    """
    preset = settings.preset
    if preset == "auto":
        preset = "bf16" if "bf16" in computes else "fp32"
    half = preset.partition("-")[0]
    text = "fp32" if preset.endswith("-text-fp32") else half
    simulates = settings.simulate and "bf16" not in computes
    policies = {
        "vae": _policy(half, settings.vae),
        "text_encoder": _policy(text, settings.text_encoder),
        "text_encoder_2": _policy(text, settings.text_encoder_2),
        "transformer": _policy(half, settings.transformer),
        "trained": _policy(half, settings.trained, params="fp32"),
    }
    if simulates:
        policies = {name: _simulated(policy) for name, policy in policies.items()}
    problems = []
    if simulates and not any(policy.simulated for policy in policies.values()):
        problems.append("simulate: nothing here is bf16; set precision.preset = 'bf16', or remove simulate")
    for name in PRECISION_COMPONENTS:
        problems += _problems(name, policies[name], device, computes, table=getattr(settings, name))
    if problems:
        raise UserError("\n  ".join([f"precision: preset {preset!r} and its overrides do not fit", *problems]))
    return Precision(preset, **policies)


def _policy(dtype: str, table: Dtypes, params: str = "") -> Policy:
    """``dtype`` for all three, or what ``table`` and ``params`` say; storage follows compute."""
    compute: str = table.get("compute", dtype)
    return Policy(table.get("params", params or dtype), compute, table.get("storage", compute))


def _simulated(policy: Policy) -> Policy:
    return dataclasses.replace(policy, simulated="bf16" in (policy.params, policy.compute))


def _problems(name: str, policy: Policy, device: str, computes: tuple[str, ...], table: dict) -> list[str]:
    found = []
    fitting = [f"{half}{text}" for half in computes for text in ("", "-text-fp32") if half != "fp32" or not text]
    hint = f"presets that work: {', '.join(fitting)}"
    if table:
        hint = f"in [precision.{name}] set one of {', '.join(computes)}"
    for dtype in dict.fromkeys((policy.params, policy.compute)):
        if dtype not in computes and not (policy.simulated and dtype == "bf16"):
            simulate = "[precision] simulate = true simulates it; " if dtype == "bf16" else ""
            found.append(f"{name}: {device} does not compute {dtype}; {simulate}{hint}")
    if "storage" in table and name in NOT_STORED:
        found.append(f"{name}: nothing of it is kept in the store; remove storage from [precision.{name}]")
    if name == "trained" and policy.params != "fp32":
        found.append("trained: parameters must be fp32: MindSpore's optimizers step in the parameters' dtype")
    if name != "trained" and policy.params != policy.compute:
        found.append(
            f"{name}: parameters in {policy.params} with arithmetic in {policy.compute} is not supported; "
            f"set params and compute of [precision.{name}] to the same dtype"
        )
    return found
