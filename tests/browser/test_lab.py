"""The story of the first notebook, as a person lives it in the browser: `gemmascope lab` (which `make lab` runs) opens
it, a head is found by eye, switched off, the bars move, and the Python that is copied gives the same numbers."""

import re
from pathlib import Path

import pytest

from tests.browser.jupyter import Jupyter, Notebook

FIRST = Path(__file__).parents[2] / "notebooks" / "01_first_look.ipynb"
DIAGONAL = """els => els.map(el => {
    const [side, ctx] = [el.width, el.getContext("2d")];
    const light = (x, y) => { const [r, g, b] = ctx.getImageData(x, y, 1, 1).data; return r + g + b; };
    const cell = side / 40, at = i => Math.floor((i + 0.5) * cell);
    let dark = 0;  // in the light theme, what is read most is darkest
    for (let query = 21; query < 40; query++) dark -= light(at(query - 19), at(query));
    return dark;
})"""
"""How dark each thumbnail is along its second diagonal: from a token's second time to the one after its first."""


@pytest.mark.browser
@pytest.mark.slow
def test_a_head_found_by_eye_is_switched_off_and_the_copied_python_says_the_same(browser, tmp_path):
    server = Jupyter(tmp_path, opens=FIRST)
    context = browser.new_context(viewport={"width": 1400, "height": 2600})
    try:
        notebook = Notebook(server, context, FIRST.name, "opened")
        notebook.run_all()
        page = notebook.page
        heads = page.locator(".gsc:has(.thumbs)")
        heads.scroll_into_view_if_needed()
        page.wait_for_timeout(1500)  # thumbnails come layer by layer
        found = heads.locator(".thumb canvas").evaluate_all(DIAGONAL)
        eye = heads.locator(".thumb").nth(found.index(max(found)))
        eye.click()
        layer, head = map(int, re.findall(r"\d+", eye.get_attribute("aria-label"))[:2])
        assert notebook.python("print(heads.selection.layer, heads.selection.head)") == f"{layer} {head}"
        assert layer == 2  # where the notebook says they are

        bench = page.locator(".gsc:has(.bench)")
        bench.scroll_into_view_if_needed()
        before = bench.locator(".pairs").inner_text()
        bench.get_by_role("switch", name=f"layer {layer} head {head}", exact=True).click()
        bench.locator(".commit").click()
        bench.locator(".log [role=option]").nth(1).wait_for(timeout=15_000)
        page.wait_for_function("text => document.querySelector('.pairs').innerText !== text", arg=before)
        assert notebook.python("print(bench.interventions)").count("Intervention") == 1

        bench.get_by_role("button", name="Python", exact=True).click()
        text = bench.locator(".aside pre").inner_text()
        told = [
            re.findall(r"-?\d+\.\d+", line.split("#")[-1]) for line in text.splitlines() if line.startswith("print")
        ]
        printed = notebook.python(f"exec({text!r}, {{}})").splitlines()
        assert [re.findall(r"-?\d+\.\d+", line) for line in printed] == told
        on_screen = " ".join(bench.locator(".facts, .pairs").all_inner_texts())
        assert told and all(figure in on_screen for line in told for figure in line)
        assert (notebook.outside, notebook.errors) == ([], [])
    finally:
        context.close()
        server.close()
