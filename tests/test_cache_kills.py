"""What the store promises when writers are killed: at any moment, again and again, several at once, while they take
over what a killed one had written."""

import functools
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import zarr
from test_cache_faults import as_after_a_kill, child, leftovers
from test_cache_store import ITEMS, segments

from cache import Store, digest

KILLED_AT_EACH_CALL = """
import itertools, numpy as np, os, shutil, signal, sys
from cache import Store, digest

folder, before, num_rows, step = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def write(num_calls):
    entries = Store(f"{folder}/{num_calls}").entries({"kind": "latents", "dtype": "float32", "shape": [4096]})
    calls = iter(range(num_calls))
    kill = lambda: next(calls, None) is None and os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(lambda frame, event, arg: kill() if event == "c_call" else None)
    with entries.writer() as writer:
        for number in range(num_rows):
            writer.write(digest(bytes([number])), np.full(4096, number, np.float32))
    sys.setprofile(None)

for num_calls in itertools.count(1, step):
    if before:
        shutil.copytree(before, f"{folder}/{num_calls}")
    pid = os.fork()
    if pid == 0:
        write(num_calls)
        os._exit(0)
    was_killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(num_calls, int(was_killed), flush=True)
    if not was_killed:
        break
"""
NURSERY = """
import numpy as np, os, select, signal, sys, traceback
from cache import Store, digest

folder, num_values, first, last = sys.argv[1], *map(int, sys.argv[2:])
items = {digest(b"%d" % number): number for number in range(first, last)}

def encode(max_items):
    entries = Store(folder).entries({"kind": "latents", "dtype": "float32", "shape": [num_values]})
    with entries.writer(max_items=max_items) as writer:
        os.write(1, b"entered\\n")
        for item in entries.missing(items):
            os.write(1, b"begun %d\\n" % items[item])
            writer.write(item, np.full(num_values, items[item], np.float32))
            os.write(1, b"written %d\\n" % items[item])

for line in sys.stdin:  # how long the next writer lives, and how much it commits at once
    pid = os.fork()
    if pid == 0:
        try:
            encode(int(line.split()[1]))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    select.select([os.pidfd_open(pid)], [], [], float(line.split()[0]))
    os.kill(pid, signal.SIGKILL)
    os.write(1, b"dead %d\\n" % os.waitpid(pid, 0)[1])
"""
FOR_EVER = 600


@dataclass
class Life:
    """What a writer said of its life. begun, written: numbers of items, in order."""

    has_entered: bool = False
    begun: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    status: int = 0


def live(nursery, seconds, max_items):
    """Let a writer live for so long, and kill it if it has not ended before."""
    nursery.stdin.write(f"{seconds} {max_items}\n")
    nursery.stdin.flush()
    life = Life()
    for line in nursery.stdout:
        word, *number = line.split()
        if word == "dead":
            life.status = int(number[0])
            break
        life.has_entered = True
        if word != "entered":
            getattr(life, word).append(int(number[0]))
    assert life.status in (0, 9), nursery.communicate()[1]
    return life


def rows_of(folder, num_values=4096):
    return Store(folder).entries({"kind": "latents", "dtype": "float32", "shape": [num_values]})


@functools.cache
def item_of(number):
    return digest(b"%d" % number)


def numbers_held(entries, numbers, known=()):
    """Those of the numbers whose items are there; each of them, but for the known ones, was read and is right."""
    missing = set(entries.missing(map(item_of, numbers)))
    held = [number for number in numbers if item_of(number) not in missing]
    for number in set(held) - set(known):
        assert (entries.read(item_of(number)) == number).all()
    return held


