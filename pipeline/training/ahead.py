"""Batches made ahead of the step, in a thread, so that the step does not wait for the store."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Ahead:
    """Makes ``make(number)`` for successive numbers, at most ``depth`` of them before they are asked for.

    ``waited_seconds`` is how long `next` has waited in all.
    """

    def __init__(self, make: Callable[[int], Any], numbers: range, depth: int):
        self.waited_seconds = 0.0
        self._ready: queue.Queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, numbers), name="batches", daemon=True)
        self._thread.start()

    def next(self) -> Any:
        """The next result.  Raises what ``make`` raised for it."""
        began = time.perf_counter()
        result, error = self._ready.get()
        self.waited_seconds += time.perf_counter() - began
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the thread, after the result that it is making."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):  # it may wait for room to put its last result
                self._ready.get(timeout=0.05)

    def _work(self, make, numbers):
        for number in numbers:
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = make(number), None
            except BaseException as error:  # it is raised where the result is asked for
                outcome = None, error
            self._ready.put(outcome)
            if self._stop.is_set() or outcome[1] is not None:
                return


@contextlib.contextmanager
def made_ahead(make: Callable[[int], Any], numbers: range, depth: int = 2) -> Iterator[Ahead]:
    """An `Ahead` whose thread ends with the block."""
    ahead = Ahead(make, numbers, depth)
    try:
        yield ahead
    finally:
        ahead.close()
