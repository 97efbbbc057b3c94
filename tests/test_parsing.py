"""Files whose content nobody vouches for: each fault is one line, and what lies beside it is read all the same."""

import json

import pytest

from cache import load_json
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