def assert_zarr_agrees(entries, seen=()):
    """Stock zarr opens each segment, but for those in ``seen``, and finds the numbers that our reader finds."""
    for folder in sorted(entries.segments_path.glob("*")):
        if folder.name not in seen:
            array = zarr.open_array(folder, mode="r")
            ours = entries.read_many(array.attrs["items"])
            np.testing.assert_array_equal(np.asarray(array[:]).view(ours.dtype), ours)


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_call_leaves_nothing_visible_and_loses_no_row(tmp_path, step):
    """Killed in one place after the other, between two calls into C, from opening the store to its last commit."""
    output, errors = child(KILLED_AT_EACH_CALL, tmp_path, "", 3, step).communicate()
    assert errors == ""
    outcomes = set()
    for num_calls, was_killed in (map(int, line.split()) for line in output.splitlines()):
        entries = rows_of(tmp_path / str(num_calls))
        missing = entries.missing(ITEMS[:3])
        assert missing in ([], ITEMS[:3])
        with entries.writer() as writer:
            missing = entries.missing(ITEMS[:3])  # the rows that were written and not committed are taken over
            outcomes.add((was_killed, 3 - len(missing)))
            for item in missing:
                writer.write(item, np.full(4096, ITEMS.index(item), np.float32))
        assert [(entries.read(item) == number).all() for number, item in enumerate(ITEMS[:3])] == [True] * 3
        assert_zarr_agrees(entries)
        assert len(segments(entries)) <= 2 and leftovers(entries) == []
    assert outcomes == {(1, 0), (1, 1), (1, 2), (1, 3), (0, 3)}


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_call_while_it_takes_over_loses_no_row(tmp_path, step):
    """As above; what is killed is taking over the rows of two dead writers."""
    entries = rows_of(tmp_path / "living")
    with entries.writer() as first, entries.writer() as second:
        for number, writer in enumerate((first, first, second)):
            writer.write(ITEMS[number], np.full(4096, number, np.float32), f"{number}.png")
        as_after_a_kill(tmp_path / "living", tmp_path / "dead")
    output, errors = child(KILLED_AT_EACH_CALL, tmp_path, tmp_path / "dead", 0, step).communicate()
    assert errors == ""
    outcomes = set()
    for num_calls, was_killed in (map(int, line.split()) for line in output.splitlines()):
        entries = rows_of(tmp_path / str(num_calls))
        outcomes.add((was_killed, 3 - len(entries.missing(ITEMS[:3]))))
        with entries.writer():
            assert entries.missing(ITEMS[:3]) == []
        assert [(entries.read(item) == number).all() for number, item in enumerate(ITEMS[:3])] == [True] * 3
        assert_zarr_agrees(entries)
        names = [zarr.open_array(folder, mode="r").attrs["names"] for folder in segments(entries)]
        assert names == [["0.png", "1.png"], ["2.png"]] and leftovers(entries) == []
    assert outcomes == {(1, 0), (1, 2), (1, 3), (0, 3)}


@pytest.mark.parametrize(
    "num_kills, num_values, max_items, seconds",
    [
        (20, 4096, 5, 0.05),
        pytest.param(200, 4096, 5, 0.05, marks=pytest.mark.slow),
        pytest.param(200, 1 << 14, 50, 0.05, marks=pytest.mark.slow),  # 64 KiB a row: many kills hit the taking over
    ],
)
def test_kills_at_any_moment_lose_nothing_and_the_rerun_encodes_the_rest(
    tmp_path, num_kills, num_values, max_items, seconds
):
    chance, numbers = random.Random(0), range(40 * num_kills)
    (tmp_path / "store").mkdir()  # the first child may be killed before it would
    nursery = child(NURSERY, tmp_path / "store", num_values, 0, len(numbers))
    held, seen, num_begun, num_in_flight, num_early = [], set(), 0, 0, 0
    for kill in range(num_kills):
        # every third one is killed early: it is taking over what the one before it had written
        life = live(nursery, chance.uniform(0, seconds * (0.2 if kill % 3 else 1)), chance.randint(1, max_items))
        assert life.status == 9, "everything was encoded before the last kill: raise the number of items"
        entries = rows_of(as_after_a_kill(tmp_path / "store", tmp_path / f"{kill}"), num_values)
        assert set(numbers_held(entries, numbers, held)) <= set(held) | set(life.begun)
        before = held
        with entries.writer():
            held = numbers_held(entries, numbers, before)
        assert life.begun == sorted(set(numbers) - set(before))[: len(life.begun)]
        assert len(life.begun) - len(life.written) in (0, 1)
        assert set(before) | set(life.written) <= set(held) <= set(before) | set(life.begun)
        assert_zarr_agrees(entries, seen)
        assert leftovers(entries) == []
        seen = {folder.name for folder in rows_of(tmp_path / "store", num_values).segments_path.glob("*")}
        num_begun += len(life.begun)
        num_in_flight += len(set(life.begun) - set(held))
        num_early += not life.has_entered
        shutil.rmtree(tmp_path / f"{kill}")
    life = live(nursery, FOR_EVER, 64)
    assert life.status == 0 and life.begun == life.written == sorted(set(numbers) - set(held))
    assert num_begun + len(life.begun) == len(numbers) + num_in_flight  # nothing else was encoded twice
    assert numbers_held(rows_of(tmp_path / "store", num_values), numbers) == list(numbers)
    assert leftovers(rows_of(tmp_path / "store", num_values)) == []
    assert nursery.communicate()[1] == "" and num_early > 0
    print(f"{num_kills} kills, {num_early} before the block was entered, {num_in_flight} items encoded twice")


