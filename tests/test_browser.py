"""A report in a browser: no error, nothing loaded, the slider slides, wide and narrow, dark and light.

Needs the extra `browser`, and Chromium where CHROMIUM says or on PATH.
"""

import os
import shutil

import pytest
from test_report import change, copied

from pipeline.report import page

SIZES = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]
STEPS = 30, 10, 20

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(lora_sampled, tmp_path_factory):
    """One training at three lengths, on one page."""
    lab = lora_sampled.copy(tmp_path_factory.mktemp("browser") / "lab")
    paths = []
    for steps in STEPS:
        paths.append(copied(lab.plan.run, f"lab-{steps:012}", steps=steps))
        change(paths[-1] / "result.json", lambda result, steps=steps: result.update(steps=steps))
    out = lab.folder / "report.html"
    out.write_text(page.report(paths))
    return out


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("no Chromium on PATH; CHROMIUM says where one is")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_page_shows_itself_without_an_error_and_its_slider_slides(width, scheme, report, chromium):
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(report.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    for plot in tab.locator(".plot").all():
        assert plot.locator("canvas").count() == 1 and plot.bounding_box()["width"] <= width

    def shown():
        return [
            picture.get_attribute("data-place") for picture in tab.locator("[data-place]").all() if picture.is_visible()
        ]

    assert shown() == ["2", "2"] and tab.locator("output").inner_text() == "30"
    tab.locator("input[type=range]").focus()
    tab.keyboard.press("ArrowLeft")
    assert shown() == ["1", "1"] and tab.locator("output").inner_text() == "20"
    tab.locator("button.picture").first.click()
    assert tab.locator("dialog").is_visible()
    tab.locator("dialog img").click()
    assert not tab.locator("dialog").is_visible()
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background.split("(")[1].split(",")[0]) < 100) == (scheme == "dark")
    assert said == []
    context.close()
