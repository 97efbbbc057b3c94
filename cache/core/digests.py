"""Facts about files, remembered by path, size, inode and times of change, so that a 9.5 GB file is read once.

Losing this memory costs time and nothing else: a file that nothing is remembered about is read again.
"""

import json
import os
import re
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TypeVar

from cache.core.address import DIGEST_BYTES, hasher
from cache.core.errors import StoreError
from cache.core.files import make_folder
from cache.core.parsing import load_json
from cache.core.reading import NotWanted, as_done, chunks, fits_in_memory, num_threads

AnyPath = str | Path
Stamp = tuple[int, int, int, int, bool]
Path_ = TypeVar("Path_", bound=str | Path)
Result = TypeVar("Result")

DIGEST = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
LOCKED_SECONDS = 30
QUERY_PATHS = 500  # that one query asks for; SQLite takes 999 at least
RACY_NS = 3_000_000_000  # a change this soon after another may leave size and mtime as they were (FAT ticks in 2 s)
STAMP = "size, mtime_ns, inode, ctime_ns"
TABLE = f"CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, {STAMP}, facts TEXT)"


class FileFacts:
    """JSON facts about files, in one SQLite file that any number of processes may use at once.

    The first ``put`` creates the SQLite file. Where it cannot be used, a line on stderr says so.
    """

    def __init__(self, path: AnyPath):
        self.path = Path(path)
        self._seen: dict[bytes, Stamp | None] = {}  # by file, when it was looked up: what new facts are about
        self._digested: dict[bytes, Stamp | None] = {}  # by file, when it had the digest that was given out first
        self._warned: set[str] = set()

    def get(self, path: AnyPath) -> dict | None:
        """The facts remembered about a file, or None where there are none or the file has changed since."""
        return self.get_many([path]).get(path)

    def get_many(self, paths: Iterable[Path_]) -> dict[Path_, dict]:
        """The facts about many files, by path as given; files that nothing is remembered about are left out."""
        stamps = {path: _stamp(path) for path in paths}
        self._seen.update((_name(path), stamp) for path, stamp in stamps.items())
        return self._use(lambda db: _find_many(db, stamps), "rw") or {}

    def look_up(self, paths: Iterable[Path_]) -> dict[Path_, dict]:
        """As ``get_many``, for callers that will not ``put``: saves the memory that a ``put`` would need."""
        stamps = {path: _stamp(path) for path in paths}
        return self._use(lambda db: _find_many(db, stamps), "rw") or {}

    def put(self, path: AnyPath, facts: dict) -> None:
        """Add to the facts about a file as it was at the last ``get``, or as it is now if there was none.

        Nothing is remembered where the file has changed since, or was changed less than three seconds before that
        moment: another change could then leave its size and mtime as they are.
        """
        self.put_many({path: facts})

    def put_many(self, facts: Mapping[Path_, dict]) -> None:
        """As ``put`` for many files, facts by path, in one transaction."""
        rows = []
        for path, new in facts.items():
            stamp = self._seen.pop(_name(path), None) or _stamp(path)
            if stamp and stamp[-1] and _is_same(stamp, _stamp(path)):
                rows.append((path, stamp, json.loads(json.dumps(new, allow_nan=False))))
        if rows:
            self._use(lambda db: _remember(db, rows), "rwc")

    def file_digest(self, path: AnyPath) -> str:
        """The address of a file's bytes, read only where it is not remembered. Raises OSError, or StoreError where
        the file keeps changing."""
        return self.file_digests([path])[path]

    def file_digests(self, paths: Iterable[Path_]) -> dict[Path_, str]:
        """As ``file_digest`` for many files: digests by path. New ones are saved about once a second.

        Several files are read at a time, the largest first; they stay in the kernel's cache only if all of them fit.
        """
        paths = list(paths)
        known = {path: facts["digest"] for path, facts in self.get_many(paths).items() if has_digest(facts)}
        for path in known:
            self._digested.setdefault(_name(path), self._seen[_name(path)])
        fresh: dict[Path_, dict] = {}
        saved = time.monotonic()
        for path, stamp, digest in _read_several(dict.fromkeys(path for path in paths if path not in known)):
            self._seen[_name(path)] = stamp
            self._digested.setdefault(_name(path), stamp)
            known[path] = digest
            fresh[path] = {"digest": digest}
            if time.monotonic() - saved > 1:
                self.put_many(fresh)
                fresh, saved = {}, time.monotonic()
        self.put_many(fresh)
        return {path: known[path] for path in paths}

    def confirm(self, paths: Iterable[AnyPath]) -> None:
        """Raise StoreError where a file has changed since this object first gave out its digest.

        Call it when the files have been used and before the result is kept: a file that was replaced or written to in
        the meantime has another inode or another time of change.
        """
        for path in paths:
            if not _is_same(self._digested[_name(path)], _stamp(path)):
                raise StoreError(f"{path}: was replaced or written to after its digest was taken; run again")

    def _use(self, work: Callable[[sqlite3.Connection], Result], mode: str) -> Result | None:
        """The result of ``work(connection)`` in one transaction, or None where there is nothing to work with."""
        for _ in range(2):
            try:
                if mode == "rw" and not (self.path.exists() and self.path.stat().st_size):
                    return None
                if mode == "rwc":
                    make_folder(self.path.parent)
                    self.path.touch()  # SQLite itself would not follow the umask
                inode = self.path.stat().st_ino if self.path.exists() else None
                link = f"{self.path.absolute().as_uri()}?mode={mode}"
                with closing(sqlite3.connect(link, LOCKED_SECONDS, isolation_level=None, uri=True)) as db, db:
                    db.execute("BEGIN" if mode == "rw" else "BEGIN IMMEDIATE")
                    if mode == "rwc":
                        db.execute(TABLE)
                    return work(db)
            except (sqlite3.OperationalError, OSError) as error:  # locked, read-only, full, or without a table yet
                self._warn(f"cannot be used now ({error}); files are read again")
                return None
            except (sqlite3.DatabaseError, ValueError, TypeError) as error:
                self._replace(inode, error)
        return None

    def _replace(self, inode: int | None, error: Exception) -> None:
        """Move a damaged file aside, unless another process has done so already."""
        if self.path.exists() and self.path.stat().st_ino == inode:
            self._warn(f"is damaged ({error}); moved to {self.path.name}.damaged and begun anew, files are read again")
            with suppress(OSError):
                os.replace(self.path, f"{self.path}.damaged")
                Path(f"{self.path}-journal").unlink(missing_ok=True)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            print(f"{self.path}: the memory of file digests {text}", file=sys.stderr)


