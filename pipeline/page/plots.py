"""Plots of a page: what is drawn, as numbers; plots.js draws it with uPlot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MOST_POINTS = 2000
"""Of a line: about two for each pixel of a wide screen."""

DIGITS = 5
LOG_FROM = 100
"""How many times the least value the greatest is, at least, where an axis is logarithmic by itself."""

Kind = Literal["line", "faint", "dashed", "dots", "bars"]
"""How a line is drawn.  "bars": a histogram, a bar from each x to the next; the last x ends the last bar."""


@dataclass(frozen=True)
class Line:
    """xs, ys: as many numbers; a y that is not finite is a gap.  colour: a place in the page's palette."""

    label: str
    xs: Sequence[float] | np.ndarray
    ys: Sequence[float] | np.ndarray
    kind: Kind = "line"
    colour: int = 0

    def spec(self) -> dict:
        ys = [_rounded(y) for y in self.ys]
        return {
            "label": self.label,
            "kind": self.kind,
            "colour": self.colour,
            "xs": [_rounded(x, 9) for x in self.xs],
            "ys": ys,
        }


@dataclass(frozen=True)
class Plot:
    """name: unique in the page.  x_kind: "step" plots share a cursor.

    log_y: None, where the values say it: those of several decades are drawn on a logarithmic axis.
    """

    name: str
    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    x_kind: Literal["step", "number"] = "step"
    log_y: bool | None = False
    note: str = ""
    log_x: bool = False

    def spec(self) -> dict:
        log_y = self._spans_decades() if self.log_y is None else self.log_y
        return {
            "name": self.name,
            "title": self.title,
            "xLabel": self.x_label,
            "xKind": self.x_kind,
            "logX": self.log_x,
            "logY": log_y,
            "lines": [line.spec() for line in self.lines],
        }

    def _spans_decades(self) -> bool:
        known = np.concatenate([np.asarray(line.ys, float) for line in self.lines])
        known = known[np.isfinite(known)]
        return bool(len(known) and known.min() > 0 and known.max() >= LOG_FROM * known.min())


def _rounded(number: float, digits: int = DIGITS) -> float | int | None:
    if not math.isfinite(number):
        return None
    rounded = float(f"{number:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def decimated(values: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """The places of at most ``most`` values that show the same curve: the least and the greatest of each of even parts.

    No peak is lost.  The first and the last are among them; places of values that are not finite are not.
    """
    places = np.flatnonzero(np.isfinite(values))
    if len(places) <= most:
        return places
    parts = np.array_split(places[1:-1], (most - 2) // 2)
    ends = [part[[np.argmin(values[part]), np.argmax(values[part])]] for part in parts]
    return np.unique(np.concatenate([places[:1], *ends, places[-1:]]))


def smoothed(values: np.ndarray, half_life: float) -> np.ndarray:
    """The exponential moving average, (n,), corrected for its beginning as Adam's moments are; gaps are passed over.

    half_life: after how many values the weight of one has halved.
    """
    keep = 0.5 ** (1 / half_life)
    average, weight, found = 0.0, 0.0, np.full(len(values), np.nan)
    for place, value in enumerate(values):
        if math.isfinite(value):
            average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
            found[place] = average / weight
    return found
