"""Committing a segment, and committing what killed writers left."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cache.core.files import make_folder, sync_folder
from cache.core.journal import read_journal
from cache.core.segment import SegmentWriter
from cache.core.workspace import JOURNAL, NOT_ALLOWED, locked_if_dead, remove_workspace, workspaces_in

if TYPE_CHECKING:
    from cache.core.entries import Entries


def publish(entries: "Entries", segment: SegmentWriter) -> None:
    """Complete a segment and move it, by one rename, to where readers see it. Raises OSError."""
    segment.finish({"kind": entries.recipe["kind"], "recipe": entries.id})
    make_folder(entries.segments_path)
    os.rename(segment.folder, entries.segments_path / segment.folder.name)
    sync_folder(entries.segments_path)


def salvage(entries: "Entries") -> int:
    """Commit the whole rows that dead writers of the recipe left, and remove their workspaces. Returns how many rows.

    Workspaces that this user may not change (a colleague's, on a read-only disk) stay. Raises OSError; rows that were
    not committed by then are still there for the next call.
    """
    if not workspaces_in(entries.path / "writing"):
        return 0
    with _one_at_a_time(entries.path / "writing"):  # who comes second waits, and then finds the rows committed
        return _salvage_all(entries)


def _salvage_all(entries: "Entries") -> int:
    num_rows = 0
    for folder in workspaces_in(entries.path / "writing"):
        try:
            with locked_if_dead(folder) as is_dead:
                if is_dead:
                    journals = [name for name in sorted(os.listdir(folder)) if name.endswith(JOURNAL)]
                    num_rows += sum(_take_over(entries, folder / name) for name in journals)
                    remove_workspace(folder)
        except FileNotFoundError:  # removed by its writer or by another process this moment
            continue
        except OSError as error:
            if error.errno not in NOT_ALLOWED:
                raise
    return num_rows


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Lock a folder where it can be locked."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _take_over(entries: "Entries", journal_path: Path) -> int:
    """Commit the rows that a journal names, up to the first that is not whole. Returns how many these are."""
    folder = journal_path.with_suffix("")
    if not folder.is_dir():  # it died with its rows committed, or before the first one
        return 0
    segment = SegmentWriter(folder, entries.layout)
    try:
        for item, crc, name in read_journal(journal_path):
            if not segment.take_over(item, name, crc):
                break
        if segment.names:
            publish(entries, segment)
        return len(segment.names)
    finally:
        segment.close()
