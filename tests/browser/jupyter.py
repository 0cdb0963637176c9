"""A Jupyter server of a test's own on loopback, and a notebook open in it: JupyterLab or Notebook 7."""

import json
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

import nbformat

TOKEN = "first"
CONFIG = """
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.port_retries = 0
c.ServerApp.open_browser = False
c.ServerApp.allow_root = True
c.ServerApp.disable_check_xsrf = True
c.IdentityProvider.token = "first"
c.LabApp.expose_app_in_browser = True
c.JupyterNotebookApp.expose_app_in_browser = True
c.LabApp.extension_manager = "readonly"
c.LabApp.news_url = None
"""
QUIET = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
"""No toast stands over the page's corner."""
NOT_OURS = ("reading 'schema'", "filebrowser:open-path", "Failed to load resource", "Error loading language")
"""What Notebook 7 and Lab say of themselves."""
_PANEL = "window.jupyterapp.shell.currentWidget"
_KERNEL = f"({_PANEL}.sessionContext || {_PANEL}.context.sessionContext).session?.kernel"


class Jupyter:
    """The server: JupyterLab, or `gemmascope lab` on a copy of a notebook (Lab saves what it runs)."""

    def __init__(self, root: Path, opens: Path | None = None):
        self.root, self.work = root, root / "work"
        self.work.mkdir()
        command = ["jupyter", "lab", f"--ServerApp.root_dir={self.work}"]
        if opens is not None:
            command = ["gemmascope.cli", "lab", shutil.copy(opens, self.work), "--"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        config = root / "config"
        settings = config / "lab" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        (config / "jupyter_server_config.py").write_text(CONFIG)
        (settings / "notification.jupyterlab-settings").write_text(json.dumps(QUIET))
        own = {
            "JUPYTER_CONFIG_DIR": config,
            "JUPYTER_DATA_DIR": root / "data",
            "JUPYTER_RUNTIME_DIR": root / "run",
            "IPYTHONDIR": root / "ipython",
            "JUPYTERLAB_SETTINGS_DIR": config / "lab",
            "JUPYTERLAB_WORKSPACES_DIR": config / "workspaces",
        }
        environment = os.environ | {name: str(place) for name, place in own.items()}
        with (root / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command, f"--port={self.port}"],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        for _ in range(240):
            with suppress(OSError):
                self.api("/api/status")
                return
            assert self.process.poll() is None, (root / "log").read_text()
            time.sleep(0.25)
        raise TimeoutError((root / "log").read_text())

    def api(self, path: str, method: str = "GET") -> object:
        request = urllib.request.Request(
            self.address + path, method=method, headers={"Authorization": f"token {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            body = answer.read()
            return json.loads(body) if body else None

    def write(self, name: str, *cells: str) -> None:
        """A notebook of code cells."""
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        notebook.cells = [nbformat.v4.new_code_cell(cell, id=f"cell{i}") for i, cell in enumerate(cells)]
        nbformat.write(notebook, self.work / name)

    def end_kernels(self) -> None:
        """A kernel outlives its page, and would give the next one its variables."""
        for session in self.api("/api/sessions"):
            self.api(f"/api/sessions/{session['id']}", "DELETE")

    def close(self) -> None:
        with suppress(OSError):
            self.end_kernels()
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(20)


class Notebook:
    """A notebook open in a page. `outside` lists what it asked of the network beyond the server, `errors` what went
    wrong in it."""

    def __init__(self, server: Jupyter, context, name: str, app: str = "lab"):
        self.page, self.outside, self.errors = context.new_page(), [], []
        self.page.on("pageerror", lambda error: self._error(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self._error(message.text))

        def only_the_server(route):
            if route.request.url.startswith((server.address, "data:", "blob:")):
                return route.continue_()
            self.outside.append(route.request.url)
            return route.abort()

        self.page.route("**/*", only_the_server)
        path = {
            "lab": f"/doc/tree/{name}?reset&",
            "notebook": f"/notebooks/{name}?factory=Notebook&",
            "opened": "/?",  # which leads to what `gemmascope lab` opens
        }[app]
        self.page.goto(f"{server.address}{path}token={TOKEN}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        ready = f"() => window.jupyterapp?.shell?.currentWidget && {_KERNEL}?.status === 'idle'"
        self.page.wait_for_function(ready, timeout=90_000)

    def _error(self, text: str) -> None:
        if not any(known in text for known in NOT_OURS):
            self.errors.append(text)

    def run_all(self) -> None:
        """Runs every cell and waits for them; a cell that fails fails the test."""
        self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        cells = f"[...{_PANEL}.content.model.cells].filter(cell => cell.type === 'code')"
        self.page.wait_for_function(f"() => {cells}.every(cell => cell.executionCount > 0)", timeout=240_000)
        outputs = self.page.evaluate(f"() => {cells}.flatMap(cell => cell.outputs.toJSON())")
        failed = [output for output in outputs if output["output_type"] == "error"]
        assert failed == []

    def python(self, code: str) -> str:
        """What code prints in the notebook's kernel, without a cell."""
        status, out = self.page.evaluate(
            """async code => {
                const future = KERNEL.requestExecute({ code, store_history: false });
                let out = "";
                future.onIOPub = message => {
                    if (message.header.msg_type === "stream") out += message.content.text;
                    if (message.header.msg_type === "error") out += message.content.traceback.join("\\n");
                };
                const reply = await future.done;
                return [reply.content.status, out];
            }""".replace("KERNEL", _KERNEL),
            code,
        )
        assert status == "ok", out
        return out.strip()
