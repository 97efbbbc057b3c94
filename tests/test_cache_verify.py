"""`python -m cache verify`: what is damaged, and what can be mended."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from test_cache_store import ITEMS, assert_holds, entries_of, fill, segments
from tools import as_json, damage_row, flip, fresh, run, shard, snapshot, write

from cache import (
    Entries,
    StoreError,
)
from cache.core.segment import Segment
from cache.terminal import progress
from cache.terminal.words import human_bytes
from cache.tools.listing import rows
from cache.tools.verify import verify


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
    monkeypatch.setattr("cache.core.entries.write_atomically", refuse)
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
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0)
    code, out, err = run(capsys, "verify", tmp_path)
    assert [line.split(",")[0] for line in err.splitlines()] == [f"verify: {n}/3 segments" for n in (1, 2, 3)]
    assert len(out.splitlines()) == 1
