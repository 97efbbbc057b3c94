"""Lines of metrics.jsonl: a training writes one every few steps, and a kill or a disk may leave half of one."""

import json
from pathlib import Path
from typing import Any

LAST_BYTES = 1 << 16
"""Of the end of a file in which its last line is looked for."""


def parsed(line: str) -> dict[str, Any] | None:
    """The numbers of a line, "step" and "loss" among them; None where it is not whole, or not such a line."""
    try:
        found = json.loads(line)
        is_whole = line.endswith("\n") and isinstance(found["step_seconds"], float) and "loss" in found
        return found if is_whole and isinstance(found["step"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def read(path: Path) -> list[dict[str, Any]]:
    """All lines that can be read, in their order; none where there is no file.  Raises OSError."""
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [line for line in map(parsed, lines) if line is not None]


def last(path: Path) -> dict[str, Any] | None:
    """The last line that can be read, without reading all before it; None where there is none.  Raises OSError."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return None
    return next((line for line in map(parsed, reversed(lines)) if line is not None), None)
