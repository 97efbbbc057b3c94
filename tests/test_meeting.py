"""Ranks that find each other and talk: no MindSpore.  Where each is a process, its end is that of all."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest
from commands import environment

from pipeline.errors import UserError
from pipeline.process import meeting, peers
from pipeline.process.ranks import Place, Ranks, place
from pipeline.process.stopping import Stopped


@pytest.fixture(autouse=True)
def port(monkeypatch) -> str:
    """Of the start that the test is."""
    monkeypatch.setenv("MS_SCHED_HOST", "127.0.0.1")
    monkeypatch.setenv("MS_SCHED_PORT", "8118")
    return "8118"


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".ranks"


def together(path, size: int, work, numbers=None) -> list:
    """What ``work(ranks)`` returns, or raises, of so many ranks in threads."""
    numbers = numbers or range(size)
    found: list = [None] * len(numbers)

    def be(index: int) -> None:
        ranks = Ranks(Place(numbers[index], size))
        try:
            ranks.open(path)
            found[index] = work(ranks)
        except (UserError, Stopped) as error:
            found[index] = error
        finally:
            for peer in ranks.peers:  # as the end of its process does
                with contextlib.suppress(OSError):
                    peer._connection.shutdown(socket.SHUT_RDWR)

    threads = [threading.Thread(target=be, args=(index,)) for index in range(len(numbers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


# --- what they say ------------------------------------------------------------------------------------------------


def test_every_rank_hears_what_all_say_in_the_order_of_the_ranks(path):
    found = together(path, 3, lambda ranks: ranks.exchange([ranks.rank, 1 / 3]))
    assert found == [[[rank, 1 / 3] for rank in range(3)]] * 3


def test_all_ranks_end_with_the_error_of_one(path):
    found = together(path, 3, lambda ranks: ranks.ending(ValueError("corrupt") if ranks.rank == 1 else None))
    assert [str(each) for each in found] == ["rank 1 has ended: corrupt", "corrupt", "rank 1 has ended: corrupt"]


def test_all_ranks_stop_where_one_is_asked_to(path):
    found = together(path, 2, lambda ranks: ranks.ending(None, is_asked=ranks.rank == 1))
    assert [type(each) for each in found] == [Stopped, Stopped]


def test_a_rank_that_is_gone_is_noticed_by_all_others(path):
    found = together(path, 3, lambda ranks: ranks.exchange(ranks.exchange(0)) if ranks.rank != 1 else None)
    assert all(isinstance(each, UserError) and "rank" in str(each) for each in (found[0], found[2]))


def test_ranks_whose_bits_differ_save_nothing(path):
    found = together(path, 3, lambda ranks: ranks.check_equal("ab" if ranks.rank == 2 else "aa", "step 5"))
    assert all(str(each).startswith("step 5: rank 2 has other bits than rank 0") for each in found)


# --- how they find each other -------------------------------------------------------------------------------------


def waited_for(path) -> dict:
    while not path.exists():
        time.sleep(0.01)
    return json.loads(path.read_text())


def test_the_way_to_the_first_rank_is_for_this_user_alone_and_gone_once_all_have_come(path):
    found = []
    thread = threading.Thread(target=lambda: found.extend(meeting.gather(path, 2)))
    thread.start()
    invitation = waited_for(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(invitation["secret"]) == 64 and invitation["host"] == "127.0.0.1"
    meeting.join(path, 1, 2)
    thread.join(10)
    assert [peer.rank for peer in found] == [1] and list(path.parent.iterdir()) == []


def test_strangers_do_not_keep_ranks_from_each_other(path, monkeypatch):
    """One says nothing, one too much, one has another secret, one says again what a rank has said."""
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 0.3)
    found = []
    thread = threading.Thread(target=lambda: found.extend(meeting.gather(path, 2)))
    thread.start()
    invitation = waited_for(path)
    address = invitation["host"], invitation["port"]
    for said in (b"", b"[" * 5000, b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"null\n", b'[1, "ab", 7]\n'):
        with socket.create_connection(address) as stranger:
            stranger.sendall(said)
            stranger.recv(100)
    forged = meeting.Invitation(**invitation | {"secret": "0" * 64})
    assert meeting._introduced(forged, 1) is None
    assert meeting.join(path, 1, 2).rank == 0
    thread.join(10)
    assert [peer.rank for peer in found] == [1]


@pytest.mark.parametrize("left", ["{", "[]", "null", "other start", "nobody", "stranger"])
def test_what_a_killed_training_has_left_misleads_nobody(path, port, monkeypatch, left):
    monkeypatch.setattr(meeting, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = stranger.getsockname()[1] if left == "stranger" else 9
        start = "8119" if left == "other start" else port
        old = meeting.Invitation(start, 2, "127.0.0.1", address, "0" * 64)
        path.write_text(left if left in ("{", "[]", "null") else json.dumps(old._asdict()))
        found: list = []
        late = threading.Thread(target=lambda: found.append(meeting.join(path, 1, 2)))
        late.start()
        time.sleep(0.5)
        assert [peer.rank for peer in meeting.gather(path, 2)] == [1]
        late.join(10)
    assert [peer.rank for peer in found] == [0] and not path.exists()


def test_who_does_not_come_is_said_with_the_folder_that_all_must_see(path, monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"ranks \[1, 2\] have not come within 0.2 s.*" + str(path.parent)):
        meeting.gather(path, 3)
    with pytest.raises(UserError, match=f"^{path.parent}: rank 0 has not come here.*all hosts have this folder"):
        meeting.join(path, 1, 3)
    assert list(path.parent.iterdir()) == []


def test_hosts_with_the_same_number_are_told_so(path):
    found = together(path, 3, lambda ranks: ranks.exchange(0), numbers=[0, 1, 1])
    assert str(found[0]) == "rank 1 has come twice; give each host its own --node_rank, from 0"
    assert all(isinstance(each, UserError) for each in found)


def test_hosts_that_start_another_number_of_ranks_are_told_so(path, port):
    path.write_text(json.dumps(meeting.Invitation(port, 4, "127.0.0.1", 9, "0" * 64)._asdict()))
    with pytest.raises(UserError, match="2 ranks were started here, and 4 where rank 0 is"):
        meeting.join(path, 1, 2)


def test_an_address_that_no_host_has_is_said(path, monkeypatch):
    monkeypatch.setenv("MS_SCHED_HOST", "nowhere.invalid")
    with pytest.raises(UserError, match="MS_SCHED_HOST = nowhere.invalid: .*give an address that all hosts reach"):
        meeting.gather(path, 2)


@pytest.mark.parametrize("number, found", [("0", Place(0, 4)), ("3", Place(3, 4))])
def test_a_rank_has_the_number_that_msrun_gives_it_over_all_hosts(monkeypatch, number, found):
    for name, value in {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "MS_NODE_ID": number, "DEVICE_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place() == found


@pytest.mark.parametrize("number, said", [("4", "found rank 4 of 4"), (None, "needs its number, --node_rank")])
def test_a_rank_without_a_number_of_its_own_is_refused(monkeypatch, number, said):
    monkeypatch.setenv("MS_ROLE", "MS_WORKER")
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    monkeypatch.setenv("MS_NODE_ID", number) if number else monkeypatch.delenv("MS_NODE_ID", raising=False)
    with pytest.raises(UserError, match=said):
        place()


# --- how they end -------------------------------------------------------------------------------------------------

WAITS = """
import sys, time
from pathlib import Path
from pipeline.process import peers, ranks
peers.PATIENCE_SECONDS = 0.5
with ranks.joined(Path(sys.argv[1])) as found:
    print("joined", flush=True)
    time.sleep(1000)  # as one that waits for another on its device
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_waits_on_its_device_ends_soon_after_another(path, port, victim):
    own = environment() | {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "3"}
    command = [sys.executable, "-c", WAITS, str(path)]
    ranks = [
        subprocess.Popen(command, env=own | {"MS_NODE_ID": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    try:
        assert all(rank.stdout.readline() == b"joined\n" for rank in ranks)
        os.kill(ranks[victim].pid, signal.SIGKILL)
        assert [rank.wait(20) for rank in ranks] == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
        said = ranks[1 - victim].stderr.read().decode()
        assert said == f"error: rank {victim} has ended while this one waited for it; ending too\n"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_host_that_does_not_answer_is_asked_by_the_kernel_for_half_a_minute():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = peers.Peer(socket.create_connection(listener.getsockname()))._connection
        idle, between, count = (
            connection.getsockopt(socket.IPPROTO_TCP, each)
            for each in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and idle + between * count == 30
        connection.close()
