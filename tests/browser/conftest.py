"""The system's Chromium, driven by Playwright, with nothing to reach: every name but loopback's resolves to nowhere."""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gemmascope.widgets import assets
from gemmascope.widgets.arrays import apart
from gemmascope.widgets.base import View

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
LIVE = Path(__file__).with_name("live.js")


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
        widgets: dict[str, object] = {}

        def from_page(message: dict):
            widget = widgets[message["ref"]]
            if "question" in message:
                if getattr(widget, "kernel_is_gone", False):
                    return {"gone": True}
                response, buffers = widget.ask(message["question"], [])
                return {"response": response, "buffers": list(map(_text, buffers))}
            for name, value in message["changed"].items():
                setattr(widget, name, value)
            return None

        html = live_page(view, widgets)
        page = open_file(html, prepare=lambda page: page.expose_function("toPython", from_page), **how)
        for ref, widget in widgets.items():
            names = [name for name in widget.keys if name in ("data", "state") or name in getattr(widget, "NAMES", ())]
            widget.observe(lambda change, ref=ref: _to_page(page, ref, change), names)
        return page

    return open_


@pytest.fixture
def settled() -> Callable:
    """settled(page) waits until Python has heard of everything that the page changed."""
    return lambda page: page.evaluate("() => window.sent")


def live_page(view: View, widgets: dict[str, object]) -> str:
    """The page of a live view; fills `widgets` by reference."""
    models, scripts = {}, {}

    def add(widget) -> None:
        ref = f"anywidget:{widget.model_id}"
        if ref in widgets:
            return
        widgets[ref] = widget
        traits = {}
        for name in ("data", "state", "selection", "children", *getattr(widget, "NAMES", ())):
            if not widget.has_trait(name):
                continue
            value = getattr(widget, name)
            for one in value if isinstance(value, list) else [value]:
                if hasattr(one, "model_id"):
                    add(one)
            traits[name] = _refs(value)
        plain, buffers = apart(traits)
        models[ref] = {"traits": plain, "buffers": list(map(_text, buffers))}
        if isinstance(widget, View):
            models[ref]["render"] = assets.renderer(widget.SCRIPT)
            scripts[assets.renderer(widget.SCRIPT)] = widget.SCRIPT

    add(view)
    script = assets.joined(*scripts.values(), "local_model.js") + LIVE.read_text()
    page = json.dumps({"models": models, "shown": f"anywidget:{view.model_id}"}).replace("<", "\\u003c")
    style = assets.css(*scripts.values())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>live</title><style>{style}</style>'
        f'<body class="gsc-page"><script type="module">{script}\nshowLive({{ {", ".join(scripts)} }}, {page});</script>'
    )


def _refs(value):
    if isinstance(value, list):
        return [_refs(one) for one in value]
    return f"anywidget:{value.model_id}" if hasattr(value, "model_id") else value


def _text(buffer: bytes) -> str:
    return base64.b64encode(buffer).decode("ascii")


def _to_page(page, ref: str, change) -> None:
    """What Python set reaches the page; what the page set does not come back to it as a change."""
    plain, buffers = apart(change["new"])
    script = "([ref, name, value, buffers]) => models[ref].receive(name, value, buffers)"
    page.evaluate(script, [ref, change["name"], plain, list(map(_text, buffers))])
