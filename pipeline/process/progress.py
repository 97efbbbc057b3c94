"""Progress of a stage: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import time

from tqdm import tqdm

LINE_EVERY_SECONDS = 15


def say(text: str, to_stderr: bool = False) -> None:
    """Print a line.  Where nobody can read it any more, as a pipe was closed or a disk is full, the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


class Progress:
    """Counts up to ``total`` things named ``unit``, from ``done`` that are there already; for a ``with`` block."""

    def __init__(self, label: str, total: int, unit: str = "item", done: int = 0):
        self.label, self.total, self.unit = label, total, unit
        self.done, self._note = done, ""
        self._since: tuple[float, int] | None = None
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True) if is_terminal else None

    def __enter__(self):
        self._began = self._said = time.monotonic()
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done, self._note = self.done + count, note
        self._since = self._since or (time.monotonic(), self.done)  # the first thing takes long: a step compiles
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)
        elif time.monotonic() - self._said >= LINE_EVERY_SECONDS:
            self._say()

    def set(self, done: int, total: int) -> None:
        """Say both counts at once, for work that learns its total on the way."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total
        self.advance(done - self.done)

    def _say(self) -> None:
        self._said = time.monotonic()
        began, first = self._since or (self._began, self.done)
        more = self.done - first
        self._print(f", {(self._said - began) / more * (self.total - self.done):.0f} s left" if more else "")

    def _print(self, when: str) -> None:
        note = f", {self._note}" if self._note else ""
        say(f"{self.label}: {self.done}/{self.total} {self.unit}s{when}{note}", to_stderr=True)

    def __exit__(self, *error):
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
        elif self.total:
            self._print(f" in {time.monotonic() - self._began:.1f} s")
