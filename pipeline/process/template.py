"""A process that has imported what stages use, and waits: a stage's process is a fork of it, and there at once.

To import MindSpore and mindone takes longer than what a stage does with a small model, and every stage is a process of
its own.  The template computes nothing and touches no device, as a fork could not go on with either: before that,
MindSpore has no threads.  It is for CPU; what an import starts on a machine with NPUs, nobody has looked at.

Lives are tied as those of other children: a stage ends with the template, and the template with whoever started it.
"""

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence

from pipeline.process import children

COMMAND = "template"
READY = b"ready"
OUTPUT = 1, 2
MOST_BYTES, MOST_FILES = 1 << 20, 16
PR_SET_NAME = 15
KILLED_WITH_TEMPLATE = -signal.SIGKILL
FIRST_FREE = 200
"""A descriptor from which on nothing is open."""


class Template:
    """A template process, as seen by the one that started it."""

    def __init__(self):
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = children.start([COMMAND, str(other.fileno())], files=[other.fileno()])
        self._is_ready = False
        self._last: Fork | None = None

    def start(self, arguments: Sequence[str], files: Sequence[int] = ()) -> "Fork | None":
        """Start ``python -m pipeline ARGUMENTS`` once all is imported, as `children.start` does: with this process's
        environment and output.

        Returns None where the template has ended, as when nothing can be imported, or code has changed since, and while
        its last fork lives; a process of its own is right then, and says what is wrong.
        """
        if self._last and self._last.poll() is None:
            return None
        shared = [*OUTPUT, *files]
        request = {"arguments": list(arguments), "files": shared, "environment": children.environment()}
        try:
            if not self._is_ready:
                self._is_ready = self._socket.recv(len(READY)) == READY
            if not self._is_ready:
                return None
            socket.send_fds(self._socket, [json.dumps(request).encode()], shared)
            pid = self._socket.recv(8)
        except OSError:
            return None
        except BaseException:  # interrupted: a fork that nobody knows of ends with the template
            self._process.kill()
            raise
        self._last = Fork(struct.unpack("q", pid)[0], self._socket) if pid else None
        return self._last

    def end(self) -> None:
        """Let the template end; it has no stage then."""
        self._socket.close()
        self._process.wait()


class Fork:
    """A stage's process, to be asked as a `subprocess.Popen`."""

    def __init__(self, pid: int, answers: socket.socket):
        self.pid, self._answers = pid, answers
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a stage", timeout or 0)
            code = self._answers.recv(8)
            self.returncode = struct.unpack("q", code)[0] if code else KILLED_WITH_TEMPLATE
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(place: int, load: Callable[[], None], run: Callable[[list[str]], int]) -> int:
    """Be a template.  place: the descriptor of the socket.  load: imports.  run: does what a stage's process does.

    Returns in each fork, what ``run`` does; the template itself ends here.
    """
    try:
        load()
    except Exception:  # a stage that starts by itself says it
        os._exit(1)
    gc.freeze()  # a fork shares pages that nobody writes to
    imported = _imported()
    template = os.getpid()
    with socket.socket(fileno=place) as requests:
        request, files = _asked(requests, imported)
    ctypes.CDLL(None).prctl(PR_SET_NAME, " ".join(request["arguments"][:2]).encode())  # for ps and top
    os.setpgid(0, 0)  # Ctrl-C reaches whoever started the template, which passes it on
    _take_files(files, request["files"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return run([*request["arguments"], "--parent", str(template)])


def _imported() -> dict[str, int]:
    """The files of all modules, and when they were changed: to compile, MindSpore reads them again."""
    paths = {path for module in list(sys.modules.values()) if (path := getattr(module, "__file__", None))}
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found[path] = os.stat(path).st_mtime_ns
    return found


def _asked(requests: socket.socket, imported: dict[str, int]) -> tuple[dict, list[int]]:
    """Returns in each fork, with what it was asked for.

    The template ends once nobody is there to ask, or where a file that it has imported is another one by now.
    """
    try:
        requests.send(READY)
        while True:
            data, files, _, _ = socket.recv_fds(requests, MOST_BYTES, MOST_FILES)
            if not data or _imported() != imported:
                os._exit(0)  # nothing but memory is left
            pid = os.fork()
            if pid == 0:
                return json.loads(data), files
            for file in files:
                os.close(file)
            requests.send(struct.pack("q", pid))
            _, status = os.waitpid(pid, 0)
            requests.send(struct.pack("q", os.waitstatus_to_exitcode(status)))
    except OSError:  # whoever asked has ended
        os._exit(0)


def _take_files(files: Sequence[int], wanted: Sequence[int]) -> None:
    """Give descriptors the numbers that they have in the process that sent them."""
    free = [fcntl.fcntl(file, fcntl.F_DUPFD, FIRST_FREE) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(free, wanted):
        os.dup2(file, number)
        os.close(file)
