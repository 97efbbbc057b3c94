"""Several workers and one scheduler, for real: all is done, once, whoever is killed in the middle."""

import configparser
import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from commands import ROOT, TASK_FAILED, children, environment, stages_under, wait_until
from lab import Lab

from pipeline import records, stage_table
from pipeline.plan.shard import Shard
from pipeline.process.several import numbers_in
from tasks import central, launch, worker

LUIGID_CFG = ROOT / "examples" / "luigi" / "luigid.cfg"


def start(lab: Lab, task: str, *options: str, numbers: str = "0", said=subprocess.PIPE) -> subprocess.Popen:
    command = [sys.executable, "-m", "tasks", "run", task, "--experiment", str(lab.path), "--devices", numbers]
    output = {"stdout": said, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *options], env=environment(), cwd=lab.folder, **output)


class Luigid:
    """A central scheduler as the example has it, which can be restarted at its port."""

    def __init__(self, folder: Path):
        with closing(socket.socket()) as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.state, self.url = folder / "state", f"http://localhost:{self.port}"
        self.start()

    def start(self) -> None:
        program = Path(sys.executable).with_name("luigid")
        arguments = [program, "--port", str(self.port), "--address", "localhost", "--state-path", str(self.state)]
        environ = {**os.environ, "LUIGI_CONFIG_PATH": str(LUIGID_CFG)}
        self.process = subprocess.Popen(arguments, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers, 60)

    def _answers(self) -> bool:
        with closing(socket.socket()) as found:
            return found.connect_ex(("localhost", self.port)) == 0

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait()


@pytest.fixture
def luigid(tmp_path):
    found = Luigid(tmp_path)
    yield found
    found.end(signal.SIGKILL)


@pytest.fixture
def many(encoded, tmp_path) -> Lab:
    """Enough photos that a shard takes some seconds."""
    return Lab(tmp_path / "lab", encoded.model, num_pictures=90).set("parallel", encoders=4)


def rows(lab: Lab) -> list[str]:
    """The items of the images' latents, as often as the store has them."""
    entries = lab.latents
    entries.refresh()
    return sorted(item for segment in entries.index().segments for item in segment.items())


def is_encoding(lab: Lab) -> bool:
    return bool(list(lab.folder.glob("store/entries/latents-*/writing/*/*")))


def num_recorded(lab: Lab) -> int:
    """How many entries the shards' records say were encoded."""
    folder = stage_table.STAGES["EncodeImages"].place(lab.plan)
    return sum(record["outcome"]["encoded"] for record in records.read(folder) if "shard" in record)


# --- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, numbers", [("0-7", "01234567"), ("3", "3"), ("0,2,2,4-5", "0245"), (" 1 , 0", "10")])
def test_devices_are_named_by_numbers_and_ranges(text, numbers):
    assert numbers_in(text) == list(numbers)


@pytest.mark.parametrize("text", ["", "7-0", "a", "0-", "-1", "0,,1"])
def test_what_names_no_devices_is_refused(text):
    with pytest.raises(ValueError, match="numbers of devices"):
        numbers_in(text)


def test_what_is_done_is_not_run_and_starts_no_scheduler(encoded, tmp_path, monkeypatch, capsys):
    lab = encoded.copy(tmp_path / "lab")
    monkeypatch.setattr(launch.central, "found", None)
    assert launch.launch("EncodePrompts", str(lab.path), ["0", "1"]) == 0
    assert "EncodePrompts(lab) is done" in capsys.readouterr().out


def test_a_scheduler_that_does_not_answer_is_said_before_any_worker_starts(tmp_path):
    lab = Lab(tmp_path / "lab", tmp_path / "no model")
    with pytest.raises(SystemExit, match="http://localhost:1: no Luigi scheduler answers .* start luigid there"):
        launch.launch("CheckData", str(lab.path), ["0"], "http://localhost:1")


