"""Shards: encoding divided among processes, by item.  Imports no MindSpore."""

import re
from dataclasses import dataclass
from typing import Self

from pipeline.errors import UserError


@dataclass(frozen=True)
class Shard:
    """The items whose digest leaves ``number`` when it is divided by ``count``; numbers begin at 0."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """``I/N``.  Raises UserError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"must be I/N, as 0/4 is the first of four and 3/4 the last, found {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def all_of(cls, count: int) -> list[Self]:
        return [cls(number, count) for number in range(count)]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def __contains__(self, item: str) -> bool:
        return self.count == 1 or int(item, 16) % self.count == self.number

    def words(self, name: str) -> str:
        """What is divided, by name, and which part of it, for people."""
        return name if self.count == 1 else f"{name} shard {self}"

    def file_name(self, stem: str) -> str:
        return stem if self.count == 1 else f"{stem}.{self.number}-of-{self.count}"


WHOLE = Shard()
"""What is not divided."""
