"""Processes that train together, each on a device of its own: which of them this is, and how they agree.

A process learns its place from the variables that ``msrun`` sets; `pipeline.process.launching` sets the same.  What the
ranks say to each other beside their gradients goes through connections of their own to the first rank, so that no
device has to be waited for, and the end of a rank, or of its host, ends the others.  Imports no MindSpore.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.process import meeting
from pipeline.process.peers import Peer, ended_with
from pipeline.process.stopping import Stopped

OF_HOST = "RANKS_OF_HOST"
"""How many ranks `pipeline.process.launching` has started on this host."""


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
    """Of this process; the only one of one rank where nobody started it as one of several.

    Raises UserError where msrun was not told which of several hosts this is.
    """
    if not is_rank():
        return Place()
    number, size = os.environ.get("MS_NODE_ID", ""), int(os.environ["MS_WORKER_NUM"])
    if not number.isdecimal():  # RANK_ID is no help: on the scheduler's host msrun then leaves it at 0
        raise UserError("msrun: each of several hosts needs its number, --node_rank, from 0")
    if int(number) >= size:
        raise UserError(f"msrun: found rank {number} of {size}; --node_rank counts hosts from 0")
    return Place(int(number), size)


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
        self.peers: list[Peer] = []

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
            self.peers[0].send(value)
            return self.peers[0].receive()
        values = [value, *(peer.receive() for peer in self.peers)]
        for peer in self.peers:
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

    def open(self, path: Path) -> None:
        """Find the other ranks; see `meeting` for ``path``."""
        self.peers = meeting.gather(path, self.size) if self.is_first else [meeting.join(path, self.rank, self.size)]

    def outlast(self) -> None:
        """Wait, on the first rank, until the others' processes are gone: the scheduler, which they need, ends with it.

        MindSpore crashes where it ends without one.
        """
        for peer in self.peers:
            peer.wait_for_end() if self.is_first else peer.stay_until_exit()


ALONE = Ranks()


@contextlib.contextmanager
def joined(path: Path) -> Iterator[Ranks]:
    """A block that this process goes through together with the other ranks, which all leave it together.

    path: the file by which they find each other, in a folder that all of them see.
    """
    ranks = Ranks(place())
    if ranks.size == 1:
        yield ranks
        return
    ranks.open(path)
    try:
        with ended_with(ranks.peers):
            yield ranks
            ranks.exchange(None)
    finally:
        ranks.outlast()
