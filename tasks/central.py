"""A central scheduler: the user's own luigid, or one that is started for a run and ends with it."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.process.children import environment
from pipeline.process.stopping import end_with_parent
from tasks import manners, scheduler

DEFAULTS = {
    ("scheduler", "retry_delay"): 5,
    ("scheduler", "retry_count"): 5,  # a worker's death counts as a failure of its task
    ("scheduler", "disable_persist"): 5,  # what has failed so often may be tried again by the next command
    ("scheduler", "prune_on_get_work"): True,  # else a dead worker is noticed within a minute
    ("scheduler", "worker_disconnect_delay"): 10,
}
"""Of a scheduler that is started here; examples/luigi/luigid.cfg has the same."""

A_DAY = 86400
LOCALHOST = "127.0.0.1"
START_SECONDS = 60
SILENT_SECONDS = 60
"""How long a scheduler may be gone, while it is started again, before the run ends."""


@dataclass
class Scheduler:
    """Where the scheduler is, and how to start it where it is our own.  Ask for it between the workers' passes too."""

    url: str
    command: list[str] | None = None
    process: subprocess.Popen | None = None

    def keep_up(self) -> None:
        """Start our own scheduler where it has ended; nobody else will."""
        if self.command and (self.process is None or self.process.poll() is not None):
            self.process = subprocess.Popen(
                self.command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0
            )
            self.wait(START_SECONDS)

    def wait(self, seconds: float) -> None:
        """Wait until the scheduler answers.  Ends the process with one line where it does not."""
        deadline = time.monotonic() + seconds
        while reason := scheduler.silence(self.url):
            if time.monotonic() > deadline:
                advice = "what was done is kept: start luigid there, and the same command goes on from there"
                sys.exit(f"error: {self.url}: no Luigi scheduler answers there ({reason}); {advice}")
            time.sleep(0.2)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()  # it has nothing to keep
            self.process.wait()


@contextmanager
def found(url: str, num_devices: int) -> Iterator[Scheduler]:
    """The scheduler at ``url``, or of Luigi's configuration, which has to answer; or one for this block alone."""
    if url := url or scheduler.configured():
        named = Scheduler(url)
        named.wait(0)
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="luigid-") as folder:
        own = _own(num_devices, Path(folder) / "state")
        try:
            own.keep_up()
            yield own
        finally:
            own.end()


def _own(num_devices: int, state: Path) -> Scheduler:
    port = _free_port()
    _ask_no_proxy()
    arguments = map(str, (os.getpid(), port, num_devices, state))
    return Scheduler(f"http://{LOCALHOST}:{port}/", [sys.executable, "-P", "-m", "tasks.central", *arguments])


def _free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind((LOCALHOST, 0))
        return free.getsockname()[1]


def _ask_no_proxy() -> None:
    """Reach this host directly, here and in the workers, where the environment names a proxy."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [known, LOCALHOST]))


def serve(parent: int, port: int, num_devices: int, state: str) -> None:
    """Be the scheduler, until the process that started this one ends."""
    import luigi.server

    end_with_parent(parent)
    for (section, option), value in DEFAULTS.items():
        manners.set_default(section, option, value)
    manners.set_always("scheduler", "disable_persist", A_DAY)  # no other command comes here
    manners.set_always("scheduler", "state_path", state)
    manners.set_always("resources", "device", num_devices)
    luigi.server.run(api_port=port, address=LOCALHOST)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
