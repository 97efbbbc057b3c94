"""The index of many segments against a plain dict."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from cache import StoreError
from cache.core.index import Index


def segment_of(items):
    return SimpleNamespace(keys=bytes.fromhex("".join(items)), num_rows=len(items), items=items)


class Plain:
    """What an index should say: the places of each item, best first, in a dict."""

    def __init__(self, segments, damaged):
        self.segments, self.places = segments, {}
        for place, segment in enumerate(segments):
            for row, item in enumerate(segment.items):
                if row not in damaged.get(place, ()):
                    self.places.setdefault(item, []).append((segment, row))

    def best(self, item):
        return self.places.get(item, [(None, 0)])[0]

    def rows_by_segment(self, items):
        best = [self.places[item][0] for item in items if item in self.places]
        return [sorted({row for found, row in best if found is segment}) for segment in self.segments]


def assert_agree(segments, damaged, items):
    index, plain = Index(segments, damaged), Plain(segments, damaged)
    assert len(index) == sum(map(len, plain.places.values()))
    for _ in range(2):  # again, of what it has kept
        for start in range(0, len(items), 7):
            assert index.best(items[start : start + 7]) == [plain.best(item) for item in items[start : start + 7]]
        assert index.best(items) == [plain.best(item) for item in items]
    assert [index.all(item) for item in items] == [plain.places.get(item, []) for item in items]
    assert index.holds(items).tolist() == [item in plain.places for item in items]
    assert [rows.tolist() for rows in index.rows_by_segment(items)] == plain.rows_by_segment(items)


def random_items(chance, number):
    """Items of which many share their first 8 bytes with others, or their last, or lie at either end of all."""
    halves = ["00" * 8, "ff" * 8, "00" * 7 + "01", "80" + "00" * 7, *(chance.randbytes(8).hex() for _ in range(number))]
    return [chance.choice(halves) + chance.choice(halves) for _ in range(number)]


@pytest.mark.parametrize("seed", range(40))
def test_the_index_agrees_with_a_dict(seed, monkeypatch):
    """Over segments that hold an item once, and several of them the same; an item may stand in a segment twice."""
    chance = random.Random(seed)
    monkeypatch.setattr("cache.core.index.KEPT_ITEMS", chance.choice([1, 10, 1 << 16]))
    pool = random_items(chance, chance.choice([1, 3, 12, 60, 400]))
    segments = [segment_of(chance.choices(pool, k=chance.randint(1, 80))) for _ in range(chance.randint(0, 9))]
    damaged = {
        place: [row for row in range(segment.num_rows) if chance.random() < chance.choice([0.1, 0.9, 1])]
        for place, segment in enumerate(segments)
        if chance.random() < 0.5
    }
    asked = chance.choices([*pool, *random_items(chance, 50)], k=chance.choice([0, 1, 200]))
    assert_agree(segments, damaged, asked)


def test_an_index_of_nothing_holds_nothing():
    assert_agree([], {}, [])
    assert_agree([], {}, ["00" * 16, "ff" * 16])
    assert_agree([segment_of(["ab" * 16])], {0: [0]}, ["ab" * 16])


def test_an_index_of_one_item_holds_that_one():
    assert_agree([segment_of(["ab" * 16])], {}, ["00" * 16, "ab" * 16, "ff" * 16, "ab" * 8 + "00" * 8, "ab" * 16])


def test_items_with_one_first_half_are_told_apart():
    items = ["ab" * 8 + f"{number * 7919 % 300:016x}" for number in range(300)]
    segments = [segment_of(items[start : start + 90]) for start in (0, 90, 180, 200)]
    assert_agree(
        segments, {1: range(0, 90, 2)}, [*items, "ab" * 8 + "ff" * 8, "ac" * 8 + "00" * 8, "aa" * 8 + "00" * 8]
    )


def test_rows_that_a_segment_has_not_are_no_damage_of_the_next_one():
    segments = [segment_of(["00" * 16, "01" * 16]), segment_of(["02" * 16, "03" * 16])]
    assert Index(segments, {0: [2, 3, -1], 1: [-1, 10**30]}).holds(["00" * 16, "01" * 16, "02" * 16, "03" * 16]).all()


@pytest.mark.parametrize("item", ["ab", "AB" * 16, "zz" * 16, " " + "ab" * 15 + "a", None, 3])
def test_what_is_no_item_is_named_among_many(item):
    index = Index([segment_of(["ab" * 16])], {})
    for look in (index.best, index.holds, index.rows_by_segment):
        with pytest.raises(StoreError, match=rf"^item {item!r} is not 32 hexadecimal digits"):
            look(["ab" * 16, item, "00" * 16])


def test_two_items_whose_digits_add_up_are_still_no_items():
    with pytest.raises(StoreError, match="item 'abab' is not 32"):
        Index([], {}).holds(["ab" * 2, "ab" * 30])


def test_a_hundred_thousand_items_are_found():
    keys = np.random.default_rng(0).integers(0, 256, (100_000, 16), np.uint8)
    items = [key.tobytes().hex() for key in keys]
    segments = [segment_of(items[start : start + 1000]) for start in range(0, 100_000, 1000)]
    found = Index(segments, {}).best(items)
    assert all(
        segments[number // 1000] is segment and number % 1000 == row for number, (segment, row) in enumerate(found)
    )
