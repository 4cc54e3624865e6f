"""The page in a real browser: a picture dropped, phrases typed, masks seen; nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image
from pipelines_world import export_untrained
from playwright.sync_api import Browser, Page, sync_playwright
from service_world import listening, picture
from tiny_world import Tiny

from benchmarks.fuzz_service import saved
from pipelines.service.app import create_app
from pipelines.service.engine import Served
from ris_core.predictor import RISPredictor

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
PHRASES = ["the red circle", "left"]
PICTURE = picture(3, 160, 240)
SYSTEMS = ["cris", "lts"]
# Puts a file where the mouse would let it fall.
DROP = """([text, name, type]) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const given = { dataTransfer: transfer, bubbles: true, cancelable: true };
  for (const kind of ["dragover", "drop"]) document.getElementById("drop").dispatchEvent(new DragEvent(kind, given));
}"""
PIXELS = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return [canvas.width, canvas.height, Array.from(data)];
}"""
# The contrast of an element's text to the nearest ground behind it, as WCAG 2 reckons it.
CONTRAST = """(element) => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ink = light(parts(getComputedStyle(element).color));
  let behind = element;
  while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const ground = light(parts(getComputedStyle(behind).backgroundColor));
  return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM} on this machine")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=OPTIONS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def folders(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("shown")
    for system in SYSTEMS:
        export_untrained(tiny, place / system, system)
    return {system: place / system for system in SYSTEMS}


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[httpx.Client]:
    with listening(create_app([Served(name, folder) for name, folder in folders.items()])) as found:
        yield found


@contextmanager
def opened(browser: Browser, client: httpx.Client, **options: Any) -> Iterator[Page]:
    """The page in a tab of its own, which must load nothing from another host and complain of nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    page = context.new_page()
    hosts: set[str] = set()
    complaints: list[str] = []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(str(client.base_url))
    page.set_default_timeout(20_000)
    yield page
    context.close()
    assert hosts - {""} == {client.base_url.netloc.decode()}  # blobs and data have no host
    assert [each for each in complaints if "the server responded with a status of 4" not in each] == []


def drop(page: Page, content: bytes, name: str = "shapes.png", kind: str = "image/png") -> None:
    page.evaluate(DROP, [base64.b64encode(content).decode(), name, kind])


def pixels(page: Page, place: int) -> np.ndarray:
    """What a canvas of the answers shows, uint8 (H, W, 3)."""
    width, height, data = page.locator(".phrase canvas").nth(place).evaluate(PIXELS)
    return np.array(data, np.uint8).reshape(height, width, 4)[:, :, :3]


def answered(page: Page, cards: int) -> None:
    page.locator("figure").nth(cards - 1).wait_for()
    assert page.locator("figure").count() == cards


def test_a_picture_is_dropped_and_masks_are_seen(
    browser: Browser, client: httpx.Client, folders: dict[str, Path], tmp_path: Path
) -> None:
    with opened(browser, client) as page:
        page.get_by_label("cris").wait_for()
        drop(page, PICTURE)
        page.get_by_label("Phrases").fill("\n".join(PHRASES))
        page.get_by_label("Show where systems looked").check()
        page.get_by_role("button", name="Find").click()
        answered(page, 4)
        assert page.locator(".phrase h2").all_text_contents() == PHRASES
        assert page.locator("figcaption .system").all_text_contents() == SYSTEMS * 2
        assert "2 phrases" in page.locator("#status").text_content()
        assert page.locator("figure").nth(1).locator("canvas").count() == 2  # LTS' mask, and its map
        assert "this system has none" in page.locator("figure").nth(0).text_content()
        plain = np.asarray(Image.open(io.BytesIO(PICTURE)))
        predictor = RISPredictor.from_folder(folders["cris"])
        (expected, _) = predictor.answer(predictor.encode(PICTURE), PHRASES)
        assert 0.01 < expected.mask.mean() < 0.99, "else the test shows little"
        darkened = np.abs(pixels(page, 0) - plain * 0.55).max(axis=2) <= 1
        assert (darkened != expected.mask).mean() > 0.98
        assert f"{100 * expected.mask.mean():.1f} % of the picture" in page.locator(".score").nth(0).text_content()
        page.screenshot(path=tmp_path / "answers.png", full_page=True)
    assert (tmp_path / "answers.png").stat().st_size > 20_000


