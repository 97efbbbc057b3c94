"""Encoding photos by one worker and by several, each with one core of its own, as each would have one NPU.

    python -m benchmarks.shards

Each turn encodes the same drawn photos into new stores, by one process and by several with a shard each, one after the
other.  "with start" is from the first process's start to the last one's end; "encoding" is the slowest process's time
from loading the model to its record; "processor" is the processor's time of the process that took most of it, start
included, which others on the machine change least.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure
from pipeline.synthetic import shapes

STAGE = "EncodeImages"


def main() -> None:
    options = _options()
    turns = _turns(options.photos, options.resolution, options.workers, options.turns)
    print(
        f"{options.photos} photos of {options.resolution} px, one core a process, seconds (median of {options.turns})"
    )
    print(f"{'':12}{'1 process':>12}{f'{options.workers} processes':>14}{'ratio':>8}   of single turns")
    for place, name in enumerate(("with start", "encoding", "processor")):
        alone, several = ([turn[side][place] for turn in turns] for side in (0, 1))
        ratios = [one / other for one, other in zip(alone, several)]
        median = [statistics.median(values) for values in (alone, several, ratios)]
        print(f"{name:12}{median[0]:12.1f}{median[1]:14.1f}{median[2]:8.2f}   {min(ratios):.2f} to {max(ratios):.2f}")


def figures(rounds: int, photos: int, resolution: int) -> Iterator[Figure]:
    """What two processes take by what one takes: half of it at best, and more where a process starts slowly."""
    alone, several = (list(zip(*side)) for side in zip(*_turns(photos, resolution, 2, rounds)))
    for place, name in enumerate(("2, with start", "2, encoding")):
        yield Figure.of(name, "1 process", several[place], alone[place])


def _turns(photos: int, resolution: int, workers: int, turns: int) -> list[list[tuple[float, float, float]]]:
    """The times of each turn, by one process and by several."""
    with tempfile.TemporaryDirectory() as folder:
        shapes.draw_shapes(Path(folder) / "photos", photos, size=resolution)
        return [
            [_measure(Path(folder) / f"{turn}-{count}", count, resolution) for count in (1, workers)]
            for turn in range(turns)
        ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    return parser.parse_args()


def _measure(folder: Path, count: int, resolution: int) -> tuple[float, float, float]:
    """Encode all photos into a new store.  Returns the times of the table."""
    folder.mkdir()
    experiment = folder / "bench.toml"
    experiment.write_text(f'[data]\nimages = "../photos"\nresolution = {resolution}\n')
    _run("GetModel", experiment)
    _run("CheckData", experiment)
    began = time.monotonic()
    processes = [
        subprocess.Popen(_command(STAGE, experiment, "--shard", f"{number}/{count}", core=core), **QUIET)
        for number, core in zip(range(count), sorted(os.sched_getaffinity(0)))
    ]
    used = [os.wait4(process.pid, 0)[2] for process in processes]
    seconds = time.monotonic() - began
    found = [json.loads(path.read_text()) for path in folder.glob(f"store/entries/*/records/{STAGE}*.json")]
    assert len(found) == len(processes) == count, "a process failed, or there are fewer cores than workers"
    return seconds, max(record["seconds"] for record in found), max(use.ru_utime + use.ru_stime for use in used)


QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _command(stage: str, experiment: Path, *options: str, core: int | None = None) -> list[str]:
    bound = [] if core is None else ["taskset", "-c", str(core)]
    return [*bound, sys.executable, "-m", "pipeline", "run", stage, "--experiment", str(experiment), *options]


def _run(stage: str, experiment: Path) -> None:
    subprocess.run(_command(stage, experiment), check=True, **QUIET)


if __name__ == "__main__":
    main()
