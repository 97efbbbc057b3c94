"""Finding photos and their captions in a folder, without decoding anything or leaving the folder."""

import codecs
import functools
import json
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError

METADATA = "metadata.jsonl"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jxl"}  # photos that Pillow may not read: said, not passed over


@dataclass(frozen=True)
class Photo:
    """One captioned image.  name: its path relative to the folder, with "/"; conditioning: likewise, or None."""

    name: str
    path: Path
    caption: str
    conditioning: str | None = None


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
    find = _from_metadata if os.path.lexists(folder / METADATA) else _from_files
    photos, problems = find(_Folder(folder), prompt.strip())
    if not photos and not problems:
        raise UserError(f"{folder}: no photo in it; expected {METADATA}, or images with NAME.txt beside NAME.png")
    return sorted(photos, key=lambda photo: photo.name), sorted(problems)


class _Unusable(Exception):
    """Why a photo, or a line of metadata.jsonl, cannot be used."""


@contextmanager
def _about(what: str):
    """Say what the reasons given in the block are about."""
    try:
        yield
    except _Unusable as reason:
        raise _Unusable(f"{what}: {reason}") from None


class _Folder:
    """A folder whose files are reached by relative names, none of which leads out of it."""

    def __init__(self, path: Path):
        self.path = path
        self.root = os.path.realpath(path)
        self._real_parent = functools.cache(os.path.realpath)  # most of a million files share theirs

    def file(self, name: str) -> Path:
        """Return the path of the regular file ``name``.  Raises _Unusable."""
        if os.path.isabs(name) or ".." in name.split("/"):
            raise _Unusable("its path leads out of the folder")
        try:
            name.encode()
            parent, last = os.path.split(os.path.join(self.root, name))
            real = os.path.join(self._real_parent(parent), last)
            real = os.path.realpath(real) if os.path.islink(real) else real
            if os.path.commonpath([self.root, real]) != self.root:
                raise _Unusable("a link that leads out of the folder")
            if not stat.S_ISREG(os.stat(real).st_mode):
                raise _Unusable("not a regular file")
        except FileNotFoundError:
            raise _Unusable("no such file") from None
        except OSError as error:
            raise _Unusable(f"cannot be read: {error.strerror}") from error
        except ValueError:  # a NUL byte, or a name that has no UTF-8 form
            raise _Unusable("its name is not valid UTF-8 text") from None
        return self.path / name

    def content(self, name: str) -> bytes:
        """Return the bytes of the file ``name``.  Raises _Unusable."""
        try:
            return self.file(name).read_bytes()
        except OSError as error:
            raise _Unusable(f"cannot be read: {error.strerror}") from error

    def names(self) -> tuple[list[str], list[Problem]]:
        """Name every file below the folder that is not hidden; no link to a folder is followed."""
        names, problems, failures = [], [], []
        for parent, folders, files in os.walk(self.root, onerror=failures.append):
            prefix = "" if parent == self.root else Path(parent).relative_to(self.root).as_posix() + "/"
            folders[:] = [name for name in folders if not name.startswith(".")]
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
            problems += [Problem(prefix + name, "a link to a folder, which is not followed") for name in links]
            names += [prefix + name for name in files if not name.startswith(".")]
        for error in failures:
            problems.append(Problem(os.path.relpath(error.filename, self.root), f"cannot be read: {error.strerror}"))
        return names, problems


def _from_files(folder: _Folder, prompt: str) -> tuple[list[Photo], list[Problem]]:
    photos = []
    names, problems = folder.names()
    existing = set(names)
    for name in names:
        stem, suffix = os.path.splitext(name)
        try:
            if suffix.lower() in UNREAD_SUFFIXES:
                raise _Unusable(f"{suffix[1:].upper()} is not read; convert it to JPEG or PNG")
            if suffix.lower() in IMAGE_SUFFIXES:
                path = folder.file(name)
                photos.append(Photo(name, path, prompt or _caption_beside(folder, stem + ".txt", existing)))
        except _Unusable as reason:
            problems.append(Problem(name, str(reason)))
    return photos, problems


def _caption_beside(folder: _Folder, name: str, existing: set[str]) -> str:
    if name not in existing:
        raise _Unusable(f"no caption: {name} is missing")
    with _about(f"its caption {name}"):
        try:
            return _checked_caption(folder.content(name).decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise _Unusable("not UTF-8") from None


def _checked_caption(text) -> str:
    if not isinstance(text, str):
        raise _Unusable("not a string")
    if not text.strip():
        raise _Unusable("empty")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _Unusable("half of a surrogate pair, which is no character")
    return text.strip()


def _from_metadata(folder: _Folder, prompt: str) -> tuple[list[Photo], list[Problem]]:
    try:
        content = folder.content(METADATA)
    except _Unusable as reason:
        raise UserError(f"{folder.path / METADATA}: {reason}") from None
    photos, problems, first_lines = [], [], {}
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        name = f"{METADATA}, line {number}"
        try:
            row = _row(line)
            name = str(PurePosixPath(row["file_name"]))
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
    path, conditioning = folder.file(name), row.get("conditioning_image")
    if conditioning is not None:
        with _about(f"its conditioning_image {conditioning}"):
            if not isinstance(conditioning, str):
                raise _Unusable("not a string")
            conditioning = str(PurePosixPath(conditioning))
            folder.file(conditioning)
    if not prompt and row.get("text") is None:
        raise _Unusable(f'no caption: its line in {METADATA} has no "text"')
    with _about(f"its caption in {METADATA}"):
        return Photo(name, path, prompt or _checked_caption(row["text"]), conditioning)
