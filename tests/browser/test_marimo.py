"""Views in marimo, through `mo.ui.anywidget`."""

import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest

from tests.browser.every_view import SETUP, VIEWS

pytest.importorskip("marimo")


def app(views: dict[str, str]) -> str:
    """A notebook of marimo's: a cell that makes the views, then a cell for each."""
    made = "".join(f"    {name} = mo.ui.anywidget({code})\n" for name, code in views.items())
    setup = "".join(f"    {line}\n" for line in SETUP.strip().splitlines())
    names = ", ".join(views)
    cells = "".join(f"\n@app.cell\ndef _({name}):\n    {name}\n    return\n" for name in views)
    return (
        "import marimo\n\napp = marimo.App()\n\n@app.cell\ndef _():\n    import marimo as mo\n"
        f"{setup}{made}    return {names}, selection\n{cells}"
    )


@pytest.fixture
def marimo(tmp_path):
    """serve(views) -> the address at which marimo shows them."""
    servers = []

    def serve(views: dict[str, str]) -> str:
        path = tmp_path / "app.py"
        path.write_text(app(views))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "marimo", "-q", "run", str(path), "--headless", f"--port={port}", "--no-token"]
        with (tmp_path / "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        servers.append(server)
        for _ in range(240):
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                return f"http://127.0.0.1:{port}"
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.25)
        raise TimeoutError((tmp_path / "log").read_text())

    yield serve
    for server in servers:
        server.terminate()
        server.wait(20)


@pytest.mark.browser
@pytest.mark.slow
def test_every_view_draws_and_links(marimo, browser):
    address = marimo(VIEWS)
    context = browser.new_context(viewport={"width": 1200, "height": 1200})
    page, outside = context.new_page(), []

    def only_the_server(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        outside.append(route.request.url)
        return route.abort()

    page.route("**/*", only_the_server)
    page.goto(address)
    page.wait_for_function(f"() => {{ {ROOTS} return roots().length === {len(VIEWS)} }}", timeout=60_000)
    page.locator(".token").nth(3).click()
    linked = f"() => {{ {ROOTS} return roots().filter(root => /\\b3 .and/.test(root.textContent)).length }}"
    page.wait_for_function(f"({linked})() >= 3", timeout=10_000)
    assert outside == []
    context.close()


ROOTS = """
const all = (node) =>
  [...node.querySelectorAll("*")].flatMap((el) => [el, ...(el.shadowRoot ? all(el.shadowRoot) : [])]);
const roots = () => all(document).filter((el) => el.matches(".gsc[data-drawn]"));
"""
"""Views drawn, in shadow roots too."""
