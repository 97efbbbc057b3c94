"""Garbage collection: what is needed, leased or young stays where it is; the rest goes, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_cache_store import REPOSITORY

from cache import (
    NEEDS_NAME,
    MissingEntry,
    Need,
    Source,
    Store,
    StoreError,
    as_needs,
    collect,
    digest,
    find_garbage,
    lease,
    needs_text,
    read_needs,
)
from cache.core.folders import names_of
from cache.tools.garbage import MANY_SMALL

RECIPE = {"kind": "latents", "dtype": "float32", "shape": [4096]}
OTHER = RECIPE | {"flip": True}
ITEMS = [digest(bytes([number])) for number in range(40)]
HOLD_A_LEASE = """
import sys, time
from cache import Need, Source, lease
recipe = {"kind": "latents", "dtype": "float32", "shape": [4096]}
with lease(sys.argv[1], [Need.of("EncodeImages", "vae", recipe, tuple(Source(item, "", "") for item in sys.argv[2:]))]):
    print("held", flush=True)
    time.sleep(600)
"""
COLLECT = """
import sys
from cache import collect
collect(sys.argv[1], {sys.argv[2]: set(sys.argv[3:])}, 0)
"""


def fill(store, numbers, recipe=RECIPE, a_segment=10):
    entries = Store(store).entries(recipe)
    with entries.writer(max_items=a_segment) as writer:
        for number in numbers:
            writer.write(ITEMS[number], np.full(4096, number, np.float32), f"{number}.png")
    return entries


def need(numbers, recipe=RECIPE):
    sources = tuple(Source(ITEMS[number], f"{number}.png", f"{number}.png") for number in numbers)
    return Need.of("EncodeImages", "vae", recipe, sources)


def keep(numbers, recipe=RECIPE):
    return as_needs([need(numbers, recipe)])


def held(store, recipe=RECIPE):
    """The numbers of the items that a fresh reader finds, each read and checked."""
    entries = Store(store).entries(recipe)
    gone = set(entries.missing(ITEMS))
    found = [number for number, item in enumerate(ITEMS) if item not in gone]
    assert all((entries.read(ITEMS[number]) == number).all() for number in found)
    return found


def folders(entries):
    return sorted(path.name for path in entries.segments_path.iterdir())


def test_what_is_needed_stays_and_the_rest_goes(tmp_path):
    entries = fill(tmp_path, range(40))
    first = folders(entries)
    (garbage,) = collect(tmp_path, keep([*range(10), *range(20, 29), 35]), 0)
    # 0..9: all needed.  10..19: none.  20..29: all but one, not worth the copying.  30..39: one, which is copied.
    assert held(tmp_path) == [*range(10), *range(20, 30), 35]
    assert (garbage.items, len(garbage.removed), len(garbage.rewritten)) == (19, 1, 1)
    assert set(folders(entries)) & set(first) == {first[0], first[2]}
    assert garbage.freed_bytes == 19 * (4096 * 4 + 4)


def test_names_of_sources_survive_the_copying(tmp_path):
    entries = fill(tmp_path, range(10))
    collect(tmp_path, keep([3, 5]), 0)
    (segment,) = Store(tmp_path).entries(RECIPE).index().segments
    assert (segment.items(), names_of(segment)) == ([ITEMS[3], ITEMS[5]], ["3.png", "5.png"])
    assert len(folders(entries)) == 1


def test_looking_for_garbage_removes_nothing(tmp_path):
    entries = fill(tmp_path, range(20))
    before = folders(entries)
    (garbage,) = find_garbage(tmp_path, keep([3]), 0)
    assert (garbage.items, len(garbage.removed), len(garbage.rewritten)) == (19, 1, 1)
    assert folders(entries) == before and held(tmp_path) == list(range(20))


def test_each_recipe_is_kept_for_itself(tmp_path):
    fill(tmp_path, range(10))
    fill(tmp_path, range(10), OTHER)
    collect(tmp_path, keep(range(10), OTHER), 0)
    assert (held(tmp_path), held(tmp_path, OTHER)) == ([], list(range(10)))


def test_young_entries_stay(tmp_path):
    fill(tmp_path, range(10))
    assert not any(collect(tmp_path, {}, 3600))
    assert held(tmp_path) == list(range(10))
    assert any(collect(tmp_path, {}, 0))
    assert held(tmp_path) == []


def test_damaged_rows_and_later_copies_are_garbage(tmp_path):
    entries = fill(tmp_path, range(10))
    fill(tmp_path, range(5))
    segment = entries.index().segments[0]
    entries.note_damage(segment, [7, 8, 9])
    (garbage,) = collect(tmp_path, keep(range(10)), 0)
    assert garbage.items == 3 + 5
    assert held(tmp_path) == list(range(7)) and len(folders(entries)) == 1
    assert not list((entries.path / "damaged").iterdir())


def test_what_was_half_removed_is_removed(tmp_path):
    entries = fill(tmp_path, range(20))
    os.remove(entries.segments_path / folders(entries)[0] / "keys")
    (garbage,) = collect(tmp_path, keep(range(20)), 0)
    assert len(garbage.broken) == 1 and len(folders(entries)) == 1
    assert held(tmp_path) == list(range(10, 20))


def test_many_small_segments_become_one(tmp_path):
    entries = fill(tmp_path, range(MANY_SMALL + 1), a_segment=1)
    collect(tmp_path, keep(range(MANY_SMALL + 1)), 0)
    assert len(folders(entries)) == 1 and held(tmp_path) == list(range(MANY_SMALL + 1))


def test_a_reader_that_looked_before_finds_what_was_copied(tmp_path):
    fill(tmp_path, range(10))
    reader = Store(tmp_path).entries(RECIPE)
    assert reader.missing(ITEMS[:10]) == []
    collect(tmp_path, keep([3]), 0)
    assert (reader.read(ITEMS[3]) == 3).all()
    with pytest.raises(MissingEntry):
        reader.read(ITEMS[4])


def test_what_a_running_process_needs_is_neither_removed_nor_moved(tmp_path):
    entries = fill(tmp_path, range(30))
    before = folders(entries)
    command = [sys.executable, "-c", HOLD_A_LEASE, str(tmp_path), ITEMS[12]]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    collect(tmp_path, keep([1]), 0)
    assert held(tmp_path) == [1, *range(10, 20)] and before[1] in folders(entries)
    process.kill()
    process.wait()
    collect(tmp_path, keep([1]), 0)
    assert held(tmp_path) == [1]
    assert not list((tmp_path / "leases").iterdir())


def test_a_lease_ends_with_its_block(tmp_path):
    fill(tmp_path, range(10))
    with lease(tmp_path, [need(range(10))]):
        collect(tmp_path, {}, 0)
        assert held(tmp_path) == list(range(10))
    assert not list((tmp_path / "leases").iterdir())
    collect(tmp_path, {}, 0)
    assert held(tmp_path) == []


def test_a_damaged_lease_stops_the_collector(tmp_path):
    fill(tmp_path, range(10))
    with lease(tmp_path, [need(range(10))]):
        (path,) = (tmp_path / "leases").iterdir()
        path.write_text("{")
        with pytest.raises(StoreError, match="damaged, so that what it needs is not known"):
            collect(tmp_path, {}, 0)
    assert held(tmp_path) == list(range(10))


def test_needs_survive_their_file(tmp_path):
    path = tmp_path / NEEDS_NAME
    path.write_text(needs_text([need([1, 2]), need([3], OTHER)]))
    assert read_needs(path) == keep([1, 2]) | keep([3], OTHER)


def test_items_that_several_recipes_share_are_in_the_file_once(tmp_path):
    both = [need(range(10)), need(range(10), OTHER), need([3]), need([3], OTHER)]
    text = needs_text(both)
    assert text.count(ITEMS[0]) == 1
    (tmp_path / NEEDS_NAME).write_text(text)
    assert read_needs(tmp_path / NEEDS_NAME) == keep(range(10)) | keep(range(10), OTHER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"needs": [{"id": "a"}]}',
        '{"needs": [{"id": "a", "items": "xy"}]}',
        '{"needs": [{"id": "a", "items_of": 0}]}',
    ],
)
def test_a_damaged_file_of_needs_is_an_error_and_not_nothing(tmp_path, text):
    (tmp_path / NEEDS_NAME).write_text(text)
    with pytest.raises(StoreError, match="needs.json: damaged"):
        read_needs(tmp_path / NEEDS_NAME)


def test_a_lease_waits_for_the_collector_and_sees_what_is_left(tmp_path, monkeypatch, capfd):
    fill(tmp_path, range(10))
    garbage, removing, may_go_on = sys.modules["cache.tools.garbage"], threading.Event(), threading.Event()
    remove = garbage._remove

    def remove_slowly(found):
        removing.set()
        assert may_go_on.wait(60)
        remove(found)

    monkeypatch.setattr(garbage, "_remove", remove_slowly)
    collector = threading.Thread(target=collect, args=(tmp_path, {}, 0))
    collector.start()
    assert removing.wait(60)
    seen = []
    stage = threading.Thread(target=lambda: seen.append(_missing_under_lease(tmp_path)))
    stage.start()
    stage.join(0.3)
    assert seen == []
    may_go_on.set()
    collector.join()
    stage.join()
    assert seen == [ITEMS[:10]]
    assert "its garbage is being collected; waiting" in capfd.readouterr().err


def _missing_under_lease(store):
    with lease(store, [need(range(10))]):
        return Store(store).entries(RECIPE).missing(ITEMS[:10])


def test_a_killed_collector_loses_nothing_that_is_kept(tmp_path):
    """Killed at 20 moments from its first instruction to its last; what it did not finish, the next one does."""
    entries, kept = Store(tmp_path).entries(RECIPE), [1, 11, 12, 21, 35]
    for number in range(20):
        fill(tmp_path, _missing_numbers(entries))
        began = time.monotonic()
        process = _collector(tmp_path, entries.id, kept)
        if number == 0:
            process.wait()
            whole_seconds = time.monotonic() - began
            continue
        time.sleep(whole_seconds * (0.5 + 0.5 * number / 20))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert set(held(tmp_path)) >= set(kept)
    collect(tmp_path, keep(kept), 0)
    assert held(tmp_path) == kept


def _missing_numbers(entries):
    missing = set(entries.missing(ITEMS))
    return [number for number, item in enumerate(ITEMS) if item in missing]


def _collector(store, recipe, kept):
    command = [sys.executable, "-c", COLLECT, str(store), recipe, *(ITEMS[number] for number in kept)]
    return subprocess.Popen(command, cwd=REPOSITORY)


def test_two_writers_two_collectors_and_a_reader_at_once(tmp_path):
    """What is needed is there at the end, whoever collected what whoever had written; every number read is right."""
    entries, kept, errors = fill(tmp_path, range(40)), list(range(0, 40, 2)), []
    stop = threading.Event()

    reader = Store(tmp_path).entries(RECIPE)

    def write():
        fill(tmp_path, _missing_numbers(Store(tmp_path).entries(RECIPE)), a_segment=3)

    def read():
        for number in kept:
            assert (reader.read(ITEMS[number]) == number).all()

    def repeat(work):
        try:
            while not stop.is_set():
                work()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in (write, write, read)]
    for thread in threads:
        thread.start()
    collectors = [_collector(tmp_path, entries.id, kept) for _ in range(2)]
    assert [process.wait() for process in collectors] == [0, 0]
    for _ in range(10):
        collect(tmp_path, keep(kept), 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    collect(tmp_path, keep(kept), 0)
    assert set(held(tmp_path)) >= set(kept)


def test_a_store_that_is_not_ours_is_not_collected(tmp_path, monkeypatch):
    fill(tmp_path, range(10))
    monkeypatch.setattr(sys.modules["cache.core.leases"], "_lock", lambda *_: False)
    with pytest.raises(StoreError, match="nothing is collected where files cannot be written and locked"):
        collect(tmp_path, {}, 0)
    assert held(tmp_path) == list(range(10))


def test_foreign_folders_among_the_entries_are_let_be(tmp_path):
    fill(tmp_path, range(10))
    for name, recipe in (("mine", None), ("latents-0", "{}"), ("latents-1", json.dumps(RECIPE))):
        (tmp_path / "entries" / name).mkdir()
        if recipe is not None:
            (tmp_path / "entries" / name / "recipe.json").write_text(recipe)
    collect(tmp_path, {}, 0)
    assert {"mine", "latents-0", "latents-1"} < set(os.listdir(tmp_path / "entries"))
