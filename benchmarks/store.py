"""``python -m benchmarks.store``: what reading and writing entries costs, against the least that it can cost.

Each kind of row is written and read by several contenders in one process, in turns, in another order each round; MB/s
(1e6 bytes) are medians over the rounds. Read the ratios, each to the first line of its block, rather than the MB/s:

    writes      against one raw file, written in order, with one fsync at the end
    cold reads  against a np.memmap of that file, after the page cache was told to drop it; opening included
    cold 1/8    the same for an eighth of the rows, so that what is read besides them is of no use: more like a store
                that is larger than the memory
    first read  the same for all rows with the file in the page cache: ours verifies each row's checksum here
    warm reads  against that memmap again, each page of it touched before; ours has verified each row before

Reads are of 8 random rows at a time, each row once, into one buffer that is used again. Cold reads mean something where
--folder is on a disk, and not where it is in memory, as /tmp may be.
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.contenders import FilePerRow, Ours, PlainArray, Raw, Zarr
from benchmarks.figures import Figure
from cache.core.layout import Layout

BATCH = 8
ZARR_ROWS = 4 * BATCH
"""How many rows zarr's own reader is asked for; it is slow."""
WARM_TURNS = 5
"""Warm reads take so little time that each contender has this many turns in a round."""
KINDS = {
    "T5 rows": ("bfloat16", (512, 4096), 64),
    "latents": ("float32", (16, 64, 64), 1024),
    "pooled vectors": ("float32", (768,), 1024),
}
"""dtype, shape of a row, how many (a multiple of 64); the latents are those of a picture of 512 x 512 pixels."""
WANTED_WARM = {"latents": 0.8, "T5 rows": 0.85}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the temporary files go (0.8 GB; default: TMPDIR or /tmp)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-store-", dir=options.folder) as folder:
        for kind, (dtype, shape, num_rows) in KINDS.items():
            result[kind] = measure(Path(folder, kind), Layout(dtype, shape), num_rows, options.rounds)
    print(json.dumps(result, indent=2) if options.json else report(result))


def figures(rounds: int) -> Iterator[Figure]:
    """The time that the store takes by that of a raw file or a memmap."""
    for kind, (dtype, shape, num_rows) in KINDS.items():
        with tempfile.TemporaryDirectory(prefix="benchmark-store-") as folder:
            speeds = measure_rounds(Path(folder), Layout(dtype, shape), num_rows, rounds)
        del speeds["cold 1/8"]
        for what, by_whom in speeds.items():
            limit = limit_of(what)
            yield Figure.of(f"{kind}, {what}", limit, by_whom[limit], by_whom["ours"])  # speeds: the other way round


def measure(folder: Path, layout: Layout, num_rows: int, rounds: int) -> dict:
    """Median MB/s by what was done and by whom: {"writes": {"raw file": ...}, ...}. Leaves no file behind."""
    speeds = measure_rounds(folder, layout, num_rows, rounds)
    return {what: {who: median(all_) for who, all_ in by_whom.items()} for what, by_whom in speeds.items()}


def measure_rounds(folder: Path, layout: Layout, num_rows: int, rounds: int) -> dict:
    """The MB/s of every round, in order, by what was done and by whom."""
    rows = random_rows(layout, num_rows)
    contenders = [Raw(folder / "raw", layout), Ours(folder / "ours", layout), FilePerRow(folder / "each", layout)]
    speeds = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for contender in shuffled(contenders, number):
            contender.remove()
            settle(rows.nbytes)
            began = time.perf_counter()
            contender.write(rows)
            speeds["writes"][contender.writes].append(rows.nbytes / 1e6 / (time.perf_counter() - began))
        order = np.random.default_rng(number).permutation(num_rows).tolist()
        measure_opening(contenders, order, number, speeds)
        measure_warm(contenders, order, number, speeds)
    for contender in contenders:
        contender.remove()
    return speeds


def settle(num_bytes: int) -> None:
    """Let the disk finish, and have as much free memory at hand: a virtual machine may have to get it from its host,
    which then would be at the cost of whoever writes next."""
    os.sync()
    np.ones(num_bytes, np.uint8)


