"""How two recipes, two experiments or two folders of entries differ."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from cache.core.address import DIGEST_BYTES, recipe_id
from cache.core.entries import Entries
from cache.core.needs import Need
from cache.core.text import printable
from cache.tools.listing import rows

DIGEST = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
SHORT = 8  # digits of a digest that tell two of them apart at a glance
ENCODER = "encoder."
NOTHING = "nothing"  # shown where a recipe lacks a field


@dataclass(frozen=True)
class Difference:
    """A field in which two recipes differ; of a nested table with a dot, as in encoder.weights.

    old, new: None where that recipe has no such field.  text: such as ``vae weights differ: 3f2a91c0 -> 91c07be2``.
    """

    field: str
    old: object
    new: object
    text: str


@dataclass(frozen=True)
class Side:
    """What an experiment needs of one recipe, or what a folder holds of it. names: item -> name of its source."""

    recipe: dict
    names: dict[str, str]
    component: str = ""


@dataclass(frozen=True)
class Pair:
    """Two recipes of a kind, and their items, name by item. ids: of both recipes; None where a side has none."""

    kind: str
    ids: tuple[str | None, str | None]
    differences: list[Difference]
    only_in_a: dict[str, str] = field(default_factory=dict)
    only_in_b: dict[str, str] = field(default_factory=dict)
    in_both: dict[str, str] = field(default_factory=dict)


def needed(needs: Iterable[Need]) -> list[Side]:
    """The needs of an experiment, as sides of a comparison."""
    return [Side(need.recipe, {source.item: source.name for source in need.sources}, need.component) for need in needs]


def held_in(entries: Entries) -> list[Side]:
    """The entries of a folder that can be read, as the side of a comparison."""
    return [Side(entries.recipe, {row.item: row.name for row in rows(entries) if not row.state})]


def diff(a: Sequence[Side], b: Sequence[Side]) -> list[Pair]:
    """Compare two sides kind by kind. Where a side has several recipes of a kind, the most similar ones are paired."""
    kinds = dict.fromkeys(side.recipe["kind"] for side in [*a, *b])
    return [_pair(kind, *pair) for kind in kinds for pair in _matched(*(_of_kind(side, kind) for side in (a, b)))]


def _of_kind(sides: Iterable[Side], kind: str) -> list[Side]:
    return [side for side in sides if side.recipe["kind"] == kind]


def _matched(a: list[Side], b: list[Side]) -> list[tuple[Side | None, Side | None]]:
    """Pairs of the most similar recipes; what is left of a side gets a pair with None."""
    order = sorted((len(differences(x.recipe, y.recipe)), i, j) for i, x in enumerate(a) for j, y in enumerate(b))
    partner_of_a: dict[int, int] = {}
    partner_of_b: dict[int, int] = {}
    for _, i, j in order:
        if i not in partner_of_a and j not in partner_of_b:
            partner_of_a[i], partner_of_b[j] = j, i
    pairs = [(side, b[partner_of_a[i]] if i in partner_of_a else None) for i, side in enumerate(a)]
    return [*pairs, *((None, side) for j, side in enumerate(b) if j not in partner_of_b)]


def _pair(kind: str, a: Side | None, b: Side | None) -> Pair:
    names_a, names_b = a.names if a else {}, b.names if b else {}
    return Pair(
        kind,
        (recipe_id(a.recipe) if a else None, recipe_id(b.recipe) if b else None),
        differences(a.recipe, b.recipe, a.component or b.component) if a and b else [],
        only_in_a={item: name for item, name in names_a.items() if item not in names_b},
        only_in_b={item: name for item, name in names_b.items() if item not in names_a},
        in_both={item: name for item, name in names_a.items() if item in names_b},
    )


def differences(old: dict, new: dict, component: str = "") -> list[Difference]:
    """The fields in which two recipes differ, sorted by name. component: what the texts call the encoder."""
    a, b = dict(flat(old)), dict(flat(new))
    fields = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    return [Difference(key, a.get(key), b.get(key), _text(key, a, b, component)) for key in fields]


def flat(table: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a recipe and their values; a nested table's fields have its name and a dot in front."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(key: str, old: dict, new: dict, component: str) -> str:
    name = f"{component or 'encoder'} {key.removeprefix(ENCODER)}" if key.startswith(ENCODER) else key
    verb = "differ" if name.endswith("s") else "differs"
    return f"{name} {verb}: {_shown(old.get(key))} -> {_shown(new.get(key))}"


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value[:SHORT] if DIGEST.fullmatch(value) else printable(value)
    return NOTHING if value is None else json.dumps(value)
