"""What is said on a terminal, or cannot be: closed pipes, full disks, text of others, a terminal that stops writers."""

import json
import os
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from commands import environment
from lab import Lab

ROOT = Path(__file__).parent.parent
ESCAPES = "\x1b]0;taken over\x07\x1b[2J"


def run(arguments: list[str], lab: Lab | None = None, stdout=subprocess.PIPE) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, env=environment(), stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)


def closed_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("tool", ["pipeline plan", "cache stats", "cache ls"])
@pytest.mark.parametrize("full", [False, True])
def test_output_that_nobody_takes_ends_a_tool_without_a_traceback(encoded, tool, full):
    stdout = os.open("/dev/full", os.O_WRONLY) if full else closed_pipe()
    result = run([*tool.split(), str(encoded.path)], stdout=stdout)
    assert result.returncode == 1 and "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert ("No space left on device" in result.stderr) == full


@pytest.mark.parametrize("full", [False, True])
def test_a_stage_that_nobody_listens_to_does_its_work(encoded, tmp_path, full):
    lab = encoded.copy(tmp_path / "lab")
    stdout = os.open("/dev/full", os.O_WRONLY) if full else closed_pipe()
    for stage in ("CheckData", "CheckRoom", "EncodeCLIP"):  # the third has nothing to do
        result = run(["pipeline", "run", stage, "--experiment", str(lab.path)], stdout=stdout)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("tool", ["pipeline plan", "cache stats", "luigi --module tasks CheckData"])
def test_ctrl_c_while_modules_load_is_no_traceback(tool):
    command = [sys.executable, "-X", "importtime", "-m", *tool.split()]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        said = next(line for line in process.stderr if line.split()[-1] == "numpy")
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == -signal.SIGINT and "Traceback" not in said


def test_ctrl_c_in_a_demo_waits_for_the_command_and_ends_without_a_traceback():
    waits = "trap 'sleep 0.5; echo kept; exit 130' INT; echo up; sleep 60"
    said = f"import steps; steps.show_and_run('bash', '-c', {waits!r})"
    command, options = [sys.executable, "-c", said], {"cwd": ROOT / "examples", "start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options) as process:
        assert next(line for line in process.stdout if line == "up\n")
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == "kept\n" and process.wait() == 130


def test_text_of_others_reaches_no_terminal_as_it_is(encoded, tmp_path):
    lab = encoded.copy(tmp_path / "lab", own_model=True)
    config = lab.model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": ESCAPES}))
    (recipe,) = lab.folder.glob("store/entries/pooled-*/recipe.json")
    for arguments in (["pipeline", "plan", str(lab.path)], ["cache", "why", str(lab.path)]):
        result = run(arguments)
        assert result.returncode == 1 and "class \\x1b]0;taken over" in result.stderr
        assert "\x1b" not in result.stderr + result.stdout
    assert recipe.is_file()


def test_a_stage_beside_a_terminal_that_stops_who_writes_to_it_goes_on(encoded, tmp_path):
    """With `stty tostop`, a process in the background is stopped when it writes, and a stage is in the background."""
    lab = encoded.copy(tmp_path / "lab")
    script = (
        "import fcntl, os, sys, termios\n"
        "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from pipeline.process import children\n"
        f"sys.exit(children.run(['run', 'CheckData', '--experiment', {str(lab.path)!r}]))\n"
    )
    master, terminal = os.openpty()
    modes = termios.tcgetattr(terminal)
    modes[3] |= termios.TOSTOP
    termios.tcsetattr(terminal, termios.TCSANOW, modes)
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    said = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "3 captioned photos, all can be used" in " ".join(said.split())


def test_a_training_that_nobody_listens_to_any_more_is_trained_to_its_end(encoded, tmp_path):
    """As where `luigi ... 2>&1 | tee log` has lost its tee."""
    lab = encoded.copy(tmp_path / "lab")
    command = [sys.executable, "-m", "pipeline", "run", "TrainLoRA", "--experiment", str(lab.path)]
    pipe = closed_pipe()
    assert subprocess.run(command, env=environment(), stdout=pipe, stderr=pipe, timeout=120).returncode == 0
    assert lab.done("TrainLoRA")
