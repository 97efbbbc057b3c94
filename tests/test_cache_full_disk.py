"""What a writer that goes on promises when a disk is full: a real one of 2 MiB, where one may be mounted.

test_faults.py has jobs that end there.
"""

import contextlib
import os
import shutil
import subprocess

import numpy as np
import pytest
from test_cache_faults import flip, leftovers
from test_cache_kills import assert_zarr_agrees, item_of, numbers_held, rows_of
from test_cache_store import segments

from cache import CorruptEntry, StoreError

PAGE = 4096
NUM_VALUES = 4096 * 4  # 64 KiB a row, which begins at a page
ROW_PAGES = 17


@pytest.fixture
def disk(tmp_path):
    """An empty disk of 512 pages."""
    path = tmp_path / "disk"
    path.mkdir()
    mount(path, "-t", "tmpfs", "-o", "size=2m", "tmpfs")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def mount(path, *options):
    """Mount something at ``path``; skips the test where this is not permitted."""
    if not shutil.which("mount"):
        pytest.skip("needs the command mount")
    done = subprocess.run(["mount", *map(str, options), str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs to mount a disk, as root can: {done.stderr.strip()}")


def leave(disk, num_pages):
    """Fill the disk with a file until so many pages are free."""
    free = os.statvfs(disk).f_bavail
    (disk / "filler").write_bytes(bytes((free - num_pages) * PAGE))
    assert os.statvfs(disk).f_bavail == num_pages


def make_room(disk):
    (disk / "filler").unlink()


def write(writer, number):
    writer.write(item_of(number), np.full(NUM_VALUES, number, np.float32), f"{number}.png")


def assert_full(caught, disk):
    text = str(caught.value)
    assert text.startswith(f"{disk}/") and "\n" not in text
    assert "the disk is full: " in text and " free; make room or choose another place for the store" in text


@pytest.mark.parametrize("num_pages", range(4))
@pytest.mark.parametrize("then", ["the commit is tried again", "more is written", "the next writer takes over"])
def test_a_disk_that_is_full_at_a_commit_shows_nothing_half_written(disk, num_pages, then):
    entries, numbers = rows_of(disk, NUM_VALUES), [0, 1, 2]
    needs_room = num_pages < 2  # a page for the keys and one for zarr.json
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(entries.writer())
        for number in numbers:
            write(writer, number)
        leave(disk, num_pages)
        if needs_room:
            for _ in range(2):
                with pytest.raises(StoreError) as caught:
                    writer.commit()
                assert_full(caught, disk)
                assert numbers_held(rows_of(disk, NUM_VALUES), range(5)) == []
        else:
            writer.commit()
            assert numbers_held(rows_of(disk, NUM_VALUES), range(5)) == numbers
        if then == "the next writer takes over":
            with pytest.raises(StoreError) if needs_room else contextlib.nullcontext():
                stack.close()
            assert len(leftovers(entries)) == needs_room
            make_room(disk)
            stack.enter_context(entries.writer())
        else:
            make_room(disk)
            if then == "more is written":
                write(writer, 3)
                numbers.append(3)
            writer.commit()
        assert numbers_held(rows_of(disk, NUM_VALUES), range(5)) == numbers
    assert_zarr_agrees(entries)
    assert leftovers(entries) == []


@pytest.mark.parametrize("num_pages", range(4))
def test_a_disk_that_is_full_from_the_beginning_can_be_written_once_there_is_room(disk, num_pages):
    entries = rows_of(disk, NUM_VALUES)
    leave(disk, num_pages)
    with pytest.raises(StoreError) as caught, entries.writer() as writer:
        num_open = []
        for _ in range(30):
            with pytest.raises(StoreError):
                write(writer, 0)
            num_open.append(len(os.listdir("/proc/self/fd")))
        assert max(num_open) == num_open[0]
        write(writer, 0)
    assert_full(caught, disk)
    make_room(disk)
    with entries.writer() as writer:
        write(writer, 0)
    assert numbers_held(entries, range(1)) == [0] and leftovers(entries) == []


def test_damage_that_cannot_be_noted_on_a_full_disk_is_reported_and_counts_as_missing(disk):
    entries = rows_of(disk, NUM_VALUES)
    with entries.writer() as writer:
        for number in range(3):
            write(writer, number)
    flip(segments(entries)[0] / "c.0.0", ROW_PAGES * PAGE)
    leave(disk, 0)
    with pytest.raises(CorruptEntry, match=f"{item_of(1)} is damaged"):
        entries.read(item_of(1))
    assert entries.missing(map(item_of, range(3))) == [item_of(1)]
    assert (entries.read(item_of(2)) == 2).all()
    make_room(disk)
    with entries.writer() as writer:
        write(writer, 1)
    assert numbers_held(entries, range(3)) == numbers_held(rows_of(disk, NUM_VALUES), range(3)) == [0, 1, 2]
