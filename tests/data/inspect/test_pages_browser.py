"""The pages about shards and samples as Chromium shows them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data import helpers
from tests.data.inspect.test_samples_page import SCRIPT, make_view
from tests.evaluate.browser import Browser
from tests.system import require
from vlm.data.inspect import samples_page
from vlm.data.validation import page
from vlm.data.validation.validate import validate

pytestmark = pytest.mark.system
Write = Callable[[Path], Path]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(require("chromium"), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def write_samples(folder: Path) -> Path:
    views = [make_view(num_frames=n, key=f"{i:08d}") for i, n in enumerate((0, 1, 64))]
    views.append(make_view(key="k" * 300, source=SCRIPT, meta={"id": SCRIPT}))
    samples_page.write_page(folder / "samples.html", views, "s" * 300)
    return folder / "samples.html"


def write_validation(folder: Path) -> Path:
    helpers.write_shards(folder, [1, 2, 64])
    name = "n" * 90
    helpers.write_tar(
        folder / "bad.tar", [(f"{name}.json", b"{}"), ("run.pth", b""), ("b.jpg", b"")]
    )
    page.write_page(folder / "validation.html", validate(sorted(folder.glob("*.tar"))))
    return folder / "validation.html"


@pytest.mark.parametrize("write", [write_samples, write_validation])
def test_pages_fit_any_screen_and_ask_for_nothing(
    tmp_path: Path, browser: Browser, write: Write
) -> None:
    path = write(tmp_path)
    for width, dark in ((1280, False), (1280, True), (375, False), (320, True)):
        browser.open(path, width=width, dark=dark)
        assert browser.complaints() == []
        assert browser.requested() == [path.as_uri()]
        assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("fetch('data:,x').then(() => 'went through', () => 'refused')") == "refused"


@pytest.mark.parametrize(
    ("write", "items", "words", "left"),
    [(write_samples, ".sample", "64 FRAMES", 1), (write_validation, ".fault", "member run.pth", 1)],
)
def test_the_filter_hides_what_does_not_match(
    tmp_path: Path,
    browser: Browser,
    write: Write,
    items: str,
    words: str,
    left: int,
) -> None:
    browser.open(write(tmp_path))
    shown = f"[...document.querySelectorAll('{items}')].filter(e => e.offsetHeight > 0).length"
    count = browser.run(shown)
    assert count > left
    browser.run("document.querySelector('input').focus()")
    browser.send("Input.insertText", text=words)
    assert browser.run(shown) == left
    assert browser.run("document.querySelector('[role=status]').innerText") == (
        f"{left} of {count} shown"
    )
    clear = "(e => { e.value = ''; e.dispatchEvent(new Event('input')); })"
    browser.run(f"{clear}(document.querySelector('input'))")
    assert browser.run(shown) == count


def test_what_is_learned_is_green_underlined_and_bracketed(
    tmp_path: Path, browser: Browser
) -> None:
    browser.open(write_samples(tmp_path))
    style = "getComputedStyle(document.querySelector('article mark.learned'{0})).{1}"
    assert "underline" in browser.run(style.format("", "textDecorationLine"))
    before = "getComputedStyle(document.querySelector('article mark.learned'), '::before').content"
    assert browser.run(before) == '"\u27e6"'
    red, green, blue = np.median(browser.picture("article mark.learned"), axis=(0, 1))
    assert green > red and green > blue


def test_frames_decode(tmp_path: Path, browser: Browser) -> None:
    browser.open(write_samples(tmp_path))
    sizes = browser.run(
        "Promise.all([...document.images].map(i => i.decode().then(() => "
        "[i.naturalWidth, i.naturalHeight])))"
    )
    assert sizes == [[48, 32]] * (1 + 16 + 2)