def has_digest(facts: dict) -> bool:
    """Whether a file's digest is among its facts. What others may have written there in its place is none."""
    found = facts.get("digest")
    return isinstance(found, str) and DIGEST.fullmatch(found) is not None


def _read_several(paths: Iterable[Path_]) -> Iterator[tuple[Path_, Stamp, str]]:
    """Each file with its stamp and its digest, as they are read."""
    sizes = {path: (_stamp(path) or (0,))[0] for path in paths}
    stay_cached = fits_in_memory(sum(sizes.values()))

    def read(path: Path_, stop: threading.Event) -> tuple[Stamp, str]:
        return _read(path, stop, stay_cached)

    if len(sizes) < 2:
        yield from ((path, *read(path, threading.Event())) for path in sizes)
        return
    for path, (stamp, digest) in as_done(read, sorted(sizes, key=lambda path: -sizes[path]), num_threads()):
        yield path, stamp, digest


def _read(path: AnyPath, stop: threading.Event, stays_cached: bool) -> tuple[Stamp, str]:
    for _ in range(3):
        before, name = _stamp(path), hasher()
        for chunk in chunks(path, stays_cached):
            name.update(chunk)
            if stop.is_set():
                raise NotWanted
        if before and _is_same(before, _stamp(path)):
            return before, name.hexdigest()
    raise StoreError(f"{path}: changes while it is read; wait until it is complete, then run again")


def _name(path: AnyPath) -> bytes:
    return os.fsencode(os.path.abspath(path))


def _stamp(path: AnyPath) -> Stamp | None:
    """(size in bytes, mtime in ns, inode, ctime in ns, whether any later change must show); None without the file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    is_old = abs(time.time_ns() - stat.st_mtime_ns) > RACY_NS
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, is_old


def _is_same(stamp: Stamp | None, other: Stamp | None) -> bool:
    """Whether two stamps are of one unchanged file."""
    return stamp is not None and other is not None and stamp[:-1] == other[:-1]


def _find_many(db: sqlite3.Connection, stamps: Mapping[Path_, Stamp | None]) -> dict[Path_, dict]:
    """The facts about those files, by path, that are remembered with the given stamps."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'files'").fetchone():
        return {}  # an older version wrote this file, which knew no inodes
    names = {path: _name(path) for path, stamp in stamps.items() if stamp}
    rows: dict[bytes, tuple] = {}
    wanted = list(dict.fromkeys(names.values()))
    for start in range(0, len(wanted), QUERY_PATHS):
        part = wanted[start : start + QUERY_PATHS]
        query = f"SELECT path, {STAMP}, facts FROM files WHERE path IN ({','.join('?' * len(part))})"
        rows.update((row[0], row) for row in db.execute(query, part))
    known = [path for path, name in names.items() if name in rows and _is_of(rows[name], stamps[path])]
    texts = [rows[names[path]][-1] for path in known]
    return dict(zip(known, _parsed(texts), strict=True))


def _parsed(texts: list) -> list[dict]:
    """The facts in rows; none in a row that holds something else, which another program must have written."""
    with suppress(ValueError, RecursionError, TypeError):
        found = json.loads(f"[{','.join(texts)}]")  # at once: a million one by one take longer
        if len(found) == len(texts) and all(type(each) is dict for each in found):
            return found
    return [_facts_in(text) for text in texts]


def _facts_in(text: object) -> dict:
    with suppress(ValueError):
        found = load_json(text) if isinstance(text, str) else None
        return found if isinstance(found, dict) else {}
    return {}


def _is_of(row: tuple, stamp: Stamp | None) -> bool:
    """Whether a row of the table is about a file as it has this stamp."""
    return stamp is not None and row[1:-1] == stamp[:-1]


def _remember(db: sqlite3.Connection, rows: Iterable[tuple[AnyPath, Stamp, dict]]) -> None:
    """Add facts, each as (path, stamp, facts), to those with the same stamp."""
    for path, stamp, new in rows:
        facts = json.dumps(_find_many(db, {path: stamp}).get(path, {}) | new)
        db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (_name(path), *stamp[:-1], facts))
