"""``predict serve`` as a person uses it: in a real browser, with a server of its own process."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from eve_ds.errors import exit_code
from eve_ds.predict import EVE
from eve_ds.predict.__main__ import main
from eve_ds.predict.image_index import ImageIndex
from tests.support.browser import Visit, chromium, drop, visit
from tests.support.predicting import exported, image_files

__all__ = ["chromium", "visit"]
QUESTION = "what color is the square"
EVIL = "<b>x"


class Place(NamedTuple):
    """Models vqa, itr and nlvr, an index, its images, and the address of the page."""

    folder: Path
    images: list[str]
    url: str

    def eve(self, name: str) -> EVE:
        return EVE.from_pretrained(self.folder / name)


def started(*options: object) -> tuple[subprocess.Popen[str], str]:
    """The command, once it has printed its address."""
    command = [sys.executable, "-m", "eve_ds.predict", "serve", "--port", "0", "--device", "cpu", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://"), line + process.communicate()[1]
    return process, line.split()[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("serve")
    for name, task in (("vqa", "vqa"), ("itr", "retrieval"), ("nlvr", "nlvr_plain")):
        exported(folder / name, task)
    images = image_files(folder / "photos", 5)
    index = folder / "photos.index"
    making = ["index", f"{folder}/photos", "--out", str(index), "--checkpoint", f"{folder}/itr", "--num_workers", "0"]
    assert exit_code(lambda: main(making)) == 0
    models = [word for name in ("vqa", "itr", "nlvr") for word in ("--checkpoint", folder / name)]
    process, url = started(*models, "--index", index, "--max_upload", 1)
    assert url.startswith("http://127.0.0.1:")
    yield Place(folder, images, url)
    process.terminate()  # SIGTERM ends it quietly
    assert process.communicate() == ("", "") and process.returncode == 0


def ask(page: Page, question: str = QUESTION) -> None:
    page.fill("#question", question)
    page.click("#ask button")


def shown_heat(page: Page, section: str) -> np.ndarray:
    """[images, R, C], what the section's heat maps show."""
    found = page.eval_on_selector_all(f"{section} .images canvas", "all => all.map(one => Array.from(one.heat))")
    return np.array(found).reshape(len(found), 4, 4)


def cells(page: Page, section: str) -> list[list[str]]:
    rows = page.locator(f"{section} tbody tr").all()
    return [[text for text in row.locator("th, td").all_inner_texts() if text] for row in rows]


def test_a_dropped_image_is_answered_as_by_the_command(
    place: Place, visit: Visit, capsys: pytest.CaptureFixture[str]
) -> None:
    image = place.images[0]
    assert exit_code(lambda: main(["answer", image, QUESTION, "--checkpoint", str(place.folder / "vqa")])) == 0
    printed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    page = visit(place.url)
    ask(page)
    expect(page.locator("#ask .state")).to_have_text("choose an image first")
    drop(page, ".picker", "zero.png", Path(image).read_bytes())
    expect(page.locator(".picker .note").first).to_have_text("zero.png, 32 \u00d7 32 pixels")
    ask(page)
    expect(page.locator("#ask .state")).to_contain_text("Done")
    assert cells(page, "#ask") == [[answer, probability] for probability, answer in printed]


def test_heat_maps_are_the_attention_of_the_word_and_the_block_that_are_chosen(place: Place, visit: Visit) -> None:
    maps = place.eve("vqa").attention(place.images[1], QUESTION)
    assert maps.of_answer is not None
    page = visit(place.url)
    page.set_input_files("#image", place.images[1])
    ask(page)
    words = page.locator("#ask .words button")
    expect(words).to_have_text(["the answer", *maps.words])
    assert np.allclose(shown_heat(page, "#ask"), maps.of_answer[-1:], atol=1e-5)
    picture = "canvas => canvas.toDataURL()"
    before = page.eval_on_selector("#ask .images canvas", picture)
    words.nth(3).click()
    assert words.nth(3).get_attribute("aria-pressed") == "true"
    assert np.allclose(shown_heat(page, "#ask"), maps.of_word[-1:, 2], atol=1e-5)
    assert page.eval_on_selector("#ask .images canvas", picture) != before
    page.fill("#ask input[type=range]", "1")
    assert np.allclose(shown_heat(page, "#ask"), maps.of_word[:1, 2], atol=1e-5)
    page.check("#ask input[type=checkbox]")
    assert np.allclose(shown_heat(page, "#ask"), maps.of_word[:, 2].mean(axis=0), atol=1e-5)
    hottest = np.argmax(maps.of_word[:, 2].mean(axis=0))
    canvas = page.locator("#ask .images canvas")
    box = canvas.bounding_box()
    assert box is not None
    row, column = divmod(int(hottest), 4)
    canvas.hover(position={"x": (column + 0.5) / 4 * box["width"], "y": (row + 0.5) / 4 * box["height"]})
    expect(page.locator("#ask .attention .note")).to_contain_text(f"Row {row + 1}, column {column + 1}: ")


