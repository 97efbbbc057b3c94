"""A connection to another rank, on this host or another: values as lines of JSON, and the end of the other noticed."""

import contextlib
import errno
import json
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.process.progress import say

LOST_SECONDS = 30
"""A host from which nothing has come for so long, not even its kernel's answer, is lost."""

PATIENCE_SECONDS = 10
"""How long a rank may go on after another has ended: it may be computing, or wait for the other on its device."""


class Peer:
    """Another rank.  The connection is there until one of both processes ends."""

    def __init__(self, connection: socket.socket, rank: int = 0):
        self.rank, self._connection, self._file = rank, connection, connection.makefile("rw")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is said is short, and waited for
        _notice_a_lost_host(connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, value: Any) -> None:
        """Say what JSON can say.  Raises UserError where the other has ended."""
        try:
            self._file.write(json.dumps(value) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._ended(error) from None

    def receive(self, longest: int = -1) -> Any:
        """What the other says next; waits for it.  longest: in characters.  Raises UserError where it has ended."""
        try:
            line, error = self._file.readline(longest), None
        except OSError as found:
            line, error = "", found
        if not line.endswith("\n"):
            raise self._ended(error)
        return json.loads(line)

    @contextlib.contextmanager
    def hurried(self, seconds: float) -> Iterator[None]:
        """A block in which the other has so long for each answer."""
        self._connection.settimeout(seconds)
        yield
        self._connection.settimeout(None)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what was not sent is lost
            self._file.close()
        self._connection.close()

    def stay_until_exit(self) -> None:
        """Let the other end see the end of this process, and not that of this object."""
        os.dup(self.fileno())

    def wait_for_end(self) -> None:
        """Until the other process is gone; it learns now that this one is about to end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
            while self._file.readline():
                pass

    def _ended(self, error: OSError | None) -> UserError:
        if error and error.errno in LOST:
            return UserError(
                f"rank {self.rank}: its host has not answered for {LOST_SECONDS} s, so this rank ends too; look at "
                "that host and the network, then start all ranks again"
            )
        return UserError(f"rank {self.rank} has ended, so this one does too; what it said is the reason")


LOST = errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH
"""What the kernel says of a connection to a host that does not answer."""


def _notice_a_lost_host(connection: socket.socket) -> None:
    """Have the kernel ask the other one's, which answers as long as the host and the network are there."""
    idle, between = LOST_SECONDS // 3, LOST_SECONDS // 6
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, (LOST_SECONDS - idle) // between)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_SECONDS)


@contextlib.contextmanager
def ended_with(peers: Sequence[Peer]) -> Iterator[None]:
    """A block in which this process ends soon after one of the others, even if it waits for them on its device.

    No other rank can be waited for there with a limit; what is in the middle of a step is lost in any case.
    """
    is_left = threading.Event()
    threading.Thread(target=_watch, args=(peers, is_left), name="ranks", daemon=True).start()
    try:
        yield
    finally:
        is_left.set()


def _watch(peers: Sequence[Peer], is_left: threading.Event) -> None:
    poll, by_file = select.poll(), {peer.fileno(): peer.rank for peer in peers}
    for file in by_file:
        poll.register(file, select.POLLRDHUP)
    while not (ended := poll.poll(1000)):
        if is_left.is_set():
            return
    if not is_left.wait(PATIENCE_SECONDS):
        say(f"error: rank {by_file[ended[0][0]]} has ended while this one waited for it; ending too", to_stderr=True)
        os._exit(1)
