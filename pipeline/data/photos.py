"""Finding photos and their captions in a folder, without decoding anything or leaving the folder."""

import codecs
import csv
import difflib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cache.core.files import is_taken
from pipeline.data import formats, parquet
from pipeline.errors import UserError

METADATA = "metadata.jsonl"
TABLES = METADATA, "metadata.csv", "metadata.parquet"
"""Lists of photos and captions; the first that is there is taken."""

AS_FOLDER = "; set [data] images to the folder that holds the photos"
CAPTION_SUFFIXES = ".txt", ".caption"
"""Of files beside photos; the first that is there is taken."""

CAPTION_COLUMNS = "text", "caption"
CHUNK_BYTES = 1 << 16


class Photo(NamedTuple):
    """One captioned image.  name: its path relative to the folder, with "/"; conditioning: likewise, or None."""

    folder: str
    name: str
    caption: str
    conditioning: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong with one file, named relative to the folder, or with one line of the list of photos."""

    name: str
    reason: str


def list_photos(folder: Path, prompt: str = "") -> tuple[list[Photo], list[Problem]]:
    """Find photos and captions without decoding anything; both lists are sorted by name.

    Where the folder has a metadata.jsonl, metadata.csv or metadata.parquet ("file_name", "text" or "caption",
    optionally "conditioning_image"), that is the list.  Otherwise it is every image below the folder, with NAME.txt or
    NAME.caption beside NAME.png.  A ``prompt`` that is not blank is the caption of all, and none is read.  Hidden files
    and text files without an image are passed over, and nothing outside the folder is ever opened.  Raises UserError
    where there is no folder, no photo, or no way to read the list.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = f"a file, and no folder{AS_FOLDER}" if folder.is_file() else f"no such folder{AS_FOLDER}{_meant(folder)}"
        raise UserError(f"{folder}: {what}")
    table = table_in(folder)
    if table:
        photos, problems = _from_table(_Folder(folder), table, prompt.strip())
    else:
        photos, problems = _from_files(_Folder(folder), prompt.strip())
    if not photos and not problems:
        raise UserError(f"{folder}: no photo in it; expected {METADATA}, or images with NAME.txt beside NAME.png")
    return sorted(photos, key=lambda photo: photo.name), sorted(problems)


def _meant(folder: Path) -> str:
    """The folder beside that has nearly the name of one that is not there."""
    parent = folder.parent
    beside = [each.name for each in parent.iterdir() if each.is_dir()] if os.access(parent, os.R_OK) else []
    return "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(folder.name, beside, 1))


def table_in(folder: Path) -> str:
    """The name of the folder's list of photos and captions; "" where there is none.  Raises UserError."""
    for name in TABLES:
        try:
            if is_taken(folder / name):
                return name
        except OSError as error:  # what cannot be looked at is not absent
            raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from error
    return ""


class _Unusable(Exception):
    """Why a photo, or a line of its list, cannot be used."""


def _about(what: str, work: Callable, *arguments):
    """The result of ``work(*arguments)``; where that gives a reason instead, say what it is about."""
    try:
        return work(*arguments)
    except _Unusable as reason:
        raise _Unusable(f"{what}: {reason}") from None


class _Folder:
    """A folder whose files are reached by relative names, none of which leads out of it."""

    def __init__(self, path: Path):
        self.path = path
        self.root = os.path.realpath(path)
        self._regular: dict[str, set[str]] = {}  # by folder: its regular files, no links, as far as a listing tells

    def check(self, name: str) -> None:
        """Raise _Unusable where ``name`` is not a regular file in the folder."""
        if name.startswith("/") or ".." in name.split("/"):
            raise _Unusable("its path leads out of the folder")
        try:
            name.encode()
            parent, _, last = name.rpartition("/")
            if parent not in self._regular:
                self._regular[parent] = self._list_regular(parent)
            is_regular = last in self._regular[parent] or self._is_regular(parent, last)
        except FileNotFoundError:
            raise _Unusable("no such file") from None
        except OSError as error:
            raise _Unusable(f"cannot be read: {error.strerror}") from error
        except ValueError:  # a NUL byte, or a name that has no UTF-8 form
            raise _Unusable("its name is not valid UTF-8 text") from None
        if not is_regular:
            raise _Unusable("not a regular file")

    def _list_regular(self, parent: str) -> set[str]:
        """To list a folder takes a quarter of the time that it takes to look at its files one by one."""
        try:
            with os.scandir(self._inside(parent)) as entries:
                return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        except OSError:  # what is wrong is said of each file
            return set()

    def _is_regular(self, parent: str, last: str) -> bool:
        path = f"{self._inside(parent)}/{last}"
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        return stat.S_ISREG(os.stat(self._inside(path) if is_link else path).st_mode)

    def _inside(self, name: str) -> str:
        """The real path of a name, or of a path, with all links followed.  Raises _Unusable where it leads out."""
        real = os.path.realpath(os.path.join(self.root, name))
        if os.path.commonpath([self.root, real]) != self.root:
            raise _Unusable("a link that leads out of the folder")
        return real

    def content(self, name: str) -> bytes:
        """Return the bytes of the file ``name``.  Raises _Unusable."""
        self.check(name)
        try:
            return _read(f"{self.root}/{name}")
        except OSError as error:
            raise _Unusable(f"cannot be read: {error.strerror}") from error

    def names(self) -> tuple[list[str], list[Problem]]:
        """Name every file below the folder that is not hidden; no link to a folder is followed."""
        names, problems, parents = [], [], [""]
        while parents:
            parent = parents.pop()
            prefix, regular = parent and f"{parent}/", self._regular.setdefault(parent, set())
            try:
                with os.scandir(f"{self.root}/{parent}") as entries:
                    for entry in entries:
                        name = prefix + entry.name
                        if entry.name.startswith("."):
                            continue
                        if entry.is_symlink() and os.path.isdir(entry.path):
                            problems.append(Problem(name, "a link to a folder, which is not followed"))
                        elif entry.is_dir(follow_symlinks=False):
                            parents.append(name)
                        else:
                            names.append(name)
                            if entry.is_file(follow_symlinks=False):
                                regular.add(entry.name)
            except OSError as error:
                problems.append(Problem(parent or ".", f"cannot be read: {error.strerror}"))
        return names, problems


