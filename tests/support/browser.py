"""A real browser for tests of web pages: Debian's Chromium, which may ask no other server than the page's own."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 60_000  # milliseconds; a slow machine is no mistake
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The browser, started once a module."""
    expect.set_options(timeout=PATIENCE)
    assert CHROMIUM.is_file(), f"{CHROMIUM} is not there: run launch/install_test_packages.sh (as root)"
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, as which CI runs; the pages are our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Visit]:
    """Opens a page: ``visit(url, **options of Browser.new_context)``.

    The test fails if one of its pages asks for anything that is not its own origin's, or raises an error.
    """
    wrong: list[str] = []
    contexts = []

    def opened(url: str, **options: Any) -> Page:
        contexts.append(chromium.new_context(**options))
        contexts[-1].set_default_timeout(PATIENCE)
        page = contexts[-1].new_page()

        def guard(route: Route) -> None:
            if _origin(route.request.url) == _origin(url):
                return route.continue_()
            wrong.append(f"a request for {route.request.url}")
            return route.abort()

        page.route("**/*", guard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: "Content Security Policy" in message.text and wrong.append(message.text))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def _origin(url: str) -> tuple[str, str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc, parts.path if parts.scheme == "file" else ""


def drop(page: Page, place: str, name: str, content: bytes, kind: str = "image/png") -> None:
    """Drop a file on the element that the selector ``place`` finds, as a person does from a file manager."""
    transfer = page.evaluate_handle(
        """([name, content, kind]) => {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: kind }));
            return transfer;
        }""",
        [name, base64.b64encode(content).decode(), kind],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(place, event, {"dataTransfer": transfer})
