"""Finding photos and their captions in a folder, without decoding anything or leaving the folder."""

import codecs
import io
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cache.core.files import is_taken
from pipeline.data import formats
from pipeline.errors import UserError

METADATA = "metadata.jsonl"
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
    """What is wrong with one file, named relative to the folder, or with one line of metadata.jsonl."""

    name: str
    reason: str


def list_photos(folder: Path, prompt: str = "") -> tuple[list[Photo], list[Problem]]:
    """Find photos and captions without decoding anything; both lists are sorted by name.

    Where the folder has a metadata.jsonl ("file_name", "text", optionally "conditioning_image"), that is the list.
    Otherwise it is every image below the folder, with NAME.txt beside NAME.png.  A ``prompt`` that is not blank is the
    caption of all, and none is read.  Hidden files and text files without an image are passed over, and nothing
    outside the folder is ever opened.  Raises UserError where there is no folder, no photo, or no way to read the list.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set [data] images to the folder that holds the photos")
    try:
        find = _from_metadata if is_taken(folder / METADATA) else _from_files
    except OSError as error:  # what cannot be looked at is not absent
        raise UserError(f"{folder / METADATA}: cannot be read: {error.strerror}") from error
    photos, problems = find(_Folder(folder), prompt.strip())
    if not photos and not problems:
        raise UserError(f"{folder}: no photo in it; expected {METADATA}, or images with NAME.txt beside NAME.png")
    return sorted(photos, key=lambda photo: photo.name), sorted(problems)


class _Unusable(Exception):
    """Why a photo, or a line of metadata.jsonl, cannot be used."""


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
                caption = prompt or _caption_beside(folder, stem + ".txt", existing)
                photos.append(Photo(str(folder.path), name, caption))
        except _Unusable as reason:
            problems.append(Problem(name, str(reason)))
    return photos, problems


def _caption_beside(folder: _Folder, name: str, existing: set[str]) -> str:
    if name not in existing:
        raise _Unusable(f"no caption: {name} is missing")
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


def _from_metadata(folder: _Folder, prompt: str) -> tuple[list[Photo], list[Problem]]:
    try:
        content = folder.content(METADATA)
    except _Unusable as reason:
        raise UserError(f"{folder.path / METADATA}: {reason}") from None
    photos: list[Photo] = []
    problems: list[Problem] = []
    first_lines: dict[str, int] = {}
    for number, line in enumerate(io.BytesIO(content.removeprefix(codecs.BOM_UTF8)), 1):
        if not line.strip():
            continue
        name = f"{METADATA}, line {number}"
        try:
            row = _row(line.rstrip(b"\n"))
            name = _normal(row["file_name"])
            if first_lines.setdefault(name, number) != number:
                raise _Unusable(f"listed twice in {METADATA}, lines {first_lines[name]} and {number}")
            photos.append(_photo(folder, name, row, prompt))
        except _Unusable as reason:
            problems.append(Problem(name, str(reason)))
    return photos, problems


def _row(line: bytes) -> dict:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise _Unusable("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise _Unusable("not a JSON object")
    if not isinstance(row.get("file_name"), str) or not row["file_name"]:
        raise _Unusable('no "file_name"')
    return row


def _photo(folder: _Folder, name: str, row: dict, prompt: str) -> Photo:
    folder.check(name)
    conditioning = row.get("conditioning_image")
    if conditioning is not None:
        conditioning = _about(f"its conditioning_image {conditioning}", _conditioning, folder, conditioning)
    if not prompt and row.get("text") is None:
        raise _Unusable(f'no caption: its line in {METADATA} has no "text"')
    caption = prompt or _about(f"its caption in {METADATA}", _checked_caption, row["text"])
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
