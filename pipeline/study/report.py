"""What a study has found, for people: first what the cheaper precision costs and saves, then the figures."""

from collections.abc import Iterator
from pathlib import Path

from cache.terminal.output import bad, good, quiet, warning
from cache.terminal.places import shown
from cache.terminal.table import Table
from cache.terminal.words import human_bytes
from pipeline.study import distances
from pipeline.study.figures import Component, Report
from pipeline.study.subject import AGAINST, IMAGE_ENCODER, OWN, SIDES

Part = str | Table

CLEAR = 2
"""A change of the loss of fewer standard errors is none that the sample shows."""

LEGEND = (
    "relative error: L2 norm of (own - reference) over that of the reference, of each item; the transformer's is of "
    "what both predict from the reference's tensors",
    "PSNR: of the images that the reference's VAE decodes from both posteriors' means",
    "change of the loss: own - reference, each with its own tensors and transformer, same noise; above 0, own is worse",
)


def parts(report: Report) -> Iterator[Part]:
    """Lines and tables to be shown; names of captions and files are cut where they are long."""
    sample, presets = report["sample"], report["presets"]
    beside = f"{presets[OWN]} (own) beside {presets[AGAINST]} (the reference)"
    yield f"{report['experiment']} on {report['device']}: {beside}"
    yield f"{sample['captions']} captions, {sample['photos']} photos, {sample['pairs']} pairs of noise and noise level"
    yield ""
    yield from verdict(report)
    for table in tables(report):
        yield ""
        yield table
    yield ""
    yield from map(quiet, LEGEND)
    if report["page"]:
        yield f"page: {shown(Path(report['page']))}"


def tables(report: Report) -> Iterator[Table]:
    """The figures: how far both sides are apart, where most, and the bytes that are saved."""
    rows = report["components"]
    columns = "precision", "own", "reference", ">error, mean", ">worst", ">cosine, worst"
    yield Table(columns, [_difference(name, row) for name, row in rows.items()])
    if worst := list(_worst(report)):
        yield Table(["worst at", ""], worst)
    taken = "bytes", ">weights, own", ">reference", ">saved", ">item, own", ">reference", ">saved"
    yield Table(taken, [_bytes(name, row) for name, row in rows.items()])


# --- the answer ---------------------------------------------------------------------------------------------------


def verdict(report: Report) -> Iterator[str]:
    """What the cheaper precision costs and saves, in lines."""
    rows = report["components"].values()
    if all(row["same_policy"] for row in rows):
        yield good("nothing to compare: each component is computed alike on both sides")
    elif report["problems"]:
        yield from map(bad, report["problems"])
        yield "training loss: none, as not everything is finite"
    else:
        yield good("everything stays finite")
    if loss := report["loss"]:
        yield from _loss(loss)
    saved = sum(row["weights_bytes"][AGAINST] - row["weights_bytes"][OWN] for row in rows)
    own = sum(row["weights_bytes"][OWN] for row in rows)
    yield f"weights of all models: {human_bytes(own)}, {_signed(saved)} saved"


def _loss(loss: distances.Change) -> Iterator[str]:
    error = loss["standard_error"]
    change = f"changes by {loss['change']:+.2e}, standard error {_said('{:.1e}', error)} ({loss['pairs']} pairs)"
    yield f"training loss: {loss['against']:.5f} with the reference, {loss['own']:.5f} own: {change}"
    if error is not None and abs(loss["change"]) > CLEAR * error:
        yield warning("  that is a clear change" if loss["change"] > 0 else "  that is a clear change, to the better")
    elif error is not None:
        yield good("  that is no change that so many pairs show")


# --- the tables ---------------------------------------------------------------------------------------------------


def _difference(name: str, row: Component) -> tuple[str, ...]:
    if row["same_policy"]:
        return name, *row["policies"].values(), "same policy", "", ""
    error, cosine = row.get("relative_error"), row.get("cosine")
    figures = [_said("{:.2e}", error and error["mean"]), _said("{:.2e}", error and error["worst"])]
    return name, *row["policies"].values(), *figures, _said("{:.8f}", cosine and cosine["worst"])


def _worst(report: Report) -> Iterator[tuple[str, str]]:
    """Where each component is worst, and the decoded images."""
    for name, row in report["components"].items():
        error = row.get("relative_error")
        if error and error["worst_item"] is not None:
            yield name, short(error["worst_item"])
    psnr = report["components"][IMAGE_ENCODER].get("psnr_db")
    if psnr and psnr["worst_item"] is not None:
        yield (
            "decoded images",
            f"{short(psnr['worst_item'])}, PSNR {psnr['worst']:.1f} dB; {psnr['mean']:.1f} dB in the mean",
        )


def _bytes(name: str, row: Component) -> tuple[str, ...]:
    pairs = row["weights_bytes"], row.get("item_bytes")
    return name, *(cell for pair in pairs for cell in _saved(pair))


def _saved(pair: dict[str, int] | None) -> list[str]:
    if pair is None:
        return ["-"] * 3
    return [*(human_bytes(pair[side]) for side in SIDES), _signed(pair[AGAINST] - pair[OWN])]


def _signed(number: int) -> str:
    return "-" * (number < 0) + human_bytes(abs(number))


def _said(form: str, number: float | None) -> str:
    return "-" if number is None else form.format(number)


def short(text: str, length: int = 60) -> str:
    """A caption or a file's name, cut inside where it is longer: files differ at the end."""
    text = text or "(the empty caption)"
    return text if len(text) <= length else text[: length - 23] + "..." + text[-20:]
