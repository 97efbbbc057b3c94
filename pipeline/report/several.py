"""The page that compares several runs, at a place of its own.  Imports no MindSpore."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.page.page import save
from pipeline.plan.run_folder import RunFolder
from pipeline.report import page
from pipeline.report.stage import made_from


def is_made(path: Path, runs: Sequence[Path]) -> bool:
    """Whether there is a page of just these runs, as they are now."""
    return made_from(path) == page.digest_of([RunFolder(run) for run in runs])


def write(path: Path, runs: Sequence[Path]) -> None:
    save(path, page.report(runs))
