"""``python -m benchmarks.digests``: the first look at a checkpoint, whose files are all read for their digests.

Files are read one after the other and then several at a time, in turns: from memory, and from the disk, which the
kernel is asked to read anew.
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from cache import FileFacts
from cache.core.digests import _read


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--megabytes", type=int, default=512, help="of each file (512)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go for a while (default: TMPDIR or /tmp)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-digests-", dir=options.folder) as folder:
        paths = [_write(Path(folder) / f"{number}", options.megabytes << 20) for number in range(options.files)]
        size = options.files * (options.megabytes << 20) / 1e9
        print(f"{size:.1f} GB in {len(paths)} files; GB/s, medians of {options.rounds}")
        print(f"{'':<14}{'one by one':>12}{'together':>12}{'ratio':>8}")
        for name, prepare in (("from memory", _keep), ("from disk", _drop)):
            found = [
                (_timed(prepare, _one_by_one, paths), _timed(prepare, _together, paths)) for _ in range(options.rounds)
            ]
            alone, together = (size / statistics.median(each) for each in zip(*found))
            print(f"{name:<14}{alone:>12.2f}{together:>12.2f}{together / alone:>8.2f}")


def _write(path: Path, num_bytes: int) -> Path:
    block = os.urandom(1 << 20)
    with open(path, "wb") as file:
        for _ in range(num_bytes >> 20):
            file.write(block)
        os.fsync(file.fileno())
    return path


def _one_by_one(paths: list[Path]) -> None:
    for path in paths:
        _read(path, threading.Event(), True)


def _together(paths: list[Path]) -> None:
    FileFacts(paths[0].with_name("none")).file_digests(paths)
    paths[0].with_name("none").unlink(missing_ok=True)


def _timed(prepare, read, paths: list[Path]) -> float:
    for path in paths:
        prepare(path)
    began = time.perf_counter()
    read(paths)
    return time.perf_counter() - began


def _keep(path: Path) -> None:
    path.read_bytes()


def _drop(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
