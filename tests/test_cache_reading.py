"""Reading large files for their digests: several at a time, and without driving everything else out of memory."""

import errno
import os
import threading
import time

import pytest

from cache import FileFacts, StoreError, digest
from cache.core import digests, reading


def written(path, size):
    """A file that is on the disk, so that the kernel may let go of it."""
    with open(path, "wb") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())
    return path


@pytest.fixture
def facts(tmp_path):
    return FileFacts(tmp_path / "facts.sqlite")


def test_several_files_are_read_at_a_time(facts, tmp_path, monkeypatch):
    paths = [written(tmp_path / f"{number}", size) for number, size in enumerate((5_000_000, 0, 9_000_000, 70))]
    both, real = threading.Barrier(2), digests.hasher
    monkeypatch.setattr(digests, "hasher", lambda: (both.wait(20), real())[1])  # fails where one is read alone
    found = facts.file_digests(paths)
    assert list(found.items()) == [(path, digest(path.read_bytes())) for path in paths]
    facts.confirm(paths)


@pytest.mark.parametrize("fault", ["missing", "changing"])
def test_a_fault_ends_the_reading_of_the_others_at_once(facts, tmp_path, fault, monkeypatch):
    for name in ("large", "larger"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)  # a hole: the disk has nothing of it, and to hash it takes half an hour
    faulty, expected = tmp_path / "none", FileNotFoundError
    if fault == "changing":
        faulty, expected = written(tmp_path / "small", 3), StoreError
        monkeypatch.setattr(digests, "_is_same", lambda *stamps: False)
    monkeypatch.setattr(reading, "MAX_THREADS", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(3))
    began = time.monotonic()
    with pytest.raises(expected, match=str(faulty)):
        facts.file_digests([tmp_path / "large", tmp_path / "larger", faulty])
    assert time.monotonic() - began < 60


def cached(path):
    """Whether the kernel has the file's first bytes in memory."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(file, [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system cannot say what is in memory")
        return False
    finally:
        os.close(file)


@pytest.mark.parametrize("fits", [True, False])
def test_files_stay_in_memory_only_where_all_of_them_fit(facts, tmp_path, monkeypatch, fits):
    paths = [written(tmp_path / f"{number}", 10_000_000) for number in range(2)]
    monkeypatch.setattr(digests, "fits_in_memory", lambda size: fits and size == 20_000_000)
    facts.file_digests(paths)
    assert [cached(path) for path in paths] == [fits, fits]


def test_half_of_the_available_memory_is_what_fits():
    assert reading.fits_in_memory(1_000_000) and not reading.fits_in_memory(1 << 50)
