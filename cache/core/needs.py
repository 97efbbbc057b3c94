"""What an experiment needs from the store: items of some recipes. A run keeps them in needs.json for the collector."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cache.core.address import canonical, item_keys, recipe_id
from cache.core.errors import StoreError
from cache.core.parsing import load_json

NEEDS_NAME = "needs.json"


class Source(NamedTuple):
    """Where an item comes from. name: of the file; key: what an export calls its tensor, the caption or the name."""

    item: str
    name: str
    key: str


@dataclass(frozen=True)
class Need:
    """The items of one recipe that an experiment works with, each once.

    stage: what encodes them. component: the model that it encodes them with. describe: gives the source of each item,
    in their order; it is called only where somebody asks, for most ask for the items of a million photos alone.
    role: what the items are to the experiment, where that is not the recipe's kind: the conditions of a ControlNet
    ("controls") may have the very recipe of the photos.
    """

    stage: str
    component: str
    recipe: dict
    items: Sequence[str]
    describe: Callable[[], Iterable[Source]] = field(repr=False, compare=False)
    role: str = ""

    @classmethod
    def of(cls, stage: str, component: str, recipe: dict, sources: Sequence[Source], role: str = "") -> "Need":
        """A need whose sources are known already."""
        return cls(stage, component, recipe, tuple(source.item for source in sources), lambda: sources, role)

    @property
    def sources(self) -> list[Source]:
        """The source of each item, in the items' order."""
        return list(self.describe())


Needs = dict[str, set[str]]
"""Items by recipe id."""


def needs_text(needs: Iterable[Need]) -> str:
    """The text of needs.json: for each recipe its id, the recipe for people who look, and its items in one string.

    Where an earlier recipe has the same items, that recipe's place, from 0, stands for them: both text encoders have
    the same captions, all variants of photos the same photos.
    """
    rows: list[dict] = []
    places: dict[str, int] = {}
    for place, need in enumerate(needs):
        items = "".join(need.items)
        first = places.setdefault(items, place)
        row = {"stage": need.stage, "id": recipe_id(need.recipe), "recipe": json.loads(canonical(need.recipe))}
        rows.append(row | ({"items": items} if first == place else {"items_of": first}))
    return json.dumps({"needs": rows}, indent=1) + "\n"


class NotedNeed(NamedTuple):
    """A row of needs.json: the stage that makes the items, and their recipe's id."""

    stage: str
    id: str
    items: list[str]


def noted_needs(path: Path) -> list[NotedNeed]:
    """What a needs.json says, row by row.

    Raises OSError where it cannot be read, StoreError where it is damaged: a guess could lose entries.
    """
    try:
        found: list[NotedNeed] = []
        for row in load_json(Path(path).read_bytes())["needs"]:
            items = found[row["items_of"]].items if "items_of" in row else _items_in(row["items"])
            found.append(NotedNeed(str(row.get("stage", "")), str(row["id"]), items))
        return found
    except (ValueError, TypeError, LookupError, AttributeError, StoreError) as error:
        raise StoreError(
            f"{os.fspath(path)}: damaged, so that what it needs is not known; remove or restore it"
        ) from error


def read_needs(path: Path) -> Needs:
    """The items by recipe id in a needs.json.  Raises as `noted_needs` does."""
    found: Needs = {}
    for noted in noted_needs(path):
        found.setdefault(noted.id, set()).update(noted.items)
    return found


def _items_in(text: str) -> list[str]:
    items = [text[start : start + 32] for start in range(0, len(text), 32)]
    item_keys(items)
    return items


def needs_of_runs(folder: Path) -> Needs:
    """What all runs in a folder need; nothing where there is no such folder yet.  Raises as `needs_by_run` does."""
    return union([needs for _, needs in needs_by_run(folder)])


def needs_by_run(folder: Path) -> list[tuple[Path, Needs]]:
    """What each run in a folder needs, with the run's folder.

    Raises StoreError where a run has no needs.json, or a damaged one, and where anything in the folder cannot be looked
    into: what cannot be read is not absent.
    """
    found = []
    for name in _names_in(Path(folder)):
        run = Path(folder, name)
        try:
            names = os.listdir(run)
        except NotADirectoryError:
            continue
        except OSError as error:
            raise _unknown(run, error) from error
        if NEEDS_NAME in names:
            try:
                found.append((run, read_needs(run / NEEDS_NAME)))
            except OSError as error:
                raise _unknown(run / NEEDS_NAME, error) from error
        elif "experiment.json" in names:
            raise StoreError(
                f"{run}: does not say what it needs from the store; run it again, or remove it if it is not needed"
            )
    return found


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        if folder.is_symlink():  # what it leads to is away, perhaps for now
            raise StoreError(f"{folder}: a link to what is not there; bring it back, or remove the link") from None
        return []
    except OSError as error:
        raise _unknown(folder, error) from error


def _unknown(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path}: {error.strerror}, so that what it needs from the store is not known; nothing is collected: make it "
        "readable, or collect as who may read it"
    )


def union(several: Sequence[Needs]) -> Needs:
    """All items that any of them needs."""
    result: Needs = {}
    for needs in several:
        for recipe, items in needs.items():
            result.setdefault(recipe, set()).update(items)
    return result


def as_needs(needs: Iterable[Need]) -> Needs:
    """The items by recipe id."""
    return union([{recipe_id(need.recipe): set(need.items)} for need in needs])
