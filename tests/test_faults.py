"""What a job promises when one of its file operations fails: writing, collecting, verifying, encoding, training.

Each operation of the job is met in turn, by each error that it may get.  Whatever fails: what was there before is there
after, nothing half-written can be seen, the job says in a line what and why, and the same job, run again, ends well.
"""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from faults import Counts, Done, Jobs, a_few, each_fault, every, of_each_shape, reason_why_not
from test_cache_faults import as_after_a_kill, flip, leftovers
from test_cache_kills import rows_of
from test_cache_store import ITEMS, segments

from cache import Entries, Need, Source, needs_text
from cache.tools.verify import Report, verify

SETUP = """# fork
import numpy as np, sys
from cache import Store, StoreError, digest
from cache.__main__ import main

def write(folder, num_items):
    entries = Store(folder).entries({"kind": "latents", "dtype": "float32", "shape": [4096]})
    items = {digest(bytes([number])): number for number in range(num_items)}
    try:
        with entries.writer(max_items=2) as writer:
            for item in entries.missing(items):
                print(items[item], flush=True)
                writer.write(item, np.full(4096, items[item], np.float32), str(items[item]))
                print("written", items[item], flush=True)
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
"""
REASONS = {errno.ENOSPC: "disk is full", errno.EIO: "Input/output error", errno.EACCES: "Permission denied"}
REASONS |= {errno.ENOMEM: "Cannot allocate memory", "full": "disk is full"}
SAID = (
    "is damaged",
    "cannot be opened or mapped",
    "cannot be written and locked",
    "No space left on device; make room",
)
"""Reasons in the words of whoever met the error."""


@pytest.fixture(scope="module")
def jobs():
    if reason := reason_why_not():
        pytest.skip(reason)
    with Jobs(SETUP) as jobs:
        yield jobs


def assert_ends_clearly(done: Done, root: Path, most_lines: int = 1) -> None:
    """A job that failed says last, in a line, which file and why; one that did not, says nothing of the sort."""
    assert "Traceback" not in done.err and done.status in (0, 1), done.err[-1500:]
    _, is_error, message = f"\n{done.err}".rpartition("\nerror: ")
    assert bool(is_error) == bool(done.status), done.err
    if is_error:
        fault = done.fault.partition(" ")[0]
        reason = REASONS[fault if fault == "full" else int(fault)]
        assert message.count("\n") <= most_lines and str(root) in message, message
        assert any(each in message for each in (reason, *SAID)), message


def assert_right(entries: Entries, items) -> None:
    """Each of the items is there, with its own bytes."""
    assert entries.missing(items) == []
    for item in items:
        assert (entries.read(item) == ITEMS.index(item)).all()


def held_in(entries: Entries) -> list[str]:
    entries.refresh()
    return [item for segment in entries.index().segments for item in segment.items()]


def assert_nothing_half_written(store: Path) -> Report:
    found = verify([store])
    assert found.damaged == [] and found.faults == [] and found.unnoted == [], found
    assert [each for each in found.leftovers if "half removed" not in each.what] == []
    assert [path for path in store.rglob("*.tmp")] == []
    return found


def report(counts: Counts) -> None:
    assert not counts.failures, f"{len(counts.failures)} failures\n" + "\n".join(counts.failures)
    assert counts.given and counts.ended
    print(f"{counts.met} operations, {counts.given} faults, which ended {counts.ended} jobs; nothing lost")


def looks_at_rows(faults):
    """Those at which rows were lost once, because what the disk did not give was taken for what is not there."""
    looks = [each for each in faults if each[2][1] in ("open", "read", "list", "look")]
    return of_each_shape([each for each in looks if "/segments/" in each[2][2]]) + [
        each for each in looks if re.search("/writing/[^/]*$", each[2][2]) and each[2][1] == "open"
    ]


EVERY = pytest.mark.parametrize("choose", [looks_at_rows, a_few, pytest.param(every, marks=pytest.mark.slow)])


@EVERY
def test_a_writer_of_entries(jobs, tmp_path, choose):
    start, numbers = tmp_path / "start", range(7)
    with rows_of(tmp_path / "living").writer() as writer:
        for number in (0, 1, 2, 3):
            writer.write(ITEMS[number], np.full(4096, number, np.float32), str(number))
            if number == 1:
                writer.commit()
        as_after_a_kill(tmp_path / "living", start)

    def code(root):
        return f"write({str(root)!r}, {len(numbers)})"

    def check(root, done):
        assert_ends_clearly(done, root)
        entries = rows_of(root)
        assert_right(entries, ITEMS[:2])
        assert_right(entries, held_in(entries))
        assert_nothing_half_written(root)
        again = jobs.run(code(root), root)
        assert (again.status, again.err) == (0, ""), (done.fault, again.err)
        assert_right(entries, ITEMS[: len(numbers)])
        assert_nothing_half_written(root)
        assert leftovers(entries) == []
        begun = [line for line in (done.out + again.out).split("\n") if line.isdecimal()]
        written = {line.split()[1] for line in done.out.splitlines() if line.startswith("written")}
        if done.fault.startswith(f"{errno.EIO} ") and "/segments/" in done.fault:
            return  # a bad disk has these: they are encoded again
        assert not {"0", "1"} & set(begun)
        if not done.fault.startswith(f"{errno.EACCES} "):  # else a workspace may be a colleague's, which nobody touches
            assert not {"2", "3"} & set(begun), "a killed writer had written these"
            assert not written & set(again.out.splitlines())

    report(each_fault(jobs, code, start, tmp_path, check, choose))


