"""No command prints a line that is wider than a terminal of 80 columns; nor does any ``--help``."""

import contextlib
import logging
import os
import signal
import sys

import pytest
from terminals import terminal

from cache import __main__ as cache_tools
from pipeline import commands
from tasks import __main__ as tasks_tools
from tasks import manners, process

COMMANDS = {"pipeline": commands.main, "cache": cache_tools.main, "tasks": tasks_tools.main}
WITH_HELP = {
    "pipeline": ["", "run", "plan", "precision", "doctor", "export", "runs", "report", "schema", "tiny-model"],
    "cache": ["", "ls", "stats", "verify", "why", "diff", "export", "gc"],
    "tasks": ["", "run"],
}
EXPERIMENT, OTHER, RUN, LATENTS = "lab.toml", "other.toml", "runs/*", "latents"
"""Stand for files of the lab."""

ON_LAB = [
    f"pipeline plan {EXPERIMENT}",
    f"pipeline plan {EXPERIMENT} --controlnet",
    f"pipeline plan {EXPERIMENT} --model-config FLUX.1-dev",
    f"pipeline plan {OTHER}",
    "pipeline plan nowhere.toml",
    f"pipeline runs {EXPERIMENT}",
    f"pipeline export {RUN} --out exported.safetensors",
    f"pipeline run CheckData --experiment {EXPERIMENT}",
    f"pipeline run CheckRoom --experiment {EXPERIMENT}",
    f"pipeline run EncodeT5 --experiment {EXPERIMENT}",
    f"pipeline run EncodeT5 --experiment {OTHER}",
    "cache ls",
    f"cache ls store {LATENTS}",
    "cache stats",
    "cache verify",
    f"cache why {EXPERIMENT}",
    f"cache why {OTHER}",
    f"cache diff {EXPERIMENT} {OTHER}",
    f"cache export {EXPERIMENT} --kind prompts --out prompts.safetensors",
    f"cache gc {EXPERIMENT}",
    f"cache gc {OTHER} --older-than 0s",
    "cache gc",
]


def screen(command: str) -> list[str]:
    """What a command shows, without the lines of one long word, such as a path, which stays whole."""
    module, *arguments = command.split()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTTOU)}
    try:
        with terminal(80) as seen, contextlib.suppress(SystemExit):
            COMMANDS[module](arguments)
    finally:
        for number, handler in handlers.items():  # a stage sets those of its process
            signal.signal(number, handler)
    assert any(seen.lines), command
    assert "Traceback" not in seen.raw and "\t" not in seen.raw
    return [line for line in seen.lines if len(line.split()) > 1]


@pytest.mark.parametrize("command", [f"{module} {name} --help" for module in WITH_HELP for name in WITH_HELP[module]])
def test_help_fits_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # argparse asks the terminal that the tests were started at
    assert max(map(len, screen(command))) <= 80


@pytest.mark.parametrize(
    "command, said",
    [
        ("pipeline plna my.toml", "there is no plna; did you mean plan?"),
        ("pipeline run TrainLora", "there is no TrainLora; did you mean TrainLoRA?"),
        ("pipeline run nothing", "there is no nothing; choose from GetModel, CheckData, "),
        ("pipeline plan --jsno", "there is no option --jsno; did you mean --json?"),
        ("pipeline", "arguments are required: COMMAND"),
        ("cache lss", "there is no lss; did you mean ls?"),
        ("tasks sweep my.toml --tsk x", "there is no option --tsk; did you mean --task?"),
        ("tasks run TrainLora", "there is no task TrainLora; did you mean TrainLoRA?"),
    ],
)
def test_a_misspelt_word_is_told_what_was_meant_in_80_columns(command, said):
    lines = screen(command)
    assert max(map(len, lines)) <= 80 and said in " ".join(" ".join(lines).split())
    assert lines[0].startswith("error: ")


def test_a_line_of_luigis_log_fits_80_columns():
    log = logging.Logger("tasks")
    with terminal(80) as seen:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        handler.addFilter(manners._Readable())
        log.addHandler(handler)
        log.error("%s failed (exit code 1; what it said stands above)", "SampleControlNetLatents" * 2)
        log.info("done      %s", "Sample(cat)")
    first, second, third = filter(None, seen.lines)
    assert max(map(len, seen.lines)) <= 80 and first.startswith("ERROR: SampleControlNet")
    assert second == "  it said stands above)" and third == "INFO: done      Sample(cat)"


def test_an_interruption_is_said_below_the_bar_that_it_ended():
    with terminal(80) as seen:
        sys.stderr.write("train  0/60 steps^C")
        process._without_traceback_of_interruption(KeyboardInterrupt, KeyboardInterrupt(), None)
    first, second, _ = seen.lines[:3]
    assert first == "train  0/60 steps^C" and second.startswith("interrupted, and the running stage with it; ")
    assert max(map(len, seen.lines)) <= 80


@pytest.fixture(scope="module")
def lab(plainly_trained, tmp_path_factory):
    """A trained lab, and the same experiment with another resolution and a longer text in `other.toml`."""
    lab = plainly_trained.copy(tmp_path_factory.mktemp("columns") / "lab")
    text = lab.path.read_text()
    (lab.folder / EXPERIMENT).write_text(text)
    (lab.folder / OTHER).write_text(text.replace("max_sequence_length = 16", "max_sequence_length = 24\nflip = true"))
    return lab


@pytest.mark.parametrize("command", ON_LAB)
def test_every_command_fits_80_columns(lab, command, monkeypatch):
    monkeypatch.chdir(lab.folder)
    monkeypatch.delenv("COLUMNS", raising=False)
    (run,) = (path for path in lab.folder.glob("runs/*") if path.is_dir())
    lines = screen(command.replace(RUN, os.fspath(run.relative_to(lab.folder))))
    assert max(map(len, lines)) <= 80, "\n".join(lines)