def measure_opening(contenders, order, number, speeds) -> None:
    """Reads by readers that are opened for them: from the disk, and then from the page cache."""
    for what, numbers in (("cold reads", order), ("cold 1/8", order[: len(order) // 8])):
        for contender in shuffled(contenders, number):
            contender.drop_from_page_cache()
            speeds[what][contender.reads].append(read_speed(contender, numbers))
    raw, ours, _ = contenders
    for contender in (raw, ours):
        read_speed(contender, order)
    for contender in shuffled([raw, ours], number):
        speeds["first read"][contender.reads].append(read_speed(contender, order))


def measure_warm(contenders, order, number, speeds) -> None:
    """Reads by readers that have read each row before."""
    raw, ours, each = contenders
    zarr, plain = Zarr(ours.folder, ours.layout), PlainArray(raw.folder, raw.layout)
    opened = [(contender, contender.reader(), order) for contender in (raw, plain, ours, each)]
    opened.append((zarr, zarr.reader(), order[:ZARR_ROWS]))
    for turn in range(WARM_TURNS + 1):
        for contender, read, numbers in shuffled(opened, number * WARM_TURNS + turn):
            result = read_speed(contender, numbers, read)
            if turn:  # the first one warms
                speeds["warm reads"][contender.reads].append(result)


def read_speed(contender, numbers, read=None) -> float:
    """MB/s of reading each row once, a batch at a time; with opening the contender where ``read`` is not given."""
    out = np.ones((BATCH, *contender.layout.shape), contender.layout.stored)  # touched, so that it is in memory
    began = time.perf_counter()
    read = read or contender.reader(numbers)
    for start in range(0, len(numbers), BATCH):
        read(numbers[start : start + BATCH], out)
    return len(numbers) * contender.layout.data_bytes / 1e6 / (time.perf_counter() - began)


def shuffled(values: list, seed: int) -> list:
    return random.Random(seed).sample(values, len(values))


def random_rows(layout: Layout, num_rows: int) -> np.ndarray:
    """Normal numbers, which do not compress: (num_rows, *shape) in the stored dtype."""
    normal = np.random.default_rng(0).standard_normal((num_rows, *layout.shape), np.float32)
    return normal.astype(layout.real).view(layout.stored)


def report(result: dict) -> str:
    lines = [f"{'medians':<40}{'MB/s':>8}{'ratio':>9}"]
    for kind, speeds in result.items():
        dtype, shape, num_rows = KINDS[kind]
        lines.append(f"{kind}: {num_rows} of {dtype} {list(shape)}, {Layout(dtype, shape).data_bytes >> 10} KiB each")
        for what, by_whom in speeds.items():
            lines += block(what, by_whom)
        if speeds["cold reads"]["memmap"] > 0.8 * speeds["warm reads"]["memmap"]:
            lines.append("  cold is as fast as warm: the page cache was not dropped, or --folder is in memory")
    return "\n".join([*lines, "; ".join(wanted(kind, result[kind]) for kind in WANTED_WARM)])


def block(what: str, by_whom: dict) -> list[str]:
    """The lines of one measurement, the limit first and then from fast to slow."""
    limit = limit_of(what)
    names = [limit, *sorted(by_whom.keys() - {limit}, key=by_whom.get, reverse=True)]
    labels = [f"  {what if who == limit else '':<12}{who}" for who in names]
    return [
        f"{label:<40}{by_whom[who]:>8.0f}{by_whom[who] / by_whom[limit]:>9.3f}" for label, who in zip(labels, names)
    ]


def limit_of(what: str) -> str:
    return "raw file" if what == "writes" else "memmap"


def wanted(kind: str, speeds: dict) -> str:
    """What ours reached of that which the store was designed to reach."""
    ratios = {what: by_whom["ours"] / by_whom[limit_of(what)] for what, by_whom in speeds.items()}
    return (
        f"{kind}: warm {ratios['warm reads']:.2f} (wanted {WANTED_WARM[kind]}), "
        f"cold {ratios['cold reads']:.2f} (wanted 1), "
        f"written at {speeds['writes']['ours']:.0f} MB/s or {ratios['writes']:.2f} (wanted 800 or 0.6)"
    )


if __name__ == "__main__":
    main()
