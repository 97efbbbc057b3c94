"""What the store promises when its files are damaged: a bit flipped anywhere, files and folders that are gone, cut
short, or not the store's. What is sound is read, other numbers never; the rerun encodes what is missing, and that only.
"""

import os
import random
import shutil

import pytest
from test_cache_faults import as_after_a_kill, flip, leftovers
from test_cache_store import ITEMS, array_of, assert_holds, entries_of, fill, segments

from cache import CorruptEntry, collect
from cache.tools.verify import verify

LARGE = (4, 64, 66)  # of float32: 67,584 bytes and a checksum, on 17 pages
FIRST, SECOND, DEAD, ALSO_DEAD, NEVER = range(5), range(5, 10), range(10, 14), range(14, 16), range(16, 20)
NOTED = 2  # a row of the first segment


@pytest.fixture(autouse=True, params=["small rows", "rows alone"])
def quick(request, monkeypatch):
    """Nothing here is about power cuts.  Rows are verified with their whole shard, and one by one as large ones are."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    if request.param == "rows alone":
        monkeypatch.setattr("cache.core.segment.SMALL_ROW_BYTES", 0)


@pytest.fixture
def store(tmp_path):
    """A store with all there can be: two segments, a damaged row that is noted, and two dead writers' workspaces."""
    entries = entries_of(tmp_path / "living")
    for numbers in (FIRST, SECOND):
        fill(entries, [ITEMS[number] for number in numbers])
    flip(segments(entries)[0] / "c.0.0.0", NOTED * 28)
    with pytest.raises(CorruptEntry):
        entries.read(ITEMS[NOTED])
    with entries.writer() as first, entries.writer() as second:
        for writer, numbers in ((first, DEAD), (second, ALSO_DEAD)):
            for number in numbers:
                writer.write(ITEMS[number], array_of(entries, number), f"{number}.png")
        return as_after_a_kill(tmp_path / "living", tmp_path / "store")


def numbers_missing(entries):
    return [ITEMS.index(item) for item in entries.missing(ITEMS)]


def encode_again(folder):
    """What the rerun of a stage does. Returns the numbers of the items that it encodes."""
    entries = entries_of(folder)
    with entries.writer() as writer:
        numbers = numbers_missing(entries)
        for number in numbers:
            writer.write(ITEMS[number], array_of(entries, number))
    return numbers


def read_what_is_there(folder):
    """Read all that is not missing; the numbers of what turns out to be damaged. What is read is right."""
    entries, damaged = entries_of(folder), []
    for number in sorted({*range(20)} - {*numbers_missing(entries)}):
        try:
            assert_holds(entries, [ITEMS[number]])
        except CorruptEntry:
            damaged.append(number)
    return damaged


def assert_rerun_encodes(folder, numbers, damaged=()):
    """The store reads right but for ``damaged``, the rerun encodes ``numbers`` and these, and the next one nothing."""
    assert read_what_is_there(folder) == list(damaged)
    assert encode_again(folder) == sorted({*numbers, *damaged})
    assert encode_again(folder) == []
    assert_holds(entries_of(folder))
    assert leftovers(entries_of(folder)) == []


def test_the_rerun_encodes_what_was_never_written_and_what_is_damaged(store):
    assert_rerun_encodes(store, [NOTED, *NEVER])


def kept_rows(path, size):
    """How many rows of a dead writer can be taken over where the file is cut to ``size`` bytes."""
    return path.read_bytes()[:size].count(b"\n") if path.suffix == ".journal" else size // 28


def lost_by(path, size):
    """The numbers that are lost where the file is cut to ``size`` bytes, or removed (-1)."""
    if "segments" in path.parts:
        numbers = FIRST if path.parent == min(path.parents[1].iterdir()) else SECOND
        return [] if path.name == "zarr.json" else numbers
    if "writing" in path.parts and path.name != "lock":
        workspaces = next(parent for parent in path.parents if parent.name == "writing")
        numbers = DEAD if min(workspaces.iterdir()) in path.parents else ALSO_DEAD
        return numbers[kept_rows(path, max(size, 0)) :]
    return []


