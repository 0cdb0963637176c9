"""The map of a model in a browser: opening, finding, copying a name, and the selection that follows."""

import pytest
import torch

import gemmascope as gs
from gemmascope.widgets.export import page as html_of

pytestmark = pytest.mark.browser

PROMPT = "When Mary and John went to the store, John gave a book to"


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def status(page) -> str:
    return page.locator(".readout").inner_text()


def test_the_keyboard_opens_a_layer_and_selects_a_hook_point(open_view, settled, model):
    view = gs.model_map(model, PROMPT)
    page = open_view(view)
    page.locator(".tree").focus()
    for key in ("PageDown", "PageDown", "PageDown", "ArrowRight"):
        page.keyboard.press(key)
        settled(page)
    assert view.selection.layer == 2 and view.state["open"] == [2]
    assert status(page).startswith(
        "layer 2: global, a query sees every position; 4 query heads, 2 kv heads, its own keys, which"
    )
    page.locator(".site .norm").first.filter(has_text=".").wait_for()
    page.keyboard.press("ArrowDown")
    assert status(page).startswith("layer 2, step 1: attention")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    settled(page)
    assert view.selection.site == "blocks.2.hook_resid_pre"
    shown = page.locator(".site[aria-selected=true] .norm").inner_text()
    page.get_by_role("button", name="Python").click()
    names: dict = {}
    *lines, last = page.locator(".aside pre").inner_text().splitlines()
    exec("\n".join(lines), names)
    assert f"{float(eval(last, names)):.3f}" == shown
    page.locator(".tree").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
        settled(page)
    assert view.state["open"] == []


def test_it_follows_what_another_view_selects(open_view, model):
    view = gs.model_map(model, state={"open": [4]})
    page = open_view(view)
    view.selection.site = "blocks.4.attn.hook_z"
    assert status(page).startswith("blocks.4.attn.hook_z [pos, head 4, d_head 32]: per-head value mix")
    view.selection.layer = 5
    assert status(page).startswith("layer 5: global")
    view.selection.site = "blocks.1.hook_mlp_out"  # in a layer that is closed
    assert status(page).startswith("layer 1: sliding, a query sees 16 positions")


def test_a_filter_is_a_text_or_a_regular_expression(open_view, settled, model):
    page = open_view(gs.model_map(model))
    box = page.get_by_role("searchbox")
    box.fill(r"^blocks\.[0-2]\..*hook_z$")
    assert page.locator(".site").count() == 3 and "3 hook points" in page.locator(".controls").inner_text()
    box.fill("neurons of the chosen")
    assert page.locator(".site .name").all_inner_texts() == ["hook_expert_post"] * 6
    box.fill("hook_(")
    assert "is no regular expression" in page.get_by_role("alert").inner_text()
    assert page.get_by_text("No hook point has that").count() == 1 and box.input_value() == "hook_("
    page.locator(".tree").focus()
    page.keyboard.press("Enter")
    n = sum(name.startswith("blocks.0.") for name in model.sites)
    box.fill("hook")  # too many to open all
    assert page.locator(".site").count() == 0 and page.get_by_text(f"{n} matches").count() == 6
    assert page.get_by_role("alert").count() == 0


def test_the_largest_one_fits_a_laptop_and_an_export(open_file):
    with torch.device("meta"):
        model = gs.HookedGemma4(gs.PRESETS["google/gemma-4-31B"])
    html = html_of(gs.model_map(model, state={"open": [59]}))
    assert len(html) < 200_000
    page = open_file(html, scheme="dark", width=600)
    assert page.get_by_role("treeitem", name="layer 59").get_attribute("aria-expanded") == "true"
    page.get_by_role("treeitem", name="layer 58").click()
    assert "global" not in status(page) and status(page).startswith("layer 58: sliding, a query sees 1024 positions")
    page.get_by_role("treeitem", name="hook_mlp_out").last.click()
    assert status(page).removeprefix("Copied. ").startswith("blocks.59.hook_mlp_out [pos, d_model 5,376]")
