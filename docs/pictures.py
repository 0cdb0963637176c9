"""Makes the pictures of the README and of docs/gallery.md from the views themselves: python docs/pictures.py [NAME ...]

Needs Chromium and Playwright, as the browser tests do. Each picture is one view, live on the shipped model, light and
dark.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from tests.browser.every_view import SETUP, VIEWS  # noqa: E402
from tests.browser.live import opened_live  # noqa: E402

CHROMIUM = os.environ.get("GEMMASCOPE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH = 1040


def bench(page) -> None:
    for name in ("layer 1 head 1", "layer 3 head 2"):
        page.get_by_role("switch", name=name, exact=True).click()
    page.locator(".commit").click()
    page.locator(".log [role=option]").nth(1).wait_for()


def grid(page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    page.wait_for_function("() => /90 of 90/.test(document.body.innerText)", timeout=60_000)
    page.locator(".matrix canvas").click(position={"x": 640, "y": 175})


BEFORE = {"AblationBench": bench, "PatchGrid": grid}
"""What is done in a view before its picture is taken."""


def main(wanted: list[str]) -> None:
    made: dict = {}
    exec(SETUP, made)
    torch.set_grad_enabled(False)
    folder = ROOT / "docs" / "pictures"
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name in wanted or VIEWS:
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport={"width": WIDTH, "height": 900}, color_scheme=scheme)
                page = context.new_page()

                def open_html(html, prepare, page=page):
                    path = Path(scratch) / "page.html"
                    path.write_text(html, encoding="utf-8")
                    prepare(page)
                    page.goto(path.as_uri())
                    page.wait_for_selector("[data-drawn]")
                    return page

                opened_live(eval(VIEWS[name], made), open_html)
                page.wait_for_timeout(1500)
                BEFORE.get(name, lambda page: None)(page)
                page.mouse.move(0, 0)
                page.wait_for_timeout(800)
                page.locator(".gsc").first.screenshot(path=folder / f"{name}-{scheme}.png")
                context.close()
            print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
