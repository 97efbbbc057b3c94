"""What a cheaper precision costs: an experiment's models under two policies, on a sample of its captions and photos.

One model a process, as in training; this one starts them, on one device or several, imports no MindSpore, and compares
what they have written.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cache import Entries, caption_item
from pipeline.data.indexing import IndexedPhoto
from pipeline.errors import UserError
from pipeline.plan.plan import Plan
from pipeline.process import children, several
from pipeline.settings.reading import load_experiment
from pipeline.settings.values import Preset
from pipeline.study import distances, figures
from pipeline.study.distances import Item
from pipeline.study.figures import Component, Report
from pipeline.study.subject import (
    AGAINST,
    CAPTION_ENCODERS,
    COMPONENTS,
    DECODED,
    ENCODERS,
    IMAGE_ENCODER,
    LOSSES,
    NETWORK,
    OWN,
    SIDES,
    Job,
    Tensors,
    evenly,
    is_same,
    label,
    plans_of,
)

WorstImage = tuple[Item, np.ndarray, np.ndarray]
"""Its row of the report; and its pixels in [0, 255], (3, height, width), from the reference's posterior and from
the experiment's own."""


@dataclass(frozen=True)
class Study:
    """report: all figures; see `figures`.

    worst_image: None where the VAE's policies are the same or nothing could be decoded.
    """

    report: Report
    worst_image: WorstImage | None = None

    @property
    def has_page(self) -> bool:
        """Whether anything was computed that a page can show."""
        return any(not row["same_policy"] for row in self.report["components"].values())


@dataclass(frozen=True)
class Outputs:
    """What a component has computed: by side, arrays by item.  names: of the items, for people."""

    sides: Mapping[str, Mapping[str, np.ndarray]]
    names: Mapping[str, str]

    @cached_property
    def not_finite(self) -> dict[str, dict[str, int]]:
        """By side: how many values are not finite, of the items that have any."""
        return {side: distances.not_finite(self.sides[side]) for side in SIDES}


def study(path: str, against: Preset, num_items: int, devices: Sequence[str] = ()) -> Study:
    """Compare the experiment in the file ``path`` with the same under the preset ``against``.

    devices: their numbers; as many models compute at a time, to the same figures.

    Raises UserError where the device cannot run either, before anything is computed; SystemExit where a child process
    has failed and said why.
    """
    experiment = load_experiment(path)
    with children.interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="precision-") as folder:
        plans = plans_of(experiment, against, Path(folder) / "store")
        photos = evenly(plans[OWN].photos, num_items)
        plans = {side: plan.of(photos) for side, plan in plans.items()}
        report = figures.heading(plans, num_items)
        if all(is_same(plans, component) for component in COMPONENTS):
            return Study(report)
        job = Job(path, against, photos, num_items, Path(folder))
        _run([_encoding(job, plans, component) for component in ENCODERS], plans, devices)
        encoded = {component: _encoded(job, plans, component) for component in ENCODERS}
        for component, outputs in encoded.items():
            figures.add_encoder(report, plans, component, outputs)
        _predict(job, plans, encoded, report, devices)
        return Study(report, _compare_decoded(job, report["components"][IMAGE_ENCODER], encoded[IMAGE_ENCODER]))


def _encoding(job: Job, plans: Mapping[str, Plan], component: str) -> list[Job]:
    """A component encodes the sample on both sides; once, where the policy is the same."""
    return [dataclasses.replace(job, component=component, side=side) for side in _sides(plans, component)]


def _sides(plans: Mapping[str, Plan], component: str) -> tuple[str, ...]:
    """That compute a component; the reference last, as its VAE decodes what both have encoded."""
    return (AGAINST,) if is_same(plans, component) else SIDES


def _encoded(job: Job, plans: Mapping[str, Plan], component: str) -> Outputs:
    sides = _sides(plans, component)
    items, texts, _ = plans[OWN].captions
    names = dict(zip(items, texts))
    if component == IMAGE_ENCODER:
        names = {photo.item: photo.name for photo in reversed(job.photos)}
    return Outputs({side: Tensors(job.output(side if side in sides else AGAINST, component)) for side in SIDES}, names)


def _run(chains: Sequence[Sequence[Job]], plans: Mapping[str, Plan], devices: Sequence[str]) -> None:
    """Have children compute all jobs; those of a chain one after another."""
    failed = several.run(chains, lambda job: ["precision-part", str(job.write())], devices)
    if failed is None:
        return
    job, code = failed
    if code > 0:
        raise SystemExit(1)  # it has said why
    policy = label(getattr(plans[job.side].precision, job.component))
    raise UserError(f"{job.component}, {policy}: {children.reason(code)}")


