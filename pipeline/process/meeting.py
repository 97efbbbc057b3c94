"""How the ranks of a training find each other, on one host or on several: the run's folder, which all see, says where.

The first rank listens, and writes its address and a secret to a file that this user alone can read.  Whoever connects
proves to know the secret, and so does the first rank.  A file that a killed training has left misleads nobody: it names
another start, or nobody who knows the secret answers at its address.
"""

import contextlib
import hmac
import json
import os
import secrets
import socket
import time
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.process.peers import Peer
from pipeline.process.progress import say

MEETING_SECONDS = 300
"""How long ranks wait for each other: they start together, and a busy machine starts them slowly."""

ANSWER_SECONDS = 5
"""How long either side waits for the other to prove itself."""

SAID_AFTER_SECONDS = 15
LONGEST_PROOF = 200
UNPROVEN = (UserError, OSError, ValueError, TypeError)
"""What comes of talking to somebody who is no rank."""


class Invitation(NamedTuple):
    """What the first rank writes.  start: which start of ranks it is of.  size: how many they are."""

    start: str
    size: int
    host: str
    port: int
    secret: str


def gather(path: Path, size: int) -> list[Peer]:
    """Wait, as the first rank, for all others; returns them by rank.  path: the file, new or a stale one's.

    Raises UserError where one does not come.
    """
    with _listening() as listener:
        host, port, *_ = listener.getsockname()
        invitation = Invitation(_start(), size, host, port, secrets.token_hex(32))
        _publish(path, invitation)
        try:
            return _admitted(listener, invitation, path)
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def join(path: Path, rank: int, size: int) -> Peer:
    """Find, as another rank, the first one.  Raises UserError where it does not come."""
    began, pause, is_said = time.monotonic(), 0.05, False
    while (waited := time.monotonic() - began) < MEETING_SECONDS:
        invitation = _read(path, size)
        peer = invitation and _introduced(invitation, rank)
        if peer:
            return peer
        if waited > SAID_AFTER_SECONDS and not is_said:
            say(f"rank {rank}: waiting for rank 0, which will say in {path} where it is", to_stderr=True)
            is_said = True
        time.sleep(pause)
        pause = min(2 * pause, 1)
    raise UserError(
        f"{path.parent}: rank 0 has not come here within {MEETING_SECONDS} s; see what it said, and that all hosts "
        "have this folder in common, and the same experiment, photos and model: if these differ, so does the folder"
    )


# --- where --------------------------------------------------------------------------------------------------------


def _start() -> str:
    """Which start of ranks this is: two at a time cannot both have their scheduler at this port of a host."""
    return os.environ["MS_SCHED_PORT"]


def _listening() -> socket.socket:
    """A socket on the network by which this host reaches the scheduler's: on one host, on no network."""
    host, port = os.environ["MS_SCHED_HOST"], os.environ["MS_SCHED_PORT"]
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            own, *_ = probe.getsockname()
        return socket.create_server((own, 0), family=family)
    except OSError as error:
        raise UserError(f"MS_SCHED_HOST = {host}: {error.strerror}; give an address that all hosts reach") from None


def _publish(path: Path, invitation: Invitation) -> None:
    """Write the file at once and whole, for this user alone."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            json.dump(invitation._asdict(), file)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _read(path: Path, size: int) -> Invitation | None:
    """What the first rank of this start has written; None as long as it has not."""
    try:
        os.listdir(path.parent)  # or NFS would go on saying that the file is not there
        found = Invitation(**json.loads(path.read_text()))
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}; all ranks must be of one user") from None
    except (OSError, ValueError, TypeError):
        return None
    if found.start != _start():
        return None
    if found.size != size:
        raise UserError(f"{size} ranks were started here, and {found.size} where rank 0 is; start as many everywhere")
    return found


# --- who ----------------------------------------------------------------------------------------------------------


def _admitted(listener: socket.socket, invitation: Invitation, path: Path) -> list[Peer]:
    deadline, found = time.monotonic() + MEETING_SECONDS, dict[int, Peer]()
    with contextlib.ExitStack() as failed:
        while missing := sorted(set(range(1, invitation.size)) - found.keys()):
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise UserError(
                    f"ranks {missing} have not come within {MEETING_SECONDS} s; see what they said, and that "
                    f"their host has {path.parent} in common with this one"
                ) from None
            peer = _admit(connection, invitation.secret)
            if peer is None:
                continue
            failed.callback(peer.close)
            if peer.rank in found:
                raise UserError(f"rank {peer.rank} has come twice; give each host its own --node_rank, from 0")
            found[peer.rank] = peer
        failed.pop_all()
    return [found[rank] for rank in sorted(found)]


def _admit(connection: socket.socket, secret: str) -> Peer | None:
    """Who it is that has connected; None where it does not prove to be a rank."""
    peer, own = Peer(connection), secrets.token_hex(16)
    with contextlib.suppress(*UNPROVEN), peer.hurried(ANSWER_SECONDS):
        peer.send(own)
        rank, other, proof = peer.receive(LONGEST_PROOF)
        if hmac.compare_digest(proof, _proof(secret, rank, own, other)):
            peer.send(_proof(secret, 0, own, other))
            peer.rank = rank
            return peer
    peer.close()
    return None


def _introduced(invitation: Invitation, rank: int) -> Peer | None:
    """The first rank; None where it is not there yet."""
    try:
        connection = socket.create_connection((invitation.host, invitation.port), ANSWER_SECONDS)
    except OSError:
        return None
    peer, own = Peer(connection), secrets.token_hex(16)
    with contextlib.suppress(*UNPROVEN), peer.hurried(ANSWER_SECONDS):
        other = peer.receive(LONGEST_PROOF)
        peer.send([rank, own, _proof(invitation.secret, rank, other, own)])
        if hmac.compare_digest(peer.receive(LONGEST_PROOF), _proof(invitation.secret, 0, other, own)):
            return peer
    peer.close()
    return None


def _proof(secret: str, rank: int, *nonces: str) -> str:
    """That the sender is this rank and knows the secret; worth nothing in another connection."""
    return hmac.new(secret.encode(), json.dumps([rank, *nonces]).encode(), "sha256").hexdigest()
