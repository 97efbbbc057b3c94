"""In what two recipes, two experiments or two folders of entries differ."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from cache.core.address import DIGEST_BYTES, recipe_id
from cache.core.entries import Entries
from cache.core.needs import Need
from cache.tools.listing import rows
from cache.tools.tables import printable

DIGEST = re.compile(f"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
SHORT = 8  # digits of a digest that tell two of them apart at a glance
ENCODER = "encoder."
NOTHING = "nothing"  # a field that a recipe has not


@dataclass(frozen=True)
class Difference:
    """A field in which two recipes differ, of nested tables with dots: encoder.weights. None: it has no such field.

    text: such as ``vae weights differ: 3f2a91c0 -> 91c07be2``.
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
    """Two recipes of a kind, the ids of both (None where that side has none), and the items of either or both."""

    kind: str
    ids: tuple[str | None, str | None]
    differences: list[Difference]
    only_in_a: dict[str, str] = field(default_factory=dict)
    only_in_b: dict[str, str] = field(default_factory=dict)
    in_both: dict[str, str] = field(default_factory=dict)


def needed(needs: Iterable[Need]) -> list[Side]:
    """What an experiment needs, to be compared."""
    return [Side(need.recipe, {source.item: source.name for source in need.sources}, need.component) for need in needs]


def held_in(entries: Entries) -> list[Side]:
    """What a folder holds and can be read, to be compared."""
    return [Side(entries.recipe, {row.item: row.name for row in rows(entries) if not row.state})]


def diff(a: Sequence[Side], b: Sequence[Side]) -> list[Pair]:
    """Both sides by kind. Where a side has several recipes of a kind, each is set against the one most like it."""
    kinds = dict.fromkeys(side.recipe["kind"] for side in [*a, *b])
    return [_pair(kind, *pair) for kind in kinds for pair in _matched(*(_of_kind(side, kind) for side in (a, b)))]


def _of_kind(sides, kind):
    return [side for side in sides if side.recipe["kind"] == kind]


def _matched(a, b):
    order = sorted((len(differences(x.recipe, y.recipe)), i, j) for i, x in enumerate(a) for j, y in enumerate(b))
    partner_of_a, partner_of_b = {}, {}
    for _, i, j in order:
        if i not in partner_of_a and j not in partner_of_b:
            partner_of_a[i], partner_of_b[j] = j, i
    pairs = [(side, b[partner_of_a[i]] if i in partner_of_a else None) for i, side in enumerate(a)]
    return pairs + [(None, side) for j, side in enumerate(b) if j not in partner_of_b]


def _pair(kind, a, b):
    names_a, names_b = (side.names if side else {} for side in (a, b))
    return Pair(
        kind,
        tuple(recipe_id(side.recipe) if side else None for side in (a, b)),
        differences(a.recipe, b.recipe, a.component or b.component) if a and b else [],
        only_in_a={item: name for item, name in names_a.items() if item not in names_b},
        only_in_b={item: name for item, name in names_b.items() if item not in names_a},
        in_both={item: name for item, name in names_a.items() if item in names_b},
    )


def differences(old: dict, new: dict, component: str = "") -> list[Difference]:
    """The fields in which two recipes differ, nested tables taken apart, by name. component: the encoder's name."""
    old, new = dict(flat(old)), dict(flat(new))
    fields = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [Difference(key, old.get(key), new.get(key), _text(key, old, new, component)) for key in fields]


def flat(table: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a recipe; those of nested tables with dots."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(key, old, new, component):
    name = f"{component or 'encoder'} {key.removeprefix(ENCODER)}" if key.startswith(ENCODER) else key
    verb = "differ" if name.endswith("s") else "differs"
    return f"{name} {verb}: {_shown(old.get(key))} -> {_shown(new.get(key))}"


def _shown(value):
    if isinstance(value, str):
        return value[:SHORT] if DIGEST.fullmatch(value) else printable(value)
    return NOTHING if value is None else json.dumps(value)
