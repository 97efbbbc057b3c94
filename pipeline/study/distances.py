"""How far the numbers of one precision lie from those of another.  NumPy alone, in float64."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

PEAK = 255.0
"""Of pixels."""


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


def items(found: Mapping, reference: Mapping, names: Mapping, part: Callable = lambda array: array) -> list[dict]:
    """Error and cosine of ``part`` of each item, and its name; both mappings have the same keys."""
    rows = []
    for key, name in names.items():
        pair = part(found[key]), part(reference[key])
        rows.append({"item": name, "relative_error": relative_error(*pair), "cosine": cosine(*pair)})
    return rows


def summary(rows: Sequence[dict], figure: str, worst: Callable[..., int]) -> dict:
    """Mean and worst of a figure over the items where it is finite, and the item where it is worst; None without any.

    worst: ``max`` of what should be small, ``min`` of what should be large.
    """
    known = {number: row[figure] for number, row in enumerate(rows) if math.isfinite(row[figure])}
    if not known:
        return {"mean": None, "worst": None, "worst_item": None}
    place = worst(known, key=known.__getitem__)
    return {"mean": float(np.mean(list(known.values()))), "worst": known[place], "worst_item": rows[place]["item"]}


def change(own: np.ndarray, against: np.ndarray) -> dict | None:
    """Means of paired losses, and mean and standard error of their difference, own - against; above 0, own is worse.

    None where any is not finite.  The standard error of a single pair is None.
    """
    own, against = own.astype(np.float64), against.astype(np.float64)
    if not len(own) or not _are_finite(own, against):
        return None
    difference = own - against
    error = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else None
    means = {"own": float(own.mean()), "against": float(against.mean())}
    return {"pairs": len(own), **means, "change": float(difference.mean()), "standard_error": error}


def _are_finite(*arrays: np.ndarray) -> bool:
    return all(np.isfinite(array).all() for array in arrays)
