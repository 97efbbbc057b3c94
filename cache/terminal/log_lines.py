"""Bars of other libraries in a log: a line now and then, instead of one endless line of all that was ever drawn.

A bar goes back to the beginning of its line with a carriage return and draws anew. A terminal shows the last drawing; a
log keeps them all. Here a log gets what a terminal would show: the last drawing when the line ends, and one in between
every LINE_EVERY_SECONDS.
"""

import re
import sys
import time
from typing import Any, TextIO

from cache.terminal.progress import LINE_EVERY_SECONDS

MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""Movements of the cursor and colours, as bars below each other are drawn with."""


class LogLines:
    """A stream that is no terminal; all but ``write`` is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream, self._drawn, self._said = stream, "", time.monotonic()

    def write(self, text: str) -> int:
        if "\r" not in text and not self._drawn:
            self._stream.write(text)
            return len(text)
        *ended, rest = MOVES.sub("", text).replace("\r\n", "\n").split("\n")
        for line in ended:
            self._draw(line)
            self._say()
        self._draw(rest)
        if self._drawn and time.monotonic() - self._said >= LINE_EVERY_SECONDS:
            self._say()
        return len(text)

    def _draw(self, text: str) -> None:
        """Go on with the line, or begin it anew where the text does."""
        before, _, after = text.rpartition("\r")
        self._drawn = after or before.rpartition("\r")[2] if "\r" in text else self._drawn + text

    def _say(self) -> None:
        if self._drawn.strip():
            self._stream.write(self._drawn.strip() + "\n")
        self._drawn, self._said = "", time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install() -> None:
    """Have this process's output be such, where it is no terminal; safe to call twice."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, LogLines) and not stream.isatty():
            setattr(sys, name, LogLines(stream))
