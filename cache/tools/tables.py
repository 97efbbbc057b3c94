"""Text for people: aligned tables, sizes, times, and names that cannot garble a terminal."""

import time
from collections.abc import Iterable, Sequence

from cache.core.text import printable

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MAX_TEXT = 80  # characters of a caption in one line


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    """One line for the column names and one for each row; a column whose name begins with ">" is right-aligned."""
    names = [column.removeprefix(">") for column in columns]
    lines = [names, *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(_line(columns, widths, line) for line in lines)


def _line(columns: Sequence[str], widths: Iterable[int], cells: Iterable[str]) -> str:
    padded = [
        cell.rjust(width) if column.startswith(">") else cell.ljust(width)
        for column, width, cell in zip(columns, widths, cells)
    ]
    return "  ".join(padded).rstrip()


def human_bytes(num_bytes: float) -> str:
    """A size in decimal units, as disks are sold: 1.2 GB."""
    unit = 0
    while num_bytes >= 999.5 and unit < len(UNITS) - 1:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return f"{num_bytes:.0f} B" if unit == 0 else f"{num_bytes:.3g} {UNITS[unit]}"


def count(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: 1 item, 1,024 items."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def local_time(time_ns: int) -> str:
    """A time in ns since 1970 as this machine's clock shows it; a dash where there is none."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_ns / 1e9)) if time_ns else "-"


def quoted(text: str) -> str:
    """A caption in one line, cut where it is long."""
    text = printable(text)
    return f'"{text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."}"'
