"""What is made ahead of its use, in threads, so that a device does not wait for the store or for photos."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Source = TypeVar("Source")
Result = TypeVar("Result")


class Ahead(Generic[Source, Result]):
    """Makes ``make(source)`` for successive sources, ``depth`` of them before they are asked for.

    ``waited_seconds`` is how long `next` has waited in all.
    """

    def __init__(self, make: Callable[[Source], Result], sources: Iterable[Source], depth: int, num_threads: int = 1):
        self.waited_seconds = 0.0
        self._make, self._sources = make, iter(sources)
        self._pool = ThreadPoolExecutor(num_threads, "ahead")
        self._ready: deque[Future[Result]] = deque()
        for _ in range(depth):
            self._begin_another()

    def next(self) -> Result:
        """The next result.  Raises what ``make`` raised for it."""
        began = time.perf_counter()
        try:
            return self._ready.popleft().result()
        finally:
            self.waited_seconds += time.perf_counter() - began
            self._begin_another()

    def close(self) -> None:
        """End the threads, after the results that they are making."""
        self._pool.shutdown(cancel_futures=True)

    def _begin_another(self) -> None:
        for source in self._sources:
            self._ready.append(self._pool.submit(self._make, source))
            return


@contextlib.contextmanager
def made_ahead(
    make: Callable[[Source], Result], sources: Iterable[Source], depth: int = 2, num_threads: int = 1
) -> Iterator[Ahead[Source, Result]]:
    """An `Ahead` whose threads end with the block."""
    ahead = Ahead(make, sources, depth, num_threads)
    try:
        yield ahead
    finally:
        ahead.close()
