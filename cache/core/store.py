"""The store: a folder for new entries, and other stores that are read too."""

from pathlib import Path

from cache.core.digests import FileFacts
from cache.core.entries import Entries


class Store:
    """A folder of entries, shared by any number of processes and experiments. Created by the first write.

    others: stores that are read too and never written to, such as a colleague's or a snapshot.
    """

    def __init__(self, path: str | Path, *others: str | Path):
        self.path, self.others = Path(path), tuple(map(Path, others))
        self.facts = FileFacts(self.path / "facts.sqlite")

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folders of all stores; the first is the one that is written to."""
        return (self.path, *self.others)

    def entries(self, recipe: dict) -> Entries:
        """All entries of one recipe.

        recipe: everything that decides the bytes, as JSON-able values; it must have ``kind``, ``dtype`` (float32,
        float16 or bfloat16) and ``shape`` (of one item). Raises StoreError where one of these cannot be used.
        """
        return Entries(self.paths, recipe)
