"""Children of which several run at a time: on their devices, in the order of their chains; a failure ends all."""

import subprocess
import time

import pytest

from pipeline.process import children, several


@pytest.fixture
def started(monkeypatch) -> list:
    """The work and device of each child that was started; work is what a shell is to do."""
    found: list = []

    def start(arguments, stdout=None, stderr=None, variables=None):
        found.append((arguments[0], variables.get(several.VISIBLE, "")))
        return subprocess.Popen(["sh", "-c", arguments[0]], stdout=stdout and subprocess.PIPE, stderr=stderr)

    monkeypatch.setattr(children, "start", start)
    return found


def run(chains, numbers=()):
    return several.run(chains, lambda work: [work], numbers)


def test_without_devices_all_is_done_in_order_and_sees_what_this_process_sees(started):
    assert run([["true 1", "true 2"], [], ["true 3"]]) is None
    assert started == [("true 1", ""), ("true 2", ""), ("true 3", "")]


def test_a_chain_waits_for_its_own_and_other_chains_take_the_free_devices(started, tmp_path):
    wait = f"until [ -e {tmp_path}/two ]; do sleep 0.01; done"
    assert run([[wait, "true 1"], [f"touch {tmp_path}/two", "true 2"]], ["4", "7"]) is None
    assert started[:2] == [(wait, "4"), (f"touch {tmp_path}/two", "7")]
    assert sorted(started[2:]) in ([("true 1", "4"), ("true 2", "7")], [("true 1", "7"), ("true 2", "4")])


def test_no_more_run_at_a_time_than_there_are_devices(started, tmp_path):
    (tmp_path / "busy").mkdir()
    alone = "mkdir {0}/busy/$0$$ && sleep 0.1 && [ $(ls {0}/busy | wc -l) -le 2 ] && rmdir {0}/busy/$0$$"
    assert run([[alone.format(tmp_path)]] * 6, ["0", "1"]) is None


def test_the_first_that_fails_is_said_and_ends_the_others(started, capfd):
    began = time.monotonic()
    assert run([["sleep 100"], ["echo why >&2; exit 3"], ["true"]], ["0", "1"]) == ("echo why >&2; exit 3", 3)
    assert time.monotonic() - began < 50 and ("true", "0") not in started
    assert "device 1: why\n" in capfd.readouterr().err
