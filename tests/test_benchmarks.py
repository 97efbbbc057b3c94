"""`python -m benchmarks`: what it measures is there, and a slower figure is seen."""

import inspect
import json

import pytest

from benchmarks import __main__ as command_line
from benchmarks import kept, measurements
from benchmarks.figures import Figure
from benchmarks.measurements import Measurement


@pytest.mark.parametrize("measurement", measurements.ALL, ids=lambda each: each.name)
def test_each_measurement_takes_its_sizes(measurement):
    more = {"torch": "python"} if measurement.needs_torch else {}
    assert inspect.isgeneratorfunction(measurement.figures)
    inspect.signature(measurement.figures).bind(measurement.quick or 1, **measurement.sizes, **more)


def figure(low: float, ratio: float, high: float) -> Figure:
    return Figure("reads", "memmap", ratio, low, high, 5)


@pytest.mark.parametrize(
    "now, said",
    [
        (figure(1.9, 2.0, 2.1), "slower"),
        (figure(1.1, 2.0, 2.1), ""),  # half of the rounds now and half of those kept overlap
        (figure(1.21, 1.22, 1.23), ""),  # less than 1.25 times
        (figure(0.5, 0.6, 0.7), "faster"),
        (figure(0.5, 0.6, 0.95), ""),
        (Figure("reads", "memmap", 1.4, 1.4, 1.4, rounds=1), ""),  # one round: 1.5 times
        (Figure("reads", "memmap", 1.6, 1.6, 1.6, rounds=1), "slower"),
        (figure(0.81, 0.82, 0.83), ""),
    ],
)
def test_a_figure_is_slower_where_it_is_neither_little_nor_chance(now, said):
    assert kept.change(now, figure(0.9, 1.0, 1.2)) == said


def test_figures_are_compared_round_by_round():
    """One round in which the whole machine was slow changes no ratio; one in which one side was moves no half."""
    found = Figure.of("reads", "memmap", ours=[2, 20, 2, 2, 30], theirs=[1, 10, 1, 1, 1])
    assert (found.low, found.ratio, found.high) == (2, 2, 2)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command with a small measurement: (exit code, what it said)."""
    small = Measurement("digests", "", 2, 2, {"files": 1, "megabytes": 1})
    monkeypatch.setattr(measurements, "ALL", (small,))

    def call(*options: str) -> tuple[int, str]:
        code = command_line.main(["--kept", str(tmp_path / "kept.json"), *options])
        return code, capsys.readouterr().out

    return call


def scale(path, **factors: float) -> None:
    """Multiply what is kept of the figures whose name begins so."""
    tables = json.loads(path.read_text())
    (table,) = tables.values()
    for name, row in table["measurements"]["digests"]["figures"].items():
        factor = factors[name.partition(",")[0].split()[-1]]
        row |= {key: row[key] * factor for key in ("ratio", "low", "high")}
    path.write_text(json.dumps(tables))


def marks(text: str) -> list[str]:
    return [line.split()[-1] for line in text.splitlines() if line.startswith("  from")]


def test_what_is_slower_than_what_is_kept_is_marked_and_fails_the_check(run, tmp_path):
    path = tmp_path / "kept.json"
    code, said = run("--check")
    assert code == 0 and "nothing is kept yet" in said and not path.exists()
    assert run("--keep")[0] == 0
    scale(path, memory=1e-4, disk=1e4)  # far beyond what the busiest machine does
    code, said = run("--check")
    assert code == 1 and marks(said) == ["slower", "slower", "faster", "faster"]
    assert "slower: 2, faster: 2" in said
    assert run()[0] == 0

    path.write_text(path.read_text().replace("cores", "cores of another kind", 1))
    code, said = run("--check")
    assert code == 0 and "slower" in marks(said) and "another kind of machine" in said


def test_figures_of_other_sizes_are_not_compared(run, tmp_path):
    run("--keep")
    path = tmp_path / "kept.json"
    path.write_text(path.read_text().replace('"megabytes": 1', '"megabytes": 2'))
    assert marks(run()[1]) == ["-"] * 4


def test_a_measurement_that_fails_is_said_and_the_rest_goes_on(run, monkeypatch):
    broken = Measurement("index", "", 1, 1, {"num_items": -1})
    monkeypatch.setattr(measurements, "ALL", (broken, *measurements.ALL))
    code, said = run()
    assert code == 1 and "index: ValueError" in said and len(marks(said)) == 4
