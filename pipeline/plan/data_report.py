"""What CheckData finds, in lines and tables for people and as JSON for programs; imports no MindSpore."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from cache.terminal.output import Marked, quiet, warning
from cache.terminal.places import shown
from cache.terminal.table import Table
from cache.terminal.words import count
from pipeline.data import findings
from pipeline.data.findings import Finding
from pipeline.data.indexing import IndexedPhoto
from pipeline.errors import UserError
from pipeline.flux import pretrained
from pipeline.plan import caption_lengths
from pipeline.plan.families import family_of
from pipeline.settings.experiment import Experiment

SHOWN = 3
"""Photos of each kind in a table."""

CUT_LATER = "captions that may be cut", "?", "", "known after GetModel, before anything is encoded"


@dataclass(frozen=True)
class DataReport:
    """are_tokens_counted: whether the model's tokenizers are here, or no caption is long enough to need them."""

    images: str
    num_photos: int
    num_captions: int
    are_tokens_counted: bool
    findings: list[Finding]


def of(experiment: Experiment, photos: Sequence[IndexedPhoto], with_tokens: bool = True) -> DataReport:
    """What will happen to the photos and captions of an experiment.

    with_tokens: whether captions are tokenized, where the model is here.
    """
    captions = dict.fromkeys(photo.caption for photo in photos)
    cuts = _cuts(experiment, captions) if with_tokens else None
    is_counted = cuts is not None or caption_lengths.are_surely_short(experiment.data, captions)
    found = findings.findings(photos, experiment.data, cuts or ())
    return DataReport(str(experiment.images), len(photos), len(captions), is_counted, found)


def _cuts(experiment: Experiment, captions) -> list[findings.Cut] | None:
    """None while the model is not here."""
    try:
        folder = pretrained.local_folder(experiment.model_path, experiment.model.revision, *experiment.model_weights)
    except UserError:
        return None  # GetModel fetches it, or says what is wrong with it
    return caption_lengths.cuts(folder, family_of(folder), experiment.data, captions)


def as_json(report: DataReport) -> str:
    found = asdict(report)
    for finding in found["findings"]:
        finding["worst"] = [worst._asdict() for worst in finding["worst"]]
    return json.dumps(found, indent=2)


def parts(report: DataReport, experiment: Experiment) -> Iterator[str | Table]:
    """Lines and tables to be shown."""
    photos = f"{shown(experiment.images)}: {count(report.num_photos, 'captioned photo')}"
    if not report.findings and report.are_tokens_counted:
        yield f"{photos}, all sound"
        return
    yield f"{photos}, all can be used; look at this:"
    yield as_table(report.findings, () if report.are_tokens_counted else [CUT_LATER])
    yield from advice(report.findings)


def as_table(found: Sequence[Finding], more: Sequence[Sequence[str]] = ()) -> Table:
    rows: list[Sequence[object]] = []
    for finding in found:
        title: tuple[Marked | str, Marked | str] = warning(finding.title), f"{finding.count:,}"
        for worst in islice(finding.worst, SHOWN):
            rows.append((*title, *worst))
            title = "", ""
    return Table(["found", ">photos", "the worst", ""], [*rows, *more])


def advice(found: Sequence[Finding]) -> Iterator[str]:
    for finding in found:
        yield quiet(f"{finding.title}: {finding.advice}")


def forbidden(found: Sequence[Finding], experiment: Experiment) -> list[Finding]:
    """Those that [data] strict makes errors of."""
    strict = experiment.data.strict
    return [finding for finding in found if strict is True or (strict and finding.kind in strict)]


def refuse(found: Sequence[Finding], experiment: Experiment) -> None:
    """Raise UserError that lists what [data] strict forbids, where any of it was found."""
    refused = forbidden(found, experiment)
    if not refused:
        return
    kinds = count(len(refused), "kind of fault", "kinds of faults")
    lines = [f"{experiment.images}: {kinds} that [data] strict forbids; mend what is listed, or change strict"]
    for finding in refused:
        lines.append(f"  {finding.title} ({finding.kind}): {count(finding.count, 'photo')}; {finding.advice}")
        lines += [f"    {name}: {what}" for name, what in finding.worst[:SHOWN]]
    raise UserError("\n".join(lines))
