"""The page of one run, and the page that compares several."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.terminal.words import duration, human_bytes
from pipeline.page import page
from pipeline.plan.run_folder import RunFolder
from pipeline.report import curves, gallery, origin, photos, work
from pipeline.report.run import Run, read_run
from pipeline.runs.differences import differing_settings, short_name

SCHEMA = 1
"""Bump when pages that exist should be made again."""

TEMPLATES = Path(__file__).parent


@dataclass(frozen=True)
class Figure:
    """A number that stands at the head of a page.  hint: what it is about, in a few words."""

    label: str
    value: str
    hint: str = ""


def report(paths: Sequence[Path]) -> str:
    """The page of a run's folder, or of several side by side.  Raises UserError where one is no run's folder."""
    runs = [read_run(path) for path in dict.fromkeys(Path(os.path.abspath(path.expanduser())) for path in paths)]
    return of_run(runs[0]) if len(runs) == 1 else of_several(runs)


def of_run(run: Run) -> str:
    plots, shown, data = curves.of_run(run), gallery.of_run(run), photos.of_run(run)
    stages, (preset, precision) = work.of_run(run), work.precision_of(run)
    return page.render(
        TEMPLATES / "run.html",
        title=run.name,
        made_from=inputs_digest(run.folder),
        run=run,
        status=status(run),
        figures=figures(run),
        gallery=shown,
        plots=[plot.spec() for plot in plots],
        figured=plots,
        data=data,
        preset=preset,
        precision=precision,
        stages=stages,
        total_seconds=sum(row.seconds for row in stages if not row.reused_from),
        changed=origin.changed(run),
        experiment_file=origin.experiment_file(run),
        commands=origin.commands(run),
        lineage=origin.lineage(run),
        missing=list(dict.fromkeys(run.missing)),
        **FORMATS,
    )


def of_several(runs: Sequence[Run]) -> str:
    named = dict(zip(labels(runs), runs))
    differing = origin.differing(differing_settings([run.known for run in runs]))
    lengths = {run.last_step for run in runs}
    are_lengths_of_one = set(differing) == {short_name("train.steps")} and len(lengths) == len(runs)
    ordered = dict(sorted(named.items(), key=lambda each: each[1].last_step)) if are_lengths_of_one else named
    plots = curves.of_several(named)
    missing = [f"{label}: {line}" for label, run in named.items() for line in dict.fromkeys(run.missing)]
    return page.render(
        TEMPLATES / "comparison.html",
        title=f"{len(runs)} runs",
        made_from=digest_of([run.folder for run in runs]),
        runs=named,
        rows={label: row(run) for label, run in named.items()},
        differing=differing,
        lineage=origin.differing([origin.lineage(run) for run in runs]),
        gallery=gallery.of_several(ordered, are_lengths_of_one),
        plots=[plot.spec() for plot in plots],
        figured=plots,
        missing=missing,
        **FORMATS,
    )


def labels(runs: Sequence[Run]) -> list[str]:
    """Short and different: the experiment's name where no two have the same, else the folder's."""
    names = [run.known.name for run in runs]
    if len(set(names)) == len(names):
        return _without_sweep(names)
    folders = [run.name for run in runs]
    return folders if len(set(folders)) == len(folders) else [str(run.folder.path) for run in runs]


def _without_sweep(names: list[str]) -> list[str]:
    """Names of one sweep, cat-rank=4,seed=1, without the experiment that all have before it: rank=4, seed=1."""
    starts = {name[: name.rfind("-", 0, name.find("=")) + 1] if "=" in name else "" for name in names}
    (start, *others) = starts
    return names if others or not start else [name.removeprefix(start).replace(",", ", ") for name in names]


def status(run: Run) -> str:
    """How far the training is, in words."""
    label, last = run.method.label, run.last_step
    if run.result is not None:
        return f"{label}, trained for {last:,} steps"
    asked, newest = run.known.steps, run.known.checkpoint
    reached = f"step {last:,}" + (f" of {asked:,}" if asked else "") if last else "no step logged"
    kept = f"newest checkpoint: step {newest:,}" if newest else "no checkpoint"
    return f"{label}, not finished: {reached}; {kept}"


def figures(run: Run) -> list[Figure]:
    result, found = run.result, []
    if run.measured:
        measured = run.measured
        change = f"{measured.before:.4g} → {measured.after:.4g}"
        hint = f"gain {measured.gain:.2g} ± {measured.standard_error:.1g} over {measured.pairs} fixed pairs"
        found.append(Figure("Loss before and after", change, hint))
    last = last_loss(run)
    if last is not None:
        found.append(Figure("Training loss at the end", f"{last:.4g}", "moving average"))
    if result and result.step_seconds is not None:
        waited = f"{result.data_wait_share:.1%} waiting for data" if result.data_wait_share is not None else ""
        found.append(Figure("A step", duration(result.step_seconds), waited))
    if result and result.trained_parameters is not None:
        found.append(Figure("Trained parameters", f"{result.trained_parameters:,}", result.mode))
    return found


def last_loss(run: Run) -> float | None:
    """The moving average of the training's loss after its last step."""
    losses = run.metrics["loss"]
    if not np.isfinite(losses).any():
        return None
    average = curves.smoothed(losses, curves.half_life(run.metrics))
    return float(average[np.isfinite(average)][-1])


def row(run: Run) -> dict[str, str]:
    """What a comparison says of a run."""
    record, measured, last = run.record(run.method.stages.train), run.measured, last_loss(run)
    result = run.result
    return {
        "trained to step": f"{run.last_step:,}" + ("" if result else ", not finished"),
        "training loss": "" if last is None else f"{last:.4g}",
        "loss after": f"{measured.after:.4g}" if measured else "",
        "gain": f"{measured.gain:.3g} ± {measured.standard_error:.1g}" if measured else "",
        "a step": duration(result.step_seconds) if result and result.step_seconds is not None else "",
        "training took": duration(record.seconds) if record else "",
        "memory": human_bytes(max(record.peak_memory_bytes.values())) if record and record.peak_memory_bytes else "",
        "trained parameters": f"{result.trained_parameters:,}" if result and result.trained_parameters else "",
    }


def inputs_digest(folder: RunFolder) -> str:
    """Of what a run's page was made from: when this changes, the page is made again."""
    found = hashlib.blake2b(f"{SCHEMA}".encode(), digest_size=16)
    for path in (folder.result, folder.samples_list, folder.loss):  # quick looks are gone once Sample is done
        content = path.read_bytes() if path.is_file() else b""
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


def digest_of(several: Sequence[RunFolder]) -> str:
    """As `inputs_digest`, of the page of one run or of several."""
    digests = [inputs_digest(folder) for folder in several]
    if len(digests) == 1:
        return digests[0]
    names = [f"{folder.path.name} {digest}\n" for folder, digest in zip(several, digests)]
    return hashlib.blake2b("".join(names).encode(), digest_size=16).hexdigest()


# --- how numbers are said -----------------------------------------------------------------------------------------


def size(number: int | None) -> str:
    return "" if number is None else human_bytes(number)


def when(text: str) -> str:
    """A record's time as people write it."""
    return text.replace("T", " ").removesuffix("Z") + (" UTC" if text.endswith("Z") else "")


FORMATS = {"duration": duration, "size": size, "when": when}
