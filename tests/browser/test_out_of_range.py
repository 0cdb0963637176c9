"""A selection of something that a view does not have, from Python or from a view of another model; and parts of a page
whose answer it does not carry."""

import re

import pytest

import gemmascope as gs
from gemmascope.widgets.export import page as page_of
from tests.browser.every_view import SETUP, VIEWS

BEYOND = [
    dict(pos=999, key=999, layer=99, head=99, expert=999, neuron=10**6, token=10**9, site="nonsense"),
    dict(pos=-999, key=-999, layer=-99, head=-99, expert=-99, neuron=-9, token=-5, site=""),
]
WRONG = re.compile(r"NaN|undefined|\bnull\b|=(?:999|-99)\b")


@pytest.fixture(scope="module")
def names() -> dict:
    made = {}
    exec(SETUP, made)
    return made


@pytest.mark.browser
@pytest.mark.parametrize("name", VIEWS)
def test_what_is_not_there_breaks_nothing(open_view, names, name):
    page = open_view(eval(VIEWS[name], {**names, "selection": (selection := gs.Selection())}))
    for beyond in BEYOND:
        for field, value in beyond.items():
            setattr(selection, field, value)
        page.wait_for_timeout(150)
        assert page.locator(".notice").is_hidden(), page.locator(".notice").inner_text()
        page.get_by_role("button", name="Table").click()
        text = page.locator("main").inner_text()
        page.get_by_role("button", name="Python").click()
        code = page.locator(".aside pre").inner_text()
        compile(code, name, "exec")
        assert not WRONG.findall(text + code)
        page.get_by_role("button", name="Python").click()


@pytest.mark.browser
def test_a_probe_that_read_no_text_is_copied_with_its_score(open_view, names):
    page = open_view(eval(VIEWS["ProbeView"], names))
    shown = page.locator(".readout").inner_text()
    page.get_by_role("button", name="Python").click()
    *lines, last = page.locator(".aside pre").inner_text().splitlines()
    found = {"probes": names["probes"]}
    exec("\n".join(lines), found)
    assert f"{float(eval(last, found)):.3f}" in shown


@pytest.mark.browser
def test_a_grid_that_has_nothing_to_show_is_still(open_file, names):
    view = eval(VIEWS["AttributionView"], {**names, "selection": gs.Selection(pos=3)})  # the page holds the last one
    view.state = {**view.state, "form": "grid"}
    page = open_file(page_of(view))
    grid = page.locator(".matrix").first
    page.locator(".matrix canvas").first.dispatch_event("mousemove")
    page.locator(".matrix canvas").first.dispatch_event("click")
    grid.focus()
    page.keyboard.press("ArrowDown")
    assert "This page does not hold that" in page.locator(".notice").inner_text()
