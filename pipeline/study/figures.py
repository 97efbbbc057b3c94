"""The figures of a study of two precisions: as a dict, as JSON, and as a table for people.  Imports no MindSpore."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from pipeline.devices import device
from pipeline.devices.precision import BYTES, Policy
from pipeline.estimate.units import in_units
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

LEGEND = """\
relative error: L2 norm of (own - reference) over that of the reference, of each item; the transformer's is of what both
predict from the reference's tensors.  PSNR: of the images that the reference's VAE decodes from both posteriors' means.
change of the loss: own - reference, each with its own tensors and transformer, same noise; above 0, own is worse."""


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
    """All figures of a study.  loss: None where none can be compared.  picture: the path of the picture, if any."""

    experiment: str
    device: str
    presets: dict[str, str]
    sample: Sample
    components: dict[str, Component]
    loss: distances.Change | None
    problems: list[str]
    picture: str | None


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
        "picture": None,
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


# --- for people ---------------------------------------------------------------------------------------------------


def as_table(report: Report) -> str:
    """All figures as text; names of captions and files are cut where they are long."""
    sample, presets, rows = report["sample"], report["presets"], report["components"]
    first = f"{report['experiment']} on {report['device']}: its own precision, {presets[OWN]}, beside the reference"
    counted = (
        f"{sample['captions']} captions, {sample['photos']} photos, {sample['pairs']} pairs of noise and noise level"
    )
    parts = [
        [f"{first}, {presets[AGAINST]}", counted],
        _aligned(_differences(rows)),
        _worst(report),
        _aligned(_bytes(rows)),
    ]
    return "\n\n".join("\n".join(part) for part in [*parts, report["problems"], [LEGEND], _picture(report)] if part)


def _picture(report: Report) -> list[str]:
    return [f"picture: {report['picture']}"] if report["picture"] else []


def _differences(rows: Mapping[str, Component]) -> list[list[str]]:
    heads = ["relative error, mean", "worst", "cosine, mean", "worst", "not finite, own", "reference"]
    lines = [["", "own", "reference", *heads]]
    for name, row in rows.items():
        figures = _mean_and_worst("{:.2e}", row.get("relative_error")) + _mean_and_worst("{:.8f}", row.get("cosine"))
        figures = ["same policy", "", "", ""] if row["same_policy"] else figures
        lines.append([name, *row["policies"].values(), *figures, *(_not_finite(row, side) for side in SIDES)])
    return lines


def _mean_and_worst(form: str, summary: distances.Summary | None) -> list[str]:
    return ["-", "-"] if summary is None else [_said(form, summary["mean"]), _said(form, summary["worst"])]


def _not_finite(row: Component, side: str) -> str:
    if "not_finite" not in row:
        return "-"
    found = row["not_finite"][side]
    return f"{found['values']:,} in {found['items']} of {row['items']}" if found["items"] else f"0 of {row['items']}"


def _worst(report: Report) -> list[str]:
    """Where each component is worst, the decoded images, and the loss."""
    lines = []
    for name, row in report["components"].items():
        error = row.get("relative_error")
        if error and error["worst_item"] is not None:
            lines.append([name, f"worst at {short(error['worst_item'])}"])
    psnr, loss = report["components"][IMAGE_ENCODER].get("psnr_db"), report["loss"]
    if psnr and psnr["worst_item"] is not None:
        worst = f"{psnr['worst']:.1f} dB at {short(psnr['worst_item'])}"
        lines.append(["decoded images", f"PSNR {psnr['mean']:.1f} dB in the mean, worst {worst}"])
    if loss:
        deviation = _said("{:.1e}", loss["standard_error"])
        change = f"changes by {loss['change']:+.2e}, standard error {deviation} ({loss['pairs']} pairs)"
        lines.append(["training loss", f"{loss['against']:.5f} with the reference, {loss['own']:.5f} own: {change}"])
    elif report["problems"]:
        lines.append(["training loss", "none, as not everything is finite"])
    return _aligned(lines)


def _bytes(rows: Mapping[str, Component]) -> list[list[str]]:
    lines = [["", "weights, own", "reference", "saved", "a stored item, own", "reference", "saved"]]
    for name, row in rows.items():
        pairs = row["weights_bytes"], row.get("item_bytes")
        lines.append([name, *(cell for pair in pairs for cell in _saved(pair))])
    return lines


def _saved(pair: dict[str, int] | None) -> list[str]:
    if pair is None:
        return ["-"] * 3
    saved = pair[AGAINST] - pair[OWN]
    return [*(in_units(pair[side]) for side in SIDES), "-" * (saved < 0) + in_units(abs(saved))]


def _said(form: str, number: float | None) -> str:
    return "-" if number is None else form.format(number)


def short(text: str, length: int = 60) -> str:
    """A caption or a file's name, cut inside where it is longer: files differ at the end."""
    text = text or "(the empty caption)"
    return text if len(text) <= length else text[: length - 23] + "..." + text[-20:]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
