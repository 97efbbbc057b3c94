"""The figures of a study of two precisions, as a dict and as JSON.  Imports no MindSpore."""

import json
import math
from collections.abc import Callable, Mapping
from typing import NotRequired, TypedDict

import numpy as np

from pipeline.devices import device
from pipeline.devices.precision import BYTES, Policy
from pipeline.flux.pretrained import checked_config
from pipeline.plan.plan import Plan
from pipeline.study import distances
from pipeline.study.subject import (
    AGAINST,
    CAPTION_ENCODERS,
    COMPONENTS,
    IMAGE_ENCODER,
    NETWORK,
    OWN,
    SIDES,
    is_same,
    label,
)

WORST: dict[distances.Figure, Callable[..., int]] = {"relative_error": max, "cosine": min}
"""Of each figure, which is the worst."""


class Sample(TypedDict):
    """How much is compared.  pairs: of noise and noise level."""

    captions: int
    photos: int
    pairs: int


class NotFinite(TypedDict):
    """How many items have values that are not finite, and how many values these are."""

    items: int
    values: int


class Component(TypedDict):
    """The figures of one component, of two sides by side; those that are not required need its outputs.

    compared: which output.  by_item, relative_error, cosine: where the policies differ.  psnr_db: of the VAE.
    """

    compared: str
    policies: dict[str, str]
    same_policy: bool
    weights_bytes: dict[str, int]
    item_bytes: NotRequired[dict[str, int]]
    items: NotRequired[int]
    not_finite: NotRequired[dict[str, NotFinite]]
    by_item: NotRequired[list[distances.Item]]
    relative_error: NotRequired[distances.Summary]
    cosine: NotRequired[distances.Summary]
    psnr_db: NotRequired[distances.Summary]


class Report(TypedDict):
    """All figures of a study.  loss: None where none can be compared.  page: its path, if there is one."""

    experiment: str
    device: str
    presets: dict[str, str]
    sample: Sample
    components: dict[str, Component]
    loss: distances.Change | None
    problems: list[str]
    page: str | None


def heading(plans: Mapping[str, Plan], pairs: int) -> Report:
    """What is compared with what, and what it takes: all that is known before anything is computed."""
    plan = plans[OWN]
    weights = {side: _weights_bytes(each) for side, each in plans.items()}
    num_photos = len({photo.digest for photo in plan.photos})
    return {
        "experiment": plan.experiment.name,
        "device": plan.device,
        "presets": {side: each.precision.label for side, each in plans.items()},
        "sample": {"captions": len(plan.captions.items), "photos": num_photos, "pairs": pairs},
        "components": {
            name: {
                "compared": what,
                "policies": {side: label(getattr(each.precision, name)) for side, each in plans.items()},
                "same_policy": is_same(plans, name),
                "weights_bytes": {side: weights[side][name] for side in SIDES},
            }
            for name, what in COMPONENTS.items()
        },
        "loss": None,
        "problems": [],
        "page": None,
    }


def _weights_bytes(plan: Plan) -> dict[str, int]:
    """Of every component, in the dtype that its policy names; where that is simulated, it takes more here."""
    numbers = {name: plan.family.num_parameters(name, checked_config(plan.model_folder, name)) for name in COMPONENTS}
    return {name: number * BYTES[getattr(plan.precision, name).params] for name, number in numbers.items()}


def add_encoder(report: Report, plans: Mapping[str, Plan], component: str, outputs) -> None:
    """Add the figures of what an encoder has computed; outputs: `study.Outputs`."""
    values = np.mean([array.size for array in outputs.sides[AGAINST].values()])
    storage = {side: getattr(plan.precision, component).storage for side, plan in plans.items()}
    row = report["components"][component]
    row["item_bytes"] = {side: round(values * BYTES[dtype]) for side, dtype in storage.items()}
    _add(report, plans, component, outputs, _mean_of if component == IMAGE_ENCODER else np.asarray)


def add_transformer(report: Report, plans: Mapping[str, Plan], outputs) -> None:
    _add(report, plans, NETWORK, outputs, np.asarray)


def _mean_of(posterior: np.ndarray) -> np.ndarray:
    return np.split(posterior, 2)[0]


def _add(report: Report, plans: Mapping[str, Plan], component: str, outputs, part: Callable) -> None:
    """What is not finite, counted over whole items; and, of ``part`` of them, how far both sides are apart."""
    row, names = report["components"][component], outputs.names
    row["items"], row["not_finite"] = len(names), {}
    for side, bad in outputs.not_finite.items():
        row["not_finite"][side] = {"items": len(bad), "values": sum(bad.values())}
        if bad and not (side == OWN and row["same_policy"]):
            report["problems"].append(_problem(plans[side], component, len(bad), len(names), side))
    if not row["same_policy"]:
        row["by_item"] = distances.items(outputs.sides[OWN], outputs.sides[AGAINST], names, part)
        for figure, worst in WORST.items():
            row[figure] = distances.summary(row["by_item"], figure, worst)


def _problem(plan: Plan, component: str, number: int, total: int, side: str) -> str:
    policy = getattr(plan.precision, component)
    what = f"{component}, {label(policy)}: {number} of {total} items are not finite"
    return f"{what}; {_advice(plan, component, policy, side)}"


def _advice(plan: Plan, component: str, policy: Policy, side: str) -> str:
    half, _, text = plan.precision.preset.partition("-")
    if policy.compute == "fp32":
        return "look at its weights"
    if side == AGAINST:
        return "compare with --against fp32"
    if component in CAPTION_ENCODERS and half == policy.compute and not text:
        return f'try [precision] preset = "{half}-text-fp32"'
    if half == "fp16" and "bf16" in device.COMPUTES[plan.device]:
        return 'try [precision] preset = "bf16"'
    return f'try [precision.{component}] params = "fp32" and compute = "fp32"'


def as_json(report: Report) -> str:
    """Strict JSON: numbers that are not finite are null."""
    return json.dumps(_nulled(report), indent=2, allow_nan=False)


def _nulled(value):
    if isinstance(value, dict):
        return {key: _nulled(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_nulled(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
