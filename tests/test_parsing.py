"""Files whose content nobody vouches for: each fault is one line, and what lies beside it is read all the same."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
from commands import environment

from cache import FileFacts, load_json
from pipeline.errors import UserError
from pipeline.settings.reading import load_experiment

DEEP = "[" * 100_000 + "]" * 100_000


NO_JSON = [DEEP, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 65 + "]" * 65]
NO_JSON += ["NaN", "[1, -Infinity]", '"\\ud800"', "9" * 5000, "\x00"]
NO_TOML = ["seed = " + "9" * 5000, "a = " + DEEP, "a = \xff".encode("latin-1")]


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_or_too_much_is_a_value_error(text):
    with pytest.raises(ValueError):
        load_json(text)


def test_json_is_read_as_it_is():
    value = {"a": [1, 2.5, None, True, "\U0001f600 ä"], "b": {"c": [[[[]]]]}}
    assert load_json(json.dumps(value)) == load_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("text", NO_TOML, ids=range(len(NO_TOML)))
def test_an_experiment_file_that_no_parser_takes_is_one_line(text, tmp_path):
    path = tmp_path / "e.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^{path}: not valid TOML: [^\n]*$"):
        load_experiment(path)


@pytest.mark.parametrize("name", ["recipe.json", "damaged"])
def test_one_bad_folder_of_entries_keeps_nobody_from_the_others(encoded, tmp_path, name):
    lab = encoded.copy(tmp_path / "lab")
    folder = next(lab.folder.glob("store/entries/pooled-*"))
    if name == "damaged":
        (segment,) = (folder / "segments").iterdir()
        (folder / "damaged").mkdir(exist_ok=True)
        (folder / "damaged" / segment.name).write_text(DEEP)
    else:
        (folder / name).write_text(DEEP)
    for tool in (["ls"], ["stats"], ["verify"], ["gc", "--older-than", "0s", str(lab.path)]):
        place = [] if tool[0] == "gc" else [str(lab.folder / "store")]
        command = [sys.executable, "-m", "cache", *tool, *place]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
        assert "Traceback" not in result.stderr and "RecursionError" not in result.stderr, result.stderr


def test_facts_that_cannot_be_read_are_of_one_file_alone(tmp_path):
    facts, files = FileFacts(tmp_path / "facts.sqlite"), [tmp_path / str(number) for number in range(3)]
    for file in files:
        file.write_text("a")
        os.utime(file, (1e9, 1e9))
        facts.file_digest(file)
    with sqlite3.connect(tmp_path / "facts.sqlite") as database:
        database.execute("UPDATE files SET facts = ? WHERE rowid = 2", (DEEP,))
    known = FileFacts(tmp_path / "facts.sqlite").get_many(files)
    assert [bool(known.get(file)) for file in files] == [True, False, True]