@pytest.mark.parametrize("cut", ["removed", "empty", "one byte", "half", "all but one byte"])
def test_a_file_that_is_cut_short_or_gone_loses_what_it_held_and_no_more(store, tmp_path, cut):
    files = sorted(path.relative_to(store) for path in store.rglob("*") if path.is_file())
    assert len(files) == 1 + 2 * 3 + 1 + 2 * 3  # recipe, segments, note, workspaces
    for place, file in enumerate(files):
        copy = shutil.copytree(store, tmp_path / str(place))
        path, size = copy / file, (copy / file).stat().st_size
        size = {"removed": -1, "empty": 0, "one byte": 1, "half": size // 2, "all but one byte": size - 1}[cut]
        lost = lost_by(path, size)
        if size < 0:
            path.unlink()
        else:
            os.truncate(path, size)
        damaged = [NOTED] if "damaged" in path.parts else []  # it is found anew
        try:
            assert_rerun_encodes(copy, [*lost, NOTED, *NEVER], damaged)
        except BaseException as error:
            error.add_note(f"{file}: {cut}")
            raise


def lost_with(folder):
    """The numbers that are lost with a folder of the store."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted({number for path in files for number in lost_by(path, -1)})


def test_a_folder_that_is_gone_takes_what_it_held_and_no_more(store, tmp_path):
    folders = sorted(path.relative_to(store) for path in store.rglob("*") if path.is_dir())
    assert len(folders) == 2 + 1 + 2 + 1 + 1 + 2 + 2  # recipe, segments, damaged, writing, workspaces
    for place, folder in enumerate(folders):
        copy = shutil.copytree(store, tmp_path / str(place))
        lost = lost_with(copy / folder)
        shutil.rmtree(copy / folder)
        try:
            assert_rerun_encodes(copy, [*lost, NOTED, *NEVER], [NOTED] if folder.name == "damaged" else [])
        except BaseException as error:
            error.add_note(str(folder))
            raise


@pytest.mark.parametrize("what", ["files", "folders", "dangling links"])
def test_what_is_not_the_stores_changes_nothing_wherever_it_lies(store, what):
    for folder in [store, *(path for path in store.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "._keys", ".nfs0000000000a1", "18ea2de0d99322ea-00000000", "keys.1.tmp", "x.journal"):
            if what == "files":
                (folder / name).write_text("null")
            elif what == "folders":
                (folder / name).mkdir()
                (folder / name / "keys").write_text("foreign")
            else:
                (folder / name).symlink_to("nowhere")
    assert_rerun_encodes(store, [NOTED, *NEVER])


def regions(layout, num_rows):
    """Where in a shard what lies: {"padding", "index" or the number of a row: offsets}, of rows about 60."""
    found = {
        "padding": [],
        "index": range(layout.rows_bytes(num_rows), layout.rows_bytes(num_rows) + 16 * num_rows + 4),
    }
    for number in range(num_rows):
        start = number * layout.stride_bytes
        data, crc = range(start, start + layout.data_bytes), range(start + layout.data_bytes, start + layout.row_bytes)
        found[number] = [data[0], data[-1], *crc, *random.Random(number).sample(data, min(56, len(data)))]
        if number + 1 < num_rows:
            found["padding"] += range(crc[-1] + 1, start + layout.stride_bytes, 200 - number)
    return found


@pytest.mark.parametrize("shape", [(2, 3), LARGE])
def test_a_bit_flipped_in_a_row_loses_that_row_alone(tmp_path, shape):
    entries = fill(entries_of(tmp_path, shape=shape), ITEMS[:4])
    segment, numbers = segments(entries)[0], range(4)
    shard = segment / entries.layout.shard_name
    for number in numbers:
        for offset in regions(entries.layout, 4)[number]:
            flip(shard, offset, 1 << offset % 8)
            reader = entries_of(tmp_path, shape=shape)
            for other in {*numbers} - {number}:
                assert_holds(reader, [ITEMS[other]])
            with pytest.raises(CorruptEntry, match=f"^{shard}: item {ITEMS[number]} is damaged; run the stage"):
                reader.read(ITEMS[number])
            assert entries_of(tmp_path, shape=shape).missing(ITEMS[:4]) == [ITEMS[number]]
            flip(shard, offset, 1 << offset % 8)
            (entries.path / "damaged" / segment.name).unlink()
    assert_holds(entries_of(tmp_path, shape=shape), ITEMS[:4])


@pytest.mark.parametrize("shape", [(2, 3), LARGE])
def test_a_bit_flipped_between_the_rows_and_behind_them_loses_nothing(tmp_path, shape):
    entries = fill(entries_of(tmp_path, shape=shape), ITEMS[:4])
    shard, places = segments(entries)[0] / entries.layout.shard_name, regions(entries.layout, 4)
    assert bool(places["padding"]) == (shape == LARGE)
    for region in ("padding", "index"):
        for offset in places[region]:
            flip(shard, offset, 1 << offset % 8)
            reader = entries_of(tmp_path, shape=shape)
            assert_holds(reader, ITEMS[:4])
            segment, _ = reader.index().best(ITEMS[:1])[0]
            assert segment.index_is_sound() == (region == "padding")
            assert verify([tmp_path]).is_sound == (region == "padding")
            flip(shard, offset, 1 << offset % 8)


def test_a_bit_flipped_in_the_keys_loses_that_segment_alone(tmp_path):
    entries = fill(fill(entries_of(tmp_path), ITEMS[:3]), ITEMS[3:6])
    keys = segments(entries)[0] / "keys"
    for offset in range(keys.stat().st_size):
        flip(keys, offset, 1 << offset % 8)
        reader = entries_of(tmp_path)
        assert reader.missing(ITEMS[:6]) == ITEMS[:3]
        assert_holds(reader, ITEMS[3:6])
        flip(keys, offset, 1 << offset % 8)
    assert entries_of(tmp_path).missing(ITEMS[:6]) == []


def test_a_bit_flipped_in_the_metadata_is_noticed_and_loses_nothing(tmp_path):
    entries = fill(entries_of(tmp_path), ITEMS[:3])
    segment = entries.index().best(ITEMS[:1])[0][0]
    path = segments(entries)[0] / "zarr.json"
    attributes = path.read_bytes().index(b'"kind"'), path.read_bytes().index(b'"names"')
    for offset in range(attributes[1]):  # a flipped letter in a name is another name; it decides nothing
        flip(path, offset, 1 << offset % 7)
        if offset < attributes[0]:
            with pytest.raises(ValueError):
                segment.metadata()
        if offset % 5 == 0:
            assert not verify([tmp_path]).is_sound
            assert_holds(entries_of(tmp_path), ITEMS[:3])
        flip(path, offset, 1 << offset % 7)
    assert segment.metadata()["shape"] == [3, 2, 3]


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_bit_flipped_in_what_a_dead_writer_left_loses_the_rows_from_there_on(store, tmp_path, step):
    journal, shard = (min(store.rglob(name)).relative_to(store) for name in ("*.journal", "writing/*/*/c.0.0.0"))
    text = (store / journal).read_bytes()
    for path, size in ((journal, len(text)), (shard, 4 * 28)):
        for offset in range(0, size, step):
            copy = shutil.copytree(store, tmp_path / str(offset))
            flip(copy / path, offset, 1 << offset % 8)
            num_kept = text[:offset].count(b"\n") if path == journal else offset // 28
            assert encode_again(copy) == sorted({NOTED, *DEAD[num_kept:], *NEVER}), f"{path} at {offset}"
            assert_holds(entries_of(copy))
            shutil.rmtree(copy)


def test_a_bit_flipped_in_a_note_of_damage_loses_no_other_segments_rows(store):
    note = next((store / "entries").glob("*/damaged/*"))
    for offset in range(note.stat().st_size):
        for bit in range(8):
            flip(note, offset, 1 << bit)
            entries = entries_of(store)
            assert {*numbers_missing(entries)} <= {*FIRST, *DEAD, *ALSO_DEAD, *NEVER}
            assert_holds(entries, [ITEMS[number] for number in SECOND])
            flip(note, offset, 1 << bit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "2",
        "{}",
        "[null]",
        "[[2]]",
        "[true]",
        "[1e999]",
        "[-1]",
        "[5]",
        "[99999999999999999999]",
        "\xff",
    ],
)
def test_a_note_that_makes_no_sense_is_let_be(store, text):
    next((store / "entries").glob("*/damaged/*")).write_text(text, "latin-1")
    assert_rerun_encodes(store, NEVER, [NOTED])


def test_a_recipe_that_is_damaged_loses_nothing_and_is_mended(store):
    path, entries = next((store / "entries").glob("*/recipe.json")), entries_of(store)
    text = path.read_bytes()
    flip(path, 20)
    assert_rerun_encodes(store, [NOTED, *NEVER])
    assert path.read_bytes() == text and entries.missing(ITEMS) == []


@pytest.mark.parametrize("num_needed", [20, 12])
def test_the_collector_keeps_the_sound_one_of_two_copies(tmp_path, num_needed):
    """Whether the segment with the damaged one is kept as it is, or what is needed of it is copied."""
    entries = fill(fill(entries_of(tmp_path)))
    flip(segments(entries)[0] / "c.0.0.0", 3 * 28)
    collect(tmp_path, {entries.id: set(ITEMS[:num_needed])}, min_age_seconds=-1)
    assert_holds(entries_of(tmp_path), ITEMS[:num_needed])
