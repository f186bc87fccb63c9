"""The report page as Chromium shows it: what decodes, what it forbids, what fits a screen."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.evaluate.browser import Browser
from tests.evaluate.report_samples import BLUE, RED, Page, clip, hostile, report
from tests.system import require
from vlm.evaluate.report import Answered, Clip

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(require("chromium"), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


DECODE = """
Promise.all([...document.querySelectorAll('image')].map(async element => {
  const image = new Image();
  image.src = element.getAttribute('href');
  await image.decode();
  return [image.naturalWidth, image.naturalHeight];
}))
"""


@pytest.mark.parametrize("build", [report, hostile])
def test_browser_has_no_complaint_and_asks_for_nothing(
    tmp_path: Path, browser: Browser, build: Any
) -> None:
    page = Page(build(), tmp_path)
    browser.open(page.path)
    assert browser.complaints() == []
    assert browser.requested() == [page.path.as_uri()]
    shown = browser.run("document.body.innerText")
    assert "alert(1)" in shown or build is report
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('.frame').length") == page.count(
        "figure", "frame"
    )
    sizes = browser.run(DECODE)
    assert len(sizes) == page.count("image")
    assert sizes[:2] == [[128, 96], [8, 6]]


def test_browser_shows_frames_and_lays_heat_over_them(tmp_path: Path, browser: Browser) -> None:
    page = Page(report(), tmp_path)
    browser.open(page.path)
    plain = browser.picture(".frame svg").astype(int)
    height, width, _ = plain.shape
    assert width / height == pytest.approx(128 / 96, abs=0.03)
    assert np.abs(plain[height // 4, width // 2] - RED).max() < 15
    assert np.abs(plain[3 * height // 4, width // 2] - BLUE).max() < 15
    heat = browser.picture(".frame svg.heat").astype(int)
    cell_h, cell_w = height / 6, width / 8
    hot = heat[int(5 * cell_h) + 4 : -4, int(7 * cell_w) + 4 : -4]
    assert hot.min(axis=(0, 1))[1] > 150, "yellow light, in the whole cell: not smoothed"
    beside = heat[int(5 * cell_h) + 4 : -4, int(5 * cell_w) : int(7 * cell_w) - 2]
    assert beside.max(axis=(0, 1))[1] < BLUE[1] + 10
    upper = heat[height // 4, width // 4]
    assert 60 < upper[0] < RED[0] - 30, "dimmed, but the frame is there"


def test_browser_is_bound_by_the_policy(tmp_path: Path, browser: Browser) -> None:
    browser.open(Page(report(), tmp_path).path)
    assert browser.run("fetch('data:,x').then(() => 'went through', () => 'refused')") == "refused"
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'),"
        " {textContent: 'window.ran = true'}))"
    )
    assert browser.run("window.ran === undefined")
    image = "Object.assign(new Image(), {src: 'http://127.0.0.1:1/x.png'})"
    assert browser.run(f"{image}.decode().then(() => 'loaded', () => 'refused')") == "refused"
    assert any("Content Security Policy" in str(event) for event in browser.complaints())


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (375, False), (320, True)]
)
def test_browser_fits_any_screen(tmp_path: Path, browser: Browser, width: int, dark: bool) -> None:
    long_name = "k" * 300
    unbroken = Answered(question=long_name, expected=long_name, predicted=long_name, task=long_name)
    odd = Clip(key=long_name, frames=clip().frames, questions=[unbroken])
    scores = {"accuracy": {"true": {long_name: 0.5}}}
    for built in (
        report(),
        report(clips=[odd], title=long_name, facts={long_name: long_name}, evaluation=scores),
    ):
        browser.open(Page(built, tmp_path).path, width=width, dark=dark)
        assert browser.run("innerWidth") == width
        assert browser.run("document.documentElement.scrollWidth") <= width
        paper = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == dark


def test_browser_tells_values_under_the_pointer(tmp_path: Path, browser: Browser) -> None:
    browser.open(Page(report(), tmp_path).path)
    box = browser.run(
        "(b => ({x: b.x, y: b.y, width: b.width, height: b.height}))"
        "(document.querySelector('.plot').getBoundingClientRect())"
    )
    middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 9}
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", **middle)
    tip = "document.querySelector('.tip').innerText"
    # 40 rows at steps 10 to 400: the middle is step 205, and 200 and 210 are equally near.
    lines = browser.run(tip).splitlines()
    step = int(lines[0].removeprefix("step "))
    assert step in (200, 210)
    assert lines[1:] == [
        f"train  {3 / (step // 10):.4g}",
        f"fine  {2.9 / (step // 10):.4g}",
        f"coarse  {3.5 / (step // 10):.4g}",
        "eval  0.25  (step 400)",
    ]
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.run("document.querySelector('.tip').hidden")