@pytest.mark.parametrize("num_kills", [6, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_values", [4096, 1 << 15])
def test_two_writers_that_are_killed_all_the_time_lose_nothing(tmp_path, num_kills, num_values):
    """Each has its own items; what one had written when it was killed, either of them takes over."""
    ranges = [range(0, 40 * num_kills), range(100_000, 100_000 + 40 * num_kills)]
    nurseries = [child(NURSERY, tmp_path, num_values, numbers[0], numbers[-1] + 1) for numbers in ranges]
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(be_killed_and_end, nurseries, [tmp_path] * 2, [num_values] * 2, ranges, [num_kills] * 2))
    assert [nursery.communicate()[1] for nursery in nurseries] == ["", ""]
    entries = rows_of(tmp_path, num_values)
    for numbers in ranges:
        assert numbers_held(entries, numbers) == list(numbers)
    assert_zarr_agrees(entries)
    assert leftovers(entries) == []
    print(f"{2 * num_kills} kills, {sum(ends)} before the block was entered")


def be_killed_and_end(nursery, store, num_values, numbers, num_kills):
    """Live, be killed and live again, in the end until all is encoded; checks that nothing is encoded twice but for
    what was just being written. Returns how many kills came before the block was entered."""
    chance, left, num_early, life = random.Random(numbers[0]), list(numbers), 0, Life(status=9)
    while life.status == 9:
        life = live(nursery, chance.uniform(0, 0.08) if num_kills > 0 else FOR_EVER, chance.randint(1, 12))
        num_kills -= 1
        if life.begun:
            assert life.begun[0] in left[:2]  # the first of these may have been in flight, and have come through
            left = left[left.index(life.begun[0]) :]
            assert life.begun == left[: len(life.begun)]
        if life.has_entered:  # what was written before is there for everyone
            done = numbers[: len(numbers) - len(left)]
            entries = rows_of(store, num_values)
            assert entries.missing(map(item_of, done)) == []
            assert all((entries.read(item_of(number)) == number).all() for number in done[-50:])
        left = left[len(life.written) :]
        num_early += not life.has_entered
    return num_early


@pytest.mark.parametrize("num_writers", [2, 4])
def test_writers_that_enter_at_once_after_a_kill_encode_nothing_again(tmp_path, num_writers):
    entries, numbers = rows_of(tmp_path / "living", 1 << 18), range(40)
    with entries.writer() as writer:
        for number in numbers:
            writer.write(item_of(number), np.full(1 << 18, number, np.float32))
        as_after_a_kill(tmp_path / "living", tmp_path / "dead")
    nurseries = [child(NURSERY, tmp_path / "dead", 1 << 18, 0, len(numbers)) for _ in range(num_writers)]
    with ThreadPoolExecutor() as pool:
        lives = list(pool.map(live, nurseries, [FOR_EVER] * num_writers, [1000] * num_writers))
    assert [life.begun for life in lives] == [[]] * num_writers
    assert numbers_held(rows_of(tmp_path / "dead", 1 << 18), numbers) == list(numbers)
    for nursery in nurseries:
        nursery.communicate()
