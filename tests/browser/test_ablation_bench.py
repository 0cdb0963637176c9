"""The ablation bench in a browser: switches, commits, the log, and what is copied from it."""

import contextlib
import io
import re

import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.widgets.export import page as html_of

pytestmark = pytest.mark.browser

TEXT = "When Mary and John went to the park, John gave a ball to"


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def bench(model, **given):
    return gs.ablation_bench(model, TEXT, answers=(" Mary", " John"), **given)


def switch(page, name: str):
    return page.get_by_role("switch", name=name, exact=True)


def commit(page, settled) -> None:
    """Commits, and waits for the log."""
    entries = page.locator(".log [role=option]").count()
    page.get_by_role("button", name="Commit", exact=True).click()
    page.wait_for_function(f"() => document.querySelectorAll('.log [role=option]').length === {entries + 1}")
    settled(page)


def test_a_head_switched_off_moves_the_bars_and_the_copied_python_says_the_same(open_view, settled, model):
    view = bench(model)
    page = open_view(view)
    head = switch(page, "layer 4 head 1")
    assert head.get_attribute("aria-checked") == "true"
    before = page.locator(".pairs").inner_text()
    head.click()
    settled(page)
    assert head.get_attribute("aria-checked") == "false"
    assert (view.selection.layer, view.selection.head) == (4, 1)
    assert page.locator(".pairs").inner_text() == before, "staged, not committed"
    commit(page, settled)
    assert page.locator(".pairs").inner_text() != before
    assert view.interventions == [gs.zero("blocks.4.attn.hook_z", heads=1)]
    assert list(view.commits["off"]) == ["layer 4 head 1"]

    page.get_by_role("button", name="Python").click()
    text = page.locator(".aside pre").inner_text()
    assert 'gs.zero("blocks.4.attn.hook_z", heads=1)' in text
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(text, {})
    told = [re.findall(r"-?\d+\.\d+", line.split("#")[-1]) for line in text.splitlines() if line.startswith("print")]
    assert [re.findall(r"-?\d+\.\d+", line) for line in printed.getvalue().splitlines()] == told
    shown = " ".join(page.locator(".facts, .pairs").all_inner_texts())
    assert all(number in shown for line in told for number in line)


def test_undo_and_redo_walk_the_log(open_view, settled, model):
    view = bench(model)
    page = open_view(view)
    for name in ("layer 2 head 2", "layer 3 attention"):
        switch(page, name).click()
        commit(page, settled)
    assert list(view.commits["off"]) == ["layer 2 head 2", "layer 2 head 2, layer 3 attention"]
    last = page.locator(".facts").inner_text()
    page.keyboard.press("Control+z")
    settled(page)
    assert view.state["at"] == 0 and view.state["on"] == [["head", 2, 2]]
    assert page.locator(".log [aria-selected=true]").inner_text().startswith("1")
    page.get_by_role("button", name="Undo").click()
    settled(page)
    assert view.state["at"] == -1 and view.interventions == []
    page.get_by_role("button", name="Redo").click()
    page.keyboard.press("Control+Shift+Z")
    settled(page)
    assert view.state["at"] == 1
    page.wait_for_function("text => document.querySelector('.facts').innerText === text", arg=last)


def test_keys_move_and_switch_and_every_switch_may_commit(open_view, settled, model):
    view = bench(model, state={"live": True})
    page = open_view(view)
    switch(page, "layer 1 head 0").focus()
    for key in ("ArrowRight", "ArrowDown", "]", "PageDown"):
        page.keyboard.press(key)
    settled(page)
    assert (view.selection.layer, view.selection.head) == (3, 2)
    page.keyboard.press("Space")
    page.wait_for_selector(".log [role=option]:nth-child(2)[aria-selected=true]")
    settled(page)
    assert view.state["on"] == [["head", 3, 2]] and len(view.commits) == 1


def test_a_second_commit_waits_for_the_first(open_view, model):
    page = open_view(bench(model))
    page.evaluate(
        """() => { const python = window.toPython; window.toPython = async (m) => {
        if (m.question?.question === 'effect') await new Promise((go) => (window.go = go)); return python(m); }; }"""
    )
    switch(page, "layer 0 feed-forward").click()
    button = page.locator(".commit")
    button.click()
    assert button.is_disabled() and button.inner_text() == "Running …"
    assert "running" in page.locator(".pending").inner_text()
    page.keyboard.press("Control+Enter")
    page.evaluate("() => window.go()")
    page.wait_for_selector(".log [role=option]:nth-child(2)")
    assert page.locator(".log [role=option]").count() == 2


def test_what_goes_wrong_is_said_in_the_view(open_view, model):
    page = open_view(bench(model))
    for expert in range(8):
        switch(page, f"layer 0 expert {expert}").click()
    page.locator(".commit").click()
    page.wait_for_selector("[role=alert]:not([hidden])")
    assert "none is left to step in" in page.locator("[role=alert]").inner_text()
    assert page.locator(".commit").is_enabled()
    for kind in ("mean", "resample"):
        assert page.get_by_role("radio", name=kind).is_disabled()
        assert "reference=" in page.locator(f"label:has([value={kind}])").get_attribute("title")


def test_neurons_and_sets(open_view, settled, model):
    view = bench(model)
    page = open_view(view)
    view.selection.layer = 3
    page.get_by_role("spinbutton").fill("17")
    page.get_by_role("button", name="Switch this neuron").click()
    page.get_by_role("textbox", name="Name of the set").fill("<b>mine</b>")
    page.get_by_role("button", name="Save the set").click()
    page.get_by_role("button", name="All on").click()
    settled(page)
    assert view.state["on"] == [] and view.state["sets"] == {"<b>mine</b>": [["neuron", 3, 17]]}
    page.get_by_role("button", name="<b>mine</b>", exact=True).click()
    settled(page)
    assert view.interventions == [gs.zero("blocks.3.mlp.hook_post", neurons=17)]


def test_an_exported_page_shows_what_was_committed(open_view, open_file, settled, model):
    view = bench(model)
    page = open_view(view)
    switch(page, "layer 2 head 2").click()
    commit(page, settled)
    figures = page.locator(".facts").inner_text()
    page = open_file(html_of(view))
    assert page.locator(".facts").inner_text() == figures
    assert page.locator(".log [role=option]").count() == 2
    head = switch(page, "layer 2 head 2")
    assert head.get_attribute("aria-checked") == "false" and head.is_disabled()
    assert "no model to run" in head.get_attribute("title")


def test_experts_have_the_words_of_the_router_view(open_view, model):
    bench_page, router = open_view(bench(model)), open_view(gs.router_view(model, TEXT))
    words = bench_page.get_by_label("experts").locator("option").all_inner_texts()
    assert [": ".join(text.split("\n")) for text in router.locator(".maker").all_inner_texts()][:2] == words


def test_a_large_model_unfolds_the_layer_that_is_selected(open_view):
    kinds = tuple("global" if layer % 6 == 5 else "sliding" for layer in range(30))
    view = gs.ablation_bench(tiny_model("26B-A4B", n_layers=30, layer_kinds=kinds, n_experts=64), torch.arange(5, 9))
    page = open_view(view)
    assert page.get_by_role("switch").count() < 200
    assert switch(page, "layer 7 expert 63").count() == 0
    view.selection.layer, view.selection.head = 7, 2
    switch(page, "layer 7 expert 63").wait_for()
    assert page.locator(".switch.here").get_attribute("aria-label") == "layer 7 head 2"
    page.get_by_role("button", name="layer 8, sliding").click()
    switch(page, "layer 8 head 0").wait_for()
