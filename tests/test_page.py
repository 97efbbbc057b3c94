"""What pages are made of: escaping, a policy that forbids loading, plots that lose no peak, bounded pictures."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipeline.page import page, pictures, plots
from pipeline.page.pictures import Embedded, Unreadable, embed
from pipeline.page.plots import Line, Plot, decimated, smoothed

VENDORED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE.uPlot": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)> \u202egpj & <!--"


class Seen(HTMLParser):
    """The elements of a page with their attributes, its texts, and the texts of its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.texts, self.inline = [], [], []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        (self.inline if self._in in ("script", "style") else self.texts).append(data)

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def rendered(tmp_path, body: str, **content) -> str:
    template = tmp_path / "some.html"
    template.write_text('{% extends "base.html" %}{% block body %}' + body + "{% endblock %}")
    return page.render(template, **{"title": EVIL, "made_from": "", "plots": [], **content})


def test_what_is_vendored_is_what_was_published():
    folder = page.ASSETS / "vendor"
    assert {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in VENDORED} == VENDORED


def test_text_of_others_is_escaped_in_elements_attributes_and_json(tmp_path):
    plot = Plot("loss", EVIL, [Line(EVIL, [1], [2.0])]).spec()
    text = rendered(tmp_path, '<p title="{{ evil }}">{{ evil }}</p>', evil=EVIL, plots=[plot])
    seen = Seen(text)
    visible = EVIL.replace("\u202e", "\\u202e")
    assert (
        seen.named("p")[0]["title"] == visible and "".join(seen.texts).count(visible) == 2
    )  # the title, the paragraph
    assert [attributes.get("type") for attributes in seen.named("script")] == ["application/json", None]
    assert "onerror" not in {key for _, attributes in seen.elements for key in attributes}
    assert json.loads(seen.inline[1])[0]["title"] == EVIL and "\u202e" not in text


def test_a_page_loads_nothing_and_runs_its_own_script_alone(tmp_path):
    seen = Seen(rendered(tmp_path, "<p></p>"))
    policy = next(each["content"] for each in seen.named("meta") if "http-equiv" in each)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    style, script = seen.inline[0], seen.inline[-1]
    for rule, content in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert not re.search(r"url\(|@import", style)
    loaded = [value for _, each in seen.elements for key, value in each.items() if key in ("src", "srcset")]
    assert loaded == [] and not seen.named("link") and not any("style" in each for _, each in seen.elements)


def test_decimation_keeps_every_peak_both_ends_and_its_bound():
    values = np.random.default_rng(0).normal(size=10_000)
    values[[17, 5_000, 9_998]] = 50, -50, 60
    values[[100, 200]] = np.nan, np.inf
    places = decimated(values)
    assert len(places) <= plots.MOST_POINTS and (np.diff(places) > 0).all()
    assert {0, 17, 5_000, 9_998, 9_999} <= set(places) and not {100, 200} & set(places)
    assert decimated(values[:50]).tolist() == list(range(50))


def test_the_moving_average_is_unbiased_from_the_first_value_on():
    values = np.array([3.0, np.nan, 1.0])
    keep = 0.5 ** (1 / 4)
    expected = [3.0, (keep * 3 + 1) / (keep + 1)]
    found = smoothed(values, 4)
    assert np.isnan(found[1]) and found[[0, 2]] == pytest.approx(expected)


def test_an_axis_is_logarithmic_where_values_span_decades():
    def is_log(*values):
        return Plot("p", "p", [Line("l", range(len(values)), values)], log_y=None).spec()["logY"]

    assert is_log(0.001, 5) and not is_log(1, 5) and not is_log(0, 5) and not is_log(-1, 500)


def noise(path, side, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def decoded(shown: Embedded) -> Image.Image:
    kind, _, content = shown.uri.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_pictures_together_keep_to_their_budget(tmp_path):
    paths = [noise(tmp_path / f"{number}.png", 300, number) for number in range(4)]
    wide, narrow = embed(paths), embed(paths, budget_bytes=60_000)
    assert {decoded(each).size for each in wide.values()} == {(300, 300)}
    sizes = {max(decoded(each).size) for each in narrow.values()}
    assert len(sizes) == 1 and sizes < set(pictures.SIDES)
    assert sum(len(each.uri) for each in narrow.values()) < 4 / 3 * 60_000 + 200
    assert {(each.width, each.height) for each in narrow.values()} == {(300, 300)}


def test_small_pictures_keep_every_pixel_and_what_is_no_picture_says_why(tmp_path):
    path, broken = noise(tmp_path / "small.png", 32, 0), tmp_path / "broken.png"
    broken.write_bytes(path.read_bytes()[:100])
    found = embed([path, broken, tmp_path / "absent.png"])
    assert found[path].is_small
    assert (np.asarray(decoded(found[path])) == np.asarray(Image.open(path))).all()
    assert isinstance(found[broken], Unreadable) and "truncated" in found[broken].reason
    assert found[tmp_path / "absent.png"].reason == "cannot be read: No such file or directory"
