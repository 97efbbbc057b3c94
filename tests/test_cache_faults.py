"""What the store promises when processes are killed, disks are full and files are damaged."""

import os
import shutil
import subprocess
import sys
from subprocess import PIPE

import numpy as np
import pytest
from test_cache_store import ITEMS, REPOSITORY, array_of, assert_holds, entries_of, fill, segments

from cache import CorruptEntry, StoreError
from cache.core.journal import Journal
from cache.core.segment import SegmentWriter
from cache.core.workspace import ID

WRITE_THE_SAME = """
import numpy as np, sys
from cache import Store, digest
entries = Store(sys.argv[1]).entries({"kind": "latents", "dtype": "float32", "shape": [2, 3]})
for number in range(20):
    with entries.writer() as writer:
        writer.write(digest(bytes([number])), np.full((2, 3), float(sys.argv[2]), np.float32))
"""


def child(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)


def flip(path, offset, bits=0x10):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ bits]))


def leftovers(entries):
    """The workspaces of dead writers, and of living ones."""
    return [path for path in (entries.path / "writing").glob("*") if ID.fullmatch(path.name) and path.is_dir()]


def as_after_a_kill(folder, copy):
    """A copy of a store in which writers live: they are dead in the copy. Committed files are linked, not copied."""
    shutil.copytree(folder, copy, copy_function=lambda a, b: (os.link if "/segments/" in a else shutil.copy2)(a, b))
    return copy


def test_a_living_writer_is_no_leftover(tmp_path):
    slow, quick = entries_of(tmp_path), entries_of(tmp_path)
    with slow.writer() as writer:
        writer.write(ITEMS[0], array_of(slow, 0))
        fill(quick, ITEMS[1:2])
        assert len(leftovers(slow)) == 1
    assert_holds(quick, ITEMS[1:2])
    quick.refresh()
    assert_holds(quick, ITEMS[:2])
    assert leftovers(slow) == []


def test_two_writers_of_one_item_keep_the_store_whole(tmp_path):
    processes = [child(WRITE_THE_SAME, tmp_path, number) for number in range(3)]
    assert [process.communicate()[1] for process in processes] == ["", "", ""]
    assert [process.returncode for process in processes] == [0, 0, 0]
    one, other = entries_of(tmp_path), entries_of(tmp_path)
    assert len(segments(one)) == 60 and one.missing(ITEMS) == [] and leftovers(one) == []
    for item in ITEMS:
        value = one.read(item)
        assert value[0, 0] in (0, 1, 2) and (value == value[0, 0]).all()
        assert (other.read(item) == value).all()


def test_the_oldest_of_two_entries_is_read_before_and_after_the_second(tmp_path):
    entries = fill(entries_of(tmp_path))
    with entries.writer() as writer:
        for item in ITEMS:
            writer.write(item, np.zeros((2, 3), np.float32))
    assert len(segments(entries)) == 2
    assert_holds(entries)
    assert_holds(entries_of(tmp_path))


def test_a_commit_that_found_the_disk_full_can_be_tried_again(tmp_path, monkeypatch):
    entries = entries_of(tmp_path)
    finish = SegmentWriter.finish
    with entries.writer() as writer:
        writer.write(ITEMS[0], array_of(entries, 0))
        monkeypatch.setattr(SegmentWriter, "finish", lambda self, attributes: open("/dev/full", "wb", 0).write(b"x"))
        with pytest.raises(StoreError, match=r"the disk is full: \d+ bytes needed, \d+ free"):
            writer.commit()
        monkeypatch.setattr(SegmentWriter, "finish", finish)
        writer.commit()
        assert_holds(entries_of(tmp_path), ITEMS[:1])


def test_a_store_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    entries = entries_of(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match="cannot read the store: .*Not a directory.*; check the path"):
        entries.missing(ITEMS)
    with pytest.raises(StoreError, match=r"cannot write to the store: .*Not a directory: .*; check the path"):
        fill(entries)


