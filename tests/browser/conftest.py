"""The system's Chromium, driven by Playwright, with nothing to reach: every name but loopback's resolves to nowhere."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemmascope.widgets.base import View
from tests.browser.live import opened_live

CHROMIUM = os.environ.get("GEMMASCOPE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="session")
def browser() -> Iterator:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium, or name one in GEMMASCOPE_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_file(browser, tmp_path: Path) -> Iterator[Callable]:
    """open_file(html, width=, height=, scheme=): a page from a file, alone. At the end: it asked nothing of the
    network, and nothing went wrong."""
    contexts, troubles = [], []

    def open_(
        html: str, width: int = 1280, height: int = 900, scheme: str = "light", prepare: Callable = lambda p: None
    ):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        path = tmp_path / f"page{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")

        def guard(route):
            if route.request.url == path.as_uri():
                return route.continue_()
            troubles.append(f"asked for {route.request.url}")
            return route.abort()

        context.route("**/*", guard)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        prepare(page)
        page.goto(path.as_uri())
        page.wait_for_selector("[data-drawn]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture
def open_view(open_file) -> Callable:
    """open_view(view, ...): a live view, its Python in this process. What the page selects or keeps is set on the view
    (after `settled(page)`), what it asks is answered by it."""

    def open_(view: View, **how):
        return opened_live(view, lambda html, prepare: open_file(html, prepare=prepare, **how))

    return open_


@pytest.fixture
def settled() -> Callable:
    """settled(page) waits until Python has heard of everything that the page changed."""
    return lambda page: page.evaluate("() => window.sent")
