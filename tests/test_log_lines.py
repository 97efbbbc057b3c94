"""Bars of other libraries in a log are lines, not one line of all that was ever drawn."""

import io
import subprocess
import sys

import pytest
from commands import environment
from tqdm import tqdm

from cache.terminal import log_lines
from cache.terminal.log_lines import LogLines


def written(*texts: str) -> str:
    stream = io.StringIO()
    log = LogLines(stream)
    for text in texts:
        log.write(text)
    return stream.getvalue()


def test_a_bar_is_one_line_once_it_has_ended():
    stream = io.StringIO()
    for _ in tqdm(range(5), desc="shards", file=LogLines(stream), mininterval=0):
        pass
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("shards: 100%") and "\r" not in stream.getvalue()


def test_bars_below_each_other_are_lines_without_movements_of_the_cursor():
    stream = io.StringIO()
    log = LogLines(stream)
    for _ in tqdm(range(2), desc="files", file=log, mininterval=0):
        for _ in tqdm(range(3), desc="bytes", file=log, mininterval=0, leave=False):
            pass
    said = stream.getvalue()
    assert "files: 100%" in said and "\r" not in said and "\x1b" not in said


def test_a_long_work_says_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(log_lines, "LINE_EVERY_SECONDS", 0)
    assert written("\r 10%", "\r 20%", "\r100%\n") == "10%\n20%\n100%\n"


@pytest.mark.parametrize("text", ["", "a line\n", "no end", "two\nlines\n", "with\ttab \x1b[0m\n"])
def test_other_text_is_passed_on_as_it_is(text):
    assert written(text) == text


def test_a_line_after_a_bar_stands_alone():
    assert written("\r 50%", "\r100%", "\n", "done\n") == "100%\ndone\n"


def test_windows_ends_of_lines_are_no_bars():
    assert written("a\r\nb\r\n") == "a\nb\n"


def test_a_stages_process_writes_bars_so():
    script = (
        "from pipeline.process import children\n"
        "children.begin()\n"
        "from tqdm import tqdm\n"
        "for _ in tqdm(range(3), mininterval=0): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True)
    assert done.returncode == 0 and done.stderr.count(b"\n") == 1 and b"\r" not in done.stderr
