"""File operations that fail, one at a time: each call to the kernel is met, and one of them gets an error.

The kernel asks this process before each call of the job's process (seccomp's user notification), so that the calls of
SQLite, safetensors and MindSpore are met as those of Python are.  Linux on x86-64 alone.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SHORT = "short"
"""A write that writes half of what it was given."""

FULL = "full"
"""A disk that has room for half of a write, and for nothing after it."""

NEEDS_ROOM = {"write", "create"}
FAULTS = {
    "create": (errno.ENOSPC, errno.EIO, errno.EACCES),  # of a file or folder; also rename and link
    "write": (errno.ENOSPC, errno.EIO, SHORT, FULL),
    "sync": (errno.ENOSPC, errno.EIO),
    "truncate": (errno.EIO,),
    "remove": (errno.EIO, errno.EACCES),
    "open": (errno.EIO, errno.EACCES),
    "read": (errno.EIO,),
    "look": (errno.EIO, errno.EACCES),  # stat
    "list": (errno.EIO,),
    "map": (errno.ENOMEM,),
}
"""What each kind of operation may meet."""

AT_PATH = {  # number of the call on x86-64: name, kind, arguments that hold the folder's descriptor and the path
    2: ("open", "open", None, 0), 4: ("stat", "look", None, 0), 6: ("lstat", "look", None, 0),
    21: ("access", "look", None, 0), 76: ("truncate", "truncate", None, 0), 82: ("rename", "create", None, 0),
    83: ("mkdir", "create", None, 0), 84: ("rmdir", "remove", None, 0), 85: ("creat", "create", None, 0),
    86: ("link", "create", None, 0), 87: ("unlink", "remove", None, 0), 257: ("openat", "open", 0, 1),
    258: ("mkdirat", "create", 0, 1), 262: ("newfstatat", "look", 0, 1), 263: ("unlinkat", "remove", 0, 1),
    264: ("renameat", "create", 0, 1), 265: ("linkat", "create", 0, 1), 269: ("faccessat", "look", 0, 1),
    316: ("renameat2", "create", 0, 1), 332: ("statx", "look", 0, 1), 439: ("faccessat2", "look", 0, 1),
}  # fmt: skip
AT_FILE = {  # number: name, kind, argument that holds the descriptor
    0: ("read", "read", 0), 1: ("write", "write", 0), 5: ("fstat", "look", 0), 9: ("mmap", "map", 4),
    17: ("pread64", "read", 0), 18: ("pwrite64", "write", 0), 19: ("readv", "read", 0), 20: ("writev", "write", 0),
    40: ("sendfile", "write", 0), 74: ("fsync", "sync", 0), 75: ("fdatasync", "sync", 0),
    77: ("ftruncate", "truncate", 0), 217: ("getdents64", "list", 0), 285: ("fallocate", "write", 0),
    295: ("preadv", "read", 0), 296: ("pwritev", "write", 0), 326: ("copy_file_range", "write", 2),
    327: ("preadv2", "read", 0), 328: ("pwritev2", "write", 0),
}  # fmt: skip
OPEN_FLAGS = {2: 1, 257: 2}
VECTORS, PLAIN, AT_OFFSET = {20, 296, 328}, {1, 18}, {18, 296, 328}
MMAP, AT_CWD, CONTINUE, NO_FILE = 9, -100, 1, 0xFFFFFFFF
RECEIVE, SEND, SET_FLAGS, SAME_PROCESSOR = 0xC0502100, 0xC0182101, 0x40082104, 1
NOTICE, ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
SECCOMP, PIDFD_GETFD, NEW_LISTENER, NO_NEW_PRIVS, DIE_WITH_PARENT = 317, 438, 8, 38, 1
ALLOW, ASK = 0x7FFF0000, 0x7FC00000


# --- in the process whose calls are met ---------------------------------------------------------------------------


def listen_to_me() -> int:
    """Have the kernel ask before each of this process's calls.  Returns the descriptor to answer at."""
    rows = [(0x20, 0, 0, 0)]  # load the call's number
    for number in sorted({*AT_PATH, *AT_FILE} - {MMAP}):
        rows += [(0x15, 0, 1, number), (0x06, 0, 0, ASK)]
    rows += [(0x15, 0, 3, MMAP), (0x20, 0, 0, 16 + 8 * 4), (0x15, 1, 0, NO_FILE), (0x06, 0, 0, ASK)]
    rows += [(0x06, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = libc.syscall(SECCOMP, 1, NEW_LISTENER, program)
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with contextlib.suppress(OSError):  # an older kernel
        fcntl.ioctl(listener, SET_FLAGS, SAME_PROCESSOR)
    return listener


def serve(connection: socket.socket, setup: str) -> None:
    """Run jobs as they are asked for.  setup: code that is run first, and may define functions for the jobs."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    names: dict = {}
    is_forked = setup.startswith("# fork")
    if not is_forked:
        socket.send_fds(connection, [b"x"], [listen_to_me()])
    exec(setup, names)
    connection.send(b"r")
    while request := connection.recv(1 << 16):
        job = json.loads(request)
        if not is_forked:
            connection.send(b"%d" % _run(job, names))
            continue
        child = os.fork()
        if child == 0:
            socket.send_fds(connection, [b"%d" % os.getpid()], [listen_to_me()])
            os._exit(_run(job, names))
        connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _run(job: dict, names: dict) -> int:
    kept = [os.dup(number) for number in (1, 2)]
    with open(job["out"], "w") as out, open(job["err"], "w") as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
    try:
        return eval(job["code"], names) or 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for number, file in zip((1, 2), kept):
            os.dup2(file, number)
            os.close(file)


# --- in the test's process ----------------------------------------------------------------------------------------


@dataclass
class Done:
    """How a job ended.  met: its file operations below the root, as (call, kind, path).  fault: what it was given."""

    status: int = 0
    out: str = ""
    err: str = ""
    met: "list[Operation]" = field(default_factory=list)
    fault: str = ""


class Jobs:
    """A process that runs jobs whose calls are met; use it in a ``with`` block.

    setup: code, run once.  If it begins with ``# fork``, each job has a process of its own, which a process that
    computes with MindSpore cannot make.
    """

    def __init__(self, setup: str, limit_seconds: float = 60):
        self.setup, self.limit_seconds = setup, limit_seconds

    def __enter__(self) -> "Jobs":
        self.connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, str(other.fileno()), self.setup]
        self.process = subprocess.Popen(command, pass_fds=[other.fileno()], cwd=Path(__file__).parent.parent)
        other.close()
        self.is_forked, self.listener = self.setup.startswith("# fork"), -1
        if not self.is_forked:
            _, (self.listener,), _, _ = socket.recv_fds(self.connection, 1, 1)
        self._watch(Path("/nowhere"), self.process.pid, None, None)
        return self

    def __exit__(self, *error) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()
        if self.listener >= 0:
            os.close(self.listener)

    def run(self, code: str, root: Path, fault_at: int | None = None, fault: int | str | None = None) -> Done:
        """Run a job, an expression; the operation below ``root`` of that number, from 0, meets the fault."""
        out, err = root.with_name(f"{root.name}.out"), root.with_name(f"{root.name}.err")
        self.connection.send(json.dumps({"code": code, "out": str(out), "err": str(err)}).encode())
        pid = self.process.pid
        if self.is_forked:
            name, (self.listener,), _, _ = socket.recv_fds(self.connection, 16, 1)
            pid = int(name)
        try:
            done, answer = self._watch(root, pid, fault_at, fault)
        finally:
            if self.is_forked:
                os.close(self.listener)
                self.listener = -1
        done.status, done.out, done.err = int(answer), out.read_text(), err.read_text()
        return done

    def _watch(self, root: Path, pid: int, fault_at: int | None, fault: int | str | None) -> tuple[Done, bytes]:
        """Answer the kernel until the job says that it is done."""
        poll, done, end = select.poll(), Done(), time.monotonic() + self.limit_seconds
        poll.register(self.connection, select.POLLIN)
        if self.listener >= 0:
            poll.register(self.listener, select.POLLIN)
        is_full = False
        while True:
            ready = dict(poll.poll(1000))
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"{done.fault or 'no fault'}: still running after {self.limit_seconds} s")
            if self.listener >= 0 and ready.get(self.listener, 0) & select.POLLIN:
                call = _next_call(self.listener)
                operation = call and call.operation(root)
                if operation:
                    kind, number = operation[1], len(done.met)
                    done.met.append(operation)
                    if number == fault_at:
                        done.fault, is_full = f"{fault} at {operation}", fault == FULL
                        call.answer(fault, pid)
                        continue
                    if is_full and kind in NEEDS_ROOM:
                        call.answer(errno.ENOSPC, pid)
                        continue
                if call:
                    call.go_on()
                continue
            if self.listener >= 0 and ready.get(self.listener, 0):
                poll.unregister(self.listener)  # its last process has ended
            if self.connection.fileno() in ready:
                answer = self.connection.recv(64)
                assert answer, "the process that runs the jobs is gone"
                return done, answer


@dataclass(frozen=True)
class Call:
    """A call to the kernel that waits for an answer."""

    listener: int
    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]

    def operation(self, root: Path) -> tuple[str, str, str] | None:
        """(call, kind, path) where it is on a file below ``root``."""
        try:
            name, kind, path = self._what()
        except OSError:  # the process has been killed, or has no such file
            return None
        if not path.startswith(f"{root}/"):
            return None
        return name, kind, path[len(str(root)) + 1 :]

    def _what(self) -> tuple[str, str, str]:
        if self.number in AT_FILE:
            name, kind, place = AT_FILE[self.number]
            return name, kind, self._link(f"fd/{_signed(self.arguments[place])}")
        name, kind, folder, place = AT_PATH[self.number]
        path = self._text(self.arguments[place])
        if self.number in OPEN_FLAGS:
            flags = self.arguments[OPEN_FLAGS[self.number]]
            kind = "create" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else "open"
        if not path.startswith("/"):
            at = AT_CWD if folder is None else _signed(self.arguments[folder])
            parent = self._link("cwd" if at == AT_CWD else f"fd/{at}")
            path = f"{parent}/{path}" if path else parent
        return name, kind, os.path.normpath(path)

    def _link(self, name: str) -> str:
        return os.readlink(f"/proc/{self.thread}/{name}")

    def _text(self, address: int) -> str:
        """Read a path, not past the end of its page where the next may not be there."""
        data = b""
        while b"\0" not in data and len(data) < 4096:
            start = address + len(data)
            data += self._memory(start, 4096 - start % 4096)
        return os.fsdecode(data.partition(b"\0")[0])

    def _memory(self, address: int, size: int) -> bytes:
        file = os.open(f"/proc/{self.thread}/mem", os.O_RDONLY)
        try:
            return os.pread(file, size, address)
        finally:
            os.close(file)

    def answer(self, fault: int | str | None, pid: int) -> None:
        """Give the call an error, or have it write a half."""
        if fault in (SHORT, FULL):
            written = self._write_a_half(pid)
            self._send(written, 0 if written else -errno.ENOSPC, 0)
        else:
            assert isinstance(fault, int)
            self._send(0, -fault, 0)

    def go_on(self) -> None:
        self._send(0, 0, CONTINUE)

    def _send(self, value: int, error: int, flags: int) -> None:
        try:
            fcntl.ioctl(self.listener, SEND, ANSWER.pack(self.id, value, error, flags))
        except FileNotFoundError:  # it was killed meanwhile
            pass

    def _write_a_half(self, pid: int) -> int:
        """Write half of the call's bytes in its place.  Returns how many; 0 where it is no plain write."""
        data = self._data()
        data = data[: (len(data) + 1) // 2] if len(data) > 1 else b""
        if not data:
            return 0
        process = os.pidfd_open(pid)
        file = ctypes.CDLL(None).syscall(PIDFD_GETFD, process, self.arguments[0], 0)
        try:
            if self.number in AT_OFFSET:
                return os.pwrite(file, data, self.arguments[3])
            return os.write(file, data)
        finally:
            os.close(file)
            os.close(process)

    def _data(self) -> bytes:
        if self.number in PLAIN:
            return self._memory(self.arguments[1], self.arguments[2])
        if self.number in VECTORS:
            table = self._memory(self.arguments[1], 16 * self.arguments[2])
            return b"".join(self._memory(*part) for part in struct.iter_unpack("=QQ", table) if part[1])
        return b""


def _next_call(listener: int) -> Call | None:
    notice = bytearray(NOTICE.size)
    try:
        fcntl.ioctl(listener, RECEIVE, notice, True)
    except FileNotFoundError:  # whoever called was killed meanwhile
        return None
    id, thread, _, number, _, _, *arguments = NOTICE.unpack(notice)
    return Call(listener, id, thread, number, tuple(arguments))


def _signed(number: int) -> int:
    return ctypes.c_int(number & 0xFFFFFFFF).value


# --- each operation of a job in turn -------------------------------------------------------------------------------


Operation = tuple[str, str, str]
"""Call, kind and path below the root."""

Fault = tuple[int, int | str, Operation]
"""The number of an operation of the job, what it is to meet, and what it is."""

NUMBERS = re.compile(r"[0-9a-f]{8,}(-[0-9a-f]{8})?|\d{4,}")


def every(faults: list[Fault]) -> list[Fault]:
    return faults


def of_each_shape(faults: list[Fault]) -> list[Fault]:
    """The faults of the last operation of each shape: with equal call and path, but for numbers and IDs."""
    last = {(call, NUMBERS.sub("", path)): place for place, _, (call, _, path) in faults}
    return [each for each in faults if each[0] in last.values()]


def a_few(faults: list[Fault]) -> list[Fault]:
    return of_each_shape(faults)[::9]


@dataclass
class Counts:
    """met: operations of the job without a fault.  given: faults that jobs met, of which ``ended`` ended theirs."""

    met: int = 0
    given: int = 0
    ended: int = 0
    failures: list[str] = field(default_factory=list)


def each_fault(
    jobs: Jobs,
    code: Callable[[Path], str],
    start: Path,
    folder: Path,
    check: Callable[[Path, Done], None],
    choose: "Callable[[list[Fault]], list[Fault]]",
) -> Counts:
    """Run a job again and again, each time from a copy of ``start``, until every operation has met all of its faults.

    code: the job in a folder.  check: looks at what is left in the folder, and raises AssertionError; it is called for
    the job without a fault too.  choose: which faults of all are tried.
    """
    counts = Counts()
    plain = _run_and_check(jobs, code, start, folder / "plain", check, counts)
    counts.met = len(plain.met)
    faults = [(place, fault, each) for place, each in enumerate(plain.met) for fault in FAULTS[each[1]]]
    for number, (place, fault, _) in enumerate(choose(faults)):
        done = _run_and_check(jobs, code, start, folder / str(number), check, counts, place, fault)
        counts.given += bool(done.fault)
        counts.ended += bool(done.fault and done.status)
    return counts


def _run_and_check(jobs, code, start, root, check, counts, *fault) -> Done:
    shutil.copytree(start, root, symlinks=True)
    done = jobs.run(code(root), root, *fault)
    try:
        check(root, done)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)
        line = next(each for each in reversed(where) if "test_" in each.filename)
        counts.failures.append(f"{done.fault}: {line.line}: {str(error)[-700:]}")
    shutil.rmtree(root)
    return done


def reason_why_not() -> str:
    """Why calls cannot be met here; empty where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "knows the calls of Linux on x86-64 alone"
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    return child.stderr.strip().rpartition("\n")[2]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        listen_to_me()
        os._exit(0)
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
