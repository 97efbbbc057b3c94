"""Addresses, atomic files, and the memory of what files hold."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cache import (
    FileFacts,
    Spelled,
    StoreError,
    canonical,
    caption_item,
    caption_items,
    digest,
    recipe_id,
    write_atomically,
)
from cache.core import digests, files

REPOSITORY = Path(__file__).parent.parent
PUT_MANY = """
import sys
from cache import FileFacts
facts = FileFacts(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
for number in range(40):
    facts.put(sys.argv[2], {f"{sys.argv[3]}-{number}": number})
"""


@pytest.fixture
def facts(tmp_path):
    return FileFacts(tmp_path / "store" / "facts.sqlite")


def old_file(path, data=b"photo", seconds=1e9):
    """A file that was last changed at ``seconds`` after 1970."""
    path.write_bytes(data)
    os.utime(path, (seconds, seconds))
    return path


def test_addresses_never_change():
    """BLAKE2b with 16 bytes; the first is what `b2sum -l 128` prints."""
    assert digest(b"") == "cae66941d9efbd404e4d88758ea67670"
    assert caption_item("a photo of a cat") == "c15881911949d1868b30db5196f966ee"
    assert caption_items(["a photo of a cat", "ä"]) == ["c15881911949d1868b30db5196f966ee", caption_item("ä")]
    assert recipe_id({"kind": "t5", "shape": [512, 4096]}) == "66ccafe59edc19e1bac4ca9d558f91de"


def test_equal_recipes_have_one_spelling():
    assert canonical({"b": (1, 2.0), "a": {"d": None, "c": True}}) == b'{"a":{"c":true,"d":null},"b":[1,2]}'
    assert canonical([-0.0, 1e22, 0.1, "ä"]) == '[0,10000000000000000000000,0.1,"ä"]'.encode()
    assert recipe_id({"a": 1, "b": 2}) == recipe_id({"b": 2, "a": 1.0})
    assert recipe_id({"a": 1}) != recipe_id({"a": "1"}) != recipe_id({"a": True})


def test_every_value_is_spelled_as_json_has_it():
    texts = ["", '"\\', "\0\x1f\x7f\n", "ä🧀\u2028"]
    value = {text: [*texts, 10**30, -7, 0.1, 1.5e-7, True, False, None, [], {}, {"b": 1, "a": 2}] for text in texts}
    expected = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical(value) == expected.encode()


def test_what_is_spelled_already_stands_as_it_is():
    rows = [["ab", 1], ["ä", 2.0]]
    assert canonical({"rows": Spelled(canonical(rows).decode()), "a": "b"}) == canonical({"rows": rows, "a": "b"})


@pytest.mark.parametrize(
    "obj, error",
    [
        ({1: "a"}, TypeError),
        ({"a": {2, 3}}, TypeError),
        ([b"a"], TypeError),
        ([float("nan")], ValueError),
        ({"a": float("inf")}, ValueError),
    ],
)
def test_what_has_no_one_spelling_is_refused(obj, error):
    with pytest.raises(error, match="a recipe"):
        canonical(obj)


def test_a_caption_a_file_and_a_recipe_never_share_an_address():
    for text in ("", "{}", "caption\0a"):
        assert len({caption_item(text), digest(text.encode()), digest(b"caption\0" + text.encode())}) == 3
    assert len({recipe_id({}), caption_item("{}"), digest(b"{}")}) == 3
    assert caption_item("a cat") != caption_item("a cat ")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomically(path, "ä")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    monkeypatch.setattr(files.os, "fsync", lambda file: open("/dev/full", "wb", 0).write(b"x"))
    with pytest.raises(OSError):
        write_atomically(path, b"third")
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_written_file_follows_the_umask(tmp_path):
    before = os.umask(0o026)
    try:
        write_atomically(tmp_path / "record", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "record").stat().st_mode & 0o777 == 0o640


def test_a_file_is_read_once(facts, tmp_path, monkeypatch):
    path = old_file(tmp_path / "weights", b"1" * 5_000_000)
    assert facts.file_digest(path) == digest(b"1" * 5_000_000)
    monkeypatch.setattr(digests, "hasher", None)
    assert FileFacts(facts.path).file_digest(str(path)) == digest(b"1" * 5_000_000)


def write_over(path, data):
    with open(path, "r+b") as file:
        file.write(data)


def put_in_place(path, data):
    other = old_file(path.with_name("other"), data)
    os.replace(other, path)


@pytest.mark.parametrize("change", [write_over, put_in_place])
def test_another_file_of_the_same_size_and_time_of_modification_is_not_taken_for_the_one_that_is_known(
    facts, tmp_path, change
):
    path = old_file(tmp_path / "weights", b"first")
    assert facts.file_digest(path) == digest(b"first")
    facts.confirm([path])
    known = path.stat()
    change(path, b"other")
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (known.st_size, known.st_mtime_ns)
    with pytest.raises(StoreError, match=f"{path}: was replaced or written to after its digest was taken"):
        facts.confirm([path])
    assert FileFacts(facts.path).file_digest(path) == digest(b"other")


def test_a_memory_of_an_older_version_is_begun_anew_without_a_word(facts, tmp_path, capsys):
    path = old_file(tmp_path / "weights", b"first")
    facts.path.parent.mkdir()
    with closing(sqlite3.connect(facts.path)) as db, db:
        db.execute("CREATE TABLE facts (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, facts TEXT)")
    assert facts.get(path) is None
    facts.put(path, {"width": 3})
    assert facts.get(path) == {"width": 3} and capsys.readouterr().err == ""


def test_a_file_that_is_gone_cannot_be_confirmed(facts, tmp_path):
    path = old_file(tmp_path / "weights", b"first")
    facts.file_digest(path)
    path.unlink()
    with pytest.raises(StoreError, match="replaced or written to"):
        facts.confirm([path])


@pytest.mark.parametrize("data, seconds", [(b"house", 1e9 + 0.001), (b"photos", 1e9)])
def test_a_changed_file_is_read_again(facts, tmp_path, data, seconds):
    path = old_file(tmp_path / "photo")
    facts.put(path, {"width": 3})
    assert facts.file_digest(path) == digest(b"photo")
    old_file(path, data, seconds)
    assert facts.get(path) is None
    assert facts.file_digest(path) == digest(data)
    assert facts.get(path) == {"digest": digest(data)}


def test_a_file_changed_a_moment_ago_is_not_remembered_yet(facts, tmp_path):
    path = tmp_path / "photo"
    path.write_bytes(b"photo")
    stat = path.stat()
    assert facts.file_digest(path) == digest(b"photo")
    path.write_bytes(b"house")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a clock that ticks slowly would leave it
    assert facts.file_digest(path) == digest(b"house")


def test_a_file_that_changes_while_it_is_read_is_read_anew(facts, tmp_path, monkeypatch):
    path, times = old_file(tmp_path / "photo"), iter([2e9, 3e9])

    def hasher_during_a_copy():
        for seconds in times:
            old_file(path, b"house", seconds)
            break
        return real()

    real = digests.hasher
    monkeypatch.setattr(digests, "hasher", hasher_during_a_copy)
    assert facts.file_digest(path) == digest(b"house")
    assert facts.get(path) == {"digest": digest(b"house")}
    times = iter(range(4_000_000_000, 5_000_000_000))
    old_file(path, b"other", 1e9)
    with pytest.raises(StoreError, match="photo: changes while it is read; wait"):
        facts.file_digest(path)


def test_facts_found_in_an_older_version_of_a_file_are_not_remembered(facts, tmp_path):
    path = old_file(tmp_path / "photo")
    assert facts.get(path) is None
    old_file(path, b"larger photo")
    facts.put(path, {"width": 3})
    assert facts.get(path) is None
    old_file(path)
    assert facts.get(path) is None


def test_to_look_files_up_is_no_promise_about_what_is_put_later(facts, tmp_path):
    path = old_file(tmp_path / "photo")
    assert facts.look_up([path, tmp_path / "none"]) == {}
    old_file(path, b"larger photo")
    facts.put(path, {"width": 3})
    assert facts.look_up([path]) == facts.look_up([path, path]) == {path: {"width": 3}}


def test_facts_add_up(facts, tmp_path):
    path = old_file(tmp_path / "photo")
    facts.put(path, {"width": 3, "mode": None})
    facts.file_digest(path)
    facts.put(path, {"width": 4})
    assert facts.get(path) == {"width": 4, "mode": None, "digest": digest(b"photo")}


def test_paths_of_any_spelling_are_one_file(facts, tmp_path, monkeypatch):
    path = old_file(tmp_path / os.fsdecode(b"?100% \xff'.jpg"))
    facts.put(path, {"width": 3})
    monkeypatch.chdir(tmp_path)
    assert facts.get(Path(path.name)) == facts.get(f"store/../{path.name}") == {"width": 3}


def test_many_files_are_looked_up_at_once(facts, tmp_path):
    paths = [old_file(tmp_path / f"{number}.jpg", bytes([number % 256])) for number in range(1500)]
    facts.put_many({path: {"width": number} for number, path in enumerate(paths[:1000])})
    assert facts.get_many([*paths, tmp_path / "none"]) == {
        path: {"width": number} for number, path in enumerate(paths[:1000])
    }
    assert facts.look_up(paths) == facts.get_many(paths)
    found = facts.file_digests(paths)
    assert list(found) == paths and found[paths[1300]] == digest(bytes([1300 % 256]))
    assert facts.get(paths[999]) == {"width": 999, "digest": digest(bytes([999 % 256]))}


def test_a_file_that_is_not_there_is_an_error_only_for_its_digest(facts, tmp_path):
    assert facts.get(tmp_path / "none") is None
    facts.put(tmp_path / "none", {"width": 3})
    assert facts.get(tmp_path / "none") is None
    with pytest.raises(FileNotFoundError):
        facts.file_digest(tmp_path / "none")


def test_several_processes_put_at_once_and_lose_nothing(facts, tmp_path):
    path = old_file(tmp_path / "photo")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUT_MANY, facts.path, path, str(number)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.close()
        process.stdin = None
    assert [process.communicate()[1] for process in processes] == ["", "", ""]
    assert len(facts.get(path)) == 120


@pytest.mark.parametrize("first_byte, last_byte", [(0, 100), (4096, 4_000_000)])
def test_a_damaged_memory_is_begun_anew_with_a_warning(facts, tmp_path, capfd, first_byte, last_byte):
    paths = [old_file(tmp_path / f"{number}.jpg") for number in range(500)]
    facts.put_many({path: {"width": 3} for path in paths})
    data = bytearray(facts.path.read_bytes())
    assert len(data) > 2 * 4096
    data[first_byte:last_byte] = b"x" * len(data[first_byte:last_byte])
    facts.path.write_bytes(data)
    assert facts.file_digest(paths[0]) == digest(b"photo")
    assert "facts.sqlite: the memory of file digests is damaged" in capfd.readouterr().err
    assert facts.get(paths[0]) == {"digest": digest(b"photo")}
    assert capfd.readouterr().err == ""
    assert facts.path.with_name("facts.sqlite.damaged").read_bytes() == data


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path, capfd):
    photo = old_file(tmp_path / "photo")
    facts = FileFacts(photo / "facts.sqlite")  # a folder that cannot be made, even by root
    assert [facts.file_digest(photo) for _ in range(2)] == [digest(b"photo")] * 2
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1 and "files are read again" in warning
