"""Starting ranks, and the process by which they find each other; their lives are tied together, and to this process."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO

from pipeline.process import children
from pipeline.process.progress import say
from pipeline.process.ranks import OF_HOST
from pipeline.process.stopping import STOPPED_EXIT

OTHERS_SECONDS = 5
"""How long the other ranks may take to end after one has died: they learn of it at once, where they say something."""

TAIL_LINES = 15


def run(arguments: Sequence[str], count: int, files: Sequence[int] = (), module: str = "pipeline") -> int:
    """Run ``python -m pipeline ARGUMENTS`` as ``count`` ranks, and wait.

    Returns 0, or the exit code of the first that failed.  The first rank says what there is to say; what another says
    is shown where it fails.  Signals sent here are passed on and waited for; if this process is killed, the kernel
    tells the ranks, which then stop.
    """
    common = _meeting_point(count)
    with contextlib.ExitStack() as stack:
        logs: list[IO] = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(1, count)]
        stack.enter_context(children.interrupted_by_sigterm())
        ranks: list[subprocess.Popen] = []
        stack.callback(_kill, ranks)
        for rank, log in enumerate([None, *logs]):
            own = {"MS_NODE_ID": str(rank), "RANK_ID": str(rank), "DEVICE_ID": str(rank)}
            more = ["--start-scheduler"] if rank == 0 else []
            ranks.append(children.start([*arguments, *more], log, log, files, common | own, module))
        try:
            failed = _wait(ranks)
        except BaseException:
            _ask_to_stop(ranks)
            with contextlib.suppress(BaseException):  # a second interruption
                _wait(ranks)  # for as long as a checkpoint takes: whoever waits for us kills us, and then they end
            raise
        if failed is None:
            return 0
        code = ranks[failed].returncode
        if code != STOPPED_EXIT:
            _say_why(failed, code, logs[failed - 1] if failed else None)
        return code if code > 0 else 1


def _meeting_point(count: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "MS_ROLE": "MS_WORKER",
        "MS_WORKER_NUM": str(count),
        "RANK_SIZE": str(count),
        OF_HOST: str(count),
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(port),
        "GLOG_v": os.environ.get("GLOG_v", "3"),  # errors, and no warnings about connections
    }


def _wait(ranks: "list[subprocess.Popen]") -> int | None:
    """Wait until all have ended, and no longer than OTHERS_SECONDS after one has died.  Returns the first that failed.

    A rank that has stopped as asked is none that died: the others do the same.
    """
    failed, deadline = None, float("inf")
    while None in (codes := [each.poll() for each in ranks]):
        died = [rank for rank, code in enumerate(codes) if code]
        if died and failed is None:
            failed = died[0]
            has_stopped = codes[failed] == STOPPED_EXIT
            if not has_stopped:
                deadline = time.monotonic() + OTHERS_SECONDS
                _ask_to_stop(ranks)
        if time.monotonic() > deadline:
            _kill(ranks)
        time.sleep(0.05)
    return failed if failed is not None else next((rank for rank, code in enumerate(codes) if code), None)


def _ask_to_stop(ranks: "list[subprocess.Popen]") -> None:
    for each in ranks:
        if each.poll() is None:
            each.send_signal(signal.SIGTERM)


def _kill(ranks: "list[subprocess.Popen]") -> None:
    for each in ranks:
        if each.poll() is None:
            each.kill()
            each.wait()


def _say_why(rank: int, code: int, log: IO | None) -> None:
    if log is not None:
        log.seek(0)
        lines = log.read().splitlines()[-TAIL_LINES:]
        say("\n  ".join([f"rank {rank} said last:", *lines]), to_stderr=True)
    said = "what it said stands above" if code > 0 else children.reason(code)
    say(f"rank {rank} ended first, and the others with it: exit code {code}; {said}", to_stderr=True)


def start_scheduler() -> None:
    """Start the process by which ranks find each other; it ends with this one, the first rank, however that ends.

    Without it the others end too, within a second.
    """
    own = {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
    children.start(["meet"], subprocess.DEVNULL, subprocess.DEVNULL, variables=own)


def meet() -> None:
    """Be that process.  It takes no notice of requests to stop: ranks need it for the step that they finish."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    import mindspore as ms

    ms.set_device("CPU")
    ms.communication.init()  # ends when the ranks have
