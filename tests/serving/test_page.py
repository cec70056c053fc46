"""The page in a real browser: send images, move the sliders, meet an error, watch a job."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import httpx
import pytest

from tests.serving.browser import Browser
from tests.serving.running import TOKEN

SCREENSHOTS = os.environ.get("ONEPASS_SCREENSHOTS")
"""Folder to keep screenshots in, for a person to look at."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        message = "needs the program chromium, which drives the page; install Debian's package chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    opened = Browser(program, tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def shoot(browser: Browser, name: str, tmp_path: Path) -> None:
    browser.screenshot(Path(SCREENSHOTS or tmp_path) / f"{name}.png")


def pixels(browser: Browser, canvas: str) -> list[int]:
    """A few samples of the first result's canvas, so that two states of it can be compared."""
    script = f"""(() => {{ const c = document.querySelector('article canvas.{canvas}');
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, k) => k % 997 === 0); }})()"""
    return browser.run(script)


def mean(browser: Browser, canvas: str) -> list[float]:
    """Mean red, green and blue of the first result's canvas."""
    return browser.run(f"""(() => {{ const c = document.querySelector('article canvas.{canvas}'), s = [0, 0, 0];
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        for (let k = 0; k < d.length; k += 4) for (let j = 0; j < 3; j++) s[j] += d[k + j];
        return s.map((v) => v / (d.length / 4)); }})()""")


def move(browser: Browser, slider: str, value: int) -> None:
    browser.run(f"(() => {{ {slider}.value = {value}; {slider}.dispatchEvent(new Event('input')); }})()")


GIVE = """(() => {{
    const bytes = Uint8Array.from(atob('{data}'), (c) => c.charCodeAt(0));
    const carried = new DataTransfer();
    carried.items.add(new File([bytes], '{name}', {{type: 'image/jpeg'}}));
    {event};
}})()"""
DROP = """document.getElementById('drop').dispatchEvent(
    new DragEvent('drop', {dataTransfer: carried, bubbles: true, cancelable: true}))"""
PASTE = "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: carried, bubbles: true}))"


@pytest.mark.parametrize(("event", "name"), [(DROP, "dropped.jpg"), (PASTE, "pasted.jpg")])
def test_an_image_that_is_dropped_or_pasted(
    service: httpx.Client, browser: Browser, jpeg: Callable[[int], bytes], event: str, name: str
) -> None:
    browser.open(str(service.base_url))
    browser.run(f"document.getElementById('token').value = {TOKEN!r}")
    browser.run(GIVE.format(data=base64.b64encode(jpeg(4)).decode(), name=name, event=event))
    browser.until("document.getElementById('status').textContent === '1 scored.'")
    assert browser.run("document.querySelector('article h3').textContent").startswith(f"{name}: ")


def test_an_image_from_choosing_to_seeing(
    service: httpx.Client, browser: Browser, jpeg: Callable[[int], bytes], shared_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "drawn.jpg").write_bytes(jpeg(4))
    browser.open(str(service.base_url))
    browser.run(f"document.getElementById('token').value = {TOKEN!r}")
    photograph = shared_dir / "data" / "sample_images" / "odd" / "exif_6.jpg"
    browser.choose("#file", tmp_path / "drawn.jpg", photograph)
    browser.until("document.getElementById('status').textContent === '2 scored.'")
    assert browser.run("document.querySelectorAll('article').length") == 2
    answer = service.post("/v1/saliency", content=photograph.read_bytes()).json()
    assert browser.run("document.querySelector('article h3').textContent") == f"exif_6.jpg: {answer['class_name']}"
    assert browser.run("document.querySelector('article canvas.overlay').width") == answer["width"]
    assert browser.run("document.querySelectorAll('article:first-child .classes li').length") == 5
    assert "ms" in browser.run("document.querySelector('article .figures').textContent")
    shoot(browser, "scored", tmp_path)

    before = {name: pixels(browser, name) for name in ("overlay", "inside", "outside")}
    move(browser, "opacity", 0)
    browser.run("document.getElementById('box').click()")
    plain = pixels(browser, "overlay")
    assert plain != before["overlay"]
    picture = cv2.imread(str(photograph))[..., ::-1].reshape(-1, 3).mean(0)
    shown = mean(browser, "overlay")
    assert shown == pytest.approx(picture, abs=2)  # without opacity and box, the upright photograph itself
    move(browser, "threshold", 50)
    assert pixels(browser, "inside") != before["inside"]
    assert pixels(browser, "outside") != before["outside"]
    assert browser.run("document.querySelector('output[for=threshold]').value") == "0.50"
    move(browser, "opacity", 80)
    shoot(browser, "threshold", tmp_path)
    move(browser, "threshold", 0)


