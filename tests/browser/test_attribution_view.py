"""The attribution view in a browser: opened part by part, by keyboard and mouse, and in an exported page."""

import re

import numpy as np
import pytest

import gemmascope as gs
from gemmascope.views.run import Run
from gemmascope.widgets.attribution_view import AttributionView
from gemmascope.widgets.export import page as html_of

pytestmark = pytest.mark.browser

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(gs.load("nano-moe"), PROMPT)


def said(page) -> str:
    return page.locator("[role=status]").inner_text()


def shown(page, text: str) -> None:
    """Waits until the view says something: answers come in their own time."""
    page.wait_for_function("text => document.querySelector('.gsc').innerText.includes(text)", arg=text)


def picked(page, name: str) -> str:
    return page.get_by_role("listbox", name=name, exact=True).locator("[aria-selected=true]").inner_text()


def printed(page, capsys) -> list[tuple[float, float]]:
    """Runs the Python of the view: the numbers it prints, beside those that its comments promise."""
    page.get_by_role("button", name="Python").click()
    code = page.locator(".aside pre").inner_text()
    capsys.readouterr()
    exec(code, {})
    return list(zip(map(float, capsys.readouterr().out.split()), map(float, re.findall(r"# (\S+)", code)), strict=True))


def test_from_the_total_to_a_source_token_by_keyboard(open_view, settled, run, capsys):
    view = gs.attribution_view(run.model, run, " Mary", " John", selection=gs.Selection(layer=0))
    page = open_view(view)
    shown(page, "Layer 0 attention, by head")
    assert "The 13 components add up to" in page.locator(".sum").first.inner_text()
    page.get_by_role("listbox", name="Waterfall of components").focus()
    page.keyboard.press("PageDown")
    shown(page, "Layer 1 attention, by head")
    settled(page)
    assert (view.selection.layer, view.selection.site) == (1, "blocks.1.hook_attn_out")
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    shown(page, "Where head 3 took it from")
    page.keyboard.press("[")
    shown(page, "Where head 2 took it from")
    settled(page)
    assert view.selection.head == 2
    page.keyboard.press("Enter")
    for key, at in {"Home": 0, "ArrowRight": 1, "ArrowDown": 2}.items():
        page.keyboard.press(key)
        settled(page)
        assert view.selection.key == at, key
    assert picked(page, "Source tokens") == "·Mary"
    assert "Head 2 of layer 1 from 2 ·Mary: +" in said(page)
    assert all("add up to" in text for text in page.locator(".sum:visible").all_inner_texts()[:3])
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowUp")
    settled(page)
    assert view.selection.head == 1
    shown(page, "Where head 1 took it from")
    numbers = printed(page, capsys)
    assert len(numbers) == 3
    for found, promised in numbers:
        assert found == pytest.approx(promised, abs=2e-6)


def test_the_position_and_the_head_of_other_views_are_followed(open_view, settled, run):
    view = gs.attribution_view(run.model, run, selection=gs.Selection(layer=2, head=1))
    page = open_view(view)
    shown(page, "after 14 ·to")
    shown(page, "Where head 1 took it from")
    view.selection.pos = 9
    shown(page, "after 9 ,")
    page.get_by_role("button", name="Position before").click()
    settled(page)
    assert view.selection.pos == 8
    shown(page, "after 8 ·store")
    view.selection.expert = 0
    shown(page, "Layer 2 feed-forward")
    view.selection.head = 3
    shown(page, "Where head 3 took it from")
    view.selection.site = "hook_embed"
    shown(page, "It is written as a whole and has no parts.")


def test_the_tokens_are_chosen_from_the_list_or_typed(open_view, settled, run):
    view = gs.attribution_view(run.model, run)
    page = open_view(view)
    shown(page, "logit of ·Mary minus logit of")
    first, second = page.get_by_label("logit of", exact=True), page.get_by_label("minus", exact=True)
    usual = page.get_by_role("button", name="the two likeliest")
    assert usual.is_disabled()
    second.select_option("none")
    shown(page, "logit of ·Mary, after 14 ·to")
    settled(page)
    mary = run.model.to_single_token(" Mary")
    assert view.state == {"form": "waterfall", "correct": mary, "wrong": None}
    second.select_option("typed")
    box = page.get_by_label("minus: its text")
    box.fill("Mary")
    box.press("Enter")
    shown(page, "'Mary' is 2 tokens, not one")
    box.fill("·John")
    box.press("Enter")
    shown(page, "logit of ·Mary minus logit of ·John, after 14 ·to")
    assert page.locator("[role=alert]").is_hidden()
    first.select_option(str(run.model.to_single_token(" John")))
    shown(page, "logit of ·John minus logit of ·Mary")
    settled(page)
    assert (view.state["correct"], view.state["wrong"]) == (run.model.to_single_token(" John"), mary)
    usual.click()
    settled(page)
    assert (view.state["correct"], view.state["wrong"]) == (None, None)


