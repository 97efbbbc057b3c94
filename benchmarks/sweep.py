"""A sweep of six beside six trainings that encode for themselves, with the small model of the package.

    python -m benchmarks.sweep

Each turn does both, one after the other: ``python -m tasks sweep`` with three learning rates and two ranks; and the
same six experiments by ``luigi --module tasks TrainLoRA``, each with an empty store, as a script does that encodes what
it trains on.  "whole" is from the first process's start to the last one's end; "processor" is the time of all
processes, which others on the machine change least.
"""

import argparse
import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.processes import run
from pipeline.synthetic import shapes

RATES, RANKS = ("1e-4", "3e-4", "1e-3"), (4, 16)
EXPERIMENT = """
name = "{name}"
paths = {{store = "{store}"}}
data = {{images = "photos", resolution = {resolution}, max_sequence_length = 24}}
lora = {{rank = {rank}, alpha = {rank}}}
train = {{steps = {steps}, learning_rate = {rate}}}
"""


def main() -> None:
    options = _options()
    turns = [_turn(options) for _ in range(options.turns)]
    head = f"{options.photos} photos of {options.resolution} px, 6 trainings of {options.steps} steps"
    print(f"{head}, seconds (median of {options.turns})")
    print(f"{'':12}{'one sweep':>12}{'six alone':>12}{'ratio':>8}   of single turns")
    for place, name in enumerate(("whole", "processor")):
        sweep, alone = ([turn[side][place] for turn in turns] for side in (0, 1))
        ratios = [other / own for own, other in zip(sweep, alone)]
        median = [statistics.median(values) for values in (sweep, alone, ratios)]
        print(f"{name:12}{median[0]:12.1f}{median[1]:12.1f}{median[2]:8.2f}   {min(ratios):.2f} to {max(ratios):.2f}")


def figures(rounds: int, **sizes) -> Iterator[Figure]:
    """What a sweep takes by six trainings that encode for themselves."""
    turns = [_turn(argparse.Namespace(**sizes)) for _ in range(rounds)]
    for place, name in enumerate(("whole", "processor")):
        yield Figure.of(name, "six alone", *([turn[side][place] for turn in turns] for side in (0, 1)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=48)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=1)
    return parser.parse_args()


def _turn(options: argparse.Namespace) -> list[tuple[float, float]]:
    """Both sides in a new folder.  Returns of each the times of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes.draw_shapes(folder / "photos", options.photos, size=options.resolution)
        return [_timed(lambda: _sweep(folder, options)), _timed(lambda: _alone(folder, options))]


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    began, used = time.perf_counter(), _processor_seconds()
    work()
    return time.perf_counter() - began, _processor_seconds() - used


def _processor_seconds() -> float:
    """Of all processes that have been waited for, those below them too."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def _sweep(folder: Path, options: argparse.Namespace) -> None:
    path = _write(folder, options, "swept", RATES[0], RANKS[0])
    ranks = ",".join(map(str, RANKS))
    swept = ["--set", f"train.learning_rate={','.join(RATES)}", "--set", f"lora.rank={ranks}"]
    run(folder, sys.executable, "-m", "tasks", "sweep", path, *swept, "--with", f"lora.alpha={ranks}")


def _alone(folder: Path, options: argparse.Namespace) -> None:
    for number, (rate, rank) in enumerate(itertools.product(RATES, RANKS)):
        path = _write(folder, options, f"alone-{number}", rate, rank)
        run(folder, sys.executable, "-m", "luigi", "--module", "tasks", "TrainLoRA", "--experiment", path)


def _write(folder: Path, options: argparse.Namespace, name: str, rate: str, rank: int) -> Path:
    """An experiment with a store of its own, which is empty yet."""
    path = folder / f"{name}.toml"
    settings = {"name": name, "store": f"store-{name}", "rate": rate, "rank": rank}
    path.write_text(EXPERIMENT.format(**settings, resolution=options.resolution, steps=options.steps))
    return path


if __name__ == "__main__":
    main()
