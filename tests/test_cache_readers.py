"""What readers are promised: threads that share one, and stores of more segments than files may be open."""

import os
import random
import resource
import sys
import threading

import numpy as np
import pytest
from test_cache_faults import child, flip
from test_cache_kills import NURSERY, item_of, rows_of
from test_cache_store import segments

from cache import Entries

NUM_SEGMENTS = 1100
READ_ALL = """
import resource, sys, tempfile
from cache import Store, StoreError, digest
resource.setrlimit(resource.RLIMIT_NOFILE, tuple(map(int, sys.argv[2:])))
entries = Store(sys.argv[1]).entries({"kind": "latents", "dtype": "float32", "shape": [2]})
try:
    for _ in range(2):
        print(sum((entries.read(digest(b"%d" % number)) == number).all() for number in range(1100)))
    others = [tempfile.TemporaryFile() for _ in range(100)]
except StoreError as error:
    print(error)
"""
READ_WHAT_IS_TRUNCATED = """
import os, sys
from cache import Store, StoreError, digest
entries = Store(sys.argv[1]).entries({"kind": "latents", "dtype": "float32", "shape": [4]})
for _ in range(3):
    entries.read(digest(b"19"))
os.truncate(sys.argv[2], int(sys.argv[3]))
try:
    print(entries.read(digest(b"19")))
except StoreError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def many_segments(tmp_path_factory):
    """A store of a great many segments."""
    folder = tmp_path_factory.mktemp("many")
    entries = rows_of(folder, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(Entries, "refresh", lambda self: None)  # after each commit, it would look at all of them
        with entries.writer(max_items=1) as writer:
            for number in range(NUM_SEGMENTS):
                writer.write(item_of(number), np.full(2, number, np.float32))
    assert len(segments(entries)) == NUM_SEGMENTS
    return folder


def test_more_segments_than_files_may_be_open_are_all_read(many_segments):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= hard < NUM_SEGMENTS + 300:
        pytest.skip(f"only {hard} files may be open here")
    output, errors = child(READ_ALL, many_segments, 256, hard).communicate()
    assert (output, errors) == (f"{NUM_SEGMENTS}\n{NUM_SEGMENTS}\n", "")


def test_where_no_more_files_may_be_open_this_is_said_in_one_line(many_segments):
    output, errors = child(READ_ALL, many_segments, 256, 256).communicate()
    assert errors == "" and output.count("\n") == 1 and "Too many open files" in output


@pytest.fixture
def restless():
    """Threads take turns as often as they can, to meet each other at any place."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("num_items", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_threads_that_share_a_reader_find_what_others_commit_meanwhile(tmp_path, restless, num_items):
    """Eight threads read what was committed, some of it for the first time; one asks what is missing."""
    writer, entries = child(NURSERY, tmp_path, 3, 0, num_items), rows_of(tmp_path, 3)
    committed, errors, is_over = [], [], threading.Event()

    def read(seed):
        chance = random.Random(seed)
        while not is_over.is_set():
            numbers = chance.choices(committed, k=5) if committed else []
            try:
                rows = entries.read_many([item_of(number) for number in numbers])
                assert rows.tolist() == [[number] * 3 for number in numbers]
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    writer.stdin.write("600 1\n")  # it commits each item by itself
    writer.stdin.close()
    for line in writer.stdout:
        if line.startswith("written"):
            number = int(line.split()[1])
            errors += entries.missing([item_of(number)])
            committed.append(number)
    is_over.set()
    for thread in threads:
        thread.join()
    assert errors == [] and len(committed) == num_items
    assert writer.wait() == 0 and writer.stderr.read() == ""


def test_threads_that_meet_damage_at_once_lose_nothing_else(tmp_path, restless):
    entries, numbers = rows_of(tmp_path, 3), range(200)
    with entries.writer(max_items=10) as writer:
        for number in numbers:
            writer.write(item_of(number), np.full(3, number, np.float32))
    for segment in segments(entries):
        flip(segment / "c.0.0", 16 * 4)
    outcomes = [{} for _ in range(8)]

    def read(outcome, reader):
        for number in random.Random(id(outcome)).sample(numbers, len(numbers)):
            try:
                outcome[number] = reader.read(item_of(number)).tolist()
            except KeyError as error:
                outcome[number] = "damaged" if "is not there" in str(error) else error
            except Exception as error:
                outcome[number] = "damaged" if "is damaged" in str(error) else error

    reader = rows_of(tmp_path, 3)
    threads = [threading.Thread(target=read, args=(outcome, reader)) for outcome in outcomes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    damaged = [number for number in numbers if number % 10 == 4]
    assert outcomes == [{number: "damaged" if number in damaged else [number] * 3 for number in numbers}] * 8
    assert rows_of(tmp_path, 3).missing(map(item_of, numbers)) == [item_of(number) for number in damaged]


@pytest.mark.parametrize("size", [0, 100])
def test_a_shard_that_is_truncated_between_two_reads_is_an_error_not_zeros_and_not_the_end(tmp_path, size):
    entries = rows_of(tmp_path, 4)
    with entries.writer() as writer:
        for number in range(20):
            writer.write(item_of(number), np.full(4, number, np.float32))
    output, errors = child(READ_WHAT_IS_TRUNCATED, tmp_path, segments(entries)[0] / "c.0.0", size).communicate()
    assert errors == "" and output.count("\n") == 1 and f"item {item_of(19)} is damaged" in output