def test_the_grid_by_keyboard(open_view, settled, run, capsys):
    view = gs.attribution_view(run.model, run, state={"form": "grid"}, selection=gs.Selection(layer=3, head=0))
    page = open_view(view)
    grid = page.get_by_role("grid", name="Attribution by layer and component")
    shown(page, "the embedding, not in the grid")
    grid.focus()
    page.keyboard.press("ArrowLeft")  # over the gap, to the experts' sum
    settled(page)
    assert view.selection.site == "blocks.3.hook_mlp_out"
    shown(page, "Layer 3 feed-forward")
    assert "The experts of layer 3 together: " in said(page)
    walk = {"Left": ["The dense branch", "Attention"], "Right": ["The dense branch", "The experts", "Head 0"]}
    for way, names in walk.items():
        for name in names:
            page.keyboard.press(f"Arrow{way}")
            settled(page)
            assert f"{name} of layer 3" in said(page)
    page.keyboard.press("End")
    settled(page)
    assert view.selection.expert == 7
    assert "Expert 7 of layer 3" in said(page)
    for found, promised in printed(page, capsys):
        assert found == pytest.approx(promised, abs=2e-6)
    page.get_by_label("as").select_option("waterfall")
    settled(page)
    assert view.state["form"] == "waterfall"
    assert page.get_by_role("listbox", name="Waterfall of components").is_visible()


def test_a_dense_model_opens_into_neurons(open_view, settled):
    model = gs.load("nano-edge")
    view = gs.attribution_view(model, PROMPT, selection=gs.Selection(layer=6, site="blocks.6.hook_mlp_out"))
    page = open_view(view)
    shown(page, "Layer 6 feed-forward, by neuron")
    page.locator(".bars [role=option]").first.click()
    settled(page)
    assert f"neuron {view.selection.neuron}" in picked(page, "Parts")
    view.selection.site = "blocks.6.hook_ple_out"
    shown(page, "It is written as a whole and has no parts.")


def test_parts_that_do_not_add_up_are_said(open_view):
    model = gs.load("nano-moe")
    with model.hooks(fwd_hooks=[("blocks.3.hook_attn_out", lambda x, hook: x * 2)]):
        page = open_view(gs.attribution_view(model, PROMPT, selection=gs.Selection(layer=3, head=0)))
    shown(page, "Layer 3 attention, by head")
    assert "A hook changed what lies between" in page.locator(".opened .sum").first.inner_text()
    assert "A hook" not in page.locator(".attribution > .sum").inner_text()


def made_up(values, **more) -> AttributionView:
    one = {"id": 1, "text": "<script>alert(1)</script>\u202e"}
    first = {"pos": 0, "correct": one, "wrong": None, "values": values, "total": 3.0, "rest": float(np.nan)}
    first |= {"capped": 2.0, "likeliest": [one], "probs": np.array([0.5], np.float32)}
    layers = [{"kind": "global", "window": None, "kv_source": None}] * 2
    answers = {"components": lambda **_: first, "heads": lambda **_: {"values": np.zeros((2, 2), np.float32)}}
    answers |= {"sources": lambda **_: {"values": np.ones(1, np.float32), "attention": np.ones(1, np.float32)}}
    return AttributionView(["a" * 10_000], layers, first, kinds=["attn", "mlp"], n_heads=2, answers=answers, **more)


def test_what_is_no_number_is_counted_and_hostile_text_stays_text(open_view):
    page = open_view(made_up(np.array([1, 2, np.nan, np.inf, 0], np.float32), selection=gs.Selection(layer=0)))
    shown(page, "2 components without a number")
    shown(page, "The 5 components do not add up: 2 numbers missing")
    assert "<script>alert(1)</script>\\u{202e}" in page.locator("h4").first.inner_text()


def test_an_exported_page_opens_what_it_carries(open_file, run):
    html = html_of(gs.attribution_view(run.model, run))
    assert len(html) < 250_000
    page = open_file(html, width=620, scheme="dark")
    page.get_by_role("listbox", name="Waterfall of components").focus()
    page.keyboard.press("Home")
    shown(page, "It is written as a whole and has no parts.")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    shown(page, "Neurons of the dense branch")
    page.keyboard.press("ArrowLeft")
    shown(page, "Layer 5 attention, by head")
    page.get_by_role("listbox", name="Parts", exact=True).locator("[role=option]").nth(3).click()
    shown(page, "Where head 3 took it from")
    assert page.locator("[role=alert]").is_hidden()
    page.get_by_role("button", name="Position before").click()
    shown(page, "This page does not hold that")
    page.get_by_role("button", name="Position after").click()
    page.wait_for_selector("[role=alert]", state="hidden")
