"""``python -m benchmarks``: measure all of it, and compare the figures with those that the repository keeps.

Each figure is a ratio inside one run: our cost by that of a yardstick, measured in turns on
the same machine, such as a compiled step by PyNative's, or a read of the store by that of a
memmap.  More is slower, or larger.  A figure also changes where its yardstick does: where
another version of MindSpore has a faster PyNative, a compiled step is said to be slower.

Ends in a table beside the figures of benchmarks/kept.json for this kind of machine (the
CPU's model and the number of cores).  "slower" and "faster" are said where the medians
differ by more than 1.25 times, and the middle half of the rounds now lies wholly outside
the middle half of the rounds kept; of a single round, where they differ by more than 1.5
times.  A smaller difference can be chance.
"""

import argparse
import os
import subprocess
from pathlib import Path

from benchmarks import kept, measurements
from benchmarks.figures import Figure
from benchmarks.kept import Found, Kept
from benchmarks.machine import machine
from benchmarks.measurements import Measurement
from cache.terminal.arguments import Parser
from cache.terminal.output import bad, good, heading, show, warning
from cache.terminal.table import Table

BUSY = 0.5
"""From this load on, other work is said to disturb."""


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # processes of measurements: no line between ours
    wanted = chosen(options)
    here = machine() | {"torch": version_of_torch(options.torch)} if options.torch else machine()
    show(heading(described(here)))
    if here["load"] > BUSY:
        show(warning(f"other work is running (load {here['load']}): ratios will scatter, and none should be kept"))
    found, failed = measure_all(wanted, options.torch)
    before = kept.read(options.kept, here["kind"])
    slower = compare(found, before)
    if options.keep and found:
        kept.keep(options.kept, here, found)
        show(f"kept in {options.kept}")
    if failed:
        show(bad(f"not measured, as said above: {', '.join(failed)}"))
    return 1 if failed or (options.check and slower and before and before.is_same_kind) else 0


def parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {each.name:<14} {each.what}" for each in measurements.ALL)
    result = Parser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"what is measured, each also by itself as python -m benchmarks.NAME:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(
        "--only", nargs="+", choices=[each.name for each in measurements.ALL], metavar="NAME", help="these only"
    )
    result.add_argument("--quick", action="store_true", help="fewer rounds, and not what takes minutes")
    result.add_argument(
        "--torch", metavar="PYTHON", help="that has torch, diffusers, peft: for what is measured beside PyTorch"
    )
    result.add_argument("--check", action="store_true", help="exit code 1 where something is slower than what is kept")
    result.add_argument("--keep", action="store_true", help="keep what was measured, for later runs to compare with")
    result.add_argument("--kept", type=Path, default=kept.PATH, metavar="FILE", help="(benchmarks/kept.json)")
    return result


def chosen(options: argparse.Namespace) -> dict[Measurement, int]:
    """What to measure, and in how many rounds."""
    rounds = {each: each.quick if options.quick else each.rounds for each in measurements.ALL}
    if not options.only:
        return {each: number for each, number in rounds.items() if number and (options.torch or not each.needs_torch)}
    named = {each: number or 1 for each, number in rounds.items() if each.name in options.only}
    if beside := [each.name for each in named if each.needs_torch and not options.torch]:
        parser().error(f"{', '.join(beside)}: --torch PYTHON is needed")
    return named


def measure_all(wanted: dict[Measurement, int], torch: str | None) -> tuple[Found, list[str]]:
    """All figures, each shown as soon as it is there; and the names of measurements that failed."""
    found: Found = {}
    failed = []
    for measurement, rounds in wanted.items():
        more = {"torch": torch} if measurement.needs_torch else {}
        figures = []
        try:
            for figure in measurement.figures(rounds, **measurement.sizes, **more):
                show(line(measurement, figure))
                figures.append(figure)
        except (Exception, SystemExit) as error:  # the others are of use without it
            show(bad(f"{measurement.name}: {type(error).__name__}: {error}"))
            failed.append(measurement.name)
        else:
            found[measurement] = figures
    return found, failed


def compare(found: Found, before: Kept | None) -> bool:
    """Show the table.  Returns whether something is slower."""
    rows, marks = [], []
    for measurement, figures in found.items():
        rows.append([heading(measurement.name), "", "", "", "", ""])
        for now in figures:
            old = before and before.figure(measurement, now.name)
            mark = kept.change(now, old) if old else ""
            cells = [number(old.ratio), f"{now.ratio / old.ratio:.2f}"] if old else ["-", "-"]
            colour = {"slower": bad, "faster": good}.get(mark, str)
            rows.append([f"  {now.name}", now.yardstick, number(now.ratio), *cells, colour(mark)])
            marks.append(mark)
    if rows:
        show("", Table(["cost of", "by that of", ">now", ">kept", ">change", ""], rows))
    show(compared_with(before, marks))
    return "slower" in marks


def compared_with(before: Kept | None, marks: list[str]) -> str:
    if before is None:
        return warning("nothing is kept yet to compare with; --keep does, on an idle machine")
    told = f"kept: {described(before.machine)}"
    if before.machine["load"] > BUSY:
        told += f", beside other work (load {before.machine['load']})"
    if not before.is_same_kind:
        return warning(f"{told}: another kind of machine: changes are of little worth, and --check passes")
    return f"{told}; slower: {marks.count('slower')}, faster: {marks.count('faster')}"


def line(measurement: Measurement, figure: Figure) -> str:
    spread = f"{number(figure.low)} to {number(figure.high)}" if figure.rounds > 1 else "one round"
    return f"{measurement.name:<14}{figure.name:<27}{number(figure.ratio):>6} of {figure.yardstick} ({spread})"


def number(value: float) -> str:
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def described(machine: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    torch = f", torch {machine['torch']}" if "torch" in machine else ""
    return f"{machine['kind']}, {machine['memory_GiB']} GiB; {versions}{torch}; {machine['commit']}, {machine['date']}"


def version_of_torch(python: str) -> str:
    command = [python, "-c", "import torch; print(torch.__version__)"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        parser().error(f"--torch {python} cannot import torch ({type(error).__name__})")


if __name__ == "__main__":
    raise SystemExit(main())
