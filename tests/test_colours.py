"""Colour profiles in files: pixels are converted to sRGB where they mean something else, and nowhere else."""

import importlib
import io

import numpy as np
import profiles
import pytest
from photo_files import age
from PIL import Image, ImageCms
from test_identity import plan_of

from cache import FileFacts, digest
from pipeline.data import formats, images, indexing
from pipeline.data.images import BadImage, examine, read_image
from pipeline.data.indexing import by_content, index_photos, inspect, read_photo, remembered
from pipeline.data.photos import list_photos
from pipeline.errors import UserError
from pipeline.methods import LORA

LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
WIDE = sorted(profiles.PRIMARIES)


def colourful(side: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(image, format: str = "PNG", profile: bytes | None = None, **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, format, **({"icc_profile": profile} if profile else {}), **options)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    image = read_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


def by_littlecms(image: Image.Image, profile: bytes) -> np.ndarray:
    """As Pillow's own documentation converts, without any of our code."""
    intent, black = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    own, to = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(image, own, to, intent, "RGB", flags=black))


# --- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("name", WIDE)
def test_a_wide_photo_is_in_srgb_as_littlecms_and_the_formulas_have_it(name, format):
    before = colourful()
    found = pixels(encoded(before, format, profiles.of_rgb(name), **LOSSLESS[format]))
    assert np.array_equal(found, by_littlecms(Image.fromarray(before), profiles.of_rgb(name)))
    assert np.abs(found - profiles.expected(name, before)).max() <= 2
    assert np.abs(found.astype(int) - before).max() > 30


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_profiles_of_lossy_files_are_read_too(format):
    before = np.full((16, 16, 3), (40, 200, 60), np.uint8)
    plain, wide = (pixels(encoded(before, format, own)) for own in (None, profiles.of_rgb("Display P3")))
    assert np.abs(wide - profiles.expected("Display P3", plain)).max() <= 2


