"""`python -m cache ls` and `stats`: what is there, how large, since when; and how tables are printed."""

import importlib.metadata
import os
import subprocess
import sys

import numpy as np
import pytest
from test_cache_store import ITEMS, REPOSITORY, array_of, entries_of, fill, segments
from tools import NASTY, as_json, damage_row, run, shard, write

from cache import (
    Store,
    digest,
)
from cache.terminal.words import human_bytes, local_time
from cache.tools import experiments
from cache.tools.listing import held, stats


def test_ls_counts_what_can_be_read_and_what_cannot(tmp_path):
    entries = fill(entries_of(tmp_path), max_items=8)
    fill(entries, ITEMS[:2])
    entries.note_damage(entries.index().segments[0], [5])
    shard(segments(entries)[2]).unlink()
    with entries.writer() as writer:
        writer.write(ITEMS[0], array_of(entries, 0))
        writer.write(ITEMS[1], array_of(entries, 1))
        [found] = held(tmp_path)
    assert (found.kind, found.id, found.shape, found.dtype) == ("latents", entries.id, (2, 3), "float32")
    assert (found.num_items, found.num_duplicates, found.num_damaged) == (15, 2, 1)
    assert (found.num_segments, found.num_small_segments, found.num_unusable) == (3, 3, 1)
    assert found.num_uncommitted == 2 and 0 < found.uncommitted_bytes < found.disk_bytes
    assert found.tensor_bytes == 18 * 24
    assert f"{found.last_written_ns:016x}" == segments(entries)[3].name[:16]


def test_an_item_is_counted_as_damaged_or_held_but_not_as_both(tmp_path):
    entries = fill(fill(entries_of(tmp_path), ITEMS[:3]), ITEMS[:1])
    entries.note_damage(entries.index().segments[0], [0])
    [found] = held(tmp_path)
    assert (found.num_items, found.num_duplicates, found.num_damaged) == (3, 0, 1)


def test_ls_prints_a_line_for_each_recipe(tmp_path, capsys):
    fill(entries_of(tmp_path, shape=(4,), kind="pooled"), ITEMS[:3])
    fill(entries_of(tmp_path, "bfloat16"))
    code, out, err = run(capsys, "ls", tmp_path)
    head, latents, pooled = out.splitlines()
    assert (code, err) == (0, "")
    assert head.split() == ["entries", "items", "size", "shape", "dtype", "last", "written"]  # no fault is there
    assert latents.split()[:2] == [f"latents-{entries_of(tmp_path, 'bfloat16').id[:12]}", "20"]
    assert "2 x 3  bfloat16" in latents and pooled.startswith("pooled-")


def test_ls_without_arguments_lists_the_store_in_the_working_directory(tmp_path, capsys, monkeypatch):
    fill(entries_of(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    assert as_json(capsys, "ls")[1][0]["num_items"] == 20


def test_ls_of_one_recipe_says_the_recipe_and_names_its_rows(tmp_path, capsys):
    entries = write(entries_of(tmp_path, encoder={"weights": "5" * 32}), (ITEMS[0], "cat.jpg"), (ITEMS[1], "dog.jpg"))
    write(entries, (ITEMS[0], "cat.jpg"))
    entries.note_damage(entries.index().segments[0], [1])
    code, out, _ = run(capsys, "ls", tmp_path, "latents-" + entries.id[:3])
    lines = [line.split() for line in out.splitlines()]
    first, second = (segment.name for segment in segments(entries))
    assert lines[-4] == ["item", "name", "state", "in", "segment"]
    assert f'  encoder.weights = "{"5" * 32}"' in out.splitlines()
    assert lines[-3:] == [
        [ITEMS[0], "cat.jpg"],
        [ITEMS[1], "dog.jpg", "damaged", first],
        [ITEMS[0], "cat.jpg", "duplicate", second],
    ]
    found = as_json(capsys, "ls", tmp_path, entries.path.name)[1]
    assert found["recipe"] == entries.recipe and len(found["rows"]) == 3


def test_a_beginning_that_fits_no_recipe_or_several_is_refused(tmp_path, capsys):
    one, other = fill(entries_of(tmp_path, note=1)), fill(entries_of(tmp_path, note=2))
    code, out, err = run(capsys, "ls", tmp_path, "latents")
    assert (code, out) == (1, "") and err.startswith("error: 'latents': 2 entries begin so: ")
    assert one.path.name in err and other.path.name in err
    code, out, err = run(capsys, "ls", tmp_path, "txt")
    assert code == 1 and "no entries begin so" in err


@pytest.mark.parametrize("command", ["ls", "stats", "verify"])
def test_a_store_that_is_not_there_is_an_error_that_names_it(tmp_path, capsys, command):
    code, out, err = run(capsys, command, tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path}/nowhere: there is no such store") and err.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", ["ls", "stats", "verify"])
def test_an_empty_store_is_no_error(tmp_path, capsys, command):
    code, out, err = run(capsys, command, tmp_path)
    assert (code, err) == (0, "")
    assert ("all sound" if command == "verify" else "nothing is stored here yet") in out


@pytest.mark.parametrize("command", ["ls", "stats", "verify"])
def test_an_experiment_file_means_the_stores_that_it_uses(tmp_path, capsys, command):
    fill(entries_of(tmp_path / "own"), ITEMS[:3])
    fill(entries_of(tmp_path / "shared"), ITEMS[:5])
    (tmp_path / "my.toml").write_text('[paths]\nstore = ["own", "shared"]\n')
    code, found = as_json(capsys, command, tmp_path / "my.toml")
    counted = {
        "ls": lambda: [each["num_items"] for each in found],
        "stats": lambda: [each["kinds"]["latents"]["num_items"] for each in found],
        "verify": lambda: [found["num_rows"]],
    }[command]()
    assert (code, counted) == (0, [8] if command == "verify" else [3, 5])


def test_an_experiment_file_that_cannot_be_used_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "my.toml").write_text("[paths\n")
    for command in ("ls", "why"):
        code, out, err = run(capsys, command, tmp_path / "my.toml")
        assert (code, out) == (1, "") and err.startswith(f"error: {tmp_path}/my.toml: not valid TOML")


