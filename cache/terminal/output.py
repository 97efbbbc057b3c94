"""Lines for people.

At a terminal, lines fit its width and colours have a meaning (the variable NO_COLOR turns them off). Anywhere else, as
in a log or a pipe, each line is plain text and stays one line, so that grep finds it. What could garble a terminal is
escaped, and nothing in a text is taken for markup::

    show("3 photos", warning("1 of them is cut"), Table(["name", ">tokens"], [("cat.txt", 600)]))
"""

import contextlib
import os
import re
import sys
import textwrap
from typing import TYPE_CHECKING, Literal, TextIO

from cache.core.text import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

    from cache.terminal.table import Table

Meaning = Literal["", "good", "warning", "bad", "quiet", "heading", "typed"]
STYLES: dict[str, str] = {"good": "green", "warning": "yellow", "bad": "red", "quiet": "dim", "heading": "bold"}
NO_BREAK = "\N{NO-BREAK SPACE}"
BESIDE_ITS_UNIT = re.compile(r"(?<=\d) (?=([kMGT]?B|s|dB|px)\b)")


class Marked(str):
    """A line, or a cell of a table, with a meaning that decides its colour; without a terminal it is a plain str."""

    meaning: Meaning

    def __new__(cls, text: object, meaning: Meaning):
        marked = super().__new__(cls, str(text))
        marked.meaning = meaning
        return marked


def good(text: object) -> Marked:
    return Marked(text, "good")


def warning(text: object) -> Marked:
    return Marked(text, "warning")


def bad(text: object) -> Marked:
    return Marked(text, "bad")


def quiet(text: object) -> Marked:
    """What most readers may skip."""
    return Marked(text, "quiet")


def heading(text: object) -> Marked:
    return Marked(text, "heading")


def typed(text: object) -> Marked:
    """A command or a path that somebody will copy: a terminal breaks it where it must, and nobody else does."""
    return Marked(text, "typed")


def style_of(text: object) -> str:
    """What rich calls the colour of a text."""
    return STYLES.get(getattr(text, "meaning", ""), "")


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can move its cursor and show colours."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def show(*parts: "str | Table", to_stderr: bool = False) -> None:
    """Print lines and tables. A line that is too long for the terminal goes on below, indented by two more.

    A text of several lines is shown as so many. Raises OSError where the output takes no more.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    for part in parts:
        if not isinstance(part, str):
            part.print(stream)
        elif is_terminal(stream):
            _print_wrapped(part, stream)
        else:
            print(printable_lines(part), file=stream)
    stream.flush()


def say(*parts: "str | Table", to_stderr: bool = False) -> None:
    """As `show`. Where nobody can read it any more, as a pipe was closed or a disk is full, the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        show(*parts, to_stderr=to_stderr)


def say_below(text: str) -> None:
    """Say why all ends, on standard error: at a terminal below a bar that was not finished, and below ^C."""
    say(*([""] if is_terminal(sys.stderr) else []), text, to_stderr=True)


def _print_wrapped(part: str, stream: TextIO) -> None:
    if getattr(part, "meaning", "") == "typed":
        print(printable_lines(part), file=stream)
        return
    text = "\n".join(line for each in part.split("\n") for line in wrapped(each, num_columns(stream)))
    if style := style_of(part):
        from rich.text import Text

        console(stream).print(Text(text, style), soft_wrap=True)
    else:
        print(text, file=stream)


def wrapped(line: str, width: int) -> list[str]:
    """The line, escaped, in lines of at most ``width``. No number leaves its unit, and no word, as a path, is cut."""
    text = BESIDE_ITS_UNIT.sub(NO_BREAK, printable_lines(line))
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    lines = textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [each.replace(NO_BREAK, " ") for each in lines] or [""]


def num_columns(terminal: TextIO) -> int:
    """How wide a terminal is; the variable COLUMNS can say something else, 80 is taken where nobody says anything."""
    said = os.environ.get("COLUMNS", "")
    return int(said) if said.isdecimal() and int(said) else os.get_terminal_size(terminal.fileno()).columns or 80


def console(stream: TextIO) -> "Console":
    """What rich prints with to a terminal. It takes nothing in a text for markup or for something to colour."""
    from rich.console import Console

    return Console(file=stream, width=num_columns(stream), highlight=False, markup=False, emoji=False)