@pytest.mark.parametrize("format, module", [("HEIF", "pillow_heif"), ("JXL", "pillow_jxl")])
def test_photos_of_phones_are_read_with_a_package(format, module):
    """With their profile, and with their size known before they are decoded."""
    extra = importlib.import_module(module)
    if format == "HEIF":
        extra.register_heif_opener()
    green = Image.new("RGB", (300, 211), (40, 200, 60))
    content = encoded(green, format, None if format == "JXL" else profiles.of_rgb("Display P3"))
    assert images.num_pixels(content) == 300 * 211
    assert examine(content)[:3] == (300, 211, "" if format == "JXL" else "Display P3")
    wanted = np.array([40, 200, 60]) if format == "JXL" else profiles.expected("Display P3", np.array([40, 200, 60]))
    assert np.abs(pixels(content)[100, 100] - wanted).max() <= 12
    with pytest.raises(BadImage, match="truncated"):
        read_image(content[: len(content) // 2])


@pytest.mark.parametrize("side", [8, 264, 20_000, 1 << 20])
def test_a_jpeg_xl_that_unpacks_to_much_is_refused_before_it_is_decoded(side, monkeypatch):
    is_small = side % 8 == 0 and side <= 256
    bits = (1 | (side // 8 - 1) << 1 | 1 << 6) if is_small else (3 << 1 | (side - 1) << 3 | 1 << 33)
    content = b"\xff\x0a" + bits.to_bytes(8, "little")
    assert formats.jxl_size(content) == (side, side)
    monkeypatch.setattr(formats.Extra, "is_here", True)
    monkeypatch.setattr(formats.Extra, "register", lambda extra: None)
    with pytest.raises(BadImage, match="too large" if side >= 20_000 else "truncated"):
        read_image(content)


@pytest.mark.parametrize("profile", [profiles.own_srgb(), profiles.of_rgb("sRGB IEC61966-2.1")], ids=["lcms", "table"])
def test_a_profile_that_means_srgb_changes_no_pixel(profile):
    found = examine(encoded(colourful(), profile=profile))
    assert (found.profile, found.ignored) == ("", "")
    assert np.array_equal(pixels(encoded(colourful(), profile=profile)), colourful())


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_grey_is_read_by_its_profile(gamma):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = pixels(encoded(grey, profile=profiles.of_grey(gamma)))
    assert np.abs(found - profiles.srgb((grey / 255) ** gamma)[..., None]).max() <= 1


def test_grey_of_sixteen_bits_is_read_by_its_profile():
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    found = pixels(encoded(Image.fromarray(grey), "PNG", profiles.of_grey(1.8)))
    assert np.abs(found - profiles.srgb((grey / 65535) ** 1.8)[..., None]).max() <= 1


def test_grey_pixels_are_read_by_an_rgb_profile():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = pixels(encoded(grey, profile=profiles.of_rgb("Adobe RGB")))
    assert np.abs(found - profiles.expected("Adobe RGB", np.stack([grey] * 3, -1))).max() <= 2


def test_cmyk_is_read_by_its_profile():
    lab = np.zeros((2, 2, 2, 2, 3))
    lab[:, :, :, 0, 0] = 60
    lab[0, 0, 0, 0] = 100, 0, 0
    lab[1, 0, 0, 0] = 55, -37, -50
    inks = np.zeros((16, 48, 4), np.uint8)
    inks[:, 16:32, 0] = inks[:, 32:, 3] = 255
    found = pixels(encoded(Image.fromarray(inks, "CMYK"), "TIFF", profiles.of_cmyk(lab)))
    assert found[0, [0, 40]].tolist() == [[255] * 3, [0] * 3]
    assert np.abs(found[0, 20].astype(int) - [0, 150, 221]).max() <= 3  # Lab (55, -37, -50), cyan of coated paper


def test_palettes_and_transparency_are_converted_before_white_shows_through():
    name, colours = "Display P3", colourful(16)
    alpha = np.full((16, 16, 1), 51, np.uint8)
    found = pixels(encoded(np.concatenate([colours, alpha], -1), profile=profiles.of_rgb(name)))
    assert np.abs(found - (0.2 * profiles.expected(name, colours) + 0.8 * 255)).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    content = encoded(palette, "PNG", profiles.of_rgb(name), transparency=0)
    assert np.abs(pixels(content)[0] - [[255] * 3, profiles.expected(name, np.array([255, 0, 0]))]).max() <= 1


def test_a_transparent_value_is_looked_for_among_the_colours_of_the_file():
    content = encoded(
        np.full((2, 2, 3), (0, 255, 0), np.uint8), "PNG", profiles.of_rgb("Adobe RGB"), transparency=(0, 255, 0)
    )
    assert pixels(content).tolist() == [[[255] * 3] * 2] * 2


# --- profiles that cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "profile, reason",
    [
        (b"hello" * 40, "cannot be used: "),
        (profiles.of_rgb("Display P3")[:200], "cannot be used: "),
        (profiles.of_grey(1.8), "Grey 1.8: about GRAY, but the pixels are RGB"),
        (profiles.profile("An effect", b"RGB ", {}, kind=b"abst"), "An effect: of class 'abst'"),
    ],
    ids=["text", "cut", "of grey", "of an effect"],
)
def test_a_profile_that_cannot_be_used_is_said_and_changes_no_pixel(profile, reason):
    content = encoded(colourful(), profile=profile)
    found = examine(content)
    assert found.profile == "" and found.ignored.startswith(reason)
    assert np.array_equal(pixels(content), colourful())


def test_damage_in_a_profile_never_raises():
    random, whole = np.random.default_rng(1), profiles.of_rgb("Display P3")
    for _ in range(100):
        content = bytearray(whole)
        for place in random.integers(0, 400, 4):
            content[place] = random.integers(256)
        assert examine(encoded(colourful(4), profile=bytes(content)))[:2] == (4, 4)


# --- what is remembered, and addresses ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    kinds = {"plain": None, "srgb": profiles.own_srgb(), "wide": profiles.of_rgb("Display P3"), "broken": b"nothing"}
    for name, profile in kinds.items():
        (folder / f"{name}.png").write_bytes(encoded(colourful(16 + len(name)), profile=profile))
        age(folder / f"{name}.png")
    return folder


@pytest.fixture
def facts(tmp_path):
    return FileFacts(tmp_path / "facts.sqlite")


def indexed(folder, facts) -> dict:
    return {photo.name.removesuffix(".png"): photo for photo in index_photos(folder, "a cat", facts)}


def test_only_a_converted_photo_has_another_address_than_its_file(folder, facts):
    found = indexed(folder, facts)
    assert {name for name, photo in found.items() if photo.item != photo.digest} == {"wide"}
    assert {name: photo.profile for name, photo in found.items() if photo.profile} == {"wide": "Display P3"}
    assert {name for name, photo in found.items() if photo.ignored} == {"broken"}
    assert all(photo.digest == digest(photo.path.read_bytes()) for photo in found.values())


def test_photos_that_an_older_version_knew_are_not_decoded_again(folder, facts, monkeypatch):
    wanted = indexed(folder, facts)
    older = FileFacts(facts.path.with_name("older.sqlite"))
    for photo in wanted.values():
        older.get(photo.path)
        older.put(photo.path, {"digest": photo.digest, "width": photo.width, "height": photo.height})
    photos = list_photos(folder, "a cat")[0]
    assert remembered(photos, older) is None  # what they say of colours is not known
    monkeypatch.setattr(indexing, "examine", None)
    monkeypatch.setattr(images, "_decode", None)
    assert indexed(folder, older) == wanted
    monkeypatch.setattr(indexing, "colours_in", None)
    assert inspect(photos, older)[0] == remembered(photos, older) == list(wanted.values())


def test_a_photo_is_read_as_it_was_said_to_be(folder, facts):
    wide = indexed(folder, facts)["wide"]
    assert np.abs(np.asarray(read_photo(wide)) - profiles.expected("Display P3", colourful(20))).max() <= 2
    assert np.array_equal(read_photo(wide._replace(profile="")), colourful(20))
    plain = indexed(folder, facts)["plain"]
    with pytest.raises(UserError, match="plain.png: its colour profile could be used when the photo was checked"):
        read_photo(plain._replace(profile="Display P3"))


def test_only_a_converted_photo_has_other_entries_and_another_run(folder, facts):
    """With the addresses of `test_identity`, which are those of every earlier version."""
    found = indexed(folder, facts)
    plain = [photo._replace(profile="", ignored="") for photo in found.values()]  # as an older version had them
    before, after = (plan_of(folder.parent, LORA).of(by_content(each)) for each in (plain, found.values()))
    (one,), (other,) = before.image_needs, after.image_needs
    assert one.entries.id == other.entries.id
    assert set(one.items) - set(other.items) == {found["wide"].digest}
    assert before.run_id != after.run_id
    without = [[photo for photo in several if photo.name != "wide.png"] for several in (plain, found.values())]
    assert len({plan_of(folder.parent, LORA).of(by_content(each)).run_id for each in without}) == 1
