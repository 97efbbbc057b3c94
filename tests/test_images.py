import io
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import BAND_PIXELS, MAX_PIXELS, BadImage, PixelBudget, examine, fit, read_image, to_array

pytestmark = pytest.mark.filterwarnings("ignore:::PIL.Image", "ignore:::PIL.TiffImagePlugin")


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(source):
    return np.asarray(read_image(source)).tolist()


def png(width, height, depth, colour_type, rows, *chunks):
    """A PNG file from raw rows, for the kinds that Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    extra = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def noise(width=48, height=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_rgb_pixels_are_kept(tmp_path):
    noise().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.mode == "RGB"
    assert np.array_equal(image, noise())


def test_a_path_and_its_bytes_give_the_same(tmp_path):
    noise().save(tmp_path / "a.jpg")
    assert pixels(tmp_path / "a.jpg") == pixels((tmp_path / "a.jpg").read_bytes())


# Where the pixels of a 2 x 3 image (width x height), numbered row by row, lie once it is upright (EXIF 2.32, 0x0112).
UPRIGHT = {
    1: [[0, 1], [2, 3], [4, 5]], 2: [[1, 0], [3, 2], [5, 4]], 3: [[5, 4], [3, 2], [1, 0]], 4: [[4, 5], [2, 3], [0, 1]],
    5: [[0, 2, 4], [1, 3, 5]], 6: [[4, 2, 0], [5, 3, 1]], 7: [[5, 3, 1], [4, 2, 0]], 8: [[1, 3, 5], [0, 2, 4]],
}  # fmt: skip


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(3, 2) * 40).convert("RGB")
    options = {"lossless": True} if format == "WEBP" else {}
    upright = np.asarray(read_image(encoded(stored, format, exif=exif, **options)))
    assert (upright[..., 0] // 40).tolist() == UPRIGHT[orientation]


def test_exif_orientation_of_a_jpeg_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(encoded(noise(48, 64), "JPEG", exif=exif)).size == (64, 48)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_means_nothing_is_passed_over(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_image(encoded(noise(), "PNG", exif=exif)), noise())


def test_palette_becomes_rgb():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, "PNG")) == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(format):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, format, transparency=0)) == [[[255, 255, 255], [200, 100, 50]]]


def test_half_transparent_palette_entry_is_blended_with_white():
    image = Image.new("P", (1, 1))
    image.putpalette([0, 0, 0])
    assert pixels(encoded(image, "PNG", transparency=bytes([51]))) == [[[204, 204, 204]]]


def test_grey_becomes_rgb():
    assert pixels(encoded(Image.new("L", (1, 1), 77), "PNG")) == [[[77, 77, 77]]]


def test_one_bit_becomes_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image, "PNG")) == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 51), [255, 204, 204]),
        ("LA", (0, 51), [204, 204, 204]),
        ("LA", (90, 255), [90, 90, 90]),
    ],
)
def test_alpha_is_composited_onto_white(mode, colour, expected):
    assert pixels(encoded(Image.new(mode, (1, 1), colour), "PNG")) == [[expected]]


def test_cmyk_becomes_rgb():
    assert pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [[[255, 0, 0]]]


def test_inverted_cmyk_of_an_adobe_jpeg_becomes_rgb():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in content
    assert np.abs(np.array(pixels(content)) - [255, 0, 0]).max() <= 2


def test_sixteen_bit_is_scaled_not_clipped():
    rows = b"\0" + struct.pack(">5H", 0, 257, 0x1234, 32896, 65535)
    assert [grey for grey, _, _ in pixels(png(5, 1, 16, 0, rows))[0]] == [0, 1, 18, 128, 255]


@pytest.mark.parametrize("mode, order", [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_sixteen_bit_tiff_is_scaled_in_each_byte_order(mode, order):
    values = np.array([[0, 128, 129, 32896, 65535]], dtype=order)
    content = encoded(Image.frombytes(mode, (5, 1), values.tobytes()), "TIFF")
    assert Image.open(io.BytesIO(content)).mode == mode
    assert [grey for grey, _, _ in pixels(content)[0]] == [0, 0, 1, 128, 255]


def test_transparent_value_of_sixteen_bit_grey_becomes_white():
    rows = b"\0" + struct.pack(">2H", 1000, 25700)
    assert pixels(png(2, 1, 16, 0, rows, (b"tRNS", struct.pack(">H", 1000)))) == [[[255] * 3, [100] * 3]]


def test_sixteen_bit_rgb_keeps_its_eight_high_bits():
    rows = b"\0" + struct.pack(">3H", 65535, 0x8000, 0x12FF)
    assert pixels(png(1, 1, 16, 2, rows)) == [[[255, 128, 18]]]


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536]])
def test_pixels_beyond_sixteen_bits_are_refused(values):
    content = encoded(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF")
    with pytest.raises(BadImage, match=f"32-bit pixels from {values[0]} to {values[1]}"):
        read_image(content)


def test_float_pixels_are_refused():
    with pytest.raises(BadImage, match="range is not known"):
        read_image(encoded(Image.new("F", (1, 1), 0.5), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    red, blue = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(red, format, save_all=True, append_images=[blue], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert pixels(content) == [[[255, 0, 0]] * 4] * 4


def test_a_photo_that_carries_a_second_one_gives_the_first():
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    content = encoded(red, "MPO", save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(content)).format == "MPO"
    assert np.abs(np.array(pixels(content)) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
def test_half_a_file_is_refused_as_truncated(format):
    content = encoded(noise(), format)
    with pytest.raises(BadImage, match="truncated"):
        read_image(content[: len(content) // 2])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
def test_a_file_cut_anywhere_is_refused_or_whole(format):
    content = encoded(noise(9, 7), format)
    whole = pixels(content)
    for length in range(len(content)):
        try:
            assert pixels(content[:length]) == whole, f"cut at {length} of {len(content)}"
        except BadImage as error:
            assert str(error)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "GIF", "WEBP", "JPEG", "BMP"])
def test_damage_never_raises_anything_but_bad_image(format):
    random = np.random.default_rng(1)
    for _ in range(150):
        content = bytearray(encoded(noise(9, 7), format))
        for place in random.integers(0, min(len(content), 150), 4):
            content[place] = random.integers(256)
        try:
            assert read_image(bytes(content)).mode == "RGB"
        except BadImage as error:
            assert str(error)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "GIF", "WEBP", "JPEG", "BMP", "AVIF"])
def test_what_is_examined_is_what_is_read(format):
    """Damaged in places and cut: the same is refused for the same reason, and the same size is found."""
    random = np.random.default_rng(2)
    for _ in range(60):
        content = bytearray(encoded(noise(9, 7), format))[: random.integers(40, 2000)]
        for place in random.integers(0, min(len(content), 150), random.integers(3)):
            content[place] = random.integers(256)
        assert outcome(lambda each: examine(each)[:2], content) == outcome(lambda each: read_image(each).size, content)


def outcome(work, content):
    try:
        return work(bytes(content))
    except BadImage as reason:
        return str(reason)


def test_pixels_of_no_common_kind_are_refused():
    with pytest.raises(BadImage, match="LAB pixels; save it as RGB"):
        read_image(encoded(Image.new("LAB", (4, 4)), "TIFF"))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(BadImage, match="empty file"):
        read_image(tmp_path / "a.png")


def test_a_file_that_is_not_an_image_is_refused():
    with pytest.raises(BadImage, match="^not an image"):
        read_image(b"hello" * 100)


def test_a_damaged_header_is_told_from_no_image():
    content = bytearray(encoded(noise(), "PNG"))
    content[20] ^= 255
    with pytest.raises(BadImage, match="header cannot be read"):
        read_image(bytes(content))


def test_formats_that_run_other_programs_are_refused():
    with pytest.raises(BadImage, match="^not an image"):
        read_image(encoded(noise(), "EPS"))


def test_a_missing_file_is_refused_with_the_reason(tmp_path):
    with pytest.raises(BadImage, match="No such file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("side", [13_342, 14_000, 20_000, 60_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side):
    assert side * side > MAX_PIXELS
    with pytest.raises(BadImage, match="too large"):
        read_image(png(side, side, 8, 2, b""))


def test_our_limit_holds_where_other_code_lifted_that_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImage, match="20000 x 20000"):
        read_image(png(20_000, 20_000, 8, 2, b""))


def test_a_text_chunk_that_unpacks_to_much_is_refused():
    text = b"comment\0\0" + zlib.compress(bytes(10_000_000))
    with pytest.raises(BadImage, match="too large"):
        read_image(png(1, 1, 8, 2, bytes(4), (b"zTXt", text)))


def test_a_large_photo_takes_what_is_decoded_and_one_copy(tmp_path):
    """Peak of a process of its own, in bytes a pixel: 2 of the file's grey, 4 of RGB, and pieces of 4 million."""
    side = 6000
    Image.fromarray(np.arange(side * side, dtype=np.uint32).astype(np.uint16).reshape(side, side)).save(
        tmp_path / "a.png", compress_level=1
    )
    code = "import resource, sys; from pipeline.data import images; content = open(sys.argv[1], 'rb').read();"
    code += "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
    code += "getattr(images, sys.argv[2])(content); print((peak() - before) * 1024 - len(content))"
    for name, a_pixel in (("read_image", 6), ("examine", 2)):
        command = [sys.executable, "-c", code, tmp_path / "a.png", name]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        assert int(done.stdout) < a_pixel * side**2 + 30 * BAND_PIXELS, done.stderr


