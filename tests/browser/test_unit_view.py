"""The unit view in a browser: reading, examples, a text of one's own, steering."""

import pytest

import gemmascope as gs
from gemmascope.widgets.export import page as html_of

pytestmark = pytest.mark.browser

NAMES = ("Mary", "Anna", "John", "Tom")
TEXTS = [f"When {a} and {b} went to the store, {b} gave a book to {a}." for a in NAMES for b in NAMES if a != b]


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def unit(model, texts=TEXTS, **given):
    return gs.unit_view(model, "blocks.5.mlp.hook_post", texts, neuron=21, **given)


def ready(page) -> None:
    page.wait_for_selector(".unit .two [role=option]")


def test_texts_are_read_until_stopped_and_on(open_view, model):
    page = open_view(unit(model, TEXTS * 25))
    page.get_by_role("button", name="Stop").click()
    assert "of 300 texts" in page.locator(".unit .controls").first.inner_text()
    page.get_by_role("button", name="Read on").click()
    page.wait_for_function("() => document.querySelector('progress').hidden")
    assert "300 texts, 5100 tokens" in page.locator(".unit .controls").first.inner_text()


def test_arrows_move_among_examples_and_select_the_unit(open_view, settled, model):
    view = unit(model)
    page = open_view(view)
    ready(page)
    page.get_by_role("grid", name="Examples").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    settled(page)
    second = view.examples.iloc[1]
    assert (view.state["text"], view.state["pos"]) == (second["text"], second["pos"] - 1)
    assert (view.selection.layer, view.selection.neuron) == (5, 21)
    assert f"of text {second['text']}" in page.locator("[role=status]").inner_text()


def test_an_own_text_is_read_and_steered(open_view, open_file, settled, model):
    view = unit(model)
    page = open_view(view)
    ready(page)
    page.get_by_role("textbox", name="Your own text").fill("Later Mary and <b>John</b>")
    page.keyboard.press("Enter")
    page.get_by_text("Your text", exact=True).wait_for()
    page.locator(".example").first.locator(".token").last.click()
    page.get_by_role("radio", name="added everywhere").check()
    page.get_by_role("button", name="Commit").click()
    page.wait_for_selector(".pairs [role=option]")
    settled(page)
    steered = {**view.state["steered"]}
    assert steered.pop("strength") == pytest.approx(view.examples["activation"].max(), rel=0.05)
    assert steered == {"text": "Later Mary and <b>John</b>", "mode": "add"}
    told = page.locator(".pairs").inner_text()
    page = open_file(html_of(view))
    page.wait_for_selector(".pairs [role=option]")
    assert page.locator(".pairs").inner_text() == told
    assert page.get_by_role("slider").is_disabled()


def test_nothing_found_is_said(open_view, model):
    page = open_view(gs.unit_view(model, ("moe.hook_expert_out", 4), TEXTS, expert=5))
    page.wait_for_function("() => document.querySelector('.unit').innerText.includes('active nowhere')")
    page.get_by_role("button", name="Read your text").click()
    assert "Write some text" in page.locator("[role=status]").inner_text()
