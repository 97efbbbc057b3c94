"""``python -m benchmarks.index``: what a store of many items costs before the first row is read, in time and memory.

A store of tiny rows is written for each size, with the usual 1024 items a segment. Then three fresh processes, one
after the other, open it; medians are printed, and of memory the rise, in MiB:

    open      seconds to see all segments and to index their items, as the first read does
    memory    what the process then holds more than before, and at most held meanwhile
    missing   seconds to look up as many items as there are, half of them unknown, and the rise at most meanwhile; this
              looks at the segments again
    8 rows    milliseconds of the first read of 8 random rows, each from a segment that is opened for it

Everything is in the page cache. Memory is read from /proc, so this runs on Linux (glibc) only.
"""

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.figures import Figure, in_child
from cache import Entries, Store

PROCESSES = 3
MAX_ITEMS = 1024
RECIPE = {"kind": "benchmark", "dtype": "float16", "shape": [1]}
KNOWN, UNKNOWN = 0, 1  # seeds of items


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the temporary files go (default: TMPDIR or /tmp)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for num_items in options.items:
        with tempfile.TemporaryDirectory(prefix="benchmark-index-", dir=options.folder) as folder:
            rows.append({"items": num_items, "write_seconds": build(folder, num_items)} | opened(folder, num_items))
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def figures(rounds: int, num_items: int) -> Iterator[Figure]:
    """What opening a store of so many items costs by sorting as many addresses."""
    addresses = np.frombuffer(np.random.default_rng(KNOWN).bytes(16 * num_items), "S16")
    with tempfile.TemporaryDirectory(prefix="benchmark-index-") as folder:
        build(folder, num_items)
        sorting, found = [], []
        for _ in range(rounds):
            sorting.append(median(watched(np.sort, addresses)["seconds"] for _ in range(9)))
            found.append(in_child(measure, folder, num_items))
    yield Figure.of("open", "sorting", (each["open_seconds"] for each in found), sorting)
    yield Figure.of("missing", "sorting", (each["missing_seconds"] for each in found), sorting)
    sizes = [num_items * addresses.itemsize / 2**20] * rounds
    yield Figure.of("memory of opening", "addresses", (each["open_peak_MiB"] for each in found), sizes)


def build(folder: str, num_items: int) -> float:
    """Write the store and return how many seconds that took."""
    value, known = np.ones(1, np.float16), items(num_items, KNOWN)
    began = time.perf_counter()
    with entries_in(folder).writer(max_items=MAX_ITEMS) as writer:
        for item in known:
            writer.write(item, value)
    return time.perf_counter() - began


def opened(folder: str, num_items: int) -> dict:
    """Medians of what fresh processes measure."""
    results = [in_child(measure, folder, num_items) for _ in range(PROCESSES)]
    return {name: median(result[name] for result in results) for name in results[0]}


def measure(folder: str, num_items: int) -> dict:
    """Open the store, look items up and read some. Runs in a process of its own."""
    entries = entries_in(folder)
    opening = watched(entries.index)
    known = items(num_items, KNOWN)
    asked = known[: num_items // 2] + items(num_items - num_items // 2, UNKNOWN)
    missing = watched(entries.missing, asked)
    batch = np.random.default_rng(0).choice(known, 8, replace=False).tolist()
    reading = watched(entries.read_many, batch)
    return {
        "open_seconds": opening["seconds"],
        "open_memory_MiB": opening["rise_MiB"],
        "open_peak_MiB": opening["peak_MiB"],
        "missing_seconds": missing["seconds"],
        "missing_peak_MiB": missing["peak_MiB"],
        "read_seconds": reading["seconds"],
    }


def watched(function, *arguments) -> dict:
    """The seconds that a call takes, and by how many MiB memory rose until it had ended, and at most meanwhile."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free, but still held, would hide a rise
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = memory_MiB("VmRSS"), time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - began
    rise, peak = memory_MiB("VmRSS") - before, memory_MiB("VmHWM") - before
    del result
    return {"seconds": seconds, "rise_MiB": rise, "peak_MiB": peak}


def memory_MiB(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


def entries_in(folder: str) -> Entries:
    return Store(folder).entries(RECIPE)


def items(num_items: int, seed: int) -> list[str]:
    """Random addresses, the same for one seed."""
    text = np.random.default_rng(seed).bytes(16 * num_items).hex()
    return [text[start : start + 32] for start in range(0, len(text), 32)]


def table(rows: list[dict]) -> str:
    lines = [
        f"{'':>10}{'write':>9}{'open':>9}{'memory':>9}{'peak':>9}{'missing':>9}{'peak':>9}{'8 rows':>9}",
        f"{'items':>10}{'s':>9}{'s':>9}{'MiB':>9}{'MiB':>9}{'s':>9}{'MiB':>9}{'ms':>9}",
    ]
    for row in rows:
        items, write, opening, memory, peak, missing, missing_peak, read = row.values()
        lines.append(
            f"{items:>10}{write:>9.1f}{opening:>9.3f}{memory:>9.1f}{peak:>9.1f}{missing:>9.3f}{missing_peak:>9.1f}"
            f"{read * 1e3:>9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