def _predict(
    job: Job, plans: Mapping[str, Plan], encoded: Mapping[str, Outputs], report: Report, devices: Sequence[str]
) -> None:
    """Have the transformer predict, from the reference's tensors where these are finite, and compare the losses.

    There are losses to compare where all that both sides have encoded is finite.
    """
    photos = _finite(job.photos, encoded, AGAINST)
    has_loss = len(photos) == len(_finite(job.photos, encoded, OWN)) == len(job.photos)
    same, own_inputs = is_same(plans, NETWORK), _own_inputs(plans)
    if not photos or (same and not has_loss):
        return
    for side in SIDES if has_loss else (AGAINST,):
        _store(plans[side], _finite(job.photos, encoded, side), encoded, side)
    job = dataclasses.replace(job, component=NETWORK, photos=photos)
    both = tuple(dict.fromkeys((AGAINST, own_inputs))) if has_loss else (AGAINST,)
    jobs = [dataclasses.replace(job, side=AGAINST, inputs=both if same else (AGAINST,))]
    jobs += [] if same else [dataclasses.replace(job, side=OWN, inputs=both)]
    _run([[each] for each in jobs], plans, devices)
    found = {side: Tensors(job.output(AGAINST if same else side)) for side in SIDES}
    names = {str(number): photos[number % len(photos)].name for number in range(job.pairs)}
    velocities = {side: {key: found[side][key] for key in names} for side in SIDES}
    figures.add_transformer(report, plans, Outputs(velocities, names))
    if has_loss:
        losses = found[OWN][f"{LOSSES} {own_inputs}"], found[AGAINST][f"{LOSSES} {AGAINST}"]
        report["loss"] = distances.change(*losses)


def _own_inputs(plans: Mapping[str, Plan]) -> str:
    """Whose tensors the own transformer trains on: the reference's, where all encoders have the same policy."""
    return AGAINST if all(is_same(plans, component) for component in ENCODERS) else OWN


def _finite(photos: Sequence[IndexedPhoto], encoded: Mapping[str, Outputs], side: str) -> list[IndexedPhoto]:
    """The photos of which all that a side has encoded is finite."""

    def is_finite(photo):
        item = caption_item(photo.caption)
        keys = dict.fromkeys(CAPTION_ENCODERS, item) | {IMAGE_ENCODER: photo.item}
        return not any(key in encoded[component].not_finite[side] for component, key in keys.items())

    return list(filter(is_finite, photos))


def _store(plan: Plan, photos: Sequence[IndexedPhoto], encoded: Mapping[str, Outputs], side: str) -> None:
    """Put into the study's own store what a training on the photos reads."""
    captions = tuple({caption_item(photo.caption) for photo in photos})
    needs = [(plan.entries_of(kind), component, captions) for component, kind in CAPTION_ENCODERS.items()]
    needs += [(need.entries, IMAGE_ENCODER, need.items) for need in plan.of(photos).image_needs]
    for entries, component, items in needs:
        _write(entries, encoded[component].sides[side], items)


def _write(entries: Entries, arrays: Mapping[str, np.ndarray], items: Sequence[str]) -> None:
    missing = entries.missing(items)  # with the same policy, both sides have the same entries
    with entries.writer() as writer:
        for item in missing:
            writer.write(item, arrays[item].astype(entries.layout.real))


def _compare_decoded(job: Job, row: Component, posteriors: Outputs) -> WorstImage | None:
    """Add to the VAE's figures those of the decoded pictures; returns the worst pair."""
    if row["same_policy"]:
        return None
    decoded = {side: Tensors(job.output(side, DECODED)) for side in SIDES}
    for item, key in zip(row["by_item"], posteriors.names):
        item["psnr_db"] = distances.psnr(decoded[OWN][key], decoded[AGAINST][key])
    row["psnr_db"] = distances.summary(row["by_item"], "psnr_db", min)
    known = [place for place, item in enumerate(row["by_item"]) if math.isfinite(item["psnr_db"])]
    if not known:
        return None
    place = min(known, key=lambda place: row["by_item"][place]["psnr_db"])
    key = list(posteriors.names)[place]
    return row["by_item"][place], decoded[AGAINST][key], decoded[OWN][key]