def test_one_flipped_byte_is_reported_by_item(tmp_path):
    entries = fill(entries_of(tmp_path))
    shard = segments(entries)[0] / "c.0.0.0"
    flip(shard, 7 * 28 + 5)  # a row is 24 bytes and 4 of checksum
    flip(shard, 9 * 28 + 26)
    with pytest.raises(CorruptEntry, match=f"^{shard}: item {ITEMS[7]} is damaged; run"):
        entries.read(ITEMS[7])
    sound = [item for number, item in enumerate(ITEMS) if number not in (7, 9)]
    assert_holds(entries, sound)


def test_damage_that_was_met_is_encoded_again_alone(tmp_path):
    entries = fill(entries_of(tmp_path))
    shard = segments(entries)[0] / "c.0.0.0"
    flip(shard, 7 * 28)
    flip(shard, 9 * 28)
    with pytest.raises(CorruptEntry):
        entries.read(ITEMS[9])
    again = entries_of(tmp_path)
    assert again.missing(ITEMS) == [ITEMS[7], ITEMS[9]] == entries.missing(ITEMS)
    fill(again, again.missing(ITEMS))
    assert_holds(entries_of(tmp_path))
    assert entries_of(tmp_path).missing(ITEMS) == []


def test_a_sound_copy_is_read_instead_of_a_damaged_one(tmp_path):
    entries = fill(fill(entries_of(tmp_path)))
    assert len(segments(entries)) == 2
    flip(segments(entries)[0] / "c.0.0.0", 0)
    assert_holds(entries_of(tmp_path))


def test_a_flipped_byte_anywhere_never_gives_other_numbers(tmp_path):
    entries = fill(entries_of(tmp_path, shape=(2,)), ITEMS[:2])
    num_noticed = 0
    for path in (segments(entries)[0] / name for name in ("c.0.0", "keys")):
        for offset in range(path.stat().st_size):
            flip(path, offset)
            reader = entries_of(tmp_path, shape=(2,))
            for item in ITEMS[:2]:
                try:
                    assert_holds(reader, [item])
                except StoreError:
                    num_noticed += 1
            flip(path, offset)
            for note in (entries.path / "damaged").glob("*"):
                note.unlink()
    assert num_noticed == 2 * 12 + 2 * (2 * 16 + 8 + 4)  # rows and keys; the shard's index is for other readers
    assert_holds(entries, ITEMS[:2])


@pytest.mark.parametrize(
    "damage",
    [
        os.remove,
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 9999),
    ],
)
@pytest.mark.parametrize("name", ["c.0.0.0", "keys"])
def test_deleted_shard_is_missing_not_zeros(tmp_path, damage, name):
    entries = fill(entries_of(tmp_path), ITEMS[:10])
    fill(entries, ITEMS[10:])
    damage(segments(entries)[0] / name)
    again = entries_of(tmp_path)
    assert again.missing(ITEMS) == ITEMS[:10]
    fill(again, again.missing(ITEMS))
    assert_holds(entries_of(tmp_path))


def test_a_shard_that_is_removed_while_it_is_mapped_is_still_read(tmp_path):
    entries = fill(entries_of(tmp_path))
    assert_holds(entries)
    os.remove(segments(entries)[0] / "c.0.0.0")
    assert_holds(entries)
    assert entries_of(tmp_path).missing(ITEMS) == ITEMS


@pytest.mark.parametrize("size", [100, 0])
def test_a_shard_that_is_truncated_while_it_is_mapped_is_an_error_not_zeros(tmp_path, size):
    entries = fill(entries_of(tmp_path))
    assert_holds(entries)
    os.truncate(segments(entries)[0] / "c.0.0.0", size)
    with pytest.raises(CorruptEntry, match=f"c.0.0.0: item {ITEMS[19]} is damaged"):
        entries.read(ITEMS[19])
    assert entries.missing(ITEMS) == ITEMS


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_commit_that_fails_at_its_last_step_is_not_undone_by_what_is_written_next(tmp_path, monkeypatch, error):
    """The segment is where readers see it, and the writer's no more."""
    entries = entries_of(tmp_path)

    def fail(path):
        raise error

    with entries.writer() as writer:
        writer.write(ITEMS[0], array_of(entries, 0))
        with monkeypatch.context() as patch, pytest.raises((StoreError, KeyboardInterrupt)):
            patch.setattr("cache.core.salvage.sync_folder", fail)
            writer.commit()
        writer.write(ITEMS[1], array_of(entries, 1))
        writer.commit()
    assert_holds(entries_of(tmp_path), ITEMS[:2])
    assert leftovers(entries) == []


