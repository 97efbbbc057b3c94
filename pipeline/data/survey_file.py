"""The photos of an experiment as one process found them, in a file, for other processes that need not look again.

Such a survey may be old.  That does no harm: what is read of a photo later is compared with its digest, see
`indexing.read_photo`.
"""

import fcntl
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from pipeline.data.indexing import IndexedPhoto
from pipeline.errors import UserError
from pipeline.process.bulk import made_in_bulk
from pipeline.process.progress import say
from pipeline.settings.experiment import Experiment

VERSION = 2
"""Bump when the file may say something else, or say it in another way."""

END = b"end of survey\n"
"""The last line of a survey that is whole."""


def subject(experiment: Experiment, with_conditions: bool) -> dict:
    """What a survey is of: for another folder or prompt, or photos without their conditions, it is of no use."""
    folder, prompt = os.fspath(experiment.images), experiment.data.prompt
    return {"version": VERSION, "folder": folder, "prompt": prompt, "with_conditions": with_conditions}


Photos = tuple[IndexedPhoto, ...]


class SurveyFile:
    """A file for the survey of one process, of those that it forks, and of the children that it starts.

    It has no name: no other process sees it, and it is gone with the last of these, however that ends.
    """

    def __init__(self):
        self._file = tempfile.TemporaryFile()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def path(self) -> str:
        """What `read` takes, in every process that has inherited the file."""
        return f"/dev/fd/{self.fileno()}"

    @property
    def is_whole(self) -> bool:
        with open(self.path, "rb") as file:
            return _is_whole(file)

    def photos(self, of: dict, look: Callable[[], Photos | None]) -> Photos | None:
        """The photos in the file; where there are none yet, what ``look()`` gives, and that is kept here if not None.

        of: see `subject`.  Where another process does so already, this one waits for it.
        """
        with open(self.path, "rb") as file:  # opened anew, for a lock of its own: what a fork inherits shares one
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_whole(file):
                return _read(file, self.path, of)
            photos = look()
            if photos is not None:
                self._keep(of, photos)
            return photos

    def _keep(self, of: dict, photos: Sequence[IndexedPhoto]) -> None:
        try:
            with open(self.path, "wb") as file:
                write(file, of, photos)
        except OSError as error:
            reason = f"cannot keep what is known of {len(photos):,} photos ({error.strerror})"
            say(f"{tempfile.gettempdir()}: {reason}; every stage looks at them itself", to_stderr=True)
            os.ftruncate(self.fileno(), 0)


def write(file: BinaryIO, of: dict, photos: Sequence[IndexedPhoto]) -> None:
    """Write the survey of photos in their order: a line of JSON for each of their columns, conditions behind photos.

    Captions stand in it once each, as many photos may share one.
    """
    conditions = {photo.condition.name: photo.condition for photo in photos if photo.condition}
    rows, places = [*photos, *conditions.values()], {name: place for place, name in enumerate(conditions)}
    captions: dict[str, int] = {}
    numbers = [captions.setdefault(row.caption, len(captions)) for row in rows]
    columns = (
        {"of": of, "photos": len(photos)},
        list(captions),
        numbers,
        [row.name for row in rows],
        "".join([row.digest for row in rows]),
        [row.width for row in rows],
        [row.height for row in rows],
        [row.conditioning for row in rows],
        [places[row.condition.name] if row.condition else None for row in rows],
        {number: [row.profile, row.ignored] for number, row in enumerate(rows) if row.profile or row.ignored},
    )
    for column in columns:
        file.write(json.dumps(column).encode() + b"\n")
    file.write(END)


def read(path: str | Path, of: dict) -> tuple[IndexedPhoto, ...]:
    """The photos of a survey.  Raises UserError where it is of something else, or damaged."""
    try:
        with open(path, "rb") as file:
            return _read(file, path, of)
    except OSError as error:
        raise UserError(f"{path}: cannot read this survey: {error.strerror}; run again without it") from None


def _read(file: BinaryIO, path: str | Path, of: dict) -> tuple[IndexedPhoto, ...]:
    try:
        if not _is_whole(file):
            raise ValueError("its end is missing")
        file.seek(0)
        head = json.loads(file.readline())
        if head["of"] != of:
            raise UserError(f"{path}: a survey of {head['of']}, expected one of {of}; run again without it")
        with made_in_bulk():
            return _photos(of["folder"], head["photos"], *map(json.loads, itertools.islice(file, 9)))
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: damaged, and no survey: {error}; run again without it") from None


def _photos(folder: str, number: int, captions: list, *columns) -> tuple[IndexedPhoto, ...]:
    """The first ``number`` of the rows that the columns give; the others are their conditions."""
    numbers, names, text, widths, heights, conditionings, places, colours = columns
    digests = [text[start : start + 32] for start in range(0, len(text), 32)]
    if len({len(column) for column in (names, numbers, digests, widths, heights, conditionings, places)}) > 1:
        raise ValueError("columns of several lengths")
    columns = names, [captions[each] for each in numbers], digests, widths, heights, conditionings
    conditions = list(map(IndexedPhoto, itertools.repeat(folder), *(column[number:] for column in columns)))
    known = {
        int(place): {"profile": profile, "ignored": ignored} for place, (profile, ignored) in dict(colours).items()
    }
    _set_colours(conditions, {place - number: each for place, each in known.items() if place >= number})
    of_photos = [None if place is None else conditions[place] for place in places[:number]]
    photos = list(map(IndexedPhoto, itertools.repeat(folder), *columns, of_photos))
    _set_colours(photos, {place: each for place, each in known.items() if place < number})
    return tuple(photos)


def _set_colours(photos: list[IndexedPhoto], known: dict[int, dict]) -> None:
    """Few photos have a colour profile of their own: these alone are made anew."""
    for place, colours in known.items():
        photos[place] = photos[place]._replace(**colours)


def _is_whole(file: BinaryIO) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(END)))
    return file.read() == END
