"""Sizes, times, counts and captions in people's words."""

import time

from cache.core.text import printable

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
MAX_TEXT = 80  # characters of a caption in one line


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


def duration(seconds: float) -> str:
    """Such as 83 ms, 6.3 s, 63 s, 12 min, 3 h 20 min."""
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def quoted(text: str) -> str:
    """A caption in one line, cut where it is long."""
    text = printable(text)
    return f'"{text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."}"'
