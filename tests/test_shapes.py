import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import read_image
from pipeline.errors import UserError
from pipeline.synthetic import score, shapes
from pipeline.synthetic.shapes import (
    COLOURS,
    MADE_UP,
    NEW_SHAPES,
    SHAPES,
    draw,
    draw_shapes,
    outline,
    picture,
    silhouette,
)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def area(shape, radius):
    image = np.asarray(draw(shape, "white", "black", (100, 100), radius, 200), dtype=float)[..., 0]
    return ((image - 20) / (245 - 20)).sum()


CROSS = 8 * 0.32 * (1 - 0.32**2) ** 0.5 - 4 * 0.32**2
STAR = 5 * 0.45 * np.sin(np.pi / 5)
FACTORS = {"circle": np.pi, "square": 2, "triangle": 3 * 3**0.5 / 4, "cross": CROSS, "star": STAR}
FACTORS["ring"] = np.pi * (1 - 0.55**2)


@pytest.mark.parametrize("shape, factor", FACTORS.items())
def test_each_shape_has_the_area_of_its_formula(shape, factor):
    assert area(shape, 60) == pytest.approx(factor * 60**2, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shape_is_where_it_was_asked_for_in_the_colours_asked_for(shape):
    image = draw(shape, "red", "blue", (20, 44), 10, 64)
    assert image.size == (64, 64)
    assert image.getpixel((20, 44)) == COLOURS["red"]
    inside = (np.asarray(image) != COLOURS["blue"]).any(-1)
    down, across = np.nonzero(inside)
    assert across.min() >= 10 and across.max() <= 30 and down.min() >= 34 and down.max() <= 54


def test_edges_are_smooth():
    greys = set(np.asarray(draw("circle", "white", "black", (32, 32), 20, 64))[..., 0].ravel().tolist())
    assert {20, 245} < greys and len(greys) > 8


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="'hexagon': expected one of circle, square, triangle"):
        draw("hexagon", "red", "blue", (5, 5), 3, 10)


def test_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    one, two, other = (draw_shapes(tmp_path / str(i), 4, 32, seed) for i, seed in enumerate((7, 7, 8)))
    assert files(one) == files(two)
    assert files(one) != files(other)


def test_more_pictures_leave_the_first_ones_as_they_are(tmp_path):
    few, many = files(draw_shapes(tmp_path / "few", 3, 32)), files(draw_shapes(tmp_path / "many", 12, 32))
    assert len(few) == 4 and len(many) == 13
    assert {name: many[name] for name in few if name.endswith("png")} == {
        name: content for name, content in few.items() if name.endswith("png")
    }
    assert many["metadata.jsonl"].startswith(few["metadata.jsonl"])


def test_captions_name_what_is_drawn(tmp_path):
    folder = draw_shapes(tmp_path / "shapes", 40, 64)
    for row in rows(folder):
        words = row["text"].replace(",", "").split()
        assert sum(word in SHAPES for word in words) == 1
        named = {COLOURS[word] for word in words if word in COLOURS}
        image = read_image(folder / row["file_name"])
        common = {colour for count, colour in image.getcolors(64 * 64) if count > 64}
        assert len(named) == 2 and named <= common


def test_captions_vary_and_use_the_right_article(tmp_path):
    captions = [row["text"] for row in rows(draw_shapes(tmp_path / "shapes", 60, 16))]
    assert len(set(captions)) > 50
    assert any("an orange" in caption for caption in captions)
    assert not any("a orange" in caption for caption in captions)


def test_every_shape_lies_within_its_picture(tmp_path):
    folder = draw_shapes(tmp_path / "shapes", 30, 64)
    for row in rows(folder):
        image = np.asarray(read_image(folder / row["file_name"]))
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert len(np.unique(border, axis=0)) <= 12, row
        assert np.unique(border, axis=0, return_counts=True)[1].max() > 0.9 * len(border)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat.png").write_bytes(b"cat")
    with pytest.raises(UserError, match="mine: exists already"):
        draw_shapes(tmp_path / "mine")
    assert files(tmp_path / "mine") == {"cat.png": b"cat"}


def test_an_empty_folder_is_filled(tmp_path):
    assert len(files(draw_shapes(tmp_path, 2, 16))) == 3


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        draw_shapes(tmp_path / "shapes", 3, 16)
    assert not list(tmp_path.iterdir())


def die_at_the_third_picture(folder):
    draw_one = shapes.picture

    def picture(seed, index, *others, **settings):
        return draw_one(seed, index, *others, **settings) if index < 2 else os.kill(os.getpid(), signal.SIGKILL)

    shapes.picture = picture
    draw_shapes(folder, 5, 16)


def test_a_killed_run_leaves_no_folder_and_the_next_one_succeeds(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=die_at_the_third_picture, args=(tmp_path / "shapes",))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "shapes").exists()
    assert len(files(draw_shapes(tmp_path / "shapes", 5, 16))) == 6


@pytest.mark.parametrize("shape", (*SHAPES, *NEW_SHAPES))
def test_the_outline_runs_along_the_inside_of_the_shape(shape):
    where = (30, 34), 20, 64
    line, inside = np.asarray(outline(shape, *where).convert("L")) > 127, silhouette(shape, *where) > 0
    assert line.any() and not (line & ~inside).any()
    assert 0.1 < line.sum() / inside.sum() < 0.8


def test_a_picture_of_the_stream_depends_on_its_number_alone():
    one, again, next_one = picture(3, 8, 64), picture(3, 8, 64), picture(3, 9, 64)
    assert one == again and one.image().tobytes() == again.image().tobytes() and one != next_one
    assert picture(3, 10**12, 64).shape in SHAPES


def test_a_picture_says_what_it_shows():
    for index in range(30):
        each = picture(2, index, 64)
        assert each.image() == draw(each.shape, each.colour, each.background, each.centre, each.radius, 64)
        assert each.outline() == outline(each.shape, each.centre, each.radius, 64)
        assert {each.word, each.colour, each.background} <= set(each.caption.replace(",", "").split())


def test_the_embedded_model_is_never_taught_the_new_shapes():
    assert {picture(1, index, 64).shape for index in range(300)} == set(SHAPES)


@pytest.mark.parametrize("shape", NEW_SHAPES)
def test_a_teaching_set_shows_one_new_shape_under_its_made_up_word_and_reminds_of_the_old(tmp_path, shape):
    folder = shapes.draw_teaching(tmp_path / "teaching", shape, count=6, reminders=3)
    assert len(files(folder)) == 10
    new, old = rows(folder)[:6], rows(folder)[6:]
    for row in new:
        assert MADE_UP[shape] in row["text"].replace(",", "").split() and shape not in row["text"]
        assert score.look(read_image(folder / row["file_name"])).shape == shape
    assert [score.look(read_image(folder / row["file_name"])).shape for row in old] == list(SHAPES)
    assert all(each in row["text"] for each, row in zip(SHAPES, old))


def test_pairs_have_a_condition_of_the_same_geometry(tmp_path):
    folder = shapes.draw_pairs(tmp_path / "pairs", count=5)
    for row in rows(folder):
        image, condition = read_image(folder / row["file_name"]), read_image(folder / row["conditioning_image"])
        line = np.asarray(condition.convert("L")) > 200
        colours = np.asarray(image)[line]
        assert image.size == condition.size == (64, 64)
        assert len(np.unique(colours, axis=0)) < 20  # the shape's own colour, and a few smooth edges
        assert (np.asarray(condition)[0, 0] == 0).all()
