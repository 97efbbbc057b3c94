"""Which scheduler the ``luigi`` command takes: the local one, or the central one that the user names."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import luigi
import pytest
from commands import command, environment, ran, run_luigi, stages_under, wait_until
from lab import Lab
from luigi.cmdline_parser import CmdlineParser
from luigi.configuration import LuigiConfigParser, LuigiTomlParser

import tasks
from tasks import manners, scheduler

pytestmark = pytest.mark.filterwarnings("ignore:.*default.scheduler.port")  # a name of older configuration files


@pytest.fixture
def config(tmp_path, monkeypatch) -> LuigiConfigParser:
    """Luigi's configuration, read anew in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LuigiConfigParser, "_instance", None)
    return luigi.configuration.get_config()


def chosen(*arguments: str) -> bool:
    """Whether ``luigi --module tasks TrainLoRA`` with some options takes the local scheduler."""
    with CmdlineParser.global_instance(["--module", "tasks", "TrainLoRA", *arguments]):
        scheduler.choose("TrainLoRA")
        return luigi.interface.core().local_scheduler


@pytest.fixture
def silent() -> int:
    """A port that nothing listens on."""
    with closing(socket.socket()) as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_where_nothing_is_named_the_scheduler_is_local(config):
    assert chosen()


@pytest.mark.parametrize("setting", ["scheduler_port", "default-scheduler-port", "scheduler_url", "--scheduler-port"])
def test_a_named_scheduler_that_does_not_answer_is_said_with_its_address_and_what_names_it(config, silent, setting):
    value, options = str(silent), ()
    if setting.startswith("--"):
        options = (setting, value)
    else:
        config.read_string(f"[core]\n{setting} = {f'http://localhost:{value}' if 'url' in setting else value}\n")
    with pytest.raises(SystemExit) as end:
        chosen(*options)
    said = str(end.value)
    assert f"error: http://localhost:{silent}" in said and "(Connection refused)" in said and "\n" not in said
    assert f"remove {setting}" in said or f"remove [core] {setting} of Luigi's configuration" in said
    assert chosen(*options, "--local-scheduler")


def test_a_toml_configuration_is_asked_too(config, silent, monkeypatch):
    monkeypatch.setenv("LUIGI_CONFIG_PARSER", "toml")
    monkeypatch.setattr(LuigiTomlParser, "enabled", True)  # to read a file takes a package that is not needed here
    monkeypatch.setattr(LuigiTomlParser, "_instance", parser := LuigiTomlParser())
    parser.data = {"core": {"scheduler_host": "localhost", "scheduler_port": silent}}
    with pytest.raises(SystemExit, match=rf"http://localhost:{silent}/: .* remove \[core\] scheduler_host of"):
        chosen()
    parser.data = {}
    assert chosen()


def test_to_ask_for_no_local_scheduler_is_to_name_the_usual_one(config, silent):
    config.read_string("[core]\nlocal_scheduler = false\n")
    with pytest.raises(SystemExit, match="remove --scheduler-port"):
        chosen("--scheduler-port", str(silent))
    config.set("core", "local_scheduler", "true")
    assert chosen()


def test_a_scheduler_that_accepts_and_never_answers_is_given_up(config, monkeypatch):
    monkeypatch.setattr(scheduler, "ANSWER_SECONDS", 0.3)
    with closing(socket.create_server(("localhost", 0))) as server, pytest.raises(SystemExit, match="not within 0.3 s"):
        chosen("--scheduler-port", str(server.getsockname()[1]))


def test_another_server_at_that_address_is_no_scheduler(config):
    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

    with http.server.HTTPServer(("localhost", 0), Other) as server:
        threading.Thread(target=server.handle_request).start()
        with pytest.raises(SystemExit, match="what answers is something else"):
            chosen("--scheduler-port", str(server.server_port))


def test_neither_a_program_nor_a_task_behind_another_one_is_told_its_scheduler(config):
    """`luigi.build` takes it from its caller; Luigi has decided before it asks what the command's task requires."""
    tasks.CheckData("of a program")
    with CmdlineParser.global_instance(["--module", "tasks", "TrainLoRA"]):
        tasks.CheckData("of another task")
    assert not config.has_option("core", "local_scheduler")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(tmp_path) -> Lab:
    """Photos that no stage has seen; no model is needed to check them."""
    return Lab(tmp_path / "lab", tmp_path / "no model")


@pytest.fixture
def luigid(tmp_path, silent) -> Iterator[subprocess.Popen]:
    """A central scheduler, with its ``port``."""
    program = Path(sys.executable).with_name("luigid")
    arguments = [program, "--port", str(silent), "--address", "localhost", "--state-path", str(tmp_path / "state")]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.port = silent
    wait_until(lambda: _answers(silent), 60)
    yield process
    process.kill()
    process.wait()


def _answers(port: int) -> bool:
    with closing(socket.socket()) as found:
        return found.connect_ex(("localhost", port)) == 0


def test_a_configuration_file_names_a_silent_scheduler_and_luigi_ends_at_once(unchecked, tmp_path, silent):
    (tmp_path / "luigi.cfg").write_text(f"[core]\ndefault-scheduler-port: {silent}\n")
    began = time.monotonic()
    result = run_luigi("TrainLoRA", unchecked, cwd=tmp_path)
    assert time.monotonic() - began < 30  # two seconds, but for what else runs here; Luigi by itself takes a minute
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and f"localhost:{silent}" in result.stderr


def test_a_central_scheduler_that_is_named_is_used(unchecked, luigid):
    result = run_luigi("CheckData", unchecked, "--scheduler-port", str(luigid.port))
    assert result.returncode == 0 and ran(result.stderr) == ["CheckData"], result.stderr
    with urllib.request.urlopen(f"http://localhost:{luigid.port}/api/task_list?data=%7B%7D") as answer:
        (task,) = json.load(answer)["response"].values()
    assert (task["name"], task["status"]) == ("CheckData", "DONE")


@pytest.mark.slow
def test_a_scheduler_that_dies_under_a_training_is_said_in_one_line_once_that_has_ended(encoded, tmp_path, luigid):
    lab = encoded.copy(tmp_path / "lab").set("train", steps=100_000, mode="pynative")
    (tmp_path / "luigi.cfg").write_text("[core]\nrpc_retry_wait = 1\n")
    process = subprocess.Popen(
        [*command("TrainLoRA", lab), "--scheduler-port", str(luigid.port)],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    (stage,) = wait_until(lambda: stages_under(process.pid))
    wait_until((lab.run_folder / "metrics.jsonl").exists)
    luigid.kill()
    os.kill(stage, signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 40 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("ERROR: Errors (3 attempts) when connecting to remote scheduler")
    assert said.splitlines()[-1].endswith("the same command goes on from there")


def test_people_of_one_host_have_lock_folders_of_their_own(config):
    """Luigi's default belongs to who came first, and everybody else's command ended with a traceback."""
    manners.apply()
    assert config.get("core", "lock_pid_dir") == f"{tempfile.gettempdir()}/luigi-{os.getuid()}"
