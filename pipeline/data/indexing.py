"""The photos of an experiment: decoded once, addressed by content, and every fault reported at once."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cache import FileFacts, digest, printable
from cache.core.digests import RACY_NS, has_digest
from cache.terminal.places import shown
from pipeline.data.colours import CONVERSION
from pipeline.data.images import BadImage, PixelBudget, colours_in, examine, num_pixels, read_image
from pipeline.data.photos import METADATA, Photo, Problem, list_photos, table_in
from pipeline.errors import UserError

MAX_WORKERS = 8  # decoded photos in memory at a time; of large ones fewer, as `PixelBudget` has it
BATCH = 64  # photos between two notes of what was learnt, so that a killed run keeps the rest
LOOKED_UP = 4096  # photos at a time, of millions whose facts would fill the memory
MAX_LISTED = 500
ASPECT_TOLERANCE = 1.01
NO_CONDITION = f'no condition: its line in {METADATA} has no "conditioning_image"'
NO_CONDITION += "; or let [controlnet] condition = 'canny', 'grey', 'blur' or 'tile' compute it"


class IndexedPhoto(NamedTuple):
    """A `Photo` that decodes.  digest: of the file's bytes; width, height: in pixels, after EXIF orientation.

    condition: the image beside it that a ControlNet is conditioned on, where it was asked for.
    profile: the name of the colour profile in the file from which its pixels are converted to sRGB; "": none.
    ignored: why a colour profile in the file is not used; "" where there is none such.
    A tuple, as a process makes a million of them before it does anything else.
    """

    folder: str
    name: str
    caption: str
    digest: str
    width: int
    height: int
    conditioning: str | None = None
    condition: "IndexedPhoto | None" = None
    profile: str = ""
    ignored: str = ""

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)

    @property
    def item(self) -> str:
        """The address of what is encoded of the photo: the digest of its file, and of what is done to its colours."""
        return digest(f"{self.digest} {CONVERSION}".encode()) if self.profile else self.digest


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


def index_pairs(
    folder: Path, prompt: str, facts: FileFacts, progress: Callable[[int, int], None] | None = None
) -> list[IndexedPhoto]:
    """As `index_photos`, each photo with its ``condition``; a pair is of one shape, up to its scale."""
    photos, problems = list_photos(folder, prompt)
    conditions = conditions_of(photos)
    no_condition = NO_CONDITION.replace(METADATA, table_in(folder) or METADATA)
    problems += [Problem(photo.name, no_condition) for photo in photos if photo.conditioning is None]
    indexed, undecodable = inspect([*photos, *conditions], facts, progress)
    pairs = _paired(indexed, photos)
    problems += [Problem(pair.name, _mismatch(pair)) for pair in pairs if not _fits(pair)]
    if problems or undecodable:
        raise UserError(_report(folder, sorted(problems + undecodable)))
    return pairs


def index_files(folder: Path, names: Sequence[str], field: str, facts: FileFacts) -> list[IndexedPhoto]:
    """The images that a field of the experiment file names, decoded; one for each name, however often it stands there.

    folder: that of the experiment file.  Raises UserError that lists every problem.
    """
    photos = file_photos(folder, names)
    indexed, problems = inspect([photo for photo in photos if photo.path.is_file()], facts)
    problems += [Problem(photo.name, "no such file") for photo in photos if not photo.path.is_file()]
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{problem.name}: {problem.reason}" for problem in sorted(problems)]
        raise UserError("\n  ".join(printable(line) for line in [f"{field}: {len(problems)} {noun}", *lines]))
    known = dict(zip(dict.fromkeys(names), indexed))
    return [known[name] for name in names]


def file_photos(folder: Path, names: Iterable[str]) -> list[Photo]:
    """The files that an experiment file in ``folder`` names, each once, as what `remembered` takes."""
    return [Photo(str(folder), os.path.expanduser(name), "") for name in dict.fromkeys(names)]


def conditions_of(photos: Sequence[Photo | IndexedPhoto]) -> list[Photo]:
    """The images that the photos name as their conditions, each once, without those that are photos themselves."""
    own = {photo.name for photo in photos}
    folders = {photo.conditioning: photo.folder for photo in photos if photo.conditioning is not None}
    return [Photo(folder, name, "") for name, folder in folders.items() if name not in own]


def _paired(indexed: Iterable[IndexedPhoto], photos: Iterable[Photo | IndexedPhoto]) -> list[IndexedPhoto]:
    """Those of the photos that were indexed and whose conditions were."""
    known: dict[str | None, IndexedPhoto] = {photo.name: photo for photo in indexed}
    found = [photo for photo in photos if photo.name in known and photo.conditioning in known]
    return [known[photo.name]._replace(condition=known[photo.conditioning]) for photo in found]


def _fits(pair: IndexedPhoto) -> bool:
    """Whether a photo and its condition have the same aspect, up to the rounding of a scaled file."""
    assert pair.condition is not None
    across, down = pair.width * pair.condition.height, pair.height * pair.condition.width
    return max(across, down) <= ASPECT_TOLERANCE * min(across, down)


def _mismatch(pair: IndexedPhoto) -> str:
    condition = pair.condition
    assert condition is not None
    return (
        f"{pair.width} x {pair.height}, but its conditioning_image {condition.name} is {condition.width} x "
        f"{condition.height}: expected the same shape"
    )


def inspect(
    photos: Sequence[Photo], facts: FileFacts, progress: Callable[[int, int], None] | None = None
) -> tuple[list[IndexedPhoto], list[Problem]]:
    """Decode, completely, each photo that ``facts`` does not remember as it now is; remember those that decode.

    Of a photo that an older version has decoded, which did not look for a colour profile, the header alone is read.
    progress: called with (photos decoded so far, photos to decode).
    """
    budget = PixelBudget()
    indexed, problems = list(_looked_up(photos, facts)), []
    unseen = [place for place, found in enumerate(indexed) if found is None]
    _wait_until_old_enough([photos[place] for place in unseen])
    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(unseen), BATCH):
            places, learnt = unseen[start : start + BATCH], {}
            batch = [photos[place] for place in places]
            known = facts.get_many(list(map(_path, batch)))  # as they are now is what will be remembered
            several = pool.map(_examine, batch, [known.get(_path(photo), {}) for photo in batch], repeat(budget))
            for done, (place, photo, found) in enumerate(zip(places, batch, several), start + 1):
                if isinstance(found, str):
                    problems.append(Problem(photo.name, found))
                else:
                    learnt[_path(photo)], indexed[place] = found, _indexed(photo, found)
                if progress:
                    progress(done, len(unseen))
            facts.put_many(learnt)
    return [photo for photo in indexed if photo is not None], problems


def by_content(photos: Iterable[IndexedPhoto]) -> tuple[IndexedPhoto, ...]:
    """Order photos by what is in them, so that renaming or moving a file changes nothing of a training."""
    return tuple(sorted(photos, key=lambda photo: (photo.digest, photo.caption, _digest_of(photo.condition))))


def _digest_of(condition: IndexedPhoto | None) -> str:
    return condition.digest if condition else ""


def remembered(photos: Sequence[Photo | IndexedPhoto], facts: FileFacts) -> list[IndexedPhoto] | None:
    """Return what ``inspect`` would, where it had nothing to decode; None where it had."""
    indexed = []
    for found in _looked_up(photos, facts):
        if found is None:
            return None
        indexed.append(found)
    return indexed


def known(photos: Sequence[Photo], facts: FileFacts) -> list[IndexedPhoto]:
    """Those of the photos that ``inspect`` would not have to decode."""
    return [found for found in _looked_up(photos, facts) if found is not None]


def num_unseen(photos: Sequence[Photo], facts: FileFacts) -> int:
    """How many of the photos ``inspect`` would have to decode."""
    return sum(found is None for found in _looked_up(photos, facts))


def remembered_pairs(photos: Sequence[IndexedPhoto], facts: FileFacts) -> list[IndexedPhoto] | None:
    """Indexed photos with their conditions, as `index_pairs` would return them; None where it had something to decode
    or to report."""
    if any(photo.conditioning is None for photo in photos):
        return None
    conditions = remembered(conditions_of(photos), facts)
    if conditions is None:
        return None
    pairs = _paired([*photos, *conditions], photos)
    return pairs if all(map(_fits, pairs)) else None


def read_photo(photo: IndexedPhoto) -> Image.Image:
    """Decode a photo as ``read_image`` does.  Raises UserError where the file is no longer the one that was indexed."""
    try:
        content = photo.path.read_bytes()
    except OSError as error:
        raise UserError(f"{printable(str(photo.path))}: {error.strerror}; put it back, or start again") from error
    if digest(content) != photo.digest:
        raise UserError(f"{printable(str(photo.path))}: changed since the photos were indexed; start again")
    try:
        return read_image(content, with_profile=bool(photo.profile))
    except BadImage as reason:
        raise UserError(f"{printable(str(photo.path))}: {reason}; it was sound when it was checked") from reason


def _looked_up(photos: Sequence[Photo | IndexedPhoto], facts: FileFacts) -> Iterator[IndexedPhoto | None]:
    """Each photo as it was indexed; None where it has changed since, or has only been digested and never decoded."""
    for start in range(0, len(photos), LOOKED_UP):
        batch = photos[start : start + LOOKED_UP]
        paths = list(map(_path, batch))
        known = facts.look_up(paths)
        for photo, path in zip(batch, paths):
            found = known.get(path, {})
            yield _indexed(photo, found) if _was_decoded(found) else None


def _was_decoded(found: dict) -> bool:
    return _has_size(found) and all(type(found.get(name)) is str for name in ("profile", "ignored"))


def _has_size(found: dict) -> bool:
    return has_digest(found) and all(type(found.get(side)) is int and found[side] > 0 for side in ("width", "height"))


def _path(photo: Photo | IndexedPhoto) -> str:
    """As ``photo.path``, which costs more than all else that is done here with a million photos."""
    return photo.name if photo.name.startswith("/") else f"{photo.folder}/{photo.name}"


def _wait_until_old_enough(photos: Iterable[Photo]) -> None:
    """Wait, 3 s at most as a rule, until no photo is so new that FileFacts would not remember it."""
    waits = []
    for photo in photos:
        with suppress(OSError):
            age = time.time_ns() - os.stat(_path(photo)).st_mtime_ns
            waits += [RACY_NS - age] if abs(age) <= RACY_NS else []
    if waits:
        time.sleep(max(waits) / 1e9 + 0.01)


def _examine(photo: Photo, known: dict, budget: PixelBudget) -> dict | str:
    """Return the facts of a photo, or the reason why it has none.  The digest is of the very bytes that decoded.

    known: what is remembered of the file as it is now.
    """
    try:
        if _has_size(known):
            colours = colours_in(photo.path)
            return known | {"profile": colours.profile, "ignored": colours.ignored}
        content = photo.path.read_bytes()
        with budget.taken(num_pixels(content)):
            return {"digest": digest(content), **examine(content)._asdict()}
    except BadImage as reason:
        return str(reason)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _indexed(photo: Photo | IndexedPhoto, found: dict) -> IndexedPhoto:
    known = found["digest"], found["width"], found["height"]
    colours = found["profile"], found["ignored"]
    return IndexedPhoto(photo.folder, photo.name, photo.caption, *known, photo.conditioning, None, *colours)


def _report(folder: Path, problems: list[Problem]) -> str:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    table, place = table_in(folder), shown(folder)
    line = f" (and its line in {table})" if table else ""
    first = f"{place}: {count}; repair or remove what is listed{line}, then start again"
    lines = [f"{place}/{problem.name}: {problem.reason}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"and {len(problems) - MAX_LISTED} more, listed once these are repaired")
    return "\n  ".join(printable(line) for line in [first, *lines])
