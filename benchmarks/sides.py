"""Two sides of a comparison, MindSpore's and PyTorch's, each a process of its own that is timed in turns.

Whatever else slows the machine slows both, so that the ratios are worth reading.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--torch", required=True, metavar="PYTHON", help="the interpreter that has torch")
    parser.add_argument("--turns", type=int, default=7, help="how often each side has its turn at each part")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per turn; a turn counts with their median")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)  # a child's name, and the folder that both share


def measure(
    module: str, torch: str, turns: int, arguments: Sequence[str], parts: Sequence[str]
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Seconds of each part, ours and PyTorch's: (turns, 2); and what both gave for the first part.

    module: whose command line a child is given: ``arguments`` and ``--side NAME FOLDER``.  Ours starts first.
    """
    with tempfile.TemporaryDirectory() as folder:
        pythons = {"mindspore": sys.executable, "torch": torch}
        both = [Side([python, "-m", module, *arguments, "--side", name, folder]) for name, python in pythons.items()]
        times = {part: np.array([[side.seconds(part) for side in both] for _ in range(turns)]) for part in parts}
        for side in both:
            side.end()
    return times, [side.first for side in both]


class Side:
    """A child process that times its parts when told to.  first: what its first part gave."""

    def __init__(self, command: Sequence[str]):
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.first = self._answer()

    def seconds(self, part: str) -> float:
        print(part, file=self._process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> float:
        for line in self._process.stdout or ():
            if line.startswith("= "):
                return float(line[2:])
        sys.exit(f"{self._process.args[0]} ended with exit code {self._process.wait()}; see its message above")


def serve(parts: Mapping[str, Callable[[], object]], rounds: int) -> None:
    """In a child: print what the first part gives, then the median seconds of each part whose name comes in."""
    first, *others = parts.values()
    found = first()
    for part in others:
        part()
    print("=", found, flush=True)
    for line in sys.stdin:
        part, taken = parts[line.strip()], []
        part()  # brings caches and threads back to it
        for _ in range(rounds):
            began = time.perf_counter()
            part()
            taken.append(time.perf_counter() - began)
        print("=", np.median(taken), flush=True)


def table(times: Mapping[str, np.ndarray]) -> str:
    lines = [f"{'milliseconds, medians':<24}{'MindSpore':>10}{'PyTorch':>10}{'ratio':>8}   of single turns"]
    for part, rows in times.items():
        ours, theirs = 1e3 * np.median(rows, axis=0)
        ratios = rows[:, 0] / rows[:, 1]
        spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
        lines.append(f"{part:<24}{ours:>10.1f}{theirs:>10.1f}{np.median(ratios):>8.2f}   {spread}")
    return "\n".join(lines)
