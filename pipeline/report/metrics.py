"""What a training has said of its steps, as columns of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.runs.metrics_file import parsed

COLUMNS = "loss", "lr", "grad_norm", "step_seconds"
MOST_STEPS = 2**53


@dataclass(frozen=True)
class Metrics:
    """steps: (n,), int64, rising.  columns: (n,) float64 each, nan where a line has no number."""

    steps: np.ndarray
    columns: dict[str, np.ndarray]
    problems: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


def read_metrics(path: Path) -> Metrics:
    """Empty where there is no such file; lines that cannot be read are left out and counted."""
    problems: list[str] = []
    try:
        texts = path.read_text(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        texts = []
    except OSError as error:
        texts, problems = [], [f"{path.name}: cannot be read: {error.strerror}"]
    lines, damaged = _lines(texts)
    if damaged:
        problems.append(f"{path.name}: {damaged} of its {len(texts)} lines cannot be read and are left out")
    columns = {name: np.array([_number(line.get(name)) for line in lines], float) for name in COLUMNS}
    return Metrics(np.array([line["step"] for line in lines], np.int64), columns, problems)


def _number(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan  # type: ignore[arg-type]


def _lines(texts: Sequence[str]) -> tuple[list[Mapping], int]:
    """The lines whose steps rise, and how many others there are; a kill may have cut the last one short."""
    lines: list[Mapping] = []
    damaged = 0
    for number, text in enumerate(texts, start=1):
        line = parsed(text)
        if line is not None and (lines[-1]["step"] if lines else 0) < line["step"] < MOST_STEPS:
            lines.append(line)
        else:
            damaged += number < len(texts)
    return lines, damaged
