from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from pipeline.synthetic import score
from pipeline.synthetic.shapes import COLOURS, NEW_SHAPES, SHAPES, draw, outline, picture

ALL = {shape: shape for shape in (*SHAPES, *NEW_SHAPES)}
COUNT = 200


def as_drawn(image, random):
    return image


def blurred(image, random):
    return image.filter(ImageFilter.GaussianBlur(1))


def noisy(image, random):
    values = np.asarray(image) + random.normal(0, 12, (*image.size, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def blurred_and_noisy(image, random):
    return noisy(blurred(image, random), random)


def unclean(image, random):
    """With three specks that belong to nothing."""
    pen = ImageDraw.Draw(image)
    for x, y in random.integers(4, 60, (3, 2)).tolist():
        pen.point((x, y), fill=(128, 128, 128))
    return image


@pytest.mark.parametrize("treat", [as_drawn, blurred, noisy, blurred_and_noisy, unclean])
@pytest.mark.parametrize("seed", [5, 6])
def test_colours_and_shape_are_named_right_on_99_of_100_pictures(treat, seed):
    pictures = [picture(seed, index, 64, ALL) for index in range(COUNT)]
    seen = [score.look(treat(each.image(), np.random.default_rng(i))) for i, each in enumerate(pictures)]
    for what in ("colour", "background", "shape"):
        right = [getattr(s, what) == getattr(each, what) for s, each in zip(seen, pictures)]
        assert sum(right) >= 0.99 * COUNT, what


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_size_of_the_picture_does_not_matter(size):
    pictures = [picture(9, index, size, ALL) for index in range(60)]
    assert sum(score.look(each.image()).shape == each.shape for each in pictures) >= (57 if size == 32 else 60)


@pytest.mark.parametrize("shape", [shape for shape in ALL if shape != "ring"])
def test_the_mask_is_the_filled_outline(shape):
    drawn = replace(picture(1, 2, 64), shape=shape, radius=18.0, centre=(30.0, 34.0))
    mask = score.look(drawn.image()).mask
    assert score.overlap(mask, score.enclosed(drawn.outline())) > 0.95


def test_the_mask_elsewhere_overlaps_little():
    mask = score.look(draw("circle", "red", "white", (20, 20), 12, 64)).mask
    assert score.overlap(mask, score.enclosed(outline("circle", (44, 44), 12, 64))) == 0


def test_an_outline_at_the_very_edge_is_filled_too():
    filled = score.enclosed(outline("square", (10, 10), 14, 64))
    assert filled[:18, :18].all() and not filled[22:].any()


def test_a_plain_picture_shows_a_background_and_nothing_else():
    seen = score.look(Image.new("RGB", (64, 64), COLOURS["blue"]))
    assert (seen.colour, seen.background, seen.shape) == (None, "blue", None)
    assert not seen.mask.any()


def test_noise_shows_no_shape():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert score.look(Image.fromarray(pixels)).shape is None


@pytest.mark.parametrize("box", [(10, 30, 54, 34), (30, 4, 34, 60)])
def test_a_bar_is_no_shape(box):
    image = Image.new("RGB", (64, 64), COLOURS["white"])
    ImageDraw.Draw(image).rectangle(box, fill=COLOURS["red"])
    assert score.look(image).shape is None


def test_of_two_shapes_the_larger_counts():
    image = draw("circle", "red", "white", (40, 40), 18, 64)
    ImageDraw.Draw(image).rectangle((3, 3, 12, 12), fill=COLOURS["red"])
    assert score.look(image).shape == "circle"


def test_a_colour_far_from_all_has_no_name():
    assert score.name(np.array([0, 255, 255])) is None
    assert {score.name(np.array(rgb) * 0.9 + 12) for rgb in COLOURS.values()} == set(COLOURS)


def test_masks_overlap_as_intersection_over_union_says():
    one, other = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    one[:2], other[1:3] = True, True
    assert score.overlap(one, other) == pytest.approx(1 / 3)
    assert score.overlap(one, one) == 1 and score.overlap(one & ~one, other & ~other) == 0


def test_shares_are_of_what_was_asked_for():
    asked = [picture(3, index, 64) for index in range(4)]
    images = [each.image() for each in asked]
    assert score.shares(images, asked) == {"colour": 1, "background": 1, "shape": 1}
    other = next(colour for colour in COLOURS if colour not in (asked[0].colour, asked[0].background))
    images[0] = draw(asked[0].shape, other, asked[0].background, asked[0].centre, asked[0].radius, 64)
    images[1] = Image.new("RGB", (64, 64), COLOURS[asked[1].background])
    assert score.shares(images, asked) == {"colour": 0.5, "background": 1, "shape": 0.75}