def _read(path: str) -> bytes:
    """The bytes of a regular file; `open` would take twice as long for each of a million captions."""
    file = os.open(path, os.O_RDONLY)
    try:
        parts = [os.read(file, CHUNK_BYTES)]
        while len(parts[-1]) == CHUNK_BYTES:
            parts.append(os.read(file, CHUNK_BYTES))
    finally:
        os.close(file)
    return b"".join(parts)


def _from_files(folder: _Folder, prompt: str) -> tuple[list[Photo], list[Problem]]:
    photos = []
    names, problems = folder.names()
    existing = set(names)
    for name in names:
        stem, suffix = os.path.splitext(name)
        try:
            if missing := formats.missing_for(suffix.lower()):
                raise _Unusable(missing)
            if formats.is_photo(suffix.lower()):
                folder.check(name)
                caption = prompt or _caption_beside(folder, stem, existing)
                photos.append(Photo(str(folder.path), name, caption))
        except _Unusable as reason:
            problems.append(Problem(name, str(reason)))
    return photos, problems


def _caption_beside(folder: _Folder, stem: str, existing: set[str]) -> str:
    name = next((stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in existing), "")
    if not name:
        raise _Unusable(f"no caption: {stem}{CAPTION_SUFFIXES[0]} is missing")
    return _about(f"its caption {name}", _caption_in, folder, name)


def _caption_in(folder: _Folder, name: str) -> str:
    try:
        return _checked_caption(folder.content(name).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Unusable("not UTF-8") from None


def _checked_caption(text) -> str:
    if not isinstance(text, str):
        raise _Unusable("not a string")
    if not text.strip():
        raise _Unusable("empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable("half of a surrogate pair, which is no character") from None
    return text.strip()


def _from_table(folder: _Folder, table: str, prompt: str) -> tuple[list[Photo], list[Problem]]:
    try:
        content = folder.content(table)
    except _Unusable as reason:
        raise UserError(f"{folder.path / table}: {reason}") from None
    photos: list[Photo] = []
    problems: list[Problem] = []
    first_lines: dict[str, int] = {}
    for number, row_in in _lines(folder.path / table, content):
        name = f"{table}, line {number}"
        try:
            row = row_in()
            name = _normal(row["file_name"])
            if first_lines.setdefault(name, number) != number:
                raise _Unusable(f"listed twice in {table}, lines {first_lines[name]} and {number}")
            photos.append(_photo(folder, name, row, prompt, table))
        except _Unusable as reason:
            problems.append(Problem(name, str(reason)))
    return photos, problems


Lines = Iterator[tuple[int, Callable[[], dict]]]
"""Of each line of a table its number, and what gives its row or raises _Unusable."""


def _lines(path: Path, content: bytes) -> Lines:
    match path.suffix:
        case ".csv":
            return _lines_of_csv(path, content)
        case ".parquet":
            return ((number, partial(_checked_row, row)) for number, row in parquet.rows(path, content))
        case _:
            return _lines_of_json(content)


def _lines_of_json(content: bytes) -> Lines:
    for number, line in enumerate(io.BytesIO(content.removeprefix(codecs.BOM_UTF8)), 1):
        if line.strip():
            yield number, partial(_row, line.rstrip(b"\n"))


def _lines_of_csv(path: Path, content: bytes) -> Lines:
    """The rows of a file separated by commas (RFC 4180), which may have line breaks inside quotation marks."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if "file_name" not in (columns := reader.fieldnames or []):
            found = ", ".join(columns)[:200] or "nothing"
            raise UserError(
                f"{path}: its first line is {found}; expected names of columns, file_name among them, and commas"
            )
        for row in reader:
            cells = {name: cell for name, cell in row.items() if name is not None and cell}
            yield reader.line_num, partial(_checked_row, cells)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is no CSV: {error}") from None


def _row(line: bytes) -> dict:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _Unusable("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise _Unusable("not a JSON object")
    return _checked_row(row)


def _checked_row(row: dict) -> dict:
    if not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise _Unusable('no "file_name"')
    return row


def _photo(folder: _Folder, name: str, row: dict, prompt: str, table: str) -> Photo:
    folder.check(name)
    conditioning = row.get("conditioning_image")
    if conditioning is not None:
        conditioning = _about(f"its conditioning_image {conditioning}", _conditioning, folder, conditioning)
    text = next((row[column] for column in CAPTION_COLUMNS if row.get(column) is not None), None)
    if not prompt and text is None:
        raise _Unusable(f'no caption: its line in {table} has no "{CAPTION_COLUMNS[0]}"')
    caption = prompt or _about(f"its caption in {table}", _checked_caption, text)
    return Photo(str(folder.path), name, caption, conditioning)


def _conditioning(folder: _Folder, name) -> str:
    if not isinstance(name, str):
        raise _Unusable("not a string")
    name = _normal(name)
    folder.check(name)
    return name


def _normal(name: str) -> str:
    """A relative name without what has no meaning in it: "./a//b" is "a/b"."""
    is_normal = "/." not in f"/{name}" and "//" not in name and not name.endswith("/")
    return name if is_normal else str(PurePosixPath(name))
