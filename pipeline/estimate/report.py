"""What `preflight` found, for people, in 80 columns, and for programs."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.estimate.estimates import Estimate
from pipeline.estimate.subject import PUBLISHED
from pipeline.estimate.units import in_units

if TYPE_CHECKING:
    from pipeline.estimate.preflight import Disk, PlanEstimate, PlannedTraining

Figures = Mapping[str, Any]
"""A row of which some figures, which are numbers or None, are told by their names."""

WIDTH, NAME_WIDTH = 80, 23
UNBROKEN = "\N{NO-BREAK SPACE}"
ENCODERS_AS_COMPONENTS = {"EncodeCLIP": "text_encoder", "EncodeT5": "text_encoder_2", "EncodeImages": "vae"}
"""What the encoders are called in the JSON of a plan from configs alone, as they always were."""


def as_json(found: "PlanEstimate", by_component: bool = False) -> str:
    """by_component: see `ENCODERS_AS_COMPONENTS`."""
    if by_component:
        stages = {ENCODERS_AS_COMPONENTS.get(name, name): row for name, row in found["stages"].items()}
        found = found | {"stages": stages}
    return json.dumps(found, indent=2)


def as_table(found: "PlanEstimate") -> str:
    """Figures in "estimated" of a row are marked with ~."""
    parts = [
        _heading(found),
        _memory(found),
        _disk(found),
        _training(found["training"], found["devices_used"]),
        _room(found["disks"]),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _heading(found: "PlanEstimate") -> list[str]:
    model = found["model"]
    lines = [f"device {found['device']}, {in_units(found['training']['memory_bytes'])}{_number_of_npus(found)}"]
    lines[0] += f"; precision {found['preset']}"
    where = "" if model["is_here"] else ", to be downloaded" if model["download_bytes"] else ", not here"
    published = "" if model["is_here"] else f" in {PUBLISHED}"
    lines += _wrapped(f"model: {model['name']}; {in_units(model['weights_bytes'])} of weights{published}{where}")
    for note in found["notes"]:
        lines += _wrapped(note, indent="  ")
    return [*lines, "~ is estimated, all else is counted"]


def _number_of_npus(found: "PlanEstimate") -> str:
    here, used = found["devices_here"], found["devices_used"]
    if here is None:
        return ""
    verb = "is used" if used == 1 else "are used"
    return f", {used} of {here} NPUs {verb}" if here else f", {used} NPU{'s' * (used > 1)} {verb}, none is here"


# --- memory -------------------------------------------------------------------------------------------------------


def _memory(found: "PlanEstimate") -> list[str]:
    """A row for each stage, in their order, and what to do where one does not fit."""
    stages, training = found["stages"], found["training"]
    encoders = {name: row for name, row in stages.items() if name.startswith("Encode")}
    rows: dict[str, Estimate] = {**encoders, training["stage"]: training, **stages}
    lines = [
        f"{'memory, of one device':<{NAME_WIDTH}}{'parameters':>15}{'weights':>11}{'peak':>11}{'host, loading':>15}"
    ]
    for name, row in rows.items():
        cells = f"{row['parameters']:>15,}{_cell(row, 'weights_bytes', 11)}{_cell(row, 'peak_bytes', 11)}"
        mark = "" if row["fits"] else "  !"
        lines.append(f"{name:<{NAME_WIDTH}}{cells}{_cell(row, 'host_loading_bytes', 15)}{mark}")
    for name, row in rows.items():
        lines += _wrapped(f"! {name}: {_too_much(row)}", indent="  ") if not row["fits"] else []
    return [*lines, *(_wrapped(_of_files(rows.values())) if found["device"] != "CPU" else ())]


def _of_files(rows: Iterable[Estimate]) -> str:
    most = max(row["files_bytes"] for row in rows)
    return f"While it loads, the host also holds pages of the files, {in_units(most)} at most, and can take them back."


def _too_much(row: Estimate) -> str:
    advice, enough = row["advice"], in_units(row["memory_bytes"])
    assert advice is not None
    settings = [each.replace(" ", UNBROKEN) for each in advice["settings"]]
    if not settings:
        return f"too much for {enough}, whatever is set; it takes a device with more memory"
    several, peak = " and ".join(settings), in_units(advice["peak_bytes"])
    if advice["fits"]:
        return f"too much for {enough}; with {several} it takes ~{peak}"
    return f"too much for {enough}, and ~{peak} even with {several}; it takes a device with more memory"


# --- disk ---------------------------------------------------------------------------------------------------------


def _disk(found: "PlanEstimate") -> list[str]:
    lines = [f"{'disk':<{NAME_WIDTH}}{'items':>11}{'missing':>11}{'each':>11}{'to the store':>14}{'to runs':>10}"]
    for name, row in found["stages"].items():
        cells = [_number(row, "items"), _number(row, "missing"), _cell(row, "item_bytes", 11)]
        cells += [_cell(row, "store_bytes", 14), _cell(row, "runs_bytes", 10) if "runs_bytes" in row else ""]
        lines.append(f"{name:<{NAME_WIDTH}}{''.join(cells)}")
    return lines


def _room(disks: "list[Disk]") -> list[str]:
    lines = []
    for disk in disks:
        least = "" if disk["is_complete"] else "at least "
        few = "" if disk["fits"] else ": too little"
        lines += _wrapped(f"{' and '.join(disk['folders'])}:")
        lines += [
            f"  {least}{_cell(disk, 'needed_bytes')} will be written, {in_units(disk['free_bytes'])} are free{few}"
        ]
    return lines


# --- training -----------------------------------------------------------------------------------------------------


def _training(own: "PlannedTraining", num_ranks: int) -> list[str]:
    """What a training keeps, part by part; of several ranks, one of them."""
    done = ", which is done" if own.get("is_done") else ""
    mode = "compiled" if own["mode"] == "jit" else "in PyNative"
    other = "without" if own["activations_bytes"] == own["activations_with_checkpointing_bytes"] else "with"
    besides = {"activations": f"; {other} checkpointing {_cell(own, f'activations_{other}_checkpointing_bytes')}"}
    parts = ("weights", "gradients", "optimizer", "activations", "checkpoints", "result")
    each = f", on each of {num_ranks} ranks" if num_ranks > 1 else ""
    lines = [f"training a {own['label']}{done}; steps {mode}{each}:"]
    lines += [f"  {'trained':<14}{own['trained_parameters']:>16,} of {own['parameters']:,} parameters"]
    lines += [f"  {'batches':<14}{_number(own, 'num_shapes', 16)} {'size' if own['num_shapes'] == 1 else 'sizes'}"]
    return lines + [f"  {part:<14}{_cell(own, f'{part}_bytes', 16)}{besides.get(part, '')}" for part in parts]


# --- cells --------------------------------------------------------------------------------------------------------


def _cell(row: Figures, key: str, width: int = 0) -> str:
    text = "?" if row[key] is None else in_units(row[key])
    return f"{_mark(row, key)}{text}".rjust(width)


def _number(row: Figures, key: str, width: int = 11) -> str:
    text = "?" if row[key] is None else f"{row[key]:,}"
    return f"{_mark(row, key)}{text}".rjust(width)


def _mark(row: Figures, key: str) -> str:
    return "~" if key in row["estimated"] and row[key] else ""


def _wrapped(text: str, indent: str = "") -> list[str]:
    """The lines of a text; no line ends between a number and its unit, or where the text has UNBROKEN."""
    text = re.sub(r"(?<=\d) (?=[kMGT]?B\b)", UNBROKEN, text)
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace(UNBROKEN, " ") for line in lines]