def test_what_is_no_image_says_so(service: httpx.Client, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "words.jpg").write_text("these are words")
    browser.choose("#file", tmp_path / "words.jpg")
    browser.until("document.querySelector('article .error:not([hidden])') !== null")
    assert browser.run("document.querySelector('article .error').textContent").startswith("undecodable: ")
    assert browser.run("document.getElementById('status').textContent") == "1 of 1 could not be scored."
    shoot(browser, "error", tmp_path)


def test_a_format_that_the_browser_does_not_know(
    service: httpx.Client, browser: Browser, shared_dir: Path, tmp_path: Path
) -> None:
    photograph = shared_dir / "data" / "sample_images" / "odd" / "photo.tiff"
    browser.choose("#file", photograph)
    browser.until("document.getElementById('status').textContent === '1 scored.'")
    assert browser.run("document.querySelector('article canvas.overlay').width") == 160
    assert browser.run("[...document.querySelectorAll('article:first-child figure')].every((f) => f.offsetHeight > 0)")
    shoot(browser, "tiff", tmp_path)
    drawn = mean(browser, "overlay"), mean(browser, "inside")
    move(browser, "opacity", 0)
    plain = cv2.imread(str(photograph))[..., ::-1].reshape(-1, 3).mean(0)
    assert mean(browser, "overlay") == pytest.approx(plain, abs=2) != drawn[0]
    move(browser, "threshold", 50)
    assert mean(browser, "inside") != drawn[1]
    move(browser, "opacity", 80)
    move(browser, "threshold", 0)


def test_a_picture_that_cannot_be_shown_says_so(
    service: httpx.Client, browser: Browser, shared_dir: Path, tmp_path: Path
) -> None:
    browser.run("window.decodedByService = async () => null")  # as when the service has become busy in between
    browser.choose("#file", shared_dir / "data" / "sample_images" / "odd" / "photo.tiff")
    browser.until("document.querySelector('article:first-child .error:not([hidden])') !== null")
    assert "this browser cannot show it" in browser.run("document.querySelector('article .error').textContent")
    assert browser.run("document.querySelectorAll('article:first-child .classes li').length") == 5
    assert browser.run("document.querySelector('article .pictures').hidden")


def test_jobs_are_shown(service: httpx.Client, browser: Browser, tmp_path: Path) -> None:
    name = service.post("/v1/jobs", json={"input": "in", "output": "from-page", "shard_size": 2}).json()["id"]
    row = f"[...document.querySelectorAll('#job-rows tr')].find((r) => r.cells[0].textContent === {name!r})"
    browser.until(f"{row} !== undefined")
    button = f"{row}.querySelector('button')"
    assert browser.run(f"{button}.getAttribute('aria-label')") == f"Cancel job {name}"
    shoot(browser, "jobs", tmp_path)
    browser.run(f"{button}.click()")
    browser.until(f"{row}.cells[1].textContent === 'cancelled'")
    assert service.get(f"/v1/jobs/{name}").json()["state"] == "cancelled"


def test_keyboard_and_screen_reader(service: httpx.Client, browser: Browser) -> None:
    browser.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(6):
        browser.press("Tab", 9)
        reached.append(browser.run("document.activeElement.id"))
    assert reached[:5] == ["file", "opacity", "threshold", "box", "smooth"]
    browser.run("opacity.focus()")
    before = browser.run("Number(opacity.value)")
    browser.press("ArrowRight", 39)
    assert browser.run("Number(opacity.value)") == before + 1
    assert [name.split()[0] for name in browser.accessible_names("slider")] == ["Opacity", "Threshold"]
    assert all(
        browser.accessible_names(role) != [] and "" not in browser.accessible_names(role)
        for role in ("checkbox", "heading")
    )
    assert any(name.startswith("Evidence for class") for name in browser.accessible_names("image"))


def test_nothing_went_wrong_unseen(browser: Browser) -> None:
    assert [text for text in browser.complaints if "401" not in text and "422" not in text] == []
