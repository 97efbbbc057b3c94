"""How far the numbers of one precision lie from those of another.  NumPy alone, in float64."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

import numpy as np

PEAK = 255.0
"""Of pixels."""

Figure = Literal["relative_error", "cosine", "psnr_db"]


class Item(TypedDict):
    """How far both sides are apart at one item, by its name.  psnr_db: of decoded images."""

    item: str
    relative_error: float
    cosine: float
    psnr_db: NotRequired[float]


class Summary(TypedDict):
    """Of one figure over all items where it is finite; None without any."""

    mean: float | None
    worst: float | None
    worst_item: str | None


class Change(TypedDict):
    """Means of paired losses, and of their difference, own - against; above 0, own is worse.

    standard_error: None of a single pair.
    """

    pairs: int
    own: float
    against: float
    change: float
    standard_error: float | None


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """The L2 norm of the difference over that of the reference.

    nan where either has a value that is not finite, and where a reference of zeros is missed.
    """
    found, reference = found.astype(np.float64), reference.astype(np.float64)
    if not _are_finite(found, reference):
        return math.nan
    difference, size = np.linalg.norm(found - reference), np.linalg.norm(reference)
    if not difference:
        return 0.0
    return float(difference / size) if size else math.nan


def cosine(found: np.ndarray, reference: np.ndarray) -> float:
    """The cosine of the angle between both as vectors; nan where either is not finite or all zeros."""
    found, reference = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not _are_finite(found, reference) or not found.any() or not reference.any():
        return math.nan
    return float(found @ reference / (np.linalg.norm(found) * np.linalg.norm(reference)))


def psnr(found: np.ndarray, reference: np.ndarray) -> float:
    """The peak signal-to-noise ratio of pixels in [0, 255], in dB: infinite where equal, nan where not finite."""
    found, reference = found.astype(np.float64), reference.astype(np.float64)
    if not _are_finite(found, reference):
        return math.nan
    error = np.square(found - reference).mean()
    return float(10 * np.log10(PEAK**2 / error)) if error else math.inf


def not_finite(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many values of each array are infinite or not a number, of the arrays that have any."""
    counts = {name: int(np.count_nonzero(~np.isfinite(array))) for name, array in arrays.items()}
    return {name: count for name, count in counts.items() if count}


def items(found: Mapping, reference: Mapping, names: Mapping, part: Callable = lambda array: array) -> list[Item]:
    """Error and cosine of ``part`` of each item, and its name; both mappings have the same keys."""
    rows: list[Item] = []
    for key, name in names.items():
        pair = part(found[key]), part(reference[key])
        rows.append({"item": name, "relative_error": relative_error(*pair), "cosine": cosine(*pair)})
    return rows


def summary(rows: Sequence[Item], figure: Figure, worst: Callable[..., int]) -> Summary:
    """Mean and worst of a figure over the items where it is finite, and the item where it is worst; None without any.

    worst: ``max`` of what should be small, ``min`` of what should be large.
    """
    known = {number: row[figure] for number, row in enumerate(rows) if math.isfinite(row[figure])}
    if not known:
        return {"mean": None, "worst": None, "worst_item": None}
    place = worst(known, key=known.__getitem__)
    return {"mean": float(np.mean(list(known.values()))), "worst": known[place], "worst_item": rows[place]["item"]}


def change(own: np.ndarray, against: np.ndarray) -> Change | None:
    """How paired losses differ; None where any is not finite."""
    own, against = own.astype(np.float64), against.astype(np.float64)
    if not len(own) or not _are_finite(own, against):
        return None
    difference = own - against
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else None
    return {
        "pairs": len(own),
        "own": float(own.mean()),
        "against": float(against.mean()),
        "change": float(difference.mean()),
        "standard_error": error,
    }


def _are_finite(*arrays: np.ndarray) -> bool:
    return all(np.isfinite(array).all() for array in arrays)