def test_large_images_are_not_decoded_all_at_once():
    budget, at_once, most = PixelBudget(100), [], []

    def decode(pixels):
        with budget.taken(pixels):
            at_once.append(pixels)
            time.sleep(0.01)
            most.append(sum(at_once))
            at_once.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [60, 60, 30, 300, 10, 0, 99, 100, 60, 20] * 3))
    assert max(each for each in most if each < 300) > 60 and {each for each in most if each > 100} <= {300}


def stripes(width, height, axis):
    """Grey values that grow by one a pixel along an axis (0 down, 1 across)."""
    values = np.indices((height, width))[axis].astype(np.uint8)
    return Image.fromarray(values).convert("RGB")


def test_fit_leaves_an_image_of_the_right_size_as_it_is():
    assert np.array_equal(fit(noise(48, 64), 48, 64), noise(48, 64))


def test_fit_keeps_the_centre_of_a_wide_image():
    fitted = np.asarray(fit(stripes(100, 40, axis=1), 40, 40))
    assert fitted[0, :, 0].tolist() == list(range(30, 70))


def test_fit_keeps_the_centre_of_a_tall_image():
    fitted = np.asarray(fit(stripes(40, 100, axis=0), 40, 40))
    assert fitted[:, 0, 0].tolist() == list(range(30, 70))


