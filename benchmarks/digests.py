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
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure
from cache import FileFacts
from cache.core.digests import _read


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--megabytes", type=int, default=512, help="of each file (512)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the files go for a while (default: TMPDIR or /tmp)")
    options = parser.parse_args()
    size = options.files * (options.megabytes << 20) / 1e9
    print(f"{size:.1f} GB in {options.files} files; GB/s, medians of {options.rounds}")
    print(f"{'':<14}{'one by one':>12}{'together':>12}{'ratio':>8}")
    for name, found in _measure(options.folder, options.files, options.megabytes, options.rounds):
        alone, together, _ = (size / statistics.median(each) for each in zip(*found))
        print(f"{name:<14}{alone:>12.2f}{together:>12.2f}{together / alone:>8.2f}")


def figures(rounds: int, files: int, megabytes: int) -> Iterator[Figure]:
    """What reading files for their digests costs, by reading them and doing nothing with them."""
    for name, found in _measure(None, files, megabytes, rounds):
        alone, together, plain = zip(*found)
        yield Figure.of(f"{name}, one by one", "plain reading", alone, plain)
        yield Figure.of(f"{name}, together", "plain reading", together, plain)


def _measure(folder: Path | None, files: int, megabytes: int, rounds: int) -> Iterator[tuple[str, list[tuple]]]:
    """From memory and from disk: each round's seconds of reading one by one, together, and without a digest."""
    with tempfile.TemporaryDirectory(prefix="benchmark-digests-", dir=folder) as name:
        paths = [_write(Path(name) / f"{number}", megabytes << 20) for number in range(files)]
        for source, prepare in (("from memory", _keep), ("from disk", _drop)):
            ways = (_one_by_one, _together, _plainly)
            yield source, [tuple(_timed(prepare, read, paths) for read in ways) for _ in range(rounds)]


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


def _plainly(paths: list[Path]) -> None:
    buffer = bytearray(1 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


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
