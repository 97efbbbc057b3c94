import numpy as np
import pytest
from PIL import Image, ImageFont

from pipeline.grid import LARGEST, SMALLEST, grid, legible, wrapped


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


def test_every_picture_is_in_its_column_under_its_prompt():
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 90, 200)]]
    rows = [
        (text, [Image.new("RGB", (64, 64), colour) for colour in row])
        for text, row in zip(("a prompt", "a much longer prompt " * 10), colours)
    ]
    shown = np.asarray(grid(["base", "trained"], rows))
    for row in colours:
        for column, colour in enumerate(row):
            places = np.argwhere((shown == colour).all(-1))
            assert len(places) == SMALLEST**2
            top, left = places.min(0)
            assert left == 12 + column * (SMALLEST + 12)
            above = shown[top - 24 : top - 2]
            assert (above < 128).any()  # its text
