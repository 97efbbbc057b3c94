"""Reading whole files once, several at a time: hashing one takes a core, and waiting for one leaves the disk idle."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeVar

from cache.core.files import named

CHUNK_BYTES = 1 << 22
MAX_THREADS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class NotWanted(Exception):
    """Another file could not be read, or the program was interrupted; nobody wants the result any more."""


def as_done(
    work: Callable[[Item, threading.Event], Result], items: Iterable[Item], num_threads: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with ``work(item, stop)``, as they are done, by several threads; an error ends all of them.

    work: raises NotWanted soon after ``stop`` is set.
    """
    stop, left = threading.Event(), iter(items)
    with ThreadPoolExecutor(num_threads) as pool:
        running = {pool.submit(work, item, stop): item for item in islice(left, 2 * num_threads)}
        try:
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
                    running |= {pool.submit(work, item, stop): item for item in islice(left, 1)}
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def num_threads() -> int:
    return min(MAX_THREADS, max(2, len(os.sched_getaffinity(0))))


def chunks(path: str | Path, stays_cached: bool = True) -> Iterator[memoryview]:
    """The bytes of a file, each chunk valid until the next is asked for.  Raises OSError that names the file.

    stays_cached: whether the kernel may keep them in memory, for whoever reads the file next.
    """
    buffer, offset = memoryview(bytearray(CHUNK_BYTES)), 0
    with named(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]
            if not stays_cached:
                with suppress(OSError):  # it is only a hint
                    os.posix_fadvise(file.fileno(), offset, count, os.POSIX_FADV_DONTNEED)
            offset += count


def fits_in_memory(num_bytes: int) -> bool:
    """Whether so many bytes of files can stay cached without driving out most of what is there."""
    with suppress(OSError, ValueError, IndexError):
        available = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
        return num_bytes < int(available) * 1024 // 2
    return True
