"""How a path is shown to people."""

import os
from pathlib import Path


def shown(path: Path | str) -> str:
    """The path as it is typed here: relative to the working directory where it is inside, else whole."""
    whole = os.path.abspath(path)
    try:
        relative = os.path.relpath(whole)
    except (OSError, ValueError):  # the working directory is gone
        return whole
    return whole if relative.split(os.sep)[0] == os.pardir else relative
