"""Lines, tables and progress: what people see of them at terminals of several widths, in a pipe and in a log."""

import re
import time

import pytest
from terminals import terminal

from cache.terminal import progress
from cache.terminal.output import bad, good, say, show, typed, warning, wrapped
from cache.terminal.progress import Progress, busy
from cache.terminal.table import MOST_ROWS, Table
from cache.terminal.words import duration

HOSTILE = "[red]a[/red] \x1b[2J\u202e 猫\n.png"
ESCAPED = "[red]a[/red] \\x1b[2J\\u202e 猫\\n.png"
TABLE = Table(["file", ">tokens", "state"], [(HOSTILE, 1200, bad("cut")), ("b.png", 7, good("whole"))])


def test_without_a_terminal_each_row_is_one_plain_line(capsys):
    show(TABLE, warning("a line " * 30))
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith(ESCAPED) and out[1].endswith("    1200  cut")
    assert out[0].split() == ["file", "tokens", "state"] and out[3] == "a line " * 30
    assert all(line.isprintable() for line in out) and len(out) == 4


def test_columns_of_wide_characters_are_aligned():
    lines = str(Table(["a", ">n"], [("猫猫", 1), ("cat", 1000)])).splitlines()
    assert lines == ["a        n", "猫猫     1", "cat   1000"]


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_at_a_terminal_everything_fits_and_nothing_is_lost(columns):
    with terminal(columns) as seen:
        show(TABLE, "words " * 40, "  -> 1.5 MB " * 20)
    assert max(map(len, seen.lines)) <= columns
    text = " ".join(seen.lines)
    assert text.count("words") == 40 and text.count("1.5 MB") == 20 and "".join(text.split()).count("1200") == 1
    assert "\x1b[2J" not in seen.raw and "\u202e" not in seen.raw
    if columns >= 80:
        assert ESCAPED in text


def test_a_command_is_not_broken_so_that_it_can_be_copied():
    command = "  see it:  python -m pipeline report runs/cat-0123456789ab"
    with terminal(30) as seen:
        show(typed(command))
    assert seen.raw == f"{command}\n"


def test_a_word_that_is_longer_than_a_line_stays_whole_to_be_copied():
    assert wrapped("see /" + "x" * 90, 40) == ["see", "  /" + "x" * 90]


def test_colours_have_a_meaning_and_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal() as seen:
        show(bad("[bold]wrong"), "plain", Table(["", ""], [(good("ok"), "x")]))
    assert "\x1b[31m[bold]wrong\x1b[0m\nplain\n" in seen.raw and "\x1b[32mok" in seen.raw
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as seen:
        show(bad("[bold]wrong"), Table(["", ""], [(good("ok"), "x")]))
    assert "\x1b" not in seen.raw and seen.lines[:2] == ["[bold]wrong", "ok  x"]
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as seen, Progress("work", 1) as work:
        work.advance()
    assert "\x1b" not in seen.raw and seen.lines[0].startswith("work: 1/1 items in ")


def test_a_column_in_which_no_row_says_anything_can_be_left_out():
    assert str(Table(["a", ">damaged"], [("x", "0"), ("y", "0")], hides=[">damaged"])) == "a\nx\ny"
    assert "damaged" in str(Table(["a", ">damaged"], [("x", "0"), ("y", 1)], hides=[">damaged"]))


def test_a_table_of_more_rows_than_anyone_reads_is_printed_at_once():
    with terminal() as seen:
        show(Table(["a" * 50, "b" * 50], [("x", number) for number in range(MOST_ROWS + 1)]))
    assert len(seen.lines) == MOST_ROWS + 3


# --- progress -----------------------------------------------------------------------------------------------------


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0)
    with Progress("T5", 3, "caption") as work:
        for number in range(3):
            work.advance(note=f"loss {number}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "T5: 1/3 captions, loss 0" and lines[2] == "T5: 3/3 captions, 0.0 s left, loss 2"
    assert lines[3].startswith("T5: 3/3 captions in ") and lines[3].endswith("s, loss 2") and len(lines) == 4


def test_a_bar_goes_away_and_what_is_said_meanwhile_stands_above_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with terminal() as seen, Progress("train", 2, "step") as work:
        time.sleep(0.3)
        work.advance()
        say("[red]a checkpoint was damaged")
        time.sleep(0.3)
        work.advance()
    assert "0/2 steps" in seen.raw and "1/2 steps" in seen.raw and "\x1b[?25l" not in seen.raw
    lines = [line for line in seen.lines if line]
    assert lines[-2] == "[red]a checkpoint was damaged" and lines[-1].startswith("train: 2/2 steps in ")
    assert max(map(len, seen.lines)) <= 80


def test_what_is_loaded_is_said_before_in_a_log_and_with_a_clock_at_a_terminal(capsys, monkeypatch):
    with busy("loading T5 (9.5 GB)"):
        assert capsys.readouterr().err == "loading T5 (9.5 GB)\n"
    monkeypatch.setenv("COLUMNS", "80")
    with terminal() as seen, busy("loading T5 (9.5 GB)"):
        time.sleep(0.3)
    clocks = re.findall(r"loading T5 \(9.5 GB\): (\S+ m?s)", seen.raw)
    assert (
        clocks[0] != clocks[-1]
        and float(clocks[-1].removesuffix(" s")) >= 0.3
        and len([line for line in seen.lines if line]) == 1
    )


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_time_left_is_not_told_from_what_begins_slowly(monkeypatch):
    clock = Clock(monkeypatch)
    with Progress("T5", 11) as work:
        clock.now += 100
        work.advance()
        assert work.seconds_left is None
        for _ in range(2):
            clock.now += 1
            work.advance()
        assert work.seconds_left == pytest.approx(8)


def test_time_left_is_not_told_from_steps_that_compile(monkeypatch):
    clock = Clock(monkeypatch)
    with Progress("train", 100, "step", done=10) as work:
        for compiles in (True, False, False, True, False):
            clock.now += 60 if compiles else 2
            if compiles:
                work.leave_out(60)
        work.advance(5)
        assert work.seconds_left == pytest.approx(85 * 2)
        assert work.words() == "15/100 steps, 3 min left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.04, "40 ms"),
        (0.5, "0.5 s"),
        (9.96, "10 s"),
        (99, "99 s"),
        (100, "2 min"),
        (12_000, "3 h 20 min"),
    ],
)
def test_durations_are_as_exact_as_anyone_reads_them(seconds, text):
    assert duration(seconds) == text
