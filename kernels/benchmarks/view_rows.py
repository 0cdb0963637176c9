"""What views cost in a browser: Chromium without a GPU, JupyterLab where a way through the kernel is part of it."""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rows import Row, Variants

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the tests' pages are what is measured
SETUP = """
import gemmascope as gs
model = gs.load("nano-moe")
prompt = gs.repeated_tokens(model, length=32, n=1)[:, :-1]
"""
HOP = """async () => {
    const strip = document.querySelector(".strip"), views = [...document.querySelectorAll(".gsc[data-drawn]")];
    const times = [];
    for (let i = 0; i < 40; i++) {
        const before = views.map((view) => view.dataset.drawn), start = performance.now();
        strip.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft", bubbles: true }));
        while (views.some((view, j) => view.dataset.drawn === before[j])) await Promise.resolve();
        times.push(performance.now() - start);
        await new Promise((done) => setTimeout(done, 50));
    }
    return times;
}"""
COMMIT = """async () => {
    const bench = document.querySelector(".bench").closest(".gsc"), times = [];
    const find = (text) => [...bench.querySelectorAll("button")].find((button) => button.textContent === text);
    for (let i = 0; i < 12; i++) {
        bench.querySelectorAll("[role=switch].head")[i].click();
        await new Promise((done) => setTimeout(done, 200));
        const rows = bench.querySelectorAll(".log [role=option]").length, start = performance.now();
        find("Commit").click();
        while (bench.querySelectorAll(".log [role=option]").length === rows || !find("Commit"))
            await new Promise(requestAnimationFrame);
        await new Promise(requestAnimationFrame);
        times.push(performance.now() - start);
    }
    return times;
}"""


@contextmanager
def _browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    from tests.browser.conftest import ARGS, CHROMIUM

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGS)
        yield browser
        browser.close()


def in_lab(cell: str, script: str) -> float:
    """The median, in milliseconds, of what a script measures on a cell's view in JupyterLab."""
    from tests.browser.jupyter import Jupyter, Notebook

    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        server = Jupyter(Path(folder))
        try:
            server.write("a.ipynb", SETUP, cell)
            notebook = Notebook(server, browser.new_context(viewport={"width": 1400, "height": 2400}), "a.ipynb")
            notebook.run_all()
            notebook.page.locator(".gsc[data-drawn]").first.wait_for(timeout=60_000)
            notebook.page.wait_for_timeout(3000)
            return statistics.median(notebook.page.evaluate(script)[2:])
        finally:
            server.close()


def _long_attention(n: int, heads: int | None = None):
    """An attention view of n random tokens: of nano-moe, or of one layer with that many heads."""
    from dataclasses import replace

    import torch

    import gemmascope as gs

    model = gs.load("nano-moe")
    if heads is not None:
        cfg = replace(model.cfg, n_layers=1, layer_kinds=("global",), n_heads=heads)
        model = gs.HookedGemma4(cfg, model.tokenizer)
    model.cfg = replace(model.cfg, n_ctx=max(n, model.cfg.n_ctx))
    tokens = torch.randint(300, 900, (1, n), generator=torch.Generator().manual_seed(0))
    names = [f"blocks.{layer}.attn.hook_rot_{one}" for layer in range(model.cfg.n_layers) for one in "qk"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=names, return_type=None)
    return gs.attention_view(model, cache)


def painted(what: str) -> float:
    """One layer of 8 heads over 1,024 tokens, every head's map looked at once: MB that crossed, the median time from a
    head's selection to its map, or kB of state that a notebook would save."""
    from tests.browser.live import opened_live

    view = _long_attention(1024, heads=8)
    if what == "saved":
        state = {name: value for name, value in view.get_state().items() if not name.startswith("_")}
        return len(json.dumps(state, default=len)) / 1e3
    crossed, asked = [], view.ask

    def counted(message, buffers):
        answer = asked(message, buffers)
        crossed.append(len(json.dumps(answer[0])) + sum(map(len, answer[1])))
        return answer

    object.__setattr__(view, "ask", counted)
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1400})

        def open_html(html, prepare):
            path = Path(folder) / "page.html"
            path.write_text(html, encoding="utf-8")
            prepare(page)
            page.goto(path.as_uri())
            page.wait_for_selector("[data-drawn]")
            return page

        opened_live(view, open_html)
        page.wait_for_timeout(3000)
        times = []
        for head in range(8):
            already = len(crossed)
            start = time.perf_counter()
            view.selection.head = head
            while len(crossed) == already and head != view.data["start"][1]:
                page.wait_for_timeout(1)
            page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            times.append((time.perf_counter() - start) * 1e3)
            page.wait_for_timeout(1000)
        return statistics.median(times) if what == "painted" else sum(crossed) / 1e6


def tiles(n: int) -> float:
    """The median time, in milliseconds, of an answer to "tile" at random places and levels of a long prompt, once the
    layer's thumbnails are there."""
    import random

    view = _long_attention(n)
    for layer, shape in enumerate(view.data["layers"]):
        for part in range(shape["parts"]):
            view.answer("thumbs", {"layer": layer, "part": part})
    times, drawn = [], random.Random(0)
    for _ in range(60):
        z = drawn.randrange(7)
        side = -(-n // (256 << z))
        y = drawn.randrange(side)
        place = {"layer": 2, "head": drawn.randrange(4), "z": z, "x": drawn.randrange(y + 1), "y": y}
        start = time.perf_counter()
        view.ask({"question": "tile", "arguments": place}, [])
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def exported(n: int) -> float:
    """MB of an exported dashboard of every view of a prompt."""
    import torch

    import gemmascope as gs

    model = gs.load("nano-moe")
    tokens = torch.randint(300, 900, (1, n), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        return gs.dashboard(model, tokens).to_html(Path(folder) / "page.html").stat().st_size / 1e6


def _figure(run, *given) -> Variants:
    return {"gemmascope": partial(run, *given)}


def view_rows() -> Iterator[Row]:
    board = 'gs.dashboard(model, prompt, views=["token_strip", "attention_view"])'
    bench = "gs.ablation_bench(model, prompt)"
    long, lab = "1 layer, 8 heads, 1024 tokens", "64 tokens of nano-moe, JupyterLab"
    for name, wanted, run, shape, unit in (
        ("view_hop", "under 20 ms", (in_lab, board, HOP), f"{lab}, strip to attention", "ms (page)"),
        ("view_commit", "under 300 ms", (in_lab, bench, COMMIT), lab, "ms (page)"),
        ("view_wire", "at most 9 MB", (painted, "wire"), f"{long}, every map", "MB"),
        ("view_painted", "under 500 ms", (painted, "painted"), f"{long}, a map", "ms (page)"),
        ("view_saved", "under 100 kB", (painted, "saved"), long, "kB"),
        ("view_tile", "under 100 ms", (tiles, 32768), "32768 tokens of nano-moe, global layer", "ms (answer)"),
        ("view_export", "under 5 MB", (exported, 256), "dashboard, 256 tokens of nano-moe", "MB"),
    ):
        yield Row(name, wanted, partial(_figure, *run), shape, "float32", mode="view", unit=unit)