def test_an_experiment_file_that_nothing_installed_can_read_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "entry_points", lambda **group: importlib.metadata.EntryPoints())
    commands = ("ls", tmp_path / "my.toml"), ("why",), ("diff", "a.toml", "b.toml"), ("gc", "my.toml")
    for command in commands:
        code, out, err = run(capsys, *command)
        assert (code, out) == (1, "") and "nothing is installed that reads experiment files" in err
        assert err.count("\n") == 1


def test_no_name_can_garble_the_terminal(tmp_path, capsys):
    entries = write(entries_of(tmp_path), (ITEMS[0], NASTY))
    damage_row(entries, 0)
    for arguments in (("ls", tmp_path, "latents"), ("verify", tmp_path)):
        out = run(capsys, *arguments)[1]
        assert "\\x1b[2J\\u202e ünï 猫" in out and "\\n" in out
        assert all(line.isprintable() for line in out.splitlines())


def test_a_recipe_that_is_damaged_is_listed_with_what_is_wrong(tmp_path, capsys):
    entries = fill(entries_of(tmp_path))
    (entries.path / "recipe.json").write_text("{")
    code, out, _ = run(capsys, "ls", tmp_path)
    assert code == 0 and out.splitlines()[-1] == f"{entries.path}/recipe.json: damaged: it holds no recipe"
    assert held(tmp_path)[0].disk_bytes > 0


def test_stats_add_up_by_kind(tmp_path):
    for note in range(2):
        fill(fill(entries_of(tmp_path, note=note)), ITEMS[: 3 + note])
    fill(entries_of(tmp_path, shape=(4,), kind="pooled"), ITEMS[:5])
    Store(tmp_path).facts.path.write_bytes(b"x" * 10)
    found = stats(tmp_path)
    latents, pooled = found["kinds"]["latents"], found["kinds"]["pooled"]
    assert (latents["num_recipes"], latents["num_items"], latents["num_duplicates"]) == (2, 40, 7)
    assert (latents["num_segments"], latents["tensor_bytes"]) == (4, 47 * 24)
    assert (pooled["num_recipes"], pooled["num_items"], pooled["tensor_bytes"]) == (1, 5, 80)
    assert found["facts_bytes"] == 10
    assert abs(found["free_bytes"] - os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize) < 1e9


def test_a_reader_of_the_output_may_leave_early(tmp_path):
    entries = entries_of(tmp_path, shape=())
    with entries.writer() as writer:
        for number in range(3000):
            writer.write(digest(b"%d" % number), np.float32(number), "x" * 50)
    script = f"set -o pipefail; {sys.executable} -m cache ls {tmp_path} latents | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{entries.path.name}:\n", "")


def test_the_tools_of_a_store_import_neither_mindspore_nor_the_pipeline(tmp_path):
    fill(entries_of(tmp_path))
    script = (
        "import sys; from cache.__main__ import main; codes = [main([name, sys.argv[1]]) for name in "
        "('ls', 'stats', 'verify')]; print(codes, {'mindspore', 'pipeline'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0] set()"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_600, "1 MB"),
        (45e9, "45 GB"),
        (1.5e15, "1.5 PB"),
    ],
)
def test_sizes_are_decimal_with_three_digits(num_bytes, text):
    assert human_bytes(num_bytes) == text


def test_no_time_is_a_dash():
    assert local_time(0) == "-"
