"""Child processes of which several run at a time, each on a device of its own."""

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TypeVar

from pipeline.process import children
from pipeline.process.progress import say

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
"""What CANN shows a process of the NPUs of its host."""

Work = TypeVar("Work")


def numbers_in(text: str) -> list[str]:
    """The numbers in ``0-7`` or ``0,2,3``, each once.  Raises ValueError."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"must be numbers of devices, as 0-7 or 0,2,3, found {text!r}")
        numbers += map(str, range(first, last + 1))
    return list(dict.fromkeys(numbers))


def run(
    chains: Iterable[Sequence[Work]], arguments: Callable[[Work], Sequence[str]], numbers: Sequence[str] = ()
) -> tuple[Work, int] | None:
    """Run ``python -m pipeline ARGUMENTS`` for all work of all chains: that of a chain one after another.

    numbers: of the devices; as many chains run at a time.  Without any, one runs at a time, on what this process sees.
    Returns the first work that failed with its exit code, see `children.run`, and then stops the others; None where
    all is done.
    """
    waiting, free = [list(chain) for chain in chains if chain], list(numbers) or [""]
    running: dict[str, tuple[_Child, list[Work]]] = {}
    with children.interrupted_by_sigterm():
        try:
            while waiting or running:
                while free and waiting:
                    chain, number = waiting.pop(0), free.pop(0)
                    running[number] = _Child(arguments(chain[0]), number, len(numbers) > 1), chain
                for number, (child, chain) in list(running.items()):
                    if (code := child.code()) is None:
                        continue
                    del running[number]
                    if code:
                        return chain[0], code
                    free.append(number)
                    waiting[:0] = [chain[1:]] if chain[1:] else []
                time.sleep(0.05)
        finally:
            children.stop([child.process for child, _ in running.values()])
    return None


class _Child:
    """A child on a device.  are_several: whether others run beside it, so that each line has to say whose it is."""

    def __init__(self, arguments: Sequence[str], number: str, are_several: bool):
        output = subprocess.PIPE if are_several else None
        variables = {VISIBLE: number} if number else {}
        self.process = children.start(arguments, output or children.STDERR, output, variables=variables)
        self._said = say_lines_of(self.process, f"device {number}: ", is_all_error=True) if are_several else []

    def code(self) -> int | None:
        """Its exit code, once it has one and all that it said has been said."""
        code = self.process.poll()
        if code is not None:
            for thread in self._said:
                thread.join()
        return code


def say_lines_of(process: subprocess.Popen, prefix: str, is_all_error: bool = False) -> list[threading.Thread]:
    """Say each line that a process writes to its pipes, with the prefix before it.  Returns what does so.

    is_all_error: whether lines of its standard output go to the standard error too.
    """
    sources = (process.stdout, is_all_error), (process.stderr, True)
    threads = [
        threading.Thread(target=_pass_on, args=(source, prefix, is_error), daemon=True)
        for source, is_error in sources
        if source is not None
    ]
    for thread in threads:
        thread.start()
    return threads


def _pass_on(source: IO[bytes], prefix: str, is_error: bool) -> None:
    for line in source:
        say(f"{prefix}{line.decode(errors='replace').rstrip()}", to_stderr=is_error)