@pytest.mark.parametrize("part", [SegmentWriter, Journal])
def test_a_write_that_is_interrupted_takes_no_later_row_with_it(tmp_path, monkeypatch, part):
    """Between the row and the journal: the row is whole, and nobody was told so."""
    entries, append = entries_of(tmp_path / "living"), SegmentWriter.append

    def interrupted(*arguments):
        if part is SegmentWriter:
            append(*arguments)
        raise KeyboardInterrupt

    with entries.writer() as writer:
        writer.write(ITEMS[0], array_of(entries, 0))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(part, "append", interrupted)
            writer.write(ITEMS[1], array_of(entries, 1))
        for number in range(2, 5):
            writer.write(ITEMS[number], array_of(entries, number))
        as_after_a_kill(tmp_path / "living", tmp_path / "dead")
    taken_over = entries_of(tmp_path / "dead")
    with taken_over.writer():
        assert set(taken_over.missing(ITEMS[:5])) <= {ITEMS[1]}
    assert_holds(taken_over, [ITEMS[number] for number in (0, 2, 3, 4)])


@pytest.mark.parametrize("name", ["*.journal", "lock"])
def test_a_file_that_a_living_writer_loses_costs_no_row(tmp_path, name):
    entries = entries_of(tmp_path)
    with entries.writer() as writer:
        for number in range(3):
            writer.write(ITEMS[number], array_of(entries, number))
        next(leftovers(entries)[0].glob(name)).unlink()
        writer.write(ITEMS[3], array_of(entries, 3))
        writer.commit()
        writer.write(ITEMS[4], array_of(entries, 4))
    assert_holds(entries_of(tmp_path), ITEMS[:5])
    assert leftovers(entries) == []


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_modes_of_what_was_taken_over_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        entries = fill(entries_of(tmp_path / "living"), ITEMS[:2])
        with entries.writer() as writer:
            writer.write(ITEMS[2], array_of(entries, 2))
            as_after_a_kill(tmp_path / "living", tmp_path / "dead")
        entries = fill(entries_of(tmp_path / "dead"), ITEMS[3:5])
        flip(segments(entries)[0] / "c.0.0.0", 0)
        with pytest.raises(CorruptEntry):
            entries.read(ITEMS[0])
    finally:
        os.umask(before)
    assert len(segments(entries)) == 3
    for path in (tmp_path / "dead").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("is_taken_over", [True, False])
def test_a_writer_whose_lock_is_removed_is_taken_over_by_others_or_itself_and_loses_no_row(tmp_path, is_taken_over):
    entries = entries_of(tmp_path)
    with entries.writer() as writer:
        for number in range(3):
            writer.write(ITEMS[number], array_of(entries, number))
        (leftovers(entries)[0] / "lock").unlink()
        if is_taken_over:
            with entries_of(tmp_path).writer():
                pass
            assert_holds(entries_of(tmp_path), ITEMS[:3])
        for number in range(3, 5):
            writer.write(ITEMS[number], array_of(entries, number))
        assert_holds(entries_of(tmp_path), ITEMS[:3])
        writer.commit()
        assert_holds(entries_of(tmp_path), ITEMS[:5])
        writer.write(ITEMS[5], array_of(entries, 5))
        (leftovers(entries)[0] / "lock").unlink()
    assert_holds(entries_of(tmp_path), ITEMS[:6])
    assert leftovers(entries) == []
