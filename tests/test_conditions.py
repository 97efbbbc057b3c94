"""Conditions: pixel by pixel beside their photos, and computed ones that are what they are called."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw

from cache import digest
from pipeline.data import conditions, images
from pipeline.data.buckets import CENTRE, crop_box
from pipeline.data.indexing import IndexedPhoto
from pipeline.data.variants import Variant

VARIANTS = [Variant(48, 32, crop, flip) for crop in (CENTRE, 0, 1, 2) for flip in (False, True)]


def indexed(picture: Image.Image, name: str) -> IndexedPhoto:
    return IndexedPhoto(
        folder="photos", name=name, caption="", digest=digest(name.encode()), width=picture.width, height=picture.height
    )


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def fitted(photo: IndexedPhoto, picture: Image.Image, variant: Variant) -> np.ndarray:
    size = variant.width, variant.height
    box = crop_box(photo.digest, *picture.size, *size, variant.crop)
    return np.asarray(images.fit(picture, *size, box, variant.flip)).astype(int)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_the_photos_size_is_cut_as_the_photo_is(variant):
    picture = noise(96, 160)
    photo = indexed(picture, "photo")._replace(condition=indexed(picture, "condition"))
    found = conditions.picture(photo, picture, variant, "file")
    np.testing.assert_array_equal(np.asarray(found), fitted(photo, picture, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_of_half_the_photos_size_shows_the_same_part(variant):
    picture, half = noise(192, 320), noise(192, 320).resize((96, 160), Image.Resampling.BOX)
    photo = indexed(picture, "photo")._replace(condition=indexed(half, "condition"))
    found = np.asarray(conditions.picture(photo, half, variant, "file")).astype(int)
    assert np.abs(found - fitted(photo, picture, variant)).mean() < 3
    elsewhere = dataclasses.replace(variant, crop=9)
    assert np.abs(found - fitted(photo, picture, elsewhere)).mean() > 10


def test_what_decides_a_random_crop_is_in_its_address():
    picture = noise(64, 96)
    one, two = (indexed(picture, name)._replace(condition=indexed(picture, "c")) for name in ("a", "b"))
    assert conditions.item(one, Variant(32, 32)) == conditions.item(two, Variant(32, 32)) == one.condition.digest
    assert conditions.item(one, Variant(32, 32, 0)) != conditions.item(two, Variant(32, 32, 0))
    other = one._replace(condition=indexed(picture, "d"))
    assert conditions.item(one, Variant(32, 32, 0)) != conditions.item(other, Variant(32, 32, 0))
    assert conditions.item(indexed(picture, "a"), Variant(32, 32, 0)) == indexed(picture, "a").digest


@pytest.fixture
def square() -> Image.Image:
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    ImageDraw.Draw(picture).rectangle((16, 16, 47, 47), fill=(240, 240, 60))
    return picture


def computed(name: str, picture: Image.Image, flip: bool = False) -> np.ndarray:
    found = conditions.picture(indexed(picture, "photo"), picture, Variant(64, 64, CENTRE, flip), name)
    assert found.mode == "RGB" and found.size == (64, 64)
    return np.asarray(found).astype(int)


@pytest.mark.parametrize("name", conditions.COMPUTED)
def test_computed_conditions_are_mirrored_with_their_photo(square, name):
    square.paste((0, 255, 0), (2, 2, 9, 30))
    np.testing.assert_array_equal(computed(name, square, flip=True), computed(name, square)[:, ::-1])


def test_canny_is_white_where_the_colour_changes_and_black_elsewhere(square):
    found = computed("canny", square)
    assert set(np.unique(found)) == {0, 255}
    rows, columns, _ = np.nonzero(found)
    away = np.minimum.reduce([abs(rows - 15.5), abs(rows - 47.5), abs(columns - 15.5), abs(columns - 47.5)])
    assert len(rows) > 3 * 100 and away.max() <= 2


def test_grey_is_the_luma(square):
    found = computed("grey", square)
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 1] == found[..., 2]).all()
    assert found[0, 0, 0] == pytest.approx(0.299 * 200 + 0.587 * 30 + 0.114 * 30, abs=1)


@pytest.mark.parametrize("name", ["blur", "tile"])
def test_blur_and_tile_keep_the_mean_and_lose_the_edges(name):
    picture = noise(512, 512).resize((64, 64), Image.Resampling.NEAREST)
    found, plain = computed(name, picture), np.asarray(picture).astype(int)
    assert found.mean() == pytest.approx(plain.mean(), abs=3)
    assert np.abs(np.diff(found, axis=0)).mean() < 0.9 * np.abs(np.diff(plain, axis=0)).mean()
