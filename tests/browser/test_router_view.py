"""The experts of a prompt in a browser: chips select, changes are committed and taken back, a page works offline."""

import re

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.views.router import trace_view
from gemmascope.widgets.export import page as html_of
from gemmascope.widgets.router_view import RouterView, Routing

pytestmark = pytest.mark.browser

PROMPT = "When Mary and John went to the store, John gave a drink to"
OFF = {"layer": 2, "expert": 1, "how": "reroute", "pos": None}


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def made_up(n: int, layers: int = 4, experts: int = 8, k: int = 2, **given) -> RouterView:
    probs = np.random.default_rng(0).dirichlet(np.full(experts, 0.3), size=(layers, n)).astype(np.float32)
    order = np.argsort(-probs, -1)
    ranked = np.take_along_axis(probs, order, -1)
    entropy = -(probs * np.log(probs + 1e-30)).sum(-1)
    routing = Routing(
        order[..., :k].astype(np.int32), ranked[..., :k].copy(), ranked[..., k - 1] - ranked[..., k], entropy, experts
    )
    return RouterView([f" t{i}" for i in range(n)], routing, **given)


def said(page) -> str:
    return page.locator(".readout").inner_text()


def chips(page, layer: int, pos: int) -> list[str]:
    return page.locator(f".cell[data-row='{layer}'][data-pos='{pos}'] .chip").all_inner_texts()


def test_a_chip_selects_its_expert_and_all_tokens_that_use_it(open_view, settled):
    view = made_up(6)
    page = open_view(view)
    page.wait_for_selector(".chip")
    chip = page.locator(".cell[data-row='2'][data-pos='3'] .chip").first
    expert = int(chip.inner_text())
    chip.click()
    settled(page)
    assert (view.selection.pos, view.selection.layer, view.selection.expert) == (3, 2, expert)
    answer = view.answers["layer"](layer=2)
    users = {pos for pos in range(6) if expert in answer["experts"][pos]}
    assert page.locator(".chip.chosen").count() == len(users)
    assert f"expert {expert} of layer 2 serves {len(users)} of 6 tokens" in page.locator(".panel").all_inner_texts()[-1]
    listed = page.get_by_role("listbox", name="Tokens of this expert").get_by_role("option")
    assert {int(text.split(" ")[0]) for text in listed.all_inner_texts()} == users
    first = listed.first
    pos = int(first.inner_text().split(" ")[0])
    first.click()
    settled(page)
    assert view.selection.pos == pos and view.selection.expert == expert


def test_keys_move_and_the_readout_tells_what_hover_tells(open_view, settled):
    view = made_up(6)
    page = open_view(view)
    page.wait_for_selector(".chip")
    page.locator(".table").focus()
    for key in ("Home", "ArrowRight", "PageDown", "ArrowDown", "]"):
        page.keyboard.press(key)
        settled(page)
    window = view.answers["window"](first=0)
    experts = window["experts"][2, 1]
    assert (view.selection.pos, view.selection.layer, view.selection.expert) == (1, 2, experts[1])
    told = said(page)
    assert told.startswith(
        f"layer 2 at 1 ·t1: expert {experts[0]} {window['weights'][2, 1, 0]:.3f}, expert {experts[1]}"
    )
    assert f"margin {window['margins'][2, 1]:.3f}, entropy {window['entropy'][2, 1]:.3f} nats" in told
    page.locator(".cell[data-row='0'][data-pos='4']").hover()
    assert said(page).startswith("layer 0 at 4 ·t4")
    page.get_by_role("grid", name="Load of each expert").focus()
    page.keyboard.press("Home")
    settled(page)
    assert (view.selection.layer, view.selection.expert) == (2, 0)
    spoken = page.locator(".matrix .spoken").inner_text()
    assert re.match(r"expert 0 of layer 2 serves \d of 6 tokens, \d\.\d\d times the uniform share", spoken)


def test_margin_entropy_and_one_layer(open_view, settled):
    view = made_up(6)
    page = open_view(view)
    page.wait_for_selector(".chip")
    window = view.answers["window"](first=0)
    for show, values in (("margin", window["margins"]), ("entropy", window["entropy"])):
        page.get_by_label("show", exact=True).select_option(show)
        assert page.locator(".cell[data-row='1'][data-pos='2']").inner_text() == f"{values[1, 2]:.3f}"
    page.get_by_label("layers").select_option("1")
    settled(page)
    assert view.state["show"] == "entropy" and view.state["only"] == 1
    assert page.locator(".table .row").count() == 2
    assert said(page).startswith("layer 1 at 5")


