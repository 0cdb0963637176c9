"""The lens in a browser: keys and clicks select, tokens are pinned, what is read changes, a page works offline."""

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.widgets.export import page as html_of
from gemmascope.widgets.lens_view import LensView

pytestmark = pytest.mark.browser

PROMPT = "When Mary and John went to the store, John gave a book to"


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def chosen(page) -> str:
    return page.locator(".table [aria-selected=true]").inner_text()


def said(page) -> str:
    return page.locator("[role=status]").inner_text()


def pins(page) -> list[str]:
    return page.locator(".pins .name").all_inner_texts()


def test_keys_move_and_pin(open_view, settled, model):
    view = gs.lens_view(model, PROMPT)
    page = open_view(view)
    page.wait_for_selector(".table .hit")
    assert chosen(page) == "·Mary" and "output at 14 ·to" in said(page)
    page.locator(".table").focus()
    page.keyboard.press("Enter")
    assert pins(page) == ["·Mary"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    settled(page)
    assert (view.selection.pos, view.selection.layer) == (13, 4)
    assert view.selection.site == "blocks.4.hook_resid_post"
    assert view.state["pins"] == [model.to_single_token(" Mary")]
    page.keyboard.press("Home")  # along positions
    page.keyboard.press("Shift+ArrowUp")
    settled(page)
    assert (view.selection.pos, view.selection.layer, view.selection.site) == (0, 0, "hook_embed")
    assert said(page).startswith("embed at 0 <bos>")
    view.selection.layer, view.selection.site = 2, None
    assert said(page).startswith("layer 2 at 0")
    page.locator(".pins button").click()
    settled(page)
    assert view.state["pins"] == [] and page.locator(".pins").is_hidden()


def test_a_token_is_followed_over_layers(open_view, settled, model):
    view = gs.lens_view(model, PROMPT)
    page = open_view(view)
    page.wait_for_selector(".bars [role=option]")
    page.locator(".bars [role=option]").nth(1).click()
    settled(page)
    token = view.selection.token
    lens = gs.logit_lens(model, PROMPT, token, positions=14)
    last = lens.rank.only(layer=5).mean
    assert f"rank {int(last)}" in said(page)
    page.locator("select").last.select_option("rank")
    assert page.locator(".layers polyline.picked").count() == 1
    assert page.locator(".layers polyline.faint").count() == 4
    page.locator(".layers").focus()
    page.keyboard.press("ArrowLeft")
    settled(page)
    assert view.selection.layer == 4 and view.state["measure"] == "rank"
    view.selection.token = 900  # not among the listed: its course is asked for
    page.wait_for_function("() => /rank/.test(document.querySelector('[role=status]').textContent)")


def test_what_is_read_is_state(open_view, settled, model):
    view = gs.lens_view(model, PROMPT, tuned=gs.TunedLens(model), state={"site": "resid_mid"})
    page = open_view(view)
    page.wait_for_selector(".bars [role=option]")
    assert "layer 5 after attention at 14" in said(page)
    page.locator("select").nth(1).select_option("resid_mlp")
    page.wait_for_function("() => document.querySelector('[role=status]').textContent.includes('after feed-forward')")
    page.locator("select").first.select_option("tuned")
    page.wait_for_function("() => document.querySelector('[role=status]').textContent.includes('output at 14')")
    settled(page)
    assert (view.state["lens"], view.state["site"]) == ("tuned", "resid_post")
    page.locator("select").nth(2).select_option("entropy")
    settled(page)
    assert view.state["colour"] == "entropy"


@pytest.mark.parametrize("site", ["resid_post", "resid_mid"])
def test_copied_python_gives_the_number_shown(open_view, model, site):
    view = gs.lens_view(model, PROMPT, state={"site": site}, selection=gs.Selection(pos=9, layer=3))
    page = open_view(view)
    page.wait_for_selector(".layers svg")
    page.get_by_role("button", name="Python").click()
    *lines, last = page.locator(".aside pre").inner_text().splitlines()
    found: dict = {}
    exec("\n".join(lines), found)
    with torch.no_grad():
        prob, rank, *_ = eval(last, found)
    assert int(rank) == 0
    assert f"{float(prob):.3f}" == page.locator(".bars .value").first.inner_text()


def test_a_page_works_offline(open_file, model):
    mary, john = (model.to_single_token(name) for name in (" Mary", " John"))
    page = open_file(html_of(gs.lens_view(model, PROMPT, state={"pins": [mary, john]})))
    page.wait_for_selector(".layers polyline.pinned", state="attached")  # a level line has no height
    page.locator(".table [role=gridcell]").first.click()
    page.locator(".bars [role=option]").nth(2).click()
    page.wait_for_selector(".layers polyline.picked", state="attached")
    assert page.locator(".notice").is_hidden()
    assert page.locator("select").first.locator("option").all_inner_texts() == ["after the layer"]


def test_a_place_that_a_page_does_not_carry_says_so(open_file, model, monkeypatch):
    monkeypatch.setattr("gemmascope.views.lens.LOGITS", 1)  # blocks of 8 positions
    monkeypatch.setattr("gemmascope.views.lens.EXPORTED", {"table": 42, "course": 21})
    page = open_file(html_of(gs.lens_view(model, PROMPT, selection=gs.Selection(pos=1))))
    assert "not in this page, but in the notebook" in said(page)
    assert "positions before 8 are not in this page" in page.locator(".controls").first.inner_text()


def test_what_is_no_number_is_hatched_and_counted(open_view, model):
    model.add_hook("blocks.2.hook_resid_post", lambda x, hook: x * torch.nan)
    try:
        page = open_view(gs.lens_view(model, PROMPT))
    finally:
        model.reset_hooks()
    page.wait_for_selector(".table .missing[aria-selected=true]")
    assert "60 without a number" in page.locator(".controls").first.inner_text()
    assert page.locator(".table .cell.missing").count() > 0


def test_hostile_tokens_are_text(open_file):
    words = ["<script>alert(1)</script>", "</script>", "\u202eabc", "x" * 10000, "\0"]

    def table(lens, site, block):
        n = len(words)
        ids = np.tile(np.arange(n)[:, None, None], (1, 2, 3)).astype(np.int32)
        half = np.full((n, 2), 0.5, np.float32)
        texts = {str(i): word for i, word in enumerate(words)}
        return {"ids": ids, "probs": np.full((n, 2, 3), 0.3, np.float32), "entropy": half, "kl": half, "texts": texts}

    view = LensView(
        words,
        np.arange(len(words)),
        1,
        5,
        answers={"table": table},
        carried={"table": 0, "course": 5},
        exported=lambda: [("table", {"lens": "logit", "site": "resid_post", "block": 0})],
    )
    page = open_file(html_of(view))
    assert page.locator(".table script").count() == 0
    assert "<script>alert(1)</script>" in page.locator(".table").inner_text()
