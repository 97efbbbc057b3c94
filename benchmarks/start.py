"""``python -m benchmarks.start``: what a stage's process costs before and after its work, beside ``import mindspore``.

In turns, so that a busy machine slows all of them: Python alone, MindSpore's import, and a process that imports what a
stage imports, sets the device up and ends as a stage does, once as it is and once with mindone's packages as they come.
"a fork" does the same as a fork of a process that has imported all, as Luigi's stages do on CPU.  CPU seconds are of
user and system; on a busy machine they say more than the clock.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figures import Figure

ROOT = Path(__file__).parents[1]
STAGE = """
from pipeline.process import ending
ending.prepare()
from pipeline import commands
from pipeline.devices import device
from pipeline.flux import models
device.use("CPU")
for component in {components}:
    models.model_class(component)
ending.at_once(0)
"""
AS_IT_COMES = "from pipeline.devices import by_need; by_need.install = lambda: None\n"
FORKED = """
import gc, os, time
from pipeline import commands
from pipeline.devices import device
from pipeline.flux import models
device.load_libraries()
gc.freeze()
before, began = os.times(), time.perf_counter()
if os.fork() == 0:
    device.use("CPU")
    models.model_class("transformer")
    os._exit(0)
os.wait()
after = os.times()
print(time.perf_counter() - began, sum(after[:4]) - sum(before[:4]))
"""
FORK = "a fork"
COMPONENTS = {"captions": ["text_encoder"], "images": ["vae"], "training, drawing": ["transformer"]}
REFERENCE = "import mindspore"
PROCESSES = {
    "python": "pass",
    REFERENCE: "import mindspore",
    **{name: STAGE.format(components=parts) for name, parts in COMPONENTS.items()},
    FORK: FORKED,
    "mindone as it comes": AS_IT_COMES + STAGE.format(components=["transformer"]).replace("ending.at_once(0)", ""),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = _measure(list(PROCESSES), options.rounds)
    medians = {name: [statistics.median(each) for each in zip(*costs)] for name, costs in found.items()}
    print(f"{'medians':<22}{'s':>7}{'ratio':>7}{'CPU s':>8}{'ratio':>7}")
    for name, (wall, cpu) in medians.items():
        ratios = wall / medians[REFERENCE][0], cpu / medians[REFERENCE][1]
        print(f"{name:<22}{wall:>7.2f}{ratios[0]:>7.2f}{cpu:>8.2f}{ratios[1]:>7.2f}")


def figures(rounds: int) -> Iterator[Figure]:
    """What starting and ending a stage costs by ``import mindspore``."""
    found = {name: list(zip(*costs)) for name, costs in _measure([REFERENCE, *COMPONENTS, FORK], rounds).items()}
    for name in [*COMPONENTS, FORK]:
        for place, what in enumerate(("", ", CPU")):
            yield Figure.of(f"{name}{what}", REFERENCE, found[name][place], found[REFERENCE][place])


def _measure(names: Sequence[str], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """The costs of each process, in turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(_costs(PROCESSES[name]))
    return found


def _costs(code: str) -> tuple[float, float]:
    """Seconds, and seconds of the CPU, of a process that runs ``code``, or that it prints."""
    began, before = time.perf_counter(), os.times()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", code]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    if printed:
        wall, cpu = map(float, printed.split())
        return wall, cpu
    after = os.times()
    used = sum(after[2:4]) - sum(before[2:4])
    return time.perf_counter() - began, used


if __name__ == "__main__":
    main()
