"""What is promised where stores are listed: the first is read and written, the others are read and never written to."""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_cache_faults import as_after_a_kill, flip, leftovers
from test_cache_full_disk import mount
from test_cache_store import ITEMS, REPOSITORY, array_of, assert_holds, entries_of, fill, segments

from cache import CorruptEntry, MissingEntry, Store, StoreError
from cache.tools.verify import verify

RECIPE = {"kind": "latents", "dtype": "float32", "shape": [2, 3]}
PRINT_MISSING = """
import sys
from cache import Store
recipe = {"kind": "latents", "dtype": "float32", "shape": [2, 3]}
items = sys.argv[1].split(",")
print([items.index(item) for item in Store(*sys.argv[2:]).entries(recipe).missing(items)])
"""


def listed(*stores):
    return Store(*stores).entries(RECIPE)


def damage(entries, number, place=0):
    """Flip a bit in a row, that of the item with this number in a segment that begins with another number."""
    segment = segments(entries)[place]
    items = [bytes.fromhex(item) for item in ITEMS]
    keys = (segment / "keys").read_bytes()
    flip(segment / "c.0.0.0", keys.index(items[number]) // 16 * 28)


def missing_in_a_fresh_process(*stores):
    command = [sys.executable, "-c", PRINT_MISSING, ",".join(ITEMS), *map(str, stores)]
    return eval(subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)


def numbers_missing(entries):
    return [ITEMS.index(item) for item in entries.missing(ITEMS)]


def snapshot(folder):
    """All that is in a folder, and when it was last changed."""
    found = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {
        path: (stat.st_mode, stat.st_size, stat.st_mtime_ns, path.is_file() and path.read_bytes())
        for path, stat in found.items()
    }


@pytest.fixture
def second(tmp_path):
    """A colleague's store that holds items 0 to 9 and is in no good state: damage that nobody has noted in rows 1 and
    6, damage that is noted in row 2, a truncated segment, a dead writer with items 10 to 12, a foreign note."""
    entries = entries_of(tmp_path / "their")
    fill(fill(entries, ITEMS[:5]), ITEMS[5:10])
    damage(entries, 2)
    with pytest.raises(CorruptEntry):
        entries.read(ITEMS[2])
    damage(entries, 1)
    damage(entries, 6, 1)
    os.truncate(fill(entries, ITEMS[13:15]).segments_path / segments(entries)[2] / "c.0.0.0", 20)
    (entries.path / "damaged" / "18ea2de0d99322ea-00000000").write_text("[0]")
    with entries.writer() as writer:
        for number in range(10, 13):
            writer.write(ITEMS[number], array_of(entries, number))
        return as_after_a_kill(tmp_path / "their", tmp_path / "second")


def use_in_every_way(first, second):
    """Look for, read and encode with both stores; what must be encoded is what ``second`` lacks."""
    entries = listed(first, second)
    assert numbers_missing(entries) == [2, *range(10, 20)]
    for number in (1, 6):
        with pytest.raises(CorruptEntry, match=f"^{second}/.*{ITEMS[number]} is damaged"):
            entries.read(ITEMS[number])
    with pytest.raises(MissingEntry):
        entries.read(ITEMS[2])
    assert_holds(entries, [ITEMS[number] for number in (0, 3, 4, 5, 7, 8, 9)])
    assert missing_in_a_fresh_process(first, second) == [1, 2, 6, *range(10, 20)]
    fill(entries, entries.missing(ITEMS))
    assert_holds(listed(first, second))
    assert numbers_missing(entries_of(first)) == [0, 3, 4, 5, 7, 8, 9]
    assert numbers_missing(listed(first, second)) == []
    verify([first, second], repair=True)
    assert_holds(listed(first, second))


def test_the_second_store_is_read_and_not_a_byte_of_it_is_changed(tmp_path, second):
    before = snapshot(second)
    use_in_every_way(tmp_path / "first", second)
    assert snapshot(second) == before


def test_the_second_store_may_be_on_a_read_only_disk(tmp_path, second):
    mount(second, "--bind", second)
    try:
        mount(second, "-o", "remount,ro,bind")
        with pytest.raises(OSError):
            (second / "x").touch()
        use_in_every_way(tmp_path / "first", second)
    finally:
        subprocess.run(["umount", "--lazy", second], check=True)


def test_new_entries_go_to_the_first_store_and_all_are_found(tmp_path):
    fill(entries_of(tmp_path / "second"), ITEMS[:5])
    fill(entries_of(tmp_path / "third"), ITEMS[3:8])
    before = snapshot(tmp_path / "second"), snapshot(tmp_path / "third")
    entries = listed(tmp_path / "first", tmp_path / "second", tmp_path / "third")
    assert numbers_missing(entries) == list(range(8, 20))
    fill(entries, entries.missing(ITEMS))
    assert_holds(listed(tmp_path / "first", tmp_path / "second", tmp_path / "third"))
    assert numbers_missing(entries_of(tmp_path / "first")) == list(range(8))
    assert before == (snapshot(tmp_path / "second"), snapshot(tmp_path / "third"))


def test_looking_into_the_second_store_makes_no_first_one(tmp_path):
    fill(entries_of(tmp_path / "second"))
    entries = listed(tmp_path / "first", tmp_path / "second")
    assert_holds(entries)
    with entries.writer():
        assert numbers_missing(entries) == []
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_first_store_that_has_an_entry_is_read(tmp_path, order):
    stores = [tmp_path / str(number) for number in range(3)]
    for number, store in enumerate(stores):
        with entries_of(store).writer() as writer:
            writer.write(ITEMS[0], np.full((2, 3), number, np.float32))
    assert listed(*(stores[number] for number in order)).read(ITEMS[0])[0, 0] == order[0]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_sound_copy_in_the_other_store_is_read_instead_of_a_damaged_one(tmp_path, is_first):
    first, second = fill(entries_of(tmp_path / "first")), fill(entries_of(tmp_path / "second"))
    damage(first if is_first else second, 7)
    before = snapshot(tmp_path / "second")
    entries = listed(tmp_path / "first", tmp_path / "second")
    assert_holds(entries)
    assert numbers_missing(entries) == []
    assert missing_in_a_fresh_process(tmp_path / "first", tmp_path / "second") == []
    assert numbers_missing(entries_of(tmp_path / "first")) == ([7] if is_first else [])
    assert snapshot(tmp_path / "second") == before


def test_an_entry_that_is_damaged_in_both_stores_is_encoded_again_alone(tmp_path):
    first, second = fill(entries_of(tmp_path / "first")), fill(entries_of(tmp_path / "second"))
    for entries in (first, second):
        damage(entries, 7)
    damage(first, 8)
    damage(second, 9)
    entries = listed(tmp_path / "first", tmp_path / "second")
    with pytest.raises(CorruptEntry, match=f"{ITEMS[7]} is damaged"):
        entries.read(ITEMS[7])
    assert numbers_missing(entries) == missing_in_a_fresh_process(tmp_path / "first", tmp_path / "second") == [7]
    fill(entries, [ITEMS[7]])
    assert_holds(listed(tmp_path / "first", tmp_path / "second"))


def test_a_copy_of_a_store_is_not_damaged_where_the_store_is(tmp_path):
    """The segments of a copy have the same names."""
    fill(entries_of(tmp_path / "first"))
    for copy in ("second", "third"):
        shutil.copytree(tmp_path / "first", tmp_path / copy)
    stores = [tmp_path / name for name in ("first", "second", "third")]
    damage(entries_of(stores[0]), 3)
    damage(entries_of(stores[1]), 3)
    damage(entries_of(stores[1]), 4)
    damage(entries_of(stores[0]), 4)
    assert_holds(listed(*stores))
    assert missing_in_a_fresh_process(*stores) == []
    assert numbers_missing(listed(stores[0])) == [3, 4] and numbers_missing(listed(stores[2])) == []
    assert numbers_missing(listed(stores[0], stores[1])) == [3, 4]


def test_what_the_owner_of_the_second_store_has_found_damaged_is_known(tmp_path):
    owner = fill(entries_of(tmp_path / "second"))
    damage(owner, 3)
    with pytest.raises(CorruptEntry):
        owner.read(ITEMS[3])
    entries = listed(tmp_path / "first", tmp_path / "second")
    assert numbers_missing(entries) == [3] and not (tmp_path / "first").exists()


def test_what_is_committed_to_the_second_store_meanwhile_is_found(tmp_path):
    fill(entries_of(tmp_path / "second"), ITEMS[:3])
    entries = listed(tmp_path / "first", tmp_path / "second")
    assert_holds(entries, ITEMS[:3])
    fill(entries_of(tmp_path / "second"), ITEMS[3:5])
    assert_holds(entries, ITEMS[3:5])


def test_a_second_store_that_is_not_there_is_one_line_and_not_an_empty_store(tmp_path):
    fill(entries_of(tmp_path / "first"))
    for look in (lambda entries: entries.missing(ITEMS), lambda entries: entries.read(ITEMS[0]), fill):
        with pytest.raises(
            StoreError, match=f"^{tmp_path}/second: this store is not there; mount it, or take it out of"
        ):
            look(listed(tmp_path / "first", tmp_path / "second"))


def test_a_second_store_that_goes_away_is_one_line_and_what_was_written_is_kept(tmp_path):
    fill(entries_of(tmp_path / "second"), ITEMS[:3])
    entries = listed(tmp_path / "first", tmp_path / "second")
    with pytest.raises(StoreError, match="second: this store is not there"), entries.writer() as writer:
        writer.write(ITEMS[3], array_of(entries, 3))
        os.rename(tmp_path / "second", tmp_path / "elsewhere")
        writer.commit()
    assert_holds(entries_of(tmp_path / "first"), ITEMS[3:4])
    assert leftovers(entries_of(tmp_path / "first")) == []
    os.rename(tmp_path / "elsewhere", tmp_path / "second")
    assert_holds(entries, ITEMS[:4])


@contextmanager
def as_nobody():
    """Run the block as a user who may not do all; as who we are, where we are not root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared():
    """A folder that everybody may enter, with a store that belongs to us and that nobody may change."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder)
        entries = fill(entries_of(path / "living"), ITEMS[:5])
        with entries.writer() as writer:
            writer.write(ITEMS[5], array_of(entries, 5))
            as_after_a_kill(path / "living", path / "second")
        for each in [path / "second", *(path / "second").rglob("*")]:
            each.chmod(0o555 if each.is_dir() else 0o444)
        yield path
        for each in [path / "second", *(path / "second").rglob("*")]:
            each.chmod(0o755)


def test_a_second_store_that_we_may_not_write_to_is_read(shared):
    with as_nobody():
        with pytest.raises(OSError):
            (shared / "second" / "x").touch()
        entries = listed(shared / "first", shared / "second")
        assert numbers_missing(entries) == list(range(5, 20))
        fill(entries, entries.missing(ITEMS))
        assert_holds(listed(shared / "first", shared / "second"))


def test_a_first_store_that_we_may_not_write_to_is_read_and_writing_is_one_line(shared):
    with as_nobody():
        entries = listed(shared / "second")
        with entries.writer():  # what the dead writer left is not ours to take over
            assert numbers_missing(entries) == list(range(5, 20))
        assert_holds(entries, ITEMS[:5])
        with pytest.raises(StoreError, match="^[^\\n]*: cannot write to the store: .*Permission denied.*$"):
            fill(entries, ITEMS[6:7])


@pytest.mark.parametrize("place", ["second", "second/entries", "."])
def test_a_second_store_that_we_may_not_read_is_one_line(shared, place):
    mode = (shared / place).stat().st_mode
    os.chmod(shared / place, 0 if os.geteuid() else 0o700)
    try:
        with as_nobody(), pytest.raises(StoreError, match="^[^\\n]*: cannot read the store: .*Permission denied"):
            listed(f"{shared}-which-is-not-there", shared / "second").missing(ITEMS)
    finally:
        os.chmod(shared / place, mode)
