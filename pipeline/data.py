"""The photos and captions of an experiment: found, checked, and every fault reported at once, before any encoding."""

import codecs
import functools
import json
import os
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from cache import FileFacts, digest
from cache.digests import RACY_NS
from pipeline.errors import UserError
from pipeline.images import BadImage, read_image

METADATA = "metadata.jsonl"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jxl"}  # photos that Pillow may not read: said, not passed over
MAX_WORKERS = 8  # decoded photos in memory at a time
BATCH = 64  # photos between two notes of what was learnt, so that a killed run keeps the rest
MAX_LISTED = 500


@dataclass(frozen=True)
class Photo:
    """One captioned image.  name: its path relative to the folder, with "/"; conditioning: likewise, or None."""

    name: str
    path: Path
    caption: str
    conditioning: str | None = None


@dataclass(frozen=True, kw_only=True)
class IndexedPhoto(Photo):
    """A photo that decodes.  digest: of the file's bytes; width, height: in pixels, after EXIF orientation."""

    digest: str
    width: int
    height: int


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong with one file, named relative to the folder, or with one line of metadata.jsonl."""

    name: str
    reason: str


def index_photos(
    folder: Path, prompt: str, facts: FileFacts, progress: Callable[[int, int], None] | None = None
) -> list[IndexedPhoto]:
    """Return the usable photos of ``folder``, sorted by name, where all of them are usable.

    Arguments as for ``list_photos`` and ``inspect``.  Raises UserError that lists every problem.
    """
    photos, problems = list_photos(folder, prompt)
    indexed, undecodable = inspect(photos, facts, progress)
    if problems or undecodable:
        raise UserError(_report(folder, sorted(problems + undecodable)))
    return indexed


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


def inspect(
    photos: list[Photo], facts: FileFacts, progress: Callable[[int, int], None] | None = None
) -> tuple[list[IndexedPhoto], list[Problem]]:
    """Decode, completely, each photo that ``facts`` does not remember as it now is; remember those that decode.

    progress: called with (photos decoded so far, photos to decode).
    """
    known, problems = _remembered(photos, facts), []
    unseen = [photo for photo in photos if photo.path not in known]
    if _settle(unseen):
        facts.get_many([photo.path for photo in unseen])  # as they are now is what will be remembered
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(unseen), BATCH):
            batch, learnt = unseen[start : start + BATCH], {}
            for done, (photo, found) in enumerate(zip(batch, pool.map(_examine, batch)), start + 1):
                if isinstance(found, str):
                    problems.append(Problem(photo.name, found))
                else:
                    learnt[photo.path] = found
                if progress:
                    progress(done, len(unseen))
            facts.put_many(learnt)
            known |= learnt
    return [_indexed(photo, known[photo.path]) for photo in photos if photo.path in known], problems


def inspected(photos: list[Photo], facts: FileFacts) -> bool:
    """Say whether ``inspect`` would have nothing to decode."""
    return len(_remembered(photos, facts)) == len(photos)


def read_photo(photo: IndexedPhoto) -> Image.Image:
    """Decode a photo as ``read_image`` does.  Raises UserError where the file is no longer the one that was indexed."""
    try:
        content = photo.path.read_bytes()
    except OSError as error:
        raise UserError(f"{_printable(str(photo.path))}: {error.strerror}; put it back, or start again") from error
    if digest(content) != photo.digest:
        raise UserError(f"{_printable(str(photo.path))}: changed since the photos were indexed; start again")
    return read_image(content)


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


def _remembered(photos: list[Photo], facts: FileFacts) -> dict[Path, dict]:
    """What is known of the photos that are unchanged; a file that was only ever digested has not been decoded."""
    known = facts.get_many([photo.path for photo in photos])
    return {path: found for path, found in known.items() if "width" in found}


def _settle(photos: list[Photo]) -> bool:
    """Wait, 3 s at most as a rule, until no photo is so new that FileFacts would not remember it.  Say if it waited."""
    waits = []
    for photo in photos:
        with suppress(OSError):
            age = time.time_ns() - os.stat(photo.path).st_mtime_ns
            waits += [RACY_NS - age] if abs(age) <= RACY_NS else []
    if waits:
        time.sleep(max(waits) / 1e9 + 0.01)
    return bool(waits)


def _examine(photo: Photo) -> dict | str:
    """Return the facts of a photo, or the reason why it has none.  The digest is of the very bytes that decoded."""
    try:
        content = photo.path.read_bytes()
        width, height = read_image(content).size
    except BadImage as reason:
        return str(reason)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return {"digest": digest(content), "width": width, "height": height}


def _indexed(photo: Photo, found: dict) -> IndexedPhoto:
    return IndexedPhoto(**vars(photo), **{key: found[key] for key in ("digest", "width", "height")})


def _report(folder: Path, problems: list[Problem]) -> str:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    first = f"{folder}: {count}; repair or remove what is listed (and its line in {METADATA}), then start again"
    lines = [f"{folder}/{problem.name}: {problem.reason}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"and {len(problems) - MAX_LISTED} more, listed once these are repaired")
    return "\n  ".join(_printable(line) for line in [first, *lines])


def _printable(text: str) -> str:
    """Escape what could garble a terminal or hide a part of a file name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
