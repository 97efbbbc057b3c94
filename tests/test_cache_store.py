"""What the store promises while nothing goes wrong with the disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

from cache import MissingEntry, Store, StoreError, digest

REPOSITORY = Path(__file__).parent.parent
ITEMS = [digest(bytes([number])) for number in range(20)]
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def entries_of(folder, dtype="float32", shape=(2, 3), **recipe):
    return Store(folder).entries({"kind": "latents", "dtype": dtype, "shape": list(shape), **recipe})


def array_of(entries, seed):
    return np.random.default_rng(seed).normal(size=entries.shape).astype(NUMPY[entries.dtype])


def fill(entries, items=ITEMS, **limits):
    with entries.writer(**limits) as writer:
        for item in items:
            writer.write(item, array_of(entries, ITEMS.index(item)))
    return entries


def assert_holds(entries, items=ITEMS):
    for item in items:
        np.testing.assert_array_equal(entries.read(item), array_of(entries, ITEMS.index(item)))


def segments(entries):
    return sorted(entries.segments_path.iterdir())


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (4, 96, 128)])
def test_what_is_read_is_what_was_written(tmp_path, dtype, shape):
    fill(entries_of(tmp_path, dtype, shape))
    entries = entries_of(tmp_path, dtype, shape)
    assert_holds(entries)
    assert (entries.read(ITEMS[0]).dtype, entries.read(ITEMS[0]).shape) == (NUMPY[dtype], shape)
    assert entries.missing(ITEMS) == []


def test_a_look_at_the_store_that_finds_nothing_new_keeps_the_index(tmp_path):
    entries = fill(entries_of(tmp_path), ITEMS[:10])
    index = entries.index()
    assert entries.missing(ITEMS) == ITEMS[10:] and entries.index() is index
    (segment,) = index.segments
    entries.note_damage(segment, [3])
    assert entries.missing(ITEMS) == [ITEMS[3], *ITEMS[10:]]
    entries.note_damage(segment, [])
    assert entries.missing(ITEMS) == ITEMS[10:]


def test_the_same_items_may_be_asked_for_again_and_what_came_or_went_is_seen(tmp_path):
    entries, items = fill(entries_of(tmp_path), ITEMS[:10]), (*ITEMS, ITEMS[3])
    assert entries.missing(items) == entries.missing(items) == ITEMS[10:]
    entries.missing(items).clear()  # the answer is the caller's
    fill(entries_of(tmp_path), ITEMS[10:15])
    assert entries.missing(items) == ITEMS[15:]
    shutil.rmtree(segments(entries)[0])
    assert entries.missing(items) == ITEMS[:10] + ITEMS[15:]
    assert entries.missing(items[5:]) == ITEMS[5:10] + ITEMS[15:] + ITEMS[3:4]


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("shape", [(), (2, 3), (4, 96, 128)])
def test_stock_zarr_reads_the_same_numbers(tmp_path, dtype, shape):
    entries = fill(entries_of(tmp_path, dtype, shape), max_items=8)
    assert len(segments(entries)) == 3
    rows = []
    for segment in segments(entries):
        array = zarr.open_array(segment, mode="r")
        assert array.shards == array.shape and array.chunks == (1, *shape)
        assert array.attrs["dtype"] == dtype
        rows += list(np.asarray(array[:]).view(NUMPY[dtype]))
        last = np.asarray(array[array.shape[0] - 1]).view(NUMPY[dtype])  # one chunk alone, through the shard's index
        np.testing.assert_array_equal(last, rows[-1])
    np.testing.assert_array_equal(rows, [array_of(entries, seed) for seed in range(20)])


def test_bfloat16_goes_in_as_numbers_or_bits_and_comes_out_as_numbers(tmp_path):
    entries = entries_of(tmp_path, "bfloat16", (2,))
    numbers = np.array([1.5, -3e38], ml_dtypes.bfloat16)
    with entries.writer() as writer:
        writer.write(ITEMS[0], numbers)
        writer.write(ITEMS[1], numbers.view(np.uint16))
    for item in ITEMS[:2]:
        assert entries.read(item).dtype == ml_dtypes.bfloat16
        assert entries.read(item).tolist() == numbers.tolist()


def test_a_row_of_zeros_is_stored_and_not_left_out(tmp_path):
    entries = entries_of(tmp_path)
    with entries.writer() as writer:
        writer.write(ITEMS[0], np.zeros((2, 3), np.float32))
    assert entries.read(ITEMS[0]).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert zarr.open_array(segments(entries)[0], mode="r").nchunks_initialized == 1


def test_a_transposed_array_is_stored_as_it_reads(tmp_path):
    entries, array = entries_of(tmp_path), np.arange(6, dtype=np.float32).reshape(3, 2).T
    with entries.writer() as writer:
        writer.write(ITEMS[0], array)
    assert entries.read(ITEMS[0]).tolist() == array.tolist()


def test_missing_keeps_the_order_and_names_each_item_once(tmp_path):
    entries = fill(entries_of(tmp_path), [ITEMS[1], ITEMS[3]])
    assert entries.missing([ITEMS[4], ITEMS[3], ITEMS[0], ITEMS[4], ITEMS[1]]) == [ITEMS[4], ITEMS[0]]
    assert entries.missing([]) == []


def test_items_that_differ_in_trailing_zero_bytes_are_found(tmp_path):
    entries = entries_of(tmp_path, shape=())
    items = ["00" * 16, "ab" + "00" * 15, "ab" * 16]
    with entries.writer() as writer:
        for number, item in enumerate(items):
            writer.write(item, np.float32(number))
    assert [float(entries.read(item)) for item in items] == [0, 1, 2]
    assert entries.missing([*items, "ab" + "00" * 14 + "01"]) == ["ab" + "00" * 14 + "01"]


def test_looking_creates_nothing_on_disk(tmp_path):
    entries = entries_of(tmp_path / "store")
    assert entries.missing(ITEMS) == ITEMS
    with pytest.raises(MissingEntry), entries.writer():
        entries.read(ITEMS[0])
    assert Store(tmp_path / "store").facts.get(__file__) is None
    assert not (tmp_path / "store").exists()


def test_a_missing_entry_is_a_key_error_with_a_readable_line(tmp_path):
    with pytest.raises(KeyError, match=f"^.*latents-.*: item {ITEMS[0]} is not there; run the stage") as caught:
        entries_of(tmp_path).read(ITEMS[0])
    assert isinstance(caught.value, StoreError) and not str(caught.value).startswith(("'", '"'))


def test_entries_are_visible_after_their_commit_and_not_before(tmp_path):
    entries, reader = entries_of(tmp_path), entries_of(tmp_path)
    with entries.writer() as writer:
        writer.write(ITEMS[0], array_of(entries, 0))
        assert reader.missing(ITEMS[:2]) == ITEMS[:2]
        writer.commit()
        writer.write(ITEMS[1], array_of(entries, 1))
        reader.refresh()
        assert_holds(reader, ITEMS[:1])
        assert reader.missing(ITEMS[:2]) == ITEMS[1:2]
    assert reader.missing(ITEMS[:2]) == []


def test_a_full_or_old_segment_is_committed_by_itself(tmp_path):
    for kind, limits in enumerate([{"max_items": 2}, {"max_bytes": 50}, {"max_seconds": 0}]):
        entries, reader = (entries_of(tmp_path, number=kind) for _ in range(2))
        with entries.writer(**limits) as writer:
            writer.write(ITEMS[0], array_of(entries, 0))
            writer.write(ITEMS[1], array_of(entries, 1))
            assert reader.missing(ITEMS[:2]) == []


def test_an_exception_commits_what_was_written_and_goes_on(tmp_path):
    entries = entries_of(tmp_path)
    with pytest.raises(KeyboardInterrupt), entries.writer() as writer:
        writer.write(ITEMS[0], array_of(entries, 0))
        raise KeyboardInterrupt
    assert_holds(entries_of(tmp_path), ITEMS[:1])


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_item(tmp_path, dtype, bad):
    entries = entries_of(tmp_path, dtype)
    array = array_of(entries, 1)
    array[1, 2] = bad
    with pytest.raises(StoreError, match=rf"latents-.*{ITEMS[1]}: 1 of 6 numbers are NaN"), entries.writer() as writer:
        writer.write(ITEMS[0], array_of(entries, 0))
        writer.write(ITEMS[1], array)
    assert entries_of(tmp_path, dtype).missing(ITEMS[:2]) == ITEMS[1:2]


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((3, 2), np.float32), r"shape is \(3, 2\), the recipe says \(2, 3\)"),
        (np.zeros((1, 2, 3), np.float32), r"shape is \(1, 2, 3\)"),
        (np.zeros((2, 3), np.float64), "array is float64, the recipe says float32"),
        (np.zeros((2, 3), np.uint16), "array is uint16, the recipe says float32"),
        (np.zeros((2, 3), ">f4"), "array is >f4, the recipe says float32"),
    ],
)
def test_another_shape_or_dtype_is_refused_by_item(tmp_path, array, words):
    with pytest.raises(StoreError, match=f"{ITEMS[0]}.*{words}"), entries_of(tmp_path).writer() as writer:
        writer.write(ITEMS[0], array)
    assert not (tmp_path / "entries").exists()


@pytest.mark.parametrize("item", ["cat", "ab" * 15, "AB" * 16, "a photo of a cat, 32 characters.", None])
def test_an_item_that_is_no_digest_is_refused(tmp_path, item):
    entries = entries_of(tmp_path)
    with pytest.raises(StoreError, match="is not 32 hexadecimal digits"), entries.writer() as writer:
        writer.write(item, array_of(entries, 0))
    for look in (entries.read, lambda item: entries.missing([item])):
        with pytest.raises(StoreError, match="is not 32 hexadecimal digits"):
            look(item)


def test_a_wrong_recipe_is_refused_with_all_its_problems(tmp_path):
    with pytest.raises(StoreError, match=r"kind = '\.\./x'.*dtype = 'int8'.*shape = \[2, 0\]"):
        Store(tmp_path).entries({"kind": "../x", "dtype": "int8", "shape": [2, 0]})
    with pytest.raises(StoreError, match="kind = None.*dtype = None.*shape = None"):
        Store(tmp_path).entries({})
    with pytest.raises(StoreError, match="found nan"):
        entries_of(tmp_path, scale=float("nan"))


def test_recipes_do_not_see_each_other(tmp_path):
    fill(entries_of(tmp_path, weights="3f2a"))
    assert entries_of(tmp_path, weights="91c0").missing(ITEMS) == ITEMS
    assert entries_of(tmp_path, weights="3f2a").missing(ITEMS) == []


def test_the_recipe_stands_beside_its_entries_and_is_mended(tmp_path):
    entries = fill(entries_of(tmp_path, prompt="ein Kätzchen"), ITEMS[:1])
    path = entries.path / "recipe.json"
    assert json.loads(path.read_text("utf-8")) == entries.recipe
    path.write_text("{")
    fill(entries, ITEMS[1:2])
    assert json.loads(path.read_text("utf-8")) == entries.recipe


def test_a_foreign_file_is_ignored(tmp_path):
    entries = fill(entries_of(tmp_path))
    for folder in (
        tmp_path,
        tmp_path / "entries",
        entries.path,
        entries.segments_path,
        entries.path / "writing",
        segments(entries)[0],
    ):
        (folder / ".DS_Store").write_text("foreign")
        (folder / "18ea2de0d99322ea-e4d4e526").mkdir()
        (folder / "18ea2de0d99322ea-00000000").write_text("foreign")
        (folder / "notes-of-mine").mkdir()
        (folder / "notes-of-mine" / "keep").write_text("foreign")
    assert_holds(entries_of(tmp_path))
    assert entries_of(tmp_path).missing(ITEMS) == []
    with entries.writer():
        pass
    assert (entries.path / "writing" / "notes-of-mine" / "keep").exists()


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        entries = fill(entries_of(tmp_path / "store"))
        (tmp_path / "photo").write_bytes(b"photo")
        os.utime(tmp_path / "photo", (0, 0))
        Store(tmp_path / "store").facts.file_digest(tmp_path / "photo")
    finally:
        os.umask(before)
    paths = list((tmp_path / "store").rglob("*"))
    assert {"keys", "zarr.json", "c.0.0.0", "recipe.json", "writing", "facts.sqlite"} <= {path.name for path in paths}
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
    assert entries.missing(ITEMS) == []


def test_the_store_needs_neither_zarr_nor_what_is_above_it():
    code = (
        "import cache, sys; print([m for m in ('mindspore', 'zarr', 'luigi', 'pipeline', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
