"""What ``npu-smi info`` says: health and memory of the NPUs, and who uses them.

The formats are those of outputs that users have published, with one and with two chips on a card.
"""

import os
import re
import subprocess
import time
from dataclasses import dataclass

from pipeline.process.progress import say
from pipeline.process.several import VISIBLE

SECONDS = 20
"""The longest that the tool may take to answer."""


@dataclass(frozen=True)
class Chip:
    """A line of ``npu-smi info``, memory in MB."""

    name: str
    health: str
    used_mb: int
    total_mb: int


@dataclass(frozen=True)
class User:
    """A process on an NPU, and the memory that it has there, in MB."""

    pid: int
    name: str
    used_mb: int

    def __str__(self):
        return f"process {self.pid} ({self.name}, {self.used_mb / 1000:.0f} GB)"


FIRST_LINE = re.compile(r"^\|\s*\d+\s+(\S+)\s*\|\s*(\w+)\s*\|")
SECOND_LINE = re.compile(r"^\|[\s\d]+\|\s*\S+:\S+\s*\|.*?(\d+)\s*/\s*(\d+)\s*\|\s*$")
PROCESS = re.compile(r"^\|\s*(\d+)\s+(\d+)\s*\|\s*(\d+)\s*\|\s*(\S+)\s*\|\s*(\d+)\s*\|\s*$")


def read_chips(text: str) -> list[Chip]:
    """The chips of ``npu-smi info``, which says two lines of each, in their order."""
    found, first = [], None
    for line in text.splitlines():
        if match := SECOND_LINE.match(line):
            if first:
                found.append(Chip(first[1], first[2], int(match[1]), int(match[2])))
            first = None
        else:
            first = FIRST_LINE.match(line) or first
    return found


def read_processes(text: str) -> dict[int, list[User]]:
    """Who uses each NPU, as ``npu-smi info`` lists them behind the chips."""
    users: dict[int, list[User]] = {}
    for match in filter(None, map(PROCESS.match, text.splitlines())):
        npu, _, pid, name, megabytes = match.groups()
        users.setdefault(int(npu), []).append(User(int(pid), name, int(megabytes)))
    return users


def first_visible() -> int:
    """The NPU that MindSpore takes in this process: the first of those that are visible."""
    first = os.environ.get(VISIBLE, "").split(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def asked() -> str:
    """What the tool says; "" where there is none, or it does not answer."""
    try:
        return subprocess.run(["npu-smi", "info"], capture_output=True, text=True, timeout=SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def wait_until_free(npu: int, seconds: float) -> None:
    """Wait until nobody else uses an NPU: a stage that was killed may take a while to leave it.

    After ``seconds`` it is taken all the same: somebody may mean to share it.
    """
    ends, said = time.monotonic() + seconds, False
    while users := [user for user in read_processes(asked()).get(npu, []) if user.pid != os.getpid()]:
        if not said:
            say(f"NPU {npu} is used by {users[0]}: waiting {seconds:.0f} s at most for it", to_stderr=True)
            said = True
        if time.monotonic() > ends:
            say(f"NPU {npu} is still used by {users[0]}; going on beside it", to_stderr=True)
            return
        time.sleep(min(2, seconds))