def test_fit_scales_the_shorter_side_and_keeps_the_aspect():
    disc = Image.new("RGB", (200, 100))
    disc.paste((255, 255, 255), (80, 30, 120, 70))
    fitted = np.asarray(fit(disc, 50, 50))[..., 0] > 127
    assert (fitted.any(0).sum(), fitted.any(1).sum()) == (20, 20)
    assert fitted[15:35, 15:35].all()


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (37, 1001), (512, 513)])
@pytest.mark.parametrize("target", [(64, 64), (96, 32), (1, 7)])
def test_fit_reaches_any_size_from_any_size(size, target):
    fitted = fit(Image.new("RGB", size, (9, 99, 199)), *target)
    assert fitted.size == target
    assert set(fitted.get_flattened_data()) == {(9, 99, 199)}


def test_fit_equals_scaling_then_cropping_where_the_sizes_are_whole():
    scaled = noise(64, 48).resize((128, 96), Image.Resampling.LANCZOS)
    assert np.array_equal(fit(noise(64, 48), 96, 96), scaled.crop((16, 0, 112, 96)))


def test_array_is_channels_first_from_minus_one_to_one():
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    array = to_array(image)
    assert (array.shape, array.dtype) == ((3, 2, 3), np.float32)
    assert array.flags.c_contiguous
    assert array[:, 0, 0].tolist() == [-1.0, 1.0, pytest.approx(-0.6)]


def test_array_of_another_mode_is_refused():
    with pytest.raises(ValueError, match="mode RGB, found L"):
        to_array(Image.new("L", (1, 1)))
