"""Text of others on its way to a terminal."""

import io
import sys


def printable(text: str) -> str:
    """Escape what could garble a terminal, begin a line, or hide a part of a name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_anything() -> None:
    """Have standard output escape what it cannot spell, such as a file's name that is no UTF-8, and not end there."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable_lines(text: str) -> str:
    """As `printable`, of a message of several lines."""
    return "\n".join(map(printable, text.split("\n")))