def garbage_in(folder: Path) -> set[str]:
    """A store with garbage of every kind, and the runs that need the rest of it.  Returns the items that are needed."""
    store = folder / "store"
    living = rows_of(folder / "living")
    for some in (range(0, 3), range(3, 6), range(6, 8), range(8, 10)):
        with living.writer() as writer:
            for number in some:
                writer.write(ITEMS[number], np.full(4096, number, np.float32), str(number))
    with living.writer() as writer:
        writer.write(ITEMS[10], np.full(4096, 10, np.float32), "10")
        as_after_a_kill(folder / "living", store)
    shutil.rmtree(folder / "living")
    entries = rows_of(store)
    flip(segments(entries)[1] / "c.0.0", 2 * (4096 * 4 + 4))  # item 5
    assert entries.missing(ITEMS[:10]) == []
    with pytest.raises(Exception, match="damaged"):
        entries.read(ITEMS[5])
    (segments(entries)[2] / "keys").unlink()
    (store / "leases").mkdir()
    shutil.copy(segments(entries)[0] / "keys", store / "leases" / segments(entries)[0].name)  # of a dead process
    needed = [ITEMS[number] for number in (0, 1, 2, 3, 8, 10)]
    sources = [Source(item, "", "") for item in needed]
    (folder / "runs/a").mkdir(parents=True)
    (folder / "runs/a/needs.json").write_text(needs_text([Need.of("Encode", "vae", entries.recipe, sources)]))
    return set(needed)


@EVERY
def test_a_collection_of_garbage(jobs, tmp_path, choose):
    start = tmp_path / "start"
    start.mkdir()
    needed = garbage_in(start)

    def code(root):
        return f"main(['gc', '--store', '{root}/store', '--runs', '{root}/runs', '--older-than', '0s', '--yes'])"

    def check(root, done):
        assert_ends_clearly(done, root)
        entries = rows_of(root / "store")
        assert_right(entries, sorted(needed - {ITEMS[10]}))
        assert_right(entries, set(held_in(entries)) - {ITEMS[5]})
        again = jobs.run(code(root), root)
        assert (again.status, again.err) == (0, ""), (done.fault, again.err)
        assert_right(entries, sorted(needed))
        assert sorted(held_in(entries)) == sorted(needed), done.fault
        assert assert_nothing_half_written(root / "store").leftovers == []
        assert leftovers(entries) == [] and list(entries.path.glob("damaged/*")) == [], done.fault

    report(each_fault(jobs, code, start, tmp_path, check, choose))


@EVERY
def test_a_verification_that_repairs(jobs, tmp_path, choose):
    start = tmp_path / "start"
    entries = rows_of(start / "store")
    for some in (range(0, 3), range(3, 6), range(6, 8), range(8, 10)):
        with entries.writer() as writer:
            for number in some:
                writer.write(ITEMS[number], np.full(4096, number, np.float32), str(number))
    whole, one_row, no_keys, no_metadata = segments(entries)
    flip(one_row / "c.0.0", 0)
    flip(no_keys / "keys", 3)
    (no_metadata / "zarr.json").write_text("{")
    os.truncate(no_metadata / "c.0.0", (no_metadata / "c.0.0").stat().st_size - 3)
    del whole

    def code(root):
        return f"main(['verify', '--repair', '{root}/store'])"

    def check(root, done):
        if done.err:
            assert_ends_clearly(done, root)
        else:
            assert done.status == 1 and f"{root}/store: " in done.out.splitlines()[-1], (done.fault, done.out)
        entries = rows_of(root / "store")
        entries.refresh()
        noted = [segment.items()[row] for segment in entries.index().segments for row in entries.damaged_rows(segment)]
        assert_right(entries, set(held_in(entries)) - {ITEMS[3]} - set(noted))
        assert not list(root.rglob("*.tmp"))
        again = jobs.run(code(root), root)
        assert (again.status, again.err) == (1, ""), (done.fault, again.err)
        found = verify([root / "store"])
        assert [each.item for each in found.damaged] == [ITEMS[3]] and not found.faults, found
        assert not found.leftovers and not found.unnoted
        assert_right(rows_of(root / "store"), [item for item in ITEMS[:10] if item != ITEMS[3]])

    report(each_fault(jobs, code, start, tmp_path, check, choose))
