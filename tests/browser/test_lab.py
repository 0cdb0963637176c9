"""`gemmascope lab` as a person uses it: JupyterLab opens on the first notebook, and it runs, without a network."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_first_look.ipynb"
PANEL = "window.jupyterapp?.shell?.currentWidget"


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab of its own, opened on a copy of the notebook (Lab saves what it runs)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    copy = shutil.copy(NOTEBOOK, tmp_path)
    options = ["--allow-root", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0"]
    options += ["--IdentityProvider.token=first", "--LabApp.expose_app_in_browser=True"]
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    folders += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    own = {name: str(tmp_path / "jupyter" / name.lower()) for name in folders}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "gemmascope.cli", "lab", str(copy), "--", *options]
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with suppress(OSError):
                urllib.request.urlopen(f"{address}/api?token=first", timeout=5)
                break
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.25)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the kernel too
        server.wait(20)


@pytest.mark.browser
@pytest.mark.slow
def test_first_notebook_runs_in_jupyterlab(lab, browser):
    context = browser.new_context(viewport={"width": 1300, "height": 1600})
    page, outside = context.new_page(), []

    def only_the_server(route):
        if route.request.url.startswith((lab, "data:", "blob:")):
            return route.continue_()
        outside.append(route.request.url)
        return route.abort()

    page.route("**/*", only_the_server)
    page.goto(f"{lab}/?token=first")  # which leads to what `gemmascope lab` opens
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_function(f"() => {PANEL}?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    cells = f"[...{PANEL}.content.model.cells].filter(cell => cell.type === 'code')"
    page.wait_for_function(f"() => {cells}.every(cell => cell.executionCount > 0)", timeout=240_000)
    errors = page.evaluate(
        f"() => {cells}.flatMap(cell => cell.outputs.toJSON()).filter(o => o.output_type === 'error')"
    )
    assert errors == []
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=30_000)
    assert outside == []
    context.close()