def test_texts_are_matched_and_a_statement_is_judged(place: Place, visit: Visit) -> None:
    texts = ["a red square", EVIL, "two dogs"]
    page = visit(place.url)
    page.set_input_files("#image", place.images[0])
    page.fill("#texts", "\n\n".join(texts))
    page.click("#match form button")
    expect(page.locator("#match .attention")).to_be_visible()
    found = sorted(
        zip(texts, place.eve("itr").match(place.images[0], texts), strict=True), key=lambda f: -f[1].probability
    )
    expected = [[text, f"{one.probability:.4f}", f"{one.similarity:.4f}", "Attention"] for text, one in found]
    assert cells(page, "#match") == expected
    page.locator("#match tbody tr").nth(2).get_by_role("button").click()
    expect(page.locator("#match .words button").nth(1)).to_have_text(re.compile(f"^{found[2][0][0]}"))

    page.set_input_files("#second", place.images[1])
    page.fill("#statement", "both are red")
    page.click("#judge form button")
    expect(page.locator("#judge .attention canvas")).to_have_count(3)  # two images and the colors
    eve = place.eve("nlvr")
    verdict = eve.judge(*place.images[:2], "both are red")
    text = f"{str(verdict.true).lower()} · probability of true {verdict.probability:.4f}"
    expect(page.locator("#judge .verdict")).to_have_text(text)
    maps = [eve.attention(image, "both are red").of_answer for image in place.images[:2]]
    assert np.allclose(shown_heat(page, "#judge"), [each[-1] for each in maps if each is not None], atol=1e-5)


def test_the_index_is_searched_by_text_and_by_image(place: Place, visit: Visit) -> None:
    index, eve = ImageIndex(place.folder / "photos.index"), place.eve("itr")
    page = visit(place.url)
    page.set_input_files("#image", place.images[2])
    for press, vector in (
        ("#search form button", eve.text_features("a square")),
        ("#alike", eve.image_features(place.images[2])),
    ):
        page.fill("#wanted", "a square")
        page.fill("#k", "3")
        page.locator(press).first.click()
        expect(page.locator("#search .state")).to_contain_text("Done")
        hits = index.search(vector[None], 3)[0]
        expected = [f"{rank}. {hit.path} {hit.score:.4f}" for rank, hit in enumerate(hits, 1)]
        expect(page.locator("#search figcaption")).to_have_text(expected)
        for hit in page.locator(".hits li").all():  # not by wait_for_function: to poll, it needs eval in the page
            expect(hit.locator("img")).not_to_have_js_property("naturalWidth", 0)
    assert hits[0].path == Path(place.images[2]).name


def test_what_is_no_image_or_too_large_is_told_and_the_page_goes_on(place: Place, visit: Visit) -> None:
    page = visit(place.url)
    drop(page, "body", "evil.png", b"no image at all")
    ask(page)
    expect(page.locator("#ask .state")).to_contain_text("the image cannot be decoded")
    drop(page, "body", "large.png", bytes(2**20 + 1))
    expect(page.locator("#picked")).to_have_text("large.png has 2 MB; 1 MB are taken")
    page.set_input_files("#image", place.images[0])
    ask(page, EVIL)
    expect(page.locator("#ask .attention")).to_be_visible()
    expect(page.locator("#ask .words")).to_contain_text("<")
    assert page.locator("#ask b").count() == 0
    request = urllib.request.Request(
        f"{place.url}api/answer", bytes(2**21), {"Content-Type": "multipart/form-data; boundary=x"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413
    assert json.load(refused.value) == {
        "error": "the request is too large: images of 1 MB in all and at most 100 fields are taken"
    }


def test_idle_connections_keep_nobody_out(place: Place) -> None:
    address = urlsplit(place.url)
    with ExitStack() as idle:
        for _ in range(200):  # waitress would take 100
            idle.enter_context(socket.create_connection((address.hostname, address.port)))
        with urllib.request.urlopen(place.url, timeout=60) as answer:
            assert answer.status == 200


def test_the_keyboard_is_enough_and_a_narrow_screen_too(place: Place, visit: Visit) -> None:
    page = visit(place.url, viewport={"width": 360, "height": 700}, color_scheme="dark")
    page.set_input_files("#image", place.images[0])
    page.focus("#image")
    page.keyboard.press("Tab")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator("#ask .attention")).to_be_visible()
    for _ in range(3):  # the button, the answer, the first word
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#ask .words [aria-pressed=true]")).to_have_text("what")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_parts_follow_from_the_checkpoints_an_open_address_is_warned_of_and_control_c_ends_it(
    place: Place, visit: Visit
) -> None:
    process, url = started("--checkpoint", place.folder / "vqa", "--host", "0.0.0.0")
    page = visit(f"http://127.0.0.1:{urlsplit(url).port}/")
    assert [one.get_attribute("id") for one in page.locator("section").all()] == ["ask"]
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert (out, process.returncode, errors.count("\n")) == ("", 0, 1)
    assert errors.startswith("WARNING: --host 0.0.0.0: whoever reaches this machine can use the page")