def test_the_threshold_and_the_systems_are_chosen(browser: Browser, client: httpx.Client) -> None:
    with opened(browser, client) as page:
        page.get_by_label("lts").uncheck()
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": PICTURE})
        page.get_by_label("Phrases").fill("the star")
        page.get_by_label("Phrases").press("Control+Enter")
        answered(page, 1)
        page.get_by_label("Threshold").fill("1")
        page.get_by_text("Nothing found").wait_for()
        assert page.locator("#level").text_content() == "1.00"
        assert page.get_by_role("img", name="cris found nothing for “the star”").count() == 1


def test_a_picture_is_shown_upright(browser: Browser, client: httpx.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = saved(Image.open(io.BytesIO(PICTURE)).transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
    with opened(browser, client) as page:
        page.get_by_label("cris").wait_for()
        page.get_by_label("Phrases").fill("left")
        drop(page, stored, "turned.jpg", "image/jpeg")
        answered(page, 2)
        assert pixels(page, 0).shape == (160, 240, 3)
        assert page.locator(".note").all_text_contents() == ["", ""]


def test_what_is_wrong_is_told_in_words(browser: Browser, client: httpx.Client) -> None:
    with opened(browser, client) as page:
        page.get_by_label("cris").wait_for()
        page.get_by_role("button", name="Find").click()
        assert page.get_by_role("alert").text_content() == "First choose a picture, then write a phrase."
        drop(page, b"no picture at all", "notes.txt", "text/plain")
        page.get_by_label("Phrases").fill("left")
        page.get_by_role("button", name="Find").click()
        page.get_by_text("it is none of the image formats read here").first.wait_for()
        drop(page, PICTURE)
        answered(page, 2)
        assert page.get_by_role("alert").count() == 0
        page.get_by_label("Phrases").fill("left\n" + "long " * 200)
        page.get_by_role("button", name="Find").click()
        answered(page, 4)
        assert (
            page.locator(".failed").all_text_contents() == ["The expression has 999 characters; 500 are the most"] * 2
        )


def test_the_token_is_asked_for_and_kept_by_the_tab(browser: Browser, folders: dict[str, Path]) -> None:
    app = create_app([Served("cris", folders["cris"])], token="open-sesame")
    with listening(app) as client, opened(browser, client) as page:
        dialog = page.get_by_role("dialog")
        for given, title in (("wrong", "This service wants a token"), ("open-sesame", "That was not the token")):
            dialog.get_by_text(title).wait_for()
            dialog.get_by_label("Token").fill(given)
            dialog.get_by_label("Token").press("Enter")
        page.get_by_label("cris").wait_for()
        drop(page, PICTURE)
        page.get_by_label("Phrases").fill("left")
        page.get_by_role("button", name="Find").click()
        answered(page, 1)
        page.reload()
        page.get_by_label("cris").wait_for()
        assert not dialog.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(scheme: Any, browser: Browser, client: httpx.Client) -> None:
    with opened(browser, client, color_scheme=scheme) as page:
        page.get_by_label("cris").wait_for()
        page.get_by_role("button", name="Find").click()
        drop(page, PICTURE)
        page.get_by_label("Phrases").fill("left")
        page.get_by_role("button", name="Find").click()
        answered(page, 2)
        for selector in (
            "h1",
            "header p",
            "label",
            "legend",
            ".hint",
            "button",
            "a",
            "figcaption",
            ".score",
            "#phrases",
            "small",
        ):
            assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector


def test_it_works_by_keyboard_and_on_a_telephone(browser: Browser, client: httpx.Client) -> None:
    with opened(browser, client) as page:
        page.get_by_label("cris").wait_for()
        order = []
        for _ in range(8):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id"))
        assert order[:7] == ["file", "phrases", "model-0", "model-1", "threshold", "location", "find"]
        page.set_viewport_size({"width": 360, "height": 640})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
