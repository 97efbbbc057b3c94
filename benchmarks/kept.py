"""`kept.json`: the figures that later runs are compared with, one table for each kind of machine."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.measurements import Measurement

PATH = Path(__file__).with_name("kept.json")
TIMES = 1.25
ONE_ROUND_TIMES = 1.5
"""By how much a ratio has to differ to count; and one of a single round, whose spread nobody knows."""

Found = dict[Measurement, list[Figure]]


@dataclass(frozen=True)
class Kept:
    """The table that a run is compared with.  machine: as `machine.machine` gives it."""

    machine: dict
    measurements: dict
    is_same_kind: bool

    def figure(self, measurement: Measurement, name: str) -> Figure | None:
        """None where it was not kept, or measured with other sizes."""
        row = self.measurements.get(measurement.name, {})
        if row.get("sizes") != _plain(measurement.sizes) or name not in row["figures"]:
            return None
        return Figure(name, **row["figures"][name])


def read(path: Path, kind: str) -> Kept | None:
    """The table of this kind of machine, else the newest one of another; None where nothing is kept."""
    tables = _tables(path)
    if not tables:
        return None
    chosen = kind if kind in tables else max(tables, key=lambda name: tables[name]["machine"]["date"])
    table = tables[chosen]
    return Kept({"kind": chosen} | table["machine"], table["measurements"], chosen == kind)


def keep(path: Path, machine: dict, found: Found) -> None:
    """Put what was found in the place of the same measurements of this kind of machine; others stay."""
    tables = _tables(path)
    table = tables.setdefault(machine["kind"], {"measurements": {}})
    table["machine"] = {key: value for key, value in machine.items() if key != "kind"}
    for measurement, figures in found.items():
        rows = {figure.name: _short(asdict(figure)) for figure in figures}
        row = {"commit": machine["commit"], "sizes": _plain(measurement.sizes), "figures": rows}
        table["measurements"][measurement.name] = row
    text = json.dumps(tables, indent=1, sort_keys=True)
    path.write_text(re.sub(r"\{[^{}]*\}", lambda each: " ".join(each[0].split()), text) + "\n")  # a figure a line


def change(now: Figure, kept: Figure) -> str:
    """What to say of a figure: "slower", "faster", or nothing where the difference could be chance.

    The medians must differ by more than 1.25 times (1.5 times where one of them is of a single round), and the middle
    half of the rounds now must lie wholly on one side of the middle half of the rounds kept.
    """
    times = ONE_ROUND_TIMES if 1 in (now.rounds, kept.rounds) else TIMES
    if now.ratio > kept.ratio * times and now.low > kept.high:
        return "slower"
    if kept.ratio > now.ratio * times and kept.low > now.high:
        return "faster"
    return ""


def _tables(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _plain(sizes: dict) -> dict:
    """As JSON has them: lists for tuples."""
    return json.loads(json.dumps(sizes))


def _short(row: dict) -> dict:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
    return {key: value for key, value in rounded.items() if key != "name"}
