"""A study of two precisions as one HTML page: how the items' errors are spread, all figures, and the image that differs
most."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.page import page
from pipeline.page.pictures import Embedded, embedded
from pipeline.page.plots import Line, Plot
from pipeline.study import report
from pipeline.study.figures import Component
from pipeline.study.study import Study, WorstImage
from pipeline.study.subject import AGAINST, IMAGE_ENCODER, OWN

TEMPLATE = Path(__file__).with_name("study.html")
BINS_A_DECADE = 12
SIDE = 512
"""The longest side of an image on the page, in pixels."""


@dataclass(frozen=True)
class Tile:
    label: str
    picture: Embedded


def save(study: Study, path: Path) -> None:
    page.save(path, of_study(study))


def of_study(study: Study) -> str:
    found, rows = study.report, study.report["components"]
    plots = list(histograms(rows))
    return page.render(
        TEMPLATE,
        title=f"{found['experiment']}: precision",
        made_from="",
        found=found,
        headline=f"{found['presets'][OWN]} (own) beside {found['presets'][AGAINST]} (the reference)",
        verdict=list(report.verdict(found)),
        plots=[plot.spec() for plot in plots],
        figured=plots,
        undrawn=list(_undrawn(rows)),
        tables=list(report.tables(found)),
        worst=study.worst_image and report.short(study.worst_image[0]["item"], 90),
        tiles=list(_tiles(rows[IMAGE_ENCODER]["policies"], study.worst_image)) if study.worst_image else [],
        legend=report.LEGEND,
    )


def histograms(rows: Mapping[str, Component]) -> Iterator[Plot]:
    """A histogram of the errors of each component that has any, all over the same decades."""
    errors = {name: _errors(row) for name, row in rows.items()}
    limits = _limits(np.concatenate(list(errors.values())))
    for name, found in errors.items():
        if len(found):
            policies = rows[name]["policies"]
            title = f"{name}, {rows[name]['compared']}: {policies[OWN]} beside {policies[AGAINST]}"
            bars = _bars(found, limits)
            yield Plot(name, title, [bars], "relative error", "number", note=_left_out(rows[name]), log_x=True)


def _errors(row: Component) -> np.ndarray:
    """log10 of the errors that have one."""
    errors = [item["relative_error"] for item in row.get("by_item", ())]
    return np.log10([error for error in errors if math.isfinite(error) and error > 0])


def _limits(errors: np.ndarray) -> tuple[int, int]:
    """The decades that hold all errors."""
    if not len(errors):
        return -4, -2
    low, high = math.floor(errors.min()), math.ceil(errors.max())
    return low, max(high, low + 1)


def _bars(errors: np.ndarray, limits: tuple[int, int]) -> Line:
    """How many items are in each bin, by the bin's lower edge; the last edge has none."""
    counts, edges = np.histogram(errors, bins=(limits[1] - limits[0]) * BINS_A_DECADE, range=limits)
    return Line("items", 10**edges, [*counts, 0], "bars")


def _left_out(row: Component) -> str:
    """Which items have no bar, in words; "" where all have one."""
    items, drawn = row.get("by_item", ()), len(_errors(row))
    equal = sum(item["relative_error"] == 0 for item in items)
    others = {"equal": equal, "not finite": len(items) - drawn - equal}
    said = ", ".join(f"{count} {what}" for what, count in others.items() if count)
    return f"of {len(items)} items not drawn: {said}" if said else ""


def _undrawn(rows: Mapping[str, Component]) -> Iterator[str]:
    for name, row in rows.items():
        if not len(_errors(row)):
            why = "the same policy on both sides" if row["same_policy"] else _left_out(row) or "nothing to compare"
            yield f"{name}: {why}"


def _tiles(policies: Mapping[str, str], worst: WorstImage) -> Iterator[Tile]:
    """The image that differs most, decoded from both posteriors, and the difference."""
    row, reference, own = worst
    factor = amplification(own - reference)
    for label, pixels in {
        f"encoded in {policies[AGAINST]}, the reference": reference,
        f"encoded in {policies[OWN]}, PSNR {row['psnr_db']:.1f} dB": own,
        f"the difference x {factor:,}; grey is none": 128 + factor * (own - reference),
    }.items():
        image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(1, 2, 0))
        yield Tile(label, embedded(image, SIDE))


def amplification(difference: np.ndarray) -> int:
    """The largest of 1, 2, 5, 10, 20, ... that keeps the difference within 127 of grey."""
    largest = float(np.abs(difference).max())
    steps = [step * 10**power for power in range(8) for step in (1, 2, 5)]
    return max([step for step in steps if step * largest <= 127], default=1)
