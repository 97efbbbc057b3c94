"""What is known of files by path, size, inode and times of change, so that a 9.5 GB file is read once.

It is a memory and no more: lost, damaged or not writable, everything still works, only slower.
"""

import json
import os
import sqlite3
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

from cache.core.address import hasher
from cache.core.errors import StoreError
from cache.core.files import make_folder

CHUNK_BYTES = 1 << 22
LOCKED_SECONDS = 30
QUERY_PATHS = 500  # that one query asks for; SQLite takes 999 at least
RACY_NS = 3_000_000_000  # a change this soon after another may leave size and mtime as they were (FAT ticks in 2 s)
STAMP = "size, mtime_ns, inode, ctime_ns"
TABLE = f"CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, {STAMP}, facts TEXT)"


class FileFacts:
    """JSON facts about files, in one SQLite file that any number of processes may use at once.

    Nothing is created before the first ``put``. Where the file cannot be used, a line on stderr says so.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._seen = {}  # file -> its stamp when it was looked up, which is what new facts are about
        self._digested = {}  # file -> its stamp when it had the digest that was given out first
        self._warned = set()

    def get(self, path):
        """The facts remembered about a file, or None where there are none or the file has changed since."""
        return self.get_many([path]).get(path)

    def get_many(self, paths):
        """As ``get`` for many files: a dict of those paths, as given, about which something is remembered."""
        stamps = {path: _stamp(path) for path in paths}
        self._seen.update((_name(path), stamp) for path, stamp in stamps.items())
        return self._use(lambda db: _find_many(db, stamps), "rw") or {}

    def look_up(self, paths):
        """As ``get_many``, for who puts nothing about these files: nothing of it is kept in memory."""
        stamps = {path: _stamp(path) for path in paths}
        return self._use(lambda db: _find_many(db, stamps), "rw") or {}

    def put(self, path, facts):
        """Add to the facts about a file as it was at the last ``get``, or as it is now if there was none.

        Not remembered where the file has changed since, or had changed in the three seconds before that moment: it
        may change again without a trace in size and mtime.
        """
        self.put_many({path: facts})

    def put_many(self, facts):
        """As ``put`` for many files in one transaction: a dict of path -> facts."""
        stamps = {path: self._seen.pop(_name(path), None) or _stamp(path) for path in facts}
        sure = [path for path, stamp in stamps.items() if stamp and stamp[-1] and _is_same(stamp, _stamp(path))]
        rows = [(path, stamps[path], json.loads(json.dumps(facts[path], allow_nan=False))) for path in sure]
        if rows:
            self._use(lambda db: [_remember(db, *row) for row in rows], "rwc")

    def file_digest(self, path):
        """The address of a file's bytes, read only where it is not remembered. Raises OSError, or StoreError where
        the file keeps changing."""
        return self.file_digests([path])[path]

    def file_digests(self, paths):
        """As ``file_digest`` for many files: a dict of path -> digest. Remembered about once a second."""
        paths = list(paths)
        known = {path: facts["digest"] for path, facts in self.get_many(paths).items() if "digest" in facts}
        for path in known:
            self._digested.setdefault(_name(path), self._seen[_name(path)])
        fresh, saved = {}, time.monotonic()
        for path in dict.fromkeys(path for path in paths if path not in known):
            known[path] = self._read(path)
            fresh[path] = {"digest": known[path]}
            if time.monotonic() - saved > 1:
                self.put_many(fresh)
                fresh, saved = {}, time.monotonic()
        self.put_many(fresh)
        return {path: known[path] for path in paths}

    def _read(self, path):
        for _ in range(3):
            before, name = _stamp(path), hasher()
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    name.update(chunk)
            if before and _is_same(before, _stamp(path)):
                self._seen[_name(path)] = before
                self._digested.setdefault(_name(path), before)
                return name.hexdigest()
        raise StoreError(f"{path}: changes while it is read; wait until it is complete, then run again")

    def confirm(self, paths):
        """Raise StoreError where one of some files is not the one whose digest this object has given out.

        Call it once a file's content is used, before anything that was made of it is kept: a file that was replaced
        or written to in the meantime has another inode or another time of change.
        """
        for path in paths:
            if not _is_same(self._digested[_name(path)], _stamp(path)):
                raise StoreError(f"{path}: was replaced or written to after its digest was taken; run again")

    def _use(self, work, mode):
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
                return self._warn(f"cannot be used now ({error}); files are read again")
            except (sqlite3.DatabaseError, ValueError, TypeError) as error:
                self._replace(inode, error)
        return None

    def _replace(self, inode, error):
        """Move a damaged file aside, unless another process has done so already."""
        if self.path.exists() and self.path.stat().st_ino == inode:
            self._warn(f"is damaged ({error}); moved to {self.path.name}.damaged and begun anew, files are read again")
            with suppress(OSError):
                os.replace(self.path, f"{self.path}.damaged")
                Path(f"{self.path}-journal").unlink(missing_ok=True)

    def _warn(self, text):
        if text not in self._warned:
            self._warned.add(text)
            print(f"{self.path}: the memory of file digests {text}", file=sys.stderr)


def _name(path):
    return os.fsencode(os.path.abspath(path))


def _stamp(path):
    """(size in bytes, mtime in ns, inode, ctime in ns, whether any later change must show); None without the file."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    is_old = abs(time.time_ns() - stat.st_mtime_ns) > RACY_NS
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns, is_old


def _is_same(stamp, other):
    """Whether two stamps are of one unchanged file."""
    return other is not None and stamp[:-1] == other[:-1]


def _find_many(db, stamps):
    """Path -> facts, of those files in a dict of path -> stamp that are remembered as of these stamps."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'files'").fetchone():
        return {}  # an older version wrote this file, which knew no inodes
    names, rows = {path: _name(path) for path, stamp in stamps.items() if stamp}, {}
    wanted = list(dict.fromkeys(names.values()))
    for start in range(0, len(wanted), QUERY_PATHS):
        part = wanted[start : start + QUERY_PATHS]
        query = f"SELECT path, {STAMP}, facts FROM files WHERE path IN ({','.join('?' * len(part))})"
        rows.update((row[0], row) for row in db.execute(query, part))
    known = [path for path, name in names.items() if name in rows and rows[name][1:-1] == stamps[path][:-1]]
    texts = ",".join([rows[names[path]][-1] for path in known])  # parsed at once: a million one by one take longer
    return dict(zip(known, json.loads(f"[{texts}]"), strict=True))


def _remember(db, path, stamp, facts):
    facts = {**_find_many(db, {path: stamp}).get(path, {}), **facts}
    db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (_name(path), *stamp[:-1], json.dumps(facts)))
