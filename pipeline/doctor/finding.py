"""What the doctor finds: a line for each thing looked at."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "FAILED", "skipped"]
"""note: worth knowing, nothing is wrong.  skipped: could not be looked at, because of something above it."""


@dataclass(frozen=True)
class Finding:
    """what: was looked at.  said: what was found, in a line.  todo: what to do about it."""

    what: str
    verdict: Verdict
    said: str
    todo: str = ""

    @property
    def is_bad(self) -> bool:
        return self.verdict == "FAILED"


def ok(what: str, said: str) -> Finding:
    return Finding(what, "ok", said)


def note(what: str, said: str, todo: str = "") -> Finding:
    return Finding(what, "note", said, todo)


def failed(what: str, said: str, todo: str) -> Finding:
    return Finding(what, "FAILED", said, todo)


def skipped(what: str, said: str) -> Finding:
    return Finding(what, "skipped", said)
