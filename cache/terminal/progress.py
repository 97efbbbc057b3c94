"""How far a work is: a bar or a clock at a terminal, a line now and then in a log; both on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from cache.core.text import printable
from cache.terminal.output import is_terminal, say
from cache.terminal.words import duration

LINE_EVERY_SECONDS = 15
REFRESHES_PER_SECOND = 4


class Progress:
    """Counts up to ``total`` things named ``unit``, from ``done`` that are there already; for a ``with`` block::

        with Progress("T5", len(captions), "caption") as progress:
            for caption in captions:
                encode(caption)
                progress.advance()

    says_end: whether a line at the end says how long it took.
    """

    def __init__(self, label: str, total: int, unit: str = "item", done: int = 0, says_end: bool = True):
        self.label, self.total, self.unit, self.note, self._says_end = label, total, unit, "", says_end
        self.done = self._first = done
        self._pace: float | None = None  # seconds for one thing
        self._left_out: tuple[float, int] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._began = self._said = time.monotonic()
        self._is_live = is_terminal(sys.stderr)
        if self._is_live:
            self._stack.enter_context(_bar(self))
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done. What `leave_out` has not named takes part in telling the time that is left."""
        now = time.monotonic()
        if not self._left_out:  # the first ones take long, as memory is allocated or something is compiled
            self.leave_out(now - self._began, count)
        seconds, number = self._left_out or (0.0, 0)
        self.done, self.note = self.done + count, note
        if counted := self.done - self._first - number:
            self._pace = (now - self._began - seconds) / counted
        if not self._is_live and now - self._said >= LINE_EVERY_SECONDS:
            self._said = now
            say(f"{self.label}: {self.words()}", to_stderr=True)

    def say_now(self, note: str) -> None:
        """Say what takes a while, such as ``compiling, about 34 s``, before it is done."""
        self.note = note or self.note
        if note and not self._is_live:
            say(f"{self.label}: {self.words()}", to_stderr=True)

    def leave_out(self, seconds: float, count: int = 1) -> None:
        """``count`` of the things took ``seconds`` because they were the first of their kind, as compiled steps are."""
        before, number = self._left_out or (0.0, 0)
        self._left_out = before + seconds, number + count

    def set(self, done: int, total: int, note: str = "") -> None:
        """Say both counts at once, for work that learns its total on the way."""
        self.total = total
        self.advance(done - self.done, note)

    @property
    def seconds_left(self) -> float | None:
        """None while nobody knows."""
        return None if self._pace is None else self._pace * (self.total - self.done)

    def words(self, when: str = "") -> str:
        """Such as ``120/500 steps, 63 s left, loss 0.3731``. when: instead of the time that is left."""
        if not when and self.seconds_left is not None:
            when = f", {duration(self.seconds_left)} left"
        note = f", {self.note}" if self.note else ""
        return f"{self.done:,}/{self.total:,} {self.unit}s{when}{note}"

    def __exit__(self, *error):
        took = f" in {duration(time.monotonic() - self._began)}"
        self._stack.close()
        if self.total and self._says_end:
            say(f"{self.label}: {self.words(took)}", to_stderr=True)


@contextlib.contextmanager
def busy(text: str) -> Iterator[None]:
    """Say what takes a while and cannot be counted, as ``loading T5 (9.5 GB)``; a terminal shows a clock."""
    if not is_terminal(sys.stderr):
        say(text, to_stderr=True)
        yield
        return
    began = time.monotonic()

    def words() -> str:
        return f"{text}: {duration(time.monotonic() - began)}"

    with _live(lambda: _text(words())):
        yield
    say(words(), to_stderr=True)


# --- at a terminal ------------------------------------------------------------------------------------------------


def _bar(progress: Progress) -> contextlib.AbstractContextManager:
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table

    def row():
        if not progress.total:
            return _text(progress.label)  # it learns how many there are
        grid = Table.grid("label", Column("bar", ratio=1), "words", padding=(0, 2, 0, 0), expand=True)
        bar = ProgressBar(progress.total, progress.done, complete_style="cyan", finished_style="green")
        grid.add_row(_text(progress.label), bar, _text(progress.words()))
        return grid

    return _live(row)


def _text(text: str):
    from rich.text import Text

    return Text(printable(text), no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def _live(render: Callable) -> Iterator[None]:
    """Show what ``render()`` gives, again and again, at the end of the terminal, and take it away again.

    What is printed meanwhile stands above it.
    """
    from rich.live import Live

    live = Live(
        get_renderable=render,
        console=_console(),
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
        redirect_stdout=is_terminal(sys.stdout),
    )
    with contextlib.suppress(OSError):  # the terminal may be gone
        live.start(refresh=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            live.stop()


def _console():
    from rich.console import Console

    class WithCursor(Console):
        """A terminal whose cursor is never hidden: nobody would show it again for a process that is killed."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

    return WithCursor(file=sys.stderr, highlight=False, markup=False, emoji=False)
