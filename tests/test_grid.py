import time

import numpy as np
import pytest
from PIL import Image, ImageFont

from pipeline.plan.pictures import LARGEST_SHOWN as LARGEST
from pipeline.plan.pictures import SMALLEST_SHOWN as SMALLEST
from pipeline.sampling.grid import WIDEST, grid, legible, wrapped


@pytest.mark.parametrize("side, shown", [(64, 192), (32, 192), (100, 200), (192, 192), (300, 300), (1024, LARGEST)])
def test_pictures_are_shown_at_a_size_that_can_be_looked_at(side, shown):
    assert legible(Image.new("RGB", (side, side))).size == (shown, shown)


def test_a_small_picture_is_enlarged_pixel_by_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(legible(Image.fromarray(pixels)), pixels.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("text", ["", "one", "a red circle " * 30, "long" * 100, "short " + "long" * 100 + " short"])
def test_lines_fit_and_together_are_the_text(text):
    font = ImageFont.load_default(15)
    lines = wrapped(text, 200, font)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_every_picture_is_in_its_row_under_its_prompt():
    headings, count = ["base", "trained"], 12
    colours = [[(20 * row + 3, 200, 9 * column) for row in range(len(headings))] for column in range(count)]
    columns = [
        ("a prompt " * (1 + column), [Image.new("RGB", (64, 64), colour) for colour in colours[column]])
        for column in range(count)
    ]
    shown = np.asarray(grid(headings, columns))
    assert shown.shape[1] <= WIDEST
    lefts = []
    for column in range(count):
        places = [np.argwhere((shown == colour).all(-1)) for colour in colours[column]]
        assert [len(each) for each in places] == [SMALLEST**2, SMALLEST**2]
        (top, left), below = places[0].min(0), places[1].min(0)
        assert (below == (top + SMALLEST + 12, left)).all()
        assert (shown[top - 20 : top, left : left + SMALLEST] < 128).any()  # its text
        assert (shown[top : top + SMALLEST, :left] < 128).any()  # what the row shows
        lefts.append(int(left))
    assert lefts == sorted(lefts[:5]) * 2 + sorted(lefts[:2])  # five side by side, and the next below


def test_one_large_picture_is_shown_whole():
    shown = grid(["base", "trained"], [("one " * 200, [Image.new("RGB", (2048, 1024), "red")] * 2)])
    assert (np.asarray(shown) == (255, 0, 0)).all(-1).sum() == 2 * 512 * 256


@pytest.mark.parametrize("text", ["x" * 20_000, "e\u0301" * 10_000, "w " * 10_000, "a" + "\u0301" * 20_000])
def test_a_text_of_any_length_is_cut_within_a_second(text):
    """A word of 2,000 letters took half a minute, and more letters the cube of it."""
    began = time.process_time()
    shown = grid(["base"], [(text, [Image.new("RGB", (64, 64))])])
    assert time.process_time() - began < 5 and shown.height < 1000