def test_a_commit_is_seen_told_and_taken_back(open_view, settled, model):
    view = gs.router_view(model, PROMPT)
    view.selection.layer, view.selection.expert = 2, 1
    page = open_view(view)
    page.wait_for_selector(".chip.chosen")
    before = chips(page, 2, 14)
    assert "1" in before
    commit = page.get_by_role("button", name="Commit")
    assert commit.is_disabled()
    page.get_by_role("button", name="Switch off").click()
    assert "expert 1 of layer 2 switched off at every token" in page.locator(".changes").inner_text()
    assert "Not run yet" in page.locator(".router-bench [role=status]").inner_text()
    commit.click()
    page.wait_for_selector(".pairs [role=option]")
    page.wait_for_selector(".cell.flip")
    settled(page)
    assert view.state["committed"] == view.state["changes"] == [OFF]
    assert "1" not in chips(page, 2, 14)
    effect = view.answers["effect"](changes=[OFF])
    assert page.locator(".cell.flip").count() == view.answers["window_after"](changes=[OFF], first=0)["differs"].sum()
    bench = page.locator(".router-bench").inner_text()
    assert f"loss {effect['loss'][0]:.3f} → {effect['loss'][1]:.3f} nats a token" in bench
    assert "before the changes expert" in said(page)

    page.get_by_role("button", name="Python").click()
    code = page.locator(".aside pre").inner_text()
    ran: dict = {}
    exec(code, ran)
    top = view.answers["next"](changes=[OFF], pos=14)
    ids = top["ids"][0][top["ids"][0] >= 0]
    line = next(line for line in code.splitlines() if line.startswith("logits[0, 14]"))
    assert torch.equal(eval(line, ran), torch.tensor(top["p"][1, 0][top["ids"][0] >= 0])) and str(ids[0]) in line

    page.get_by_role("button", name="before", exact=True).click()
    assert chips(page, 2, 14) == before
    page.get_by_role("button", name="Undo").click()  # nothing is on: what is shown is the plain run, at once
    settled(page)
    assert view.state["committed"] == view.state["changes"] == []
    assert page.locator(".cell.flip").count() == 0 and not page.locator(".pairs").is_visible()


def test_one_token_and_one_removed(open_view, settled, model):
    view = gs.router_view(model, PROMPT, state={"changes": [OFF]})
    view.selection.pos, view.selection.layer, view.selection.expert = 3, 4, 3
    page = open_view(view)
    page.wait_for_selector(".chip")
    page.get_by_label("where").select_option("one")
    page.get_by_role("button", name="Force").click()
    page.get_by_role("button", name="Silence").click()  # one expert, one place: the later word
    settled(page)
    assert view.state["changes"] == [OFF, {"layer": 4, "expert": 3, "how": "silence", "pos": 3}]
    page.get_by_role("button", name="Remove: expert 1 of layer 2").click()
    page.locator(".table").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".pairs [role=option]")
    settled(page)
    assert view.state["committed"] == [{"layer": 4, "expert": 3, "how": "silence", "pos": 3}]


def test_a_silenced_expert_is_said_to_be_silent(open_view, model):
    everywhere = {**OFF, "how": "silence"}
    view = gs.router_view(model, PROMPT, state={"changes": [everywhere]})
    used = view.answers["layer"](layer=2)["experts"] == 1
    pos = int(used.any(-1).argmax())
    view.selection.pos, view.selection.layer, view.selection.expert = pos, 2, 1
    page = open_view(view)
    page.wait_for_selector(".chip.chosen")
    panel, users = page.locator(".split > .panel"), page.get_by_role("listbox", name="Tokens of this expert")
    assert f"expert 1 of layer 2 serves {used.sum()} of 15 tokens" in panel.inner_text()
    page.get_by_role("button", name="Commit").click()
    page.wait_for_selector(".chip.silent")
    nothing = f"expert 1 of layer 2 is silenced: its slot says nothing at {used.sum()} of 15 tokens"
    assert nothing in panel.inner_text() and nothing in page.locator(".matrix .spoken").inner_text()
    assert set(users.locator(".value").all_inner_texts()) == {"silent"}
    assert "expert 1 silent" in said(page) and page.locator(".chip.silent").count() == used.sum()
    page.get_by_role("button", name="before", exact=True).click()
    assert "serves" in panel.inner_text() and page.locator(".chip.silent").count() == 0
    assert "silent" not in users.inner_text()


