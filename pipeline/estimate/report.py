"""What `preflight` found: for people, the answer first and then the figures; and for programs."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cache.terminal.output import bad, good, quiet, warning
from cache.terminal.places import shown
from cache.terminal.table import Table
from cache.terminal.words import human_bytes
from pipeline.estimate.estimates import Estimate
from pipeline.estimate.subject import PUBLISHED
from pipeline.plan import prior

if TYPE_CHECKING:
    from pipeline.estimate.preflight import Disk, PlanEstimate, PlannedTraining

Part = str | Table
Figures = Mapping[str, Any]
"""A row of which some figures, which are numbers or None, are told by their names."""

ENCODERS_AS_COMPONENTS = {"EncodeCLIP": "text_encoder", "EncodeT5": "text_encoder_2", "EncodeImages": "vae"}
"""What the encoders are called in the JSON of a plan from configs alone, as they always were."""


def as_json(found: "PlanEstimate", by_component: bool = False) -> str:
    """by_component: see `ENCODERS_AS_COMPONENTS`."""
    if by_component:
        stages = {ENCODERS_AS_COMPONENTS.get(name, name): row for name, row in found["stages"].items()}
        found = found | {"stages": stages}
    return json.dumps(found, indent=2)


def parts(found: "PlanEstimate") -> Iterator[Part]:
    """Lines and tables to be shown.  Figures in "estimated" of a row are marked with ~."""
    yield from _verdict(found)
    yield ""
    yield from _heading(found)
    for section in (_memory(found), _disk(found), _training(found["training"], found["devices_used"])):
        yield ""
        yield from section


# --- the answer ---------------------------------------------------------------------------------------------------


def _verdict(found: "PlanEstimate") -> Iterator[Part]:
    """Whether devices and disks have room, and what to change where they have not."""
    rows = _rows(found)
    too_large = {name: row for name, row in rows.items() if not row["fits"]}
    for name, row in too_large.items():
        yield bad(
            f"does not fit: {name} takes {_cell(row, 'peak_bytes')}, one device has {human_bytes(row['memory_bytes'])}"
        )
        yield warning(f"  {_change(row)}")
    if not too_large:
        name, row = max(rows.items(), key=lambda each: each[1]["peak_bytes"])
        most = f"{name} takes the most, {_cell(row, 'peak_bytes')} of {human_bytes(row['memory_bytes'])}"
        yield good(f"fits one device: {most}")
    yield from map(_room, found["disks"])


def _change(row: Estimate) -> str:
    advice = row["advice"]
    assert advice is not None
    larger = "it takes a device with more memory"
    if not advice["settings"]:
        return f"no setting changes that: {larger}"
    settings, peak = " and ".join(advice["settings"]), human_bytes(advice["peak_bytes"])
    return f"set {settings}: ~{peak}" if advice["fits"] else f"~{peak} even with {settings}: {larger}"


def _room(disk: "Disk") -> Part:
    least = "" if disk["is_complete"] else "at least "
    fits, mark = ("fits", good) if disk["fits"] else ("does not fit", bad)
    needed, free = f"{least}{_cell(disk, 'needed_bytes')}", human_bytes(disk["free_bytes"])
    return mark(f"{fits} the disk: {needed} for {', '.join(map(shown, disk['folders']))}; {free} are free")


# --- what it is about ---------------------------------------------------------------------------------------------


def _heading(found: "PlanEstimate") -> Iterator[Part]:
    model = found["model"]
    where = "" if model["is_here"] else ", to be downloaded" if model["download_bytes"] else ", not here"
    published = "" if model["is_here"] else f" in {PUBLISHED}"
    weights = f"{human_bytes(model['weights_bytes'])} of weights{published}{where}"
    device = f"{found['device']}, {human_bytes(found['training']['memory_bytes'])}{_number_of_npus(found)}"
    yield Table(
        ["", ""], [("device", device), ("precision", found["preset"]), ("model", f"{model['name']}, {weights}")]
    )
    yield from found["notes"]
    yield quiet("~ is estimated, all else is counted")


def _number_of_npus(found: "PlanEstimate") -> str:
    here, used = found["devices_here"], found["devices_used"]
    if here is None:
        return ""
    verb = "is used" if used == 1 else "are used"
    return f", {used} of {here} NPUs {verb}" if here else f", {used} NPU{'s' * (used > 1)} {verb}, none is here"


# --- memory -------------------------------------------------------------------------------------------------------


def _rows(found: "PlanEstimate") -> dict[str, Estimate]:
    """What each stage takes, in their order."""
    stages, training = found["stages"], found["training"]
    before = {name: row for name, row in stages.items() if name.startswith("Encode") or name == prior.STAGE}
    return {**before, training["stage"]: training, **stages}


def _memory(found: "PlanEstimate") -> Iterator[Part]:
    rows = _rows(found)
    columns = "memory of one device", ">parameters", ">weights", ">peak", ">loading", "fits"
    yield Table(columns, [_memory_row(name, row) for name, row in rows.items()])
    more = f"; besides, {_of_files(rows.values())}" if found["device"] != "CPU" else ""
    yield quiet(f"loading: what the host needs while it loads the weights{more}")
    if found["ranks_host_bytes"] is not None:
        yield quiet(_of_ranks(found))


def _memory_row(name: str, row: Estimate) -> tuple[str, ...]:
    peak, fits = _cell(row, "peak_bytes"), row["fits"]
    figures = f"{row['parameters']:,}", _cell(row, "weights_bytes"), peak if fits else bad(peak)
    return name, *figures, _cell(row, "host_loading_bytes"), good("yes") if fits else bad("NO")


def _of_ranks(found: "PlanEstimate") -> str:
    """What a host takes that has all ranks."""
    assert found["ranks_host_bytes"] is not None
    many, least = f"{found['devices_used']} ranks", human_bytes(found["ranks_host_bytes"])
    if found["device"] == "CPU":
        return f"{many} on one host take ~{least} of its memory: each its own, the mapped weights once"
    return f"{many} on one host take up to ~{least} of its memory while they load, besides the pages of the files"


def _of_files(rows: Iterable[Estimate]) -> str:
    most = max(row["files_bytes"] for row in rows)
    return f"it then holds pages of the files, {human_bytes(most)} at most, which it can take back"


# --- disk ---------------------------------------------------------------------------------------------------------


def _disk(found: "PlanEstimate") -> Iterator[Part]:
    rows = []
    for name, row in found["stages"].items():
        cells = _number(row, "items"), _number(row, "missing"), _cell(row, "item_bytes"), _cell(row, "store_bytes")
        rows.append((name, *cells, _cell(row, "runs_bytes") if "runs_bytes" in row else ""))
    yield Table(["disk", ">items", ">missing", ">each", ">to the store", ">to runs"], rows, hides=[">to runs"])


# --- training -----------------------------------------------------------------------------------------------------


def _training(own: "PlannedTraining", num_ranks: int) -> Iterator[Part]:
    """What a training keeps, part by part; of several ranks, one of them."""
    done = ", which is done" if own.get("is_done") else ""
    each = f", on each of {num_ranks} ranks" if num_ranks > 1 else ""
    yield f"training a {own['label']}{done}; steps {'compiled' if own['mode'] == 'jit' else 'in PyNative'}{each}:"
    if own["first_step"]:
        yield f"  the first step of each size of batch: {own['first_step']}"
    other = "without" if own["activations_bytes"] == own["activations_with_checkpointing_bytes"] else "with"
    besides = {"activations": f"{other} checkpointing {_cell(own, f'activations_{other}_checkpointing_bytes')}"}
    names = ("weights", "gradients", "optimizer", "activations", "checkpoints", "result")
    yield Table(
        ["", ">", ""],
        [
            ("  trained", f"{own['trained_parameters']:,}", f"of {own['parameters']:,} parameters"),
            ("  batches", _number(own, "num_shapes"), "size" if own["num_shapes"] == 1 else "sizes"),
            *((f"  {name}", _cell(own, f"{name}_bytes"), besides.get(name, "")) for name in names),
        ],
    )


# --- cells --------------------------------------------------------------------------------------------------------


def _cell(row: Figures, key: str) -> str:
    return f"{_mark(row, key)}{'?' if row[key] is None else human_bytes(row[key])}"


def _number(row: Figures, key: str) -> str:
    return f"{_mark(row, key)}{'?' if row[key] is None else f'{row[key]:,}'}"


def _mark(row: Figures, key: str) -> str:
    return "~" if key in row["estimated"] and row[key] else ""