def test_the_examples_of_luigis_configuration_say_what_the_command_does_by_itself():
    for file, defaults in (("luigid.cfg", central.DEFAULTS), ("worker.cfg", worker.DEFAULTS)):
        found = configparser.ConfigParser()
        found.read(LUIGID_CFG.with_name(file))
        said = {key: found.get(*key) for key in defaults}
        assert said == {key: str(value).lower() for key, value in defaults.items()}


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_of_one_host_share_the_shards_and_see_one_device_each(many):
    process = start(many, "EncodeImages", numbers="2-3")
    wait_until(lambda: len(stages_under(process.pid)) == 2)
    seen = {Path(f"/proc/{stage}/environ").read_bytes() for stage in stages_under(process.pid)}
    assert len(seen) == 2 and all(b"ASCEND_RT_VISIBLE_DEVICES=" in each for each in seen)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert len(rows(many)) == len(set(rows(many))) == num_recorded(many) == len(many.plan.photos)
    assert {"device 2: ", "device 3: "} <= {line[:10] for line in output.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGKILL], ids=["stays", "SIGTERM", "SIGKILL"])
def test_all_is_encoded_once_where_a_worker_is_killed_and_the_scheduler_restarted(many, luigid, number):
    several = [start(many, "EncodeImages", "--scheduler-url", luigid.url) for _ in range(2)]
    stage = wait_until(lambda: is_encoding(many) and stages_under(several[0].pid))[0]
    (first,) = children(several[0].pid)
    os.kill(first, signal.SIGKILL)
    if number:
        luigid.end(number)
        luigid.start()
    outputs = [process.communicate(timeout=600)[0] for process in several]
    assert [process.returncode for process in several] == [0, 0], outputs
    assert not Path(f"/proc/{stage}").exists()
    assert "the worker was killed by SIGKILL" in outputs[0] and "Traceback" not in "".join(outputs)
    assert len(rows(many)) == len(set(rows(many))) == len(many.plan.photos)


@pytest.mark.slow
def test_a_paused_worker_is_taken_for_dead_and_its_shard_is_encoded_once(many, luigid):
    """Who gets the shard next waits for it; once the worker goes on, both find it done."""
    paths = [many.folder / name for name in ("first", "second")]
    with open(paths[0], "w") as first, open(paths[1], "w") as second:
        several = [start(many, "EncodeImages", "--scheduler-url", luigid.url, said=said) for said in (first, second)]
    wait_until(lambda: is_encoding(many) and stages_under(several[0].pid))
    paused = [several[0].pid, *_below(several[0].pid)]
    for pid in paused:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: "another process is at it; waiting" in paths[1].read_text())
    for pid in paused:
        os.kill(pid, signal.SIGCONT)
    assert [process.wait(600) for process in several] == [0, 0], [path.read_text() for path in paths]
    assert len(rows(many)) == len(set(rows(many))) == num_recorded(many) == len(many.plan.photos)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_command(many, number):
    process = start(many, "EncodeImages", numbers="0-1")
    wait_until(lambda: is_encoding(many) and len(stages_under(process.pid)) == 2)
    below = list(filter(_is_alive, _below(process.pid)))
    assert len(below) == 7  # a scheduler, two workers, and for each a process of its task and the stage
    process.send_signal(number)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in output and (number == signal.SIGKILL or "interrupted, and all workers" in output)
    wait_until(lambda: not any(map(_is_alive, below)), 60)
    assert len(rows(many)) == len(set(rows(many))) < len(many.plan.photos)


@pytest.mark.slow
def test_a_failing_stage_is_the_exit_code_of_the_whole(many):
    (many.pictures / "00000.png").write_bytes(b"")
    process = start(many, "TrainLoRA", numbers="0-1")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == TASK_FAILED and "00000.png: empty file" in output and "Traceback" not in output
    assert "running   CheckRoom" not in output
    assert output.count("00000.png: empty file") == output.count("running   CheckData") == 1


@pytest.mark.slow
def test_array_jobs_share_a_stage_beside_the_collector_and_a_job_started_twice_waits(many):
    many.run("CheckData")
    command = [sys.executable, "-m", "pipeline", "run", "EncodeImages", "--experiment", str(many.path), "--shard"]
    jobs = [
        subprocess.Popen([*command, shard], env=environment(), stderr=subprocess.PIPE, text=True)
        for shard in map(str, [*Shard.all_of(3), Shard(0, 3)])
    ]
    gc = [sys.executable, "-m", "cache", "gc", str(many.path), "--yes", "--older-than", "0s"]
    while any(job.poll() is None for job in jobs):
        subprocess.run(gc, env=environment(), check=True, capture_output=True)
    said = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, said
    assert "another process is at it; waiting" in said[0] + said[3]
    assert len(rows(many)) == len(set(rows(many))) == num_recorded(many) == len(many.plan.photos)


def _below(pid: int) -> list[int]:
    return [each for child in children(pid) for each in (child, *_below(child))]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
