"""`python -m cache gc`, as it is typed; what it may collect is in test_cache_garbage."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from nobody import as_nobody, open_folder

from cache import (
    NEEDS_NAME,
    Need,
    Source,
    Store,
    digest,
    needs_text,
)
from cache import __main__ as command_line

RECIPE = {"kind": "latents", "dtype": "float32", "shape": [64]}


@pytest.fixture
def two_runs(tmp_path):
    """A store of nine latents in three segments, and runs that need the first and the second."""
    return make_two_runs(tmp_path)


def make_two_runs(tmp_path):
    entries = Store(tmp_path / "store").entries(RECIPE)
    items = [digest(f"gc {number}".encode()) for number in range(9)]
    with entries.writer(max_items=3) as writer:
        for number, item in enumerate(items):
            writer.write(item, np.full(entries.shape, number, np.float32), f"{number}.png")
    for name, kept in (("a", items[:3]), ("b", items[3:5])):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / NEEDS_NAME).write_text(text_of(kept))
    return tmp_path, entries, items


def text_of(kept) -> str:
    return needs_text([Need.of("EncodeImages", "vae", RECIPE, tuple(Source(item, "", "") for item in kept))])


def gc(folder, *options):
    return command_line.main(
        ["gc", "--store", str(folder / "store"), "--runs", str(folder / "runs"), "--older-than", "0s", *options]
    )


def test_gc_says_what_it_would_remove_and_removes_it_with_yes(two_runs, capsys):
    folder, entries, items = two_runs
    assert gc(folder) == 0
    said = capsys.readouterr().out
    assert "4 entries" in said and "would be removed; nothing is yet: add --yes" in said
    assert entries.missing(items) == []
    assert gc(folder, "--yes", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["items"], len(found["removed"]), len(found["rewritten"])) == (4, 1, 1)
    assert entries.missing(items) == items[5:]
    assert gc(folder, "--yes") == 0
    assert "there is nothing to remove" in capsys.readouterr().out


def test_gc_says_for_whom_it_keeps_what_before_and_after(two_runs, capsys):
    folder, entries, items = two_runs
    (folder / "runs" / "c").mkdir()
    needs = text_of(items[2:5])
    (folder / "runs" / "c" / NEEDS_NAME).write_text(needs)
    for options in ((), ("--yes",)):
        assert gc(folder, *options) == 0
        heading, *rows = capsys.readouterr().out.splitlines()
        assert heading.split() == ["kept", "for", "entries", "size", "for", "it", "alone"]
        found = {Path(name).name: figures for name, *figures in map(str.split, rows[:3])}
        size = entries.layout.stride_bytes
        assert found == {
            "a": ["3", f"{3 * size}", "B", f"{2 * size}", "B"],
            "b": ["2", f"{2 * size}", "B", "0", "B"],
            "c": ["3", f"{3 * size}", "B", "0", "B"],
        }


def test_gc_says_what_it_keeps_only_as_it_is_young(two_runs, capsys):
    folder, _, _ = two_runs
    command_line.main(["gc", "--store", str(folder / "store"), "--runs", str(folder / "runs"), "--older-than", "1h"])
    assert "kept for now, though nobody needs them: 4 too young to go" in capsys.readouterr().out


def test_gc_keeps_what_is_young(two_runs, capsys):
    folder, entries, items = two_runs
    assert command_line.main(["gc", "--store", str(folder / "store"), "--runs", str(folder / "runs"), "--yes"]) == 0
    assert entries.missing(items) == []


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda runs: (runs / "a" / NEEDS_NAME).write_text("{"), "needs.json: damaged"),
        (
            lambda runs: (runs / "a" / NEEDS_NAME).rename(runs / "a" / "experiment.json"),
            "a: does not say what it needs",
        ),
    ],
)
def test_gc_removes_nothing_while_a_run_does_not_say_what_it_needs(two_runs, capsys, damage, words):
    folder, entries, items = two_runs
    damage(folder / "runs")
    assert gc(folder, "--yes") == 1
    assert words in capsys.readouterr().err
    assert entries.missing(items) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "name the experiments whose entries are kept"),
        (["--store", "STORE"], "name the experiments, or the folders of --runs"),
        (["--store", "STORE", "--runs", "no/runs"], "no/runs: there is no such folder of runs"),
        (["--store", "no/store", "--runs", "RUNS"], "no/store: there is no such store"),
    ],
)
def test_gc_does_not_guess_what_to_keep(two_runs, capsys, arguments, words):
    folder, entries, items = two_runs
    places = {"STORE": str(folder / "store"), "RUNS": str(folder / "runs")}
    assert (
        command_line.main(["gc", *(places.get(each, each) for each in arguments), "--older-than", "0s", "--yes"]) == 1
    )
    assert words in capsys.readouterr().err
    assert entries.missing(items) == []


@pytest.mark.parametrize("age", ["soon", "9" * 400 + "d"])
def test_gc_refuses_an_age_that_is_none(two_runs, age, capsys):
    with pytest.raises(SystemExit):
        gc(two_runs[0], "--older-than", age)
    assert f"'{age}' is no age" in capsys.readouterr().err


@pytest.mark.parametrize("hidden", ["runs", "runs/b", "runs/b/needs.json"])
def test_gc_removes_nothing_where_it_may_not_look(hidden, capsys):
    with open_folder() as folder:
        _, entries, items = make_two_runs(folder)
        with as_nobody(folder):
            os.chmod(folder / hidden, 0)
            assert gc(folder, "--yes") == 1
            os.chmod(folder / hidden, 0o755)
        said = capsys.readouterr().err
        assert f"{folder / hidden}: Permission denied" in said and "nothing is collected" in said
        assert entries.missing(items) == []


@pytest.mark.parametrize("gone", ["runs", "runs/b"])
def test_gc_removes_nothing_where_a_link_leads_to_what_is_away(two_runs, gone, capsys):
    folder, entries, items = two_runs
    shutil.move(folder / gone, folder / "away")
    (folder / gone).symlink_to(folder / "elsewhere")
    assert gc(folder, "--yes") == 1
    assert str(folder / gone) in capsys.readouterr().err and entries.missing(items) == []
