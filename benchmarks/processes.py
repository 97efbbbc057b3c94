"""Running the commands that benchmarks time."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(folder: Path, *words: str | Path) -> None:
    """Run a command in ``folder``, with this repository's packages; end here with what it said where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr.decode(errors='replace')[-3000:]}")
