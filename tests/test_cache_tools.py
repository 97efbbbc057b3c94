"""What the store's tools say: what is there, what is damaged, what can be mended, and why something is missing."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import zarr
from test_cache_store import ITEMS, REPOSITORY, array_of, assert_holds, entries_of, fill, segments

from cache import (
    NEEDS_NAME,
    Entries,
    Need,
    Source,
    Store,
    StoreError,
    caption_item,
    collect,
    digest,
    needs_text,
)
from cache import __main__ as command_line
from cache.compare import diff, differences, held_in, needed
from cache.explain import why
from cache.export import export
from cache.listing import held, rows, stats
from cache.segment import Segment
from cache.tables import human_bytes, local_time, table
from cache.verify import verify

NASTY = 'a "quoted"\ncat \x1b[2J\u202e ünï 猫'


def run(capsys, *arguments):
    """The exit code and what the command line printed: (code, stdout, stderr)."""
    code = command_line.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def as_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out)


def write(entries, *sources):
    """Commit one entry for each (item, name) in one segment."""
    with entries.writer() as writer:
        for item, name in sources:
            writer.write(item, array_of(entries, ITEMS.index(item) if item in ITEMS else 99), name)
    return entries


def image(number, name=""):
    name = name or f"{number}.png"
    return Source(ITEMS[number], name, name)


def need_of(entries, *sources, stage="EncodeImages", component="vae"):
    return Need(stage, component, entries.recipe, sources)


def shard(segment):
    return next(path for path in segment.iterdir() if path.name.startswith("c."))


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def damage_row(entries, row, segment=0):
    flip(shard(segments(entries)[segment]), row * entries.layout.stride_bytes)


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def fresh(entries):
    return Entries(entries.stores, entries.recipe)


# --- ls and stats ---------------------------------------------------------------------------------------------------


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
    assert head.split()[:3] == ["kind", "id", "items"]
    assert latents.split()[:3] == ["latents", entries_of(tmp_path, "bfloat16").id[:12], "20"]
    assert "2 x 3  bfloat16" in latents and pooled.split()[0] == "pooled"


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
    assert f'  encoder.weights = "{"5" * 32}"' in out.splitlines()
    assert lines[-3:] == [
        [ITEMS[0], first, "cat.jpg"],
        [ITEMS[1], first, "damaged", "dog.jpg"],
        [ITEMS[0], second, "duplicate", "cat.jpg"],
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


# --- verify ---------------------------------------------------------------------------------------------------------


def test_what_is_sound_is_found_sound(tmp_path, capsys):
    entries = fill(entries_of(tmp_path), max_items=8)
    before = snapshot(tmp_path)
    code, out, err = run(capsys, "verify", tmp_path, "--repair")
    num_bytes = sum(shard(segment).stat().st_size for segment in segments(entries))
    assert (code, err) == (0, "")
    assert out == f"{tmp_path}: 3 segments, 20 entries, {human_bytes(num_bytes)} read: all sound\n"
    assert snapshot(tmp_path) == before


def test_each_damaged_entry_is_named_and_the_next_run_misses_exactly_these(tmp_path, capsys):
    entries = write(entries_of(tmp_path), *((item, f"{number}.png") for number, item in enumerate(ITEMS[:8])))
    damage_row(entries, 2)
    damage_row(entries, 7)
    assert fresh(entries).missing(ITEMS[:8]) == []
    code, out, _ = run(capsys, "verify", tmp_path)
    name = segments(entries)[0].name
    assert code == 1
    assert out.splitlines()[:2] == [
        f"damaged: {entries.path.name} item {ITEMS[number]} ({number}.png) in {tmp_path}, segment {name}"
        for number in (2, 7)
    ]
    assert fresh(entries).missing(ITEMS[:8]) == [ITEMS[2], ITEMS[7]]
    assert [each["item"] for each in as_json(capsys, "verify", tmp_path)[1]["damaged"]] == [ITEMS[2], ITEMS[7]]


def test_notes_that_are_not_true_are_taken_back(tmp_path):
    entries = fill(entries_of(tmp_path), max_items=8)
    first, second, _ = entries.index().segments
    entries.note_damage(first, [1, 2])
    entries.note_damage(second, [0])
    damage_row(entries, 2)
    (entries.path / "damaged" / "0000000000000001-00000000").write_text("[3]")  # of a segment that was collected
    verify([tmp_path])
    assert fresh(entries).missing(ITEMS) == [ITEMS[2]]
    assert [path.name for path in (entries.path / "damaged").iterdir()] == [first.name]


def test_what_was_damaged_and_encoded_again_is_no_damage_any_more(tmp_path, capsys):
    entries = fill(entries_of(tmp_path))
    damage_row(entries, 4)
    verify([tmp_path])
    fill(entries, fresh(entries).missing(ITEMS))
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 0 and "1 damaged entry: encoded again since" in out
    assert_holds(fresh(entries))


def test_damage_in_a_store_that_is_only_read_is_noted_in_our_own(tmp_path):
    theirs = fill(entries_of(tmp_path / "theirs"))
    (tmp_path / "ours").mkdir()
    damage_row(theirs, 3)
    (segments(theirs)[0] / "zarr.json").write_text("{")
    before = snapshot(tmp_path / "theirs")
    report = verify([tmp_path / "ours", tmp_path / "theirs"], repair=True)
    assert [each.item for each in report.damaged] == [ITEMS[3]] and not report.unnoted
    assert [(each.is_mended, each.mend) for each in report.faults] == [(False, "")]
    assert snapshot(tmp_path / "theirs") == before
    both = Entries([tmp_path / "ours", tmp_path / "theirs"], theirs.recipe)
    assert both.missing(ITEMS) == [ITEMS[3]]


def test_damage_that_cannot_be_noted_is_said(tmp_path, monkeypatch):
    def refuse(path, data):
        raise OSError(30, "Read-only file system")

    entries = fill(entries_of(tmp_path))
    damage_row(entries, 0)
    monkeypatch.setattr("cache.entries.write_atomically", refuse)
    report = verify([tmp_path])
    assert report.unnoted == [os.fspath(segments(entries)[0])]


def zarr_reads(entries):
    for segment in segments(entries):
        array = zarr.open_array(segment, mode="r")
        np.testing.assert_array_equal(np.asarray(array[:])[-1], array[array.shape[0] - 1])
        assert array.attrs["recipe"] == entries.id
        assert [ITEMS.index(item) for item in array.attrs["items"]] == list(range(20))


def drop_field(name):
    def act(segment):
        document = json.loads((segment / "zarr.json").read_text())
        del document[name]
        (segment / "zarr.json").write_text(json.dumps(document))

    return act


def change_attribute(name, change):
    def act(segment):
        document = json.loads((segment / "zarr.json").read_text())
        document["attributes"][name] = change(document["attributes"][name])
        (segment / "zarr.json").write_text(json.dumps(document))

    return act


MENDABLE = {
    "no metadata": lambda segment: (segment / "zarr.json").unlink(),
    "metadata is no JSON": lambda segment: (segment / "zarr.json").write_bytes(b"\xff\0"),
    "metadata is a list": lambda segment: (segment / "zarr.json").write_text("[]"),
    "metadata without attributes": drop_field("attributes"),
    "metadata without shape": drop_field("shape"),
    "items in another order": change_attribute("items", lambda items: items[::-1]),
    "a name is missing": change_attribute("names", lambda names: names[1:]),
    "names are no text": change_attribute("names", lambda names: [1] * 20),
    "of another recipe": change_attribute("recipe", lambda recipe: "0" * 32),
    "an index entry": lambda segment: flip(shard(segment), -50),
    "the index checksum": lambda segment: flip(shard(segment), -1),
    "no index": lambda segment: os.truncate(shard(segment), 20 * 28),
    "half an index": lambda segment: os.truncate(shard(segment), shard(segment).stat().st_size - 9),
    "a longer shard": lambda segment: shard(segment).open("ab").write(b"more"),
    "a key": lambda segment: flip(segment / "keys", 17),
    "the keys' checksum": lambda segment: flip(segment / "keys", -1),
    "the keys' size": lambda segment: flip(segment / "keys", -8),
}


@pytest.mark.parametrize("how", MENDABLE)
def test_repair_mends_all_that_is_not_a_row(tmp_path, how):
    entries = fill(entries_of(tmp_path))
    MENDABLE[how](segments(entries)[0])
    damaged = snapshot(tmp_path)

    report = verify([tmp_path])
    assert not report.is_sound and not report.damaged
    assert [bool(each.mend) and not each.is_mended for each in report.faults] == [True]
    assert snapshot(tmp_path) == damaged

    report = verify([tmp_path], repair=True)
    assert [each.is_mended for each in report.faults] == [True] and not report.is_sound
    assert verify([tmp_path]).is_sound and not list(tmp_path.rglob("*.tmp"))
    assert_holds(fresh(entries))
    assert fresh(entries).missing(ITEMS) == []
    zarr_reads(entries)


def test_a_mended_segment_keeps_the_names_that_are_left(tmp_path):
    entries = write(entries_of(tmp_path), (ITEMS[0], "cat.jpg"), (ITEMS[1], "dog.jpg"))
    drop_field("shape")(segments(entries)[0])
    verify([tmp_path], repair=True)
    assert [row.name for row in rows(entries)] == ["cat.jpg", "dog.jpg"]
    zarr.open_array(segments(entries)[0], mode="r")


def test_of_a_truncated_shard_repair_saves_the_rows_that_are_left(tmp_path):
    entries = fill(entries_of(tmp_path))
    os.truncate(shard(segments(entries)[0]), 17 * 28 + 5)
    assert fresh(entries).missing(ITEMS) == ITEMS
    report = verify([tmp_path])
    assert [each.item for each in report.damaged] == ITEMS[17:]
    assert fresh(entries).missing(ITEMS) == ITEMS
    verify([tmp_path], repair=True)
    assert fresh(entries).missing(ITEMS) == ITEMS[17:]
    assert_holds(fresh(entries), ITEMS[:17])


def test_a_reader_that_has_mapped_a_truncated_shard_never_reads_the_hole_that_repair_leaves(tmp_path):
    entries = fill(entries_of(tmp_path))
    reader = fresh(entries)
    assert_holds(reader)
    os.truncate(shard(segments(entries)[0]), 17 * 28)
    verify([tmp_path], repair=True)
    for item in ITEMS:
        with suppress(StoreError):
            assert_holds(reader, [item])
    with pytest.raises(StoreError):
        reader.read(ITEMS[19])
    assert_holds(fresh(entries), ITEMS[:17])


def test_damaged_keys_are_not_guessed(tmp_path):
    entries = fill(entries_of(tmp_path))
    [segment] = segments(entries)
    flip(segment / "keys", 17)
    change_attribute("items", lambda items: [*items[:3], ITEMS[0][::-1], *items[4:]])(segment)
    report = verify([tmp_path], repair=True)
    assert [(Path(each.path).name, each.mend) for each in report.faults] == [("keys", "")]
    assert fresh(entries).missing(ITEMS) == ITEMS


def test_a_repair_that_fails_leaves_the_segment_as_it_was(tmp_path, monkeypatch):
    entries = fill(entries_of(tmp_path))
    os.truncate(shard(segments(entries)[0]), 20 * 28)
    (segments(entries)[0] / "zarr.json").write_text("{")
    before = snapshot(entries.path)

    def refuse(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    report = verify([tmp_path], repair=True)
    assert [each.what.partition("; cannot be mended: ")[2] for each in report.faults] == ["No space left on device"] * 2
    assert snapshot(entries.path) == before


def test_a_shard_that_is_gone_takes_its_entries_with_it(tmp_path):
    entries = fill(entries_of(tmp_path), ITEMS[:3])
    shard(segments(entries)[0]).unlink()
    report = verify([tmp_path], repair=True)
    assert [each.item for each in report.damaged] == ITEMS[:3]
    assert [(each.what, each.mend) for each in report.faults] == [("is not there", "")]
    assert fresh(entries).missing(ITEMS[:3]) == ITEMS[:3]


def test_a_recipe_that_is_not_the_folders_is_damage(tmp_path):
    entries, other = fill(entries_of(tmp_path)), entries_of(tmp_path, note=1)
    (entries.path / "recipe.json").write_text(json.dumps(other.recipe))
    report = verify([tmp_path], repair=True)
    assert [each.path for each in report.faults] == [f"{entries.path}/recipe.json"]
    assert f"the recipe in it is that of {other.path.name}" in report.faults[0].what


def test_a_damaged_recipe_is_mended_from_another_store(tmp_path):
    ours, theirs = fill(entries_of(tmp_path / "ours")), fill(entries_of(tmp_path / "theirs"))
    before = snapshot(ours.path)
    (ours.path / "recipe.json").write_text("")
    report = verify([tmp_path / "ours", tmp_path / "theirs"], repair=True)
    assert [each.is_mended for each in report.faults] == [True] and report.num_rows == 40
    assert snapshot(ours.path) == before and theirs.path.exists()


def test_a_writer_that_has_just_begun_is_no_damage(tmp_path):
    entries = entries_of(tmp_path)
    entries.segments_path.mkdir(parents=True)
    assert verify([tmp_path]).is_sound


def test_what_is_half_removed_or_foreign_is_named_and_is_no_damage(tmp_path, capsys):
    entries = fill(entries_of(tmp_path), max_items=8)
    (segments(entries)[0] / "keys").unlink()
    (entries.segments_path / "backup").mkdir()
    (tmp_path / "entries" / "notes.txt").write_text("mine")
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 0
    assert f"{tmp_path}/entries/notes.txt: foreign" in out and "backup: foreign" in out
    assert f"{segments(entries)[0]}: has no keys: half removed" in out


def test_one_kind_is_verified_alone(tmp_path, capsys):
    damage_row(fill(entries_of(tmp_path)), 1)
    fill(entries_of(tmp_path, shape=(4,), kind="pooled"), ITEMS[:3])
    code, found = as_json(capsys, "verify", tmp_path, "--kind", "pooled")
    assert (code, found["num_rows"], found["is_sound"]) == (0, 3, True)
    assert run(capsys, "verify", tmp_path, "--kind", "latents")[0] == 1
    code, out, err = run(capsys, "verify", tmp_path, "--kind", "txt")
    assert (code, out) == (1, "") and "nothing of kind 'txt'; it holds latents, pooled" in err


@pytest.mark.parametrize("when", ["before it is opened", "while it is read"])
def test_a_segment_that_is_collected_meanwhile_is_passed_over(tmp_path, monkeypatch, when):
    entries = fill(entries_of(tmp_path), max_items=8)
    _, second, _ = segments(entries)

    def collect(*_):
        (second / "keys").unlink(missing_ok=True)
        shutil.rmtree(second, ignore_errors=True)

    def read(segment):
        if segment.name == second.name:
            collect()
        return damaged_rows(segment)

    damaged_rows = Segment.damaged_rows
    if when == "while it is read":
        monkeypatch.setattr(Segment, "damaged_rows", read)
    report = verify([tmp_path], progress=None if when == "while it is read" else collect)
    assert (report.is_sound, report.num_rows) == (True, 12)


def test_long_verifications_say_how_far_they_are(tmp_path, capsys, monkeypatch):
    fill(entries_of(tmp_path), max_items=8)
    monkeypatch.setattr(command_line, "PROGRESS_SECONDS", 0)
    code, out, err = run(capsys, "verify", tmp_path)
    assert [line.split(",")[0] for line in err.splitlines()] == [f"verify: {n} of 3 segments" for n in (1, 2, 3)]
    assert len(out.splitlines()) == 1


# --- why ------------------------------------------------------------------------------------------------------------


def reasons_of(answer):
    return {reason.reason: [each.name for each in reason.items] for reason in answer.reasons}


def test_what_is_all_there_is_said_in_one_line_for_each_stage(tmp_path, capsys, monkeypatch):
    latents = fill(entries_of(tmp_path))
    needs = [need_of(latents, image(0), image(1))]
    monkeypatch.setattr(command_line, "_needs", lambda experiment: (Store(tmp_path), needs))
    code, out, _ = run(capsys, "why", "my.toml")
    assert (code, out) == (0, f"EncodeImages (latents-{latents.id[:12]}): all 2 are there\n")


def test_each_missing_item_has_exactly_one_reason(tmp_path):
    entries = write(entries_of(tmp_path, width=512), *((ITEMS[number], f"{number}.png") for number in range(3)))
    write(entries_of(tmp_path, width=256), (ITEMS[10], "10.png"), (ITEMS[11], "1.png"))
    entries.note_damage(entries.index().segments[0], [0])
    need = need_of(entries, image(0), image(11, "1.png"), image(2), image(10), image(12))
    [answer] = why(Store(tmp_path), [need])
    assert reasons_of(answer) == {"damaged": ["0.png"], "changed": ["1.png"], "recipe": ["10.png"], "new": ["12.png"]}
    assert (answer.wanted, answer.num_missing, answer.present) == (5, 4, {str(tmp_path): 1})
    assert [reason.items[0].text for reason in answer.reasons] == [
        f"0.png, in segment {segments(entries)[0].name}",
        f"1.png changed since it was encoded ({ITEMS[1][:8]} -> {ITEMS[11][:8]})",
        "10.png",
        "12.png",
    ]
    assert [each.text for each in answer.reasons[2].differences] == ["width differs: 256 -> 512"]


def test_a_changed_caption_is_told_from_a_changed_photo(tmp_path):
    old, new = "a cat", NASTY
    entries = write(entries_of(tmp_path, kind="txt"), (caption_item(old), "cat.jpg"))
    need = need_of(entries, Source(caption_item(new), "cat.jpg", new), stage="EncodeT5", component="text_encoder_2")
    [reason] = why(Store(tmp_path), [need])[0].reasons
    assert reason.reason == "changed"
    assert reason.items[0].text.startswith('the caption of cat.jpg changed, now "a "quoted"\\ncat \\x1b[2J')


def test_the_photo_that_was_encoded_last_under_a_name_is_the_one_that_changed(tmp_path):
    entries = write(write(entries_of(tmp_path), (ITEMS[0], "cat.jpg")), (ITEMS[1], "cat.jpg"))
    [reason] = why(Store(tmp_path), [need_of(entries, image(2, "cat.jpg"))])[0].reasons
    assert f"({ITEMS[1][:8]} -> {ITEMS[2][:8]})" in reason.items[0].text


def test_other_weights_are_named_by_component_and_digest(tmp_path):
    old = fill(entries_of(tmp_path, encoder={"weights": "3f2a91c0" + "0" * 24, "config": "1" * 32}), ITEMS[:2])
    new = entries_of(tmp_path, encoder={"weights": "91c07be2" + "0" * 24, "config": "1" * 32})
    [reason] = why(Store(tmp_path), [need_of(new, image(0), image(1))])[0].reasons
    assert (reason.reason, reason.nearest, len(reason.items)) == ("recipe", old.path.name, 2)
    assert [each.text for each in reason.differences] == ["vae weights differ: 3f2a91c0 -> 91c07be2"]


def test_of_several_recipes_the_one_with_fewest_differences_explains(tmp_path):
    fill(entries_of(tmp_path, a=1, b=1, c=1))
    near = fill(entries_of(tmp_path, a=0, b=0, c=1))
    fill(entries_of(tmp_path, kind="txt", a=0, b=0, c=0))
    [reason] = why(Store(tmp_path), [need_of(entries_of(tmp_path, a=0, b=0, c=0), image(3))])[0].reasons
    assert reason.nearest == near.path.name


def test_of_recipes_as_near_the_one_that_holds_most_explains_and_the_next_the_rest(tmp_path):
    few = fill(entries_of(tmp_path, a=1), [ITEMS[0], ITEMS[9]])
    most = fill(entries_of(tmp_path, a=2), ITEMS[:3])
    wanted = need_of(entries_of(tmp_path, a=0), *map(image, (0, 1, 2, 9)))
    found = why(Store(tmp_path), [wanted])[0].reasons
    assert [(reason.nearest, len(reason.items)) for reason in found] == [(most.path.name, 3), (few.path.name, 1)]


def test_a_recipe_that_holds_what_is_wanted_goes_before_a_nearer_one_that_does_not(tmp_path):
    fill(entries_of(tmp_path, a=1, b=0), [ITEMS[19]])
    holder = fill(entries_of(tmp_path, a=1, b=1), [ITEMS[0]])
    [reason] = why(Store(tmp_path), [need_of(entries_of(tmp_path, a=0, b=0), image(0))])[0].reasons
    assert reason.nearest == holder.path.name


def test_with_nothing_of_a_recipe_the_nearest_is_named_even_where_all_is_new(tmp_path):
    fill(entries_of(tmp_path, width=512), [ITEMS[19]])
    first, second = why(Store(tmp_path), [need_of(entries_of(tmp_path, width=768), image(0))])[0].reasons
    assert (first.reason, first.items) == ("recipe", [])
    assert [each.text for each in first.differences] == ["width differs: 512 -> 768"]
    assert (second.reason, len(second.items)) == ("new", 1)


def test_with_a_recipe_in_use_a_new_photo_is_just_new(tmp_path):
    fill(entries_of(tmp_path, width=512), [ITEMS[19]])
    used = fill(entries_of(tmp_path, width=768), [ITEMS[1]])
    assert [reason.reason for reason in why(Store(tmp_path), [need_of(used, image(0))])[0].reasons] == ["new"]


def test_in_a_store_that_is_not_there_yet_all_is_new(tmp_path):
    [answer] = why(Store(tmp_path / "store"), [need_of(entries_of(tmp_path / "store"), image(0))])
    assert reasons_of(answer) == {"new": ["0.png"]} and not (tmp_path / "store").exists()


def test_what_a_truncated_segment_held_is_damaged_and_can_be_saved(tmp_path):
    entries = fill(entries_of(tmp_path), ITEMS[:3])
    os.truncate(shard(segments(entries)[0]), 30)
    [reason] = why(Store(tmp_path), [need_of(entries, image(0))])[0].reasons
    assert reason.reason == "damaged" and "verify --repair" in reason.items[0].text


def test_with_several_stores_it_is_said_how_many_come_from_each(tmp_path, capsys, monkeypatch):
    ours, theirs = fill(entries_of(tmp_path / "a"), ITEMS[:3]), fill(entries_of(tmp_path / "b"), ITEMS[2:7])
    store, need = Store(tmp_path / "a", tmp_path / "b"), need_of(ours, *map(image, range(9)))
    [answer] = why(store, [need])
    assert answer.present == {str(tmp_path / "a"): 3, str(tmp_path / "b"): 4} and answer.num_missing == 2
    monkeypatch.setattr(command_line, "_needs", lambda experiment: (store, [need]))
    line = run(capsys, "why")[1].splitlines()[0]
    assert line.endswith(f"7 of 9 are there (3 from {tmp_path}/a, 4 from {tmp_path}/b), 2 missing")
    assert theirs.path.exists()


def test_ten_examples_are_shown_and_all_on_request(tmp_path, capsys, monkeypatch):
    need = need_of(entries_of(tmp_path), *map(image, range(12)))
    monkeypatch.setattr(command_line, "_needs", lambda experiment: (Store(tmp_path), [need]))
    lines = run(capsys, "why")[1].splitlines()
    assert lines[1:3] == ["  12 new:", "    0.png"] and lines[-1] == "    and 2 more (--all names them)"
    assert len(lines) == 13 and len(run(capsys, "why", "--all")[1].splitlines()) == 14
    assert len(as_json(capsys, "why")[1][0]["reasons"][0]["items"]) == 12


# --- diff -----------------------------------------------------------------------------------------------------------


def test_recipes_differ_by_field_whatever_is_nested_or_absent():
    old = {"encoder": {"weights": "a" * 32, "config": "c" * 32}, "width": 512, "crop": "centre", "shape": [1, 2]}
    new = {"encoder": {"weights": "b" * 32, "config": "c" * 32}, "width": 768, "flip": False, "shape": [1, 3]}
    assert [(each.field, each.text) for each in differences(old, new)] == [
        ("crop", "crop differs: centre -> nothing"),
        ("encoder.weights", f"encoder weights differ: {'a' * 8} -> {'b' * 8}"),
        ("flip", "flip differs: nothing -> false"),
        ("shape", "shape differs: [1, 2] -> [1, 3]"),
        ("width", "width differs: 512 -> 768"),
    ]
    assert differences(old, old) == []


def test_diff_counts_items_by_kind(tmp_path):
    a, b = entries_of(tmp_path, width=1), entries_of(tmp_path, width=2)
    pooled = entries_of(tmp_path, kind="pooled")
    ours, theirs = [need_of(a, *map(image, range(5)))], [need_of(b, *map(image, range(3, 9))), need_of(pooled)]
    pairs = diff(needed(ours), needed(theirs))
    assert [(pair.kind, pair.ids) for pair in pairs] == [("latents", (a.id, b.id)), ("pooled", (None, pooled.id))]
    assert [len(names) for names in (pairs[0].only_in_a, pairs[0].only_in_b, pairs[0].in_both)] == [3, 4, 2]
    assert [each.text for each in pairs[0].differences] == ["width differs: 1 -> 2"]


def test_diff_sets_each_recipe_against_the_one_most_like_it(tmp_path):
    one, two, three = (entries_of(tmp_path, a=a, b=b) for a, b in ((0, 0), (1, 1), (1, 2)))
    pairs = diff(needed([need_of(one), need_of(two)]), needed([need_of(three), need_of(one)]))
    assert [pair.ids for pair in pairs] == [(one.id, one.id), (two.id, three.id)]


def test_diff_of_two_folders_compares_what_they_hold(tmp_path, capsys, monkeypatch):
    a, b = fill(entries_of(tmp_path / "a", note=1), ITEMS[:5]), fill(entries_of(tmp_path / "b", note=2), ITEMS[3:9])
    a.note_damage(a.index().segments[0], [4])
    monkeypatch.chdir(tmp_path / "a" / "entries")
    code, out, err = run(capsys, "diff", a.path.name, b.path)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"latents: other recipes ({a.id[:12]} -> {b.id[:12]})",
        "  note differs: 1 -> 2",
        "  1 item in both, 3 only in A, 5 only in B",
    ]
    assert list(as_json(capsys, "diff", a.path, b.path)[1][0]["only_in_a"]) == ITEMS[:3]
    assert len(held_in(a)[0].names) == 4


def test_a_folder_that_holds_no_entries_cannot_be_compared(tmp_path, capsys):
    code, out, err = run(capsys, "diff", tmp_path, tmp_path)
    assert (code, out) == (1, "") and err.startswith(f"error: {tmp_path}/recipe.json: cannot be read: No such file")


# --- export ---------------------------------------------------------------------------------------------------------


def bits(array):
    """The numbers as they are stored: MindSpore, where it is imported, has a bfloat16 of its own, equal to no other."""
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_safetensors_reads_what_was_exported(tmp_path, dtype, shape):
    captions = ["a cat", NASTY, "\0\\u0041", "", "猫" * 300]
    entries = entries_of(tmp_path / "store", dtype, shape, kind="txt")
    sources = [Source(caption_item(caption), f"{number}.png", caption) for number, caption in enumerate(captions)]
    with entries.writer() as writer:
        for number, source in enumerate(sources):
            writer.write(source.item, array_of(entries, number))
    path = tmp_path / "prompts.safetensors"
    export(Store(tmp_path / "store"), [need_of(entries, *sources)], "prompts", path)

    found = safetensors.numpy.load_file(path)
    assert sorted(found) == sorted(captions)
    for number, caption in enumerate(captions):
        assert found[caption].dtype.name == dtype and found[caption].shape == shape
        np.testing.assert_array_equal(bits(found[caption]), bits(array_of(entries, number)))
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
        np.testing.assert_array_equal(bits(file.get_tensor(NASTY)), bits(array_of(entries, 1)))
    assert metadata | {"recipe": None} == {"kind": "prompts", "recipe_id": entries.id, "recipe": None}
    assert json.loads(metadata["recipe"]) == entries.recipe
    assert list(tmp_path.iterdir()).count(path) == 1 and len(list(tmp_path.iterdir())) == 2


def test_an_export_is_the_same_bytes_in_any_order(tmp_path):
    entries = fill(entries_of(tmp_path / "store"))
    for name, order in (("a", range(9)), ("b", reversed(range(9)))):
        export(Store(tmp_path / "store"), [need_of(entries, *map(image, order))], "latents", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    header_bytes = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0 and (tmp_path / "a").stat().st_size == 8 + header_bytes + 9 * 24


def test_what_is_being_exported_is_not_collected(tmp_path, monkeypatch):
    entries, read = fill(entries_of(tmp_path / "store"), max_items=8), Entries.read

    def read_beside_a_collector(self, item):
        collect(tmp_path / "store", {}, 0)
        return read(self, item)

    monkeypatch.setattr(Entries, "read", read_beside_a_collector)
    export(Store(tmp_path / "store"), [need_of(entries, image(0), image(19))], "latents", tmp_path / "x")
    assert sorted(safetensors.numpy.load_file(tmp_path / "x")) == ["0.png", "19.png"]
    assert fresh(entries).missing([ITEMS[0], ITEMS[10], ITEMS[19]]) == [ITEMS[10]]


def test_photos_of_several_recipes_are_exported_together(tmp_path):
    wide, high = fill(entries_of(tmp_path / "store", shape=(2, 3))), fill(entries_of(tmp_path / "store", shape=(3, 2)))
    needs = [need_of(wide, image(0)), need_of(high, image(1))]
    export(Store(tmp_path / "store"), needs, "latents", tmp_path / "x.safetensors")
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {name: array.shape for name, array in found.items()} == {"0.png": (2, 3), "1.png": (3, 2)}
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert json.loads(file.metadata()["recipe"]) == [wide.recipe, high.recipe]


@pytest.fixture
def exporting(tmp_path, capsys, monkeypatch):
    """Runs the export of some needs; returns its exit code and outputs, and what is then beside the store."""

    def act(*needs, arguments=()):
        monkeypatch.setattr(command_line, "_needs", lambda experiment: (Store(tmp_path / "store"), needs))
        out = tmp_path / "out" / "x.safetensors"
        result = run(capsys, "export", "my.toml", "--kind", "latents", "--out", out, *arguments)
        return *result, {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    (tmp_path / "out").mkdir()
    return act


def test_missing_entries_are_counted_with_the_command_that_encodes_them(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"), ITEMS[:3])
    code, out, err, files = exporting(need_of(entries, *map(image, range(5))))
    assert (code, out, files) == (1, "", {})
    assert "not written: 2 of 5 entries of latents-" in err and err.count("\n") == 1
    assert "luigi --module tasks EncodeImages --local-scheduler --experiment my.toml" in err


def test_an_entry_found_damaged_on_the_way_leaves_no_file(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"))
    damage_row(entries, 4)
    code, out, err, files = exporting(need_of(entries, *map(image, range(9))))
    assert (code, out, files) == (1, "", {}) and f"item {ITEMS[4]} is damaged" in err


def test_a_file_that_is_there_is_replaced_only_on_request(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"))
    (tmp_path / "out" / "x.safetensors").write_bytes(b"precious")
    code, _, err, files = exporting(need_of(entries, image(0)))
    assert (code, files) == (1, {"x.safetensors": b"precious"}) and "--force" in err
    code, out, _, files = exporting(need_of(entries, image(0)), arguments=["--force"])
    assert code == 0 and "1 tensor of latents" in out and list(files) == ["x.safetensors"]
    assert list(safetensors.numpy.load(files["x.safetensors"])) == ["0.png"]


@pytest.mark.parametrize("name", ["__metadata__", "surrogate\udcff.png"])
def test_names_that_the_format_cannot_hold_are_refused(tmp_path, exporting, name):
    entries = fill(entries_of(tmp_path / "store"))
    code, _, err, files = exporting(need_of(entries, image(0, name)))
    assert (code, files) == (1, {}) and "rename it" in err and err.isprintable() is False and "\udcff" not in err


def test_two_tensors_of_one_name_are_refused(tmp_path, exporting):
    entries = fill(entries_of(tmp_path / "store"))
    code, _, err, files = exporting(need_of(entries, image(0, "cat.jpg"), image(1, "cat.jpg")))
    assert (code, files) == (1, {}) and "as another one is" in err


def test_a_header_that_no_reader_accepts_is_refused(tmp_path, exporting, monkeypatch):
    entries = fill(entries_of(tmp_path / "store"))
    monkeypatch.setattr("cache.tensors.MAX_HEADER_BYTES", 300)
    code, _, err, files = exporting(need_of(entries, *map(image, range(9))))
    assert (code, files) == (1, {}) and "header" in err


def test_a_kind_that_the_experiment_lacks_is_said(tmp_path, exporting):
    code, _, err, files = exporting(need_of(entries_of(tmp_path / "store", kind="txt"), image(0)))
    assert (code, files) == (1, {}) and "the experiment has no latents" in err


def test_an_export_to_a_folder_that_is_not_there_is_said_in_one_line(tmp_path, capsys):
    entries = fill(entries_of(tmp_path / "store"))
    with pytest.raises(StoreError, match="nowhere/x: not written: No such file or directory; choose another place"):
        export(Store(tmp_path / "store"), [need_of(entries, image(0))], "latents", tmp_path / "nowhere" / "x")


# --- how it is printed ----------------------------------------------------------------------------------------------


def test_columns_are_as_wide_as_their_widest_cell():
    assert table(["a", ">number"], [("long", 1), ("", 1000)]) == "a     number\nlong       1\n        1000"


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


# --- a real experiment ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tiny_model, tmp_path_factory):
    from lab import Lab

    lab = Lab(tmp_path_factory.mktemp("tools") / "lab", tiny_model)
    lab.encode()
    return lab


def test_of_an_experiment_that_is_encoded_everything_is_there_and_exported(encoded, tmp_path, capsys):
    code, out, _ = run(capsys, "why", encoded.path)
    assert code == 0 and [line.partition(":")[2] for line in out.splitlines()] == [" all 3 are there"] * 3
    assert run(capsys, "export", encoded.path, "--kind", "prompts", "--out", tmp_path / "x")[0] == 0
    found = safetensors.numpy.load_file(tmp_path / "x")
    assert sorted(found) == sorted(row["text"] for row in encoded.captions())
    for caption, array in found.items():
        np.testing.assert_array_equal(array, encoded.plan.txt.read(caption_item(caption)))


def test_what_was_changed_in_an_experiment_is_what_why_and_diff_say(encoded, tmp_path, capsys):
    lab = encoded.copy(tmp_path / "lab").set("data", resolution=48)
    captions = lab.captions()
    lab.write_captions([captions[0] | {"text": "another caption"}, *captions[1:]])
    lab.settle()
    capsys.readouterr()
    clip, t5, images = as_json(capsys, "why", lab.path)[1]
    assert (clip["missing"], t5["missing"], images["missing"]) == (1, 1, 3)
    assert [reason["reason"] for reason in clip["reasons"]] == ["changed"]
    texts = {each["field"]: each["text"] for each in images["reasons"][0]["differences"]}
    assert texts.keys() == {"width", "height", "shape"} and texts["width"] == "width differs: 32 -> 48"

    pairs = {pair["kind"]: pair for pair in as_json(capsys, "diff", encoded.path, lab.path)[1]}
    assert {pair["field"] for pair in pairs["latents"]["differences"]} == texts.keys()
    assert (len(pairs["latents"]["in_both"]), len(pairs["txt"]["only_in_b"]), pairs["txt"]["differences"]) == (3, 1, [])
    code, _, err = run(capsys, "export", lab.path, "--kind", "latents", "--out", tmp_path / "x")
    assert code == 1 and f"EncodeImages --local-scheduler --experiment {lab.path}" in err


# --- gc ------------------------------------------------------------------------------------------------------------


RECIPE = {"kind": "latents", "dtype": "float32", "shape": [64]}


@pytest.fixture
def two_runs(tmp_path):
    """A store of nine latents in three segments, and runs that need the first and the second."""
    entries = Store(tmp_path / "store").entries(RECIPE)
    items = [digest(f"gc {number}".encode()) for number in range(9)]
    with entries.writer(max_items=3) as writer:
        for number, item in enumerate(items):
            writer.write(item, np.full(entries.shape, number, np.float32), f"{number}.png")
    for name, kept in (("a", items[:3]), ("b", items[3:5])):
        (tmp_path / "runs" / name).mkdir(parents=True)
        sources = tuple(Source(item, "", "") for item in kept)
        text = needs_text([Need("EncodeImages", "vae", RECIPE, sources)])
        (tmp_path / "runs" / name / NEEDS_NAME).write_text(text)
    return tmp_path, entries, items


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


def test_gc_refuses_an_age_that_is_none(two_runs, capsys):
    with pytest.raises(SystemExit):
        gc(two_runs[0], "--older-than", "soon")
    assert "'soon' is no age" in capsys.readouterr().err
