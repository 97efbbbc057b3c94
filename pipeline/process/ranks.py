"""Processes that train together, each on a device of its own: which of them this is, and how they agree.

A process learns its place from the variables that ``msrun`` sets; `pipeline.process.launching` sets the same.  What the
ranks say to each other beside their gradients goes through a socket of this machine, so that no device has to be waited
for, and the end of a rank ends the others at once.  Imports no MindSpore.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.process.stopping import Stopped

MEETING_SECONDS = 300
"""How long the first rank may come later than another: they start together, and a busy machine starts them slowly."""


@dataclass(frozen=True)
class Place:
    """Which of ``size`` ranks this process is, from 0."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0


def place() -> Place:
    """Of this process; the only one of one rank where nobody started it as one of several."""
    if not is_rank():
        return Place()
    # not RANK_ID, which msrun leaves at 0 where nobody numbers the machines
    return Place(int(os.environ["DEVICE_ID"]), int(os.environ["MS_WORKER_NUM"]))


def is_rank() -> bool:
    """Whether this process was started as a rank."""
    return os.environ.get("MS_ROLE") == "MS_WORKER"


def is_scheduler() -> bool:
    """Whether ``msrun`` has started this command as the process by which ranks find each other."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


class Ranks:
    """The ranks as one of them sees them; by itself, the only rank there is.  All must call the same, in one order."""

    def __init__(self, own: Place = Place()):
        self.rank, self.size = own.rank, own.size
        self._peers: list[_Peer] = []

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def exchange(self, value: Any) -> list:
        """Every rank's value, by rank, once all have given theirs; what JSON can say.

        Raises UserError where a rank has ended.
        """
        if self.size == 1:
            return [value]
        if not self.is_first:
            self._peers[0].send(value)
            return self._peers[0].receive()
        values = [value, *(peer.receive() for peer in self._peers)]
        for peer in self._peers:
            peer.send(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank: the same answer on all."""
        return any(self.exchange(bool(flag)))

    def ending(self, error: BaseException | None, is_asked: bool = False) -> BaseException | None:
        """What all ranks end with now, or None: this one's error, or another's, or Stopped where any was asked to."""
        said = self.exchange([error and (str(error) or type(error).__name__), is_asked])
        if error is not None:
            return error
        for rank, (text, _) in enumerate(said):
            if text is not None:
                return UserError(f"rank {rank} has ended: {text}")
        return Stopped() if any(asked for _, asked in said) else None

    def check_equal(self, digest: str, what: str) -> None:
        """Raise UserError where the ranks' digests differ."""
        found = self.exchange(digest)
        if len(set(found)) > 1:
            others = [str(rank) for rank, each in enumerate(found) if each != found[0]]
            raise UserError(
                f"{what}: rank {' and '.join(others)} has other bits than rank 0, nothing was saved; the same command "
                "goes on from the last checkpoint"
            )

    def open(self) -> None:
        """Find the other ranks."""
        own = f"\0mindspore-flux-finetune-{os.environ['MS_SCHED_PORT']}"
        if self.is_first:
            self._peers = _accepted(own, self.size)
        else:
            self._peers = [_Peer(_connected(own), 0)]
            self._peers[0].send(self.rank)

    def outlast(self) -> None:
        """Wait, on the first rank, until the others' processes are gone: the scheduler, which they need, ends with it.

        MindSpore crashes where it ends without one.
        """
        for peer in self._peers:
            peer.wait_for_end() if self.is_first else peer.stay_until_exit()


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """A block that this process goes through together with the other ranks, which all leave it together."""
    ranks = Ranks(place())
    if ranks.size == 1:
        yield ranks
        return
    ranks.open()
    try:
        yield ranks
        ranks.exchange(None)
    finally:
        ranks.outlast()


class _Peer:
    """A connection to another rank: a line of JSON for each value."""

    def __init__(self, connection: socket.socket, rank: int):
        self.rank, self._connection, self._file = rank, connection, connection.makefile("rw")

    def send(self, value: Any) -> None:
        try:
            self._file.write(json.dumps(value) + "\n")
            self._file.flush()
        except OSError:
            raise self._ended() from None

    def receive(self) -> Any:
        try:
            line = self._file.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise self._ended()
        return json.loads(line)

    def stay_until_exit(self) -> None:
        """Let the other end see the end of this process, and not that of this object."""
        os.dup(self._connection.fileno())

    def wait_for_end(self) -> None:
        """Until the other process is gone; it learns now that this one is about to end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            while self._file.readline():
                pass

    def _ended(self) -> UserError:
        return UserError(f"rank {self.rank} has ended, so this one does too; what it said is the reason")


def _accepted(name: str, size: int) -> "list[_Peer]":
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(MEETING_SECONDS)
        listener.bind(name)
        listener.listen(size)
        found: dict[int, _Peer] = {}
        while len(found) < size - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, size)) - found.keys())
                raise UserError(f"ranks {missing} have not come within {MEETING_SECONDS} s") from None
            if _user_of(connection) == os.getuid():
                peer = _Peer(connection, 0)
                peer.rank = int(peer.receive())
                found[peer.rank] = peer
        return [found[rank] for rank in sorted(found)]


def _connected(name: str) -> socket.socket:
    deadline = time.monotonic() + MEETING_SECONDS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(name)
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank 0 has not come within {MEETING_SECONDS} s; all ranks must be on one machine"
                ) from None
            time.sleep(0.05)
            continue
        if _user_of(connection) != os.getuid():
            raise UserError("rank 0: another user's process has its place; start again")
        return connection


def _user_of(connection: socket.socket) -> int:
    """Whose process is at the other end: any user of the machine may connect."""
    form = "3i"  # process, user, group
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form))
    return struct.unpack(form, found)[1]