@pytest.mark.parametrize("width", [1280, 1000, 760, 400])
def test_the_next_tokens_are_whole_at_every_width(open_view, model, width):
    page = open_view(gs.router_view(model, PROMPT, state={"changes": [OFF], "committed": [OFF]}), width=width)
    page.wait_for_selector(".pairs [role=option]")
    cut = """() => [...document.querySelectorAll(".pairs span, .pairs-head span")]
      .filter((el) => el.offsetParent && el.scrollWidth > el.clientWidth + 1).map((el) => el.textContent)"""
    assert page.evaluate(cut) == []


def test_what_cannot_be_run_is_said(open_view, settled, model):
    changes = [{**OFF, "expert": expert} for expert in range(7)]
    page = open_view(gs.router_view(model, PROMPT, state={"changes": changes}))
    page.wait_for_selector(".chip")
    page.get_by_role("button", name="Commit").click()
    page.wait_for_selector(".notice:not([hidden])")
    assert "at most 6 of them can be switched off" in page.locator(".notice").inner_text()
    assert page.get_by_role("button", name="Commit").is_enabled()


def test_one_commit_at_a_time_and_a_kernel_that_is_gone(open_view, settled, model):
    view = gs.router_view(model, PROMPT, state={"changes": [OFF]})
    ran, effect = [], view.answers["effect"]
    view.answers["effect"] = lambda changes: (ran.append(changes), effect(changes))[1]
    page = open_view(view)
    page.wait_for_selector(".chip")
    twice = """() => {
      const commit = document.querySelector("button.commit");
      commit.click();
      commit.click();
      return [commit.ariaDisabled, document.querySelector(".router-bench [role=status]").textContent];
    }"""
    assert page.evaluate(twice) == ["true", "Running …"]
    page.wait_for_selector(".cell.flip")
    settled(page)
    assert ran == [[OFF]]
    view.kernel_is_gone = True
    page.get_by_role("button", name="Force", exact=True).click()
    page.get_by_role("button", name="Commit").click()
    page.wait_for_selector(".notice:not([hidden])")
    assert "The kernel is gone" in page.locator(".notice").inner_text()
    assert page.get_by_role("button", name="Commit").is_enabled()


def test_two_prompts(open_view, model):
    page = open_view(gs.router_view(model, PROMPT, compare=PROMPT.replace("Mary", "Anna")))
    page.wait_for_selector(".cell.differs")
    assert re.search(r"differs from the other prompt: \d+ of 90 choices", page.locator(".legend").first.inner_text())
    assert page.get_by_role("grid", name="Load of each expert, other prompt").is_visible()
    page = open_view(gs.router_view(model, PROMPT, compare="The cat sat"))
    page.wait_for_selector(".chip")
    assert page.locator(".cell.differs").count() == 0
    assert "loads are compared, positions are not" in page.locator(".split").inner_text()


def test_a_page_shows_choices_and_what_was_committed(open_file, model):
    page = open_file(html_of(gs.router_view(model, PROMPT, state={"changes": [OFF], "committed": [OFF]})))
    page.wait_for_selector(".pairs [role=option]")
    page.wait_for_selector(".cell.flip")
    assert page.get_by_role("button", name="Switch off").is_disabled()
    assert "This page has no model" in page.locator(".router-bench").inner_text()
    page.locator(".cell[data-row='3'][data-pos='9'] .chip").first.click()
    assert said(page).startswith("layer 3 at 9")
    assert page.locator(".notice:not([hidden])").count() == 0
    bare = open_file(html_of(trace_view(gs.trace_routing(model, PROMPT))))
    bare.wait_for_selector(".chip")
    assert bare.locator(".router-bench").count() == 0


def test_many_experts_and_a_long_prompt(open_view):
    view = made_up(600, layers=30, experts=128, k=8)
    page = open_view(view)
    page.wait_for_selector(".chip")
    assert len(chips(page, 0, 599)) == 8
    view.selection.pos = 10  # another window
    page.wait_for_selector(".cell[data-row='0'][data-pos='10'] .chip")
    assert chips(page, 0, 10) == [str(one) for one in view.answers["window"](first=0)["experts"][0, 10]]


def test_what_is_no_number_is_counted_and_strings_stay_text(open_view):
    floats = np.array([[0.2, np.nan]], np.float32)
    routing = Routing(np.zeros((1, 2, 1), np.int32), floats[..., None], floats, floats, 2)
    page = open_view(RouterView(["<script>alert(1)</script>", "b"], routing, state={"show": "margin"}))
    page.wait_for_selector(".cell.missing")
    assert "1 weight without a number" in page.locator(".controls").inner_text()
    assert page.locator(".head .cell").first.inner_text().endswith("<script>alert(1)</script>")
