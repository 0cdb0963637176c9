"""The attention view in a browser: heads, one map, the numbers of a query and a key."""

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.widgets.attention_view import AttentionView, codes
from gemmascope.widgets.export import page as html_of

pytestmark = pytest.mark.browser

WORDS = ["<bos>", "The", " capital", " of", " France", " is", " Paris", "\n"]
PROMPT = "When Mary and John went to the store, John gave a book to Mary. When Mary and John went to the"


def made(words=WORDS, change=lambda patterns: None, **given) -> AttentionView:
    """Two layers of two heads, the first sliding: a window of 3. Made-up weights; every row sums to 1."""
    n, window = len(words), 3
    back = np.arange(n)[:, None] - np.arange(n)
    patterns = np.random.default_rng(0).random((2, 2, n, n)).astype(np.float32)
    patterns *= np.stack([(back >= 0) & (back < window), back >= 0])[:, None]
    patterns /= patterns.sum(-1, keepdims=True)
    change(patterns)
    answers = {
        "thumbs": lambda of, layer, part: {"codes": codes(patterns[layer])},
        "map": lambda of, layer, head: {"codes": codes(patterns[layer, head])},
        "row": lambda of, layer, head, pos: {"weights": patterns[layer, head, pos]},
        "column": lambda of, layer, head, key: {"weights": patterns[layer, head, :, key].copy()},
        "scores": lambda of, layer: {"scores": np.array([[0.1 + layer], [0.9 - layer]], np.float32)},
    }
    layers = [
        {"kind": "sliding", "window": window, "kv_heads": 1, "kv_source": None, "parts": 1},
        {"kind": "global", "window": None, "kv_heads": 2, "kv_source": 0, "parts": 1},
    ]
    view = AttentionView(words, layers, 2, answers, thumb_block=1, scores={"induction": "mean attention"}, **given)
    view.patterns = patterns
    return view


def said(page) -> str:
    page.wait_for_function("() => !document.querySelector('[role=status]').textContent.endsWith('…')")
    return page.locator("[role=status]").inner_text()


def until(page, true) -> None:
    """Waits for what a page does later: keep a place, ask for what is in sight."""
    for _ in range(400):
        if true():
            return
        page.wait_for_timeout(50)
    raise AssertionError("It did not come true in 20 seconds.")


def pixel(page, row: int, column: int, n: int = len(WORDS)) -> list[int]:
    """The colour of a cell of the large map."""
    return page.evaluate(
        """([row, column, n]) => {
            const canvas = document.querySelector(".map canvas");
            const ratio = window.devicePixelRatio;
            const cell = Math.min(32, Math.floor((document.querySelector(".map").clientWidth - 134) / n));
            const at = (i) => Math.round((92 + (i + 0.5) * cell) * ratio);
            return [...canvas.getContext("2d").getImageData(at(column), at(row), 1, 1).data].slice(0, 3);
        }""",
        [row, column, n],
    )


def test_keys_select_and_python_sees_it(open_view, settled):
    view = made()
    page = open_view(view)
    page.locator("[aria-label=Heads]").focus()
    for key, at in {"PageDown": (1, 0), "]": (1, 1), "ArrowUp": (0, 1), "[": (0, 0), "ArrowRight": (0, 1)}.items():
        page.keyboard.press(key)
        settled(page)
        assert (view.selection.layer, view.selection.head) == at, key
    page.locator(".map").focus()
    for key, at in {"Home": (7, 0), "ArrowUp": (6, 0), "ArrowRight": (6, 1), "Enter": (6, None)}.items():
        page.keyboard.press(key)
        settled(page)
        row = view.patterns[0, 1, 6]
        expected = (at[0], int(row.argmax()) if at[1] is None else at[1])
        assert (view.selection.pos, view.selection.key) == expected, key
    name = f"{expected[1]} {WORDS[expected[1]].replace(' ', '·')}"
    assert said(page) == f"layer 0 head 1: 6 ·Paris reads {name}: {row.max():.3f}"
    assert page.locator(".map [role=gridcell]").text_content() == said(page)
    assert page.locator(".thumb[aria-selected=true]").get_attribute("title") == "layer 0 head 1"
    view.selection.key = 7
    assert said(page).endswith("6 ·Paris reads 7 ⏎: not yet written")
    view.selection.key = 1
    assert said(page).endswith("6 ·Paris reads 1 The: outside the window")
    view.selection.layer = 1
    assert said(page).endswith(f": {view.patterns[1, 1, 6, 1]:.3f}")


def test_clicks_select_and_bars_are_exact(open_view, settled):
    view = made()
    page = open_view(view)
    page.locator(".thumb[title='layer 1 head 1']").click()
    page.locator(".map canvas").click(position={"x": 92 + 3 * 32 + 5, "y": 92 + 5 * 32 + 5})
    settled(page)
    selection = view.selection
    assert (selection.layer, selection.head, selection.pos, selection.key) == (1, 1, 5, 3)
    row, column = view.patterns[1, 1, 5], view.patterns[1, 1, :, 3]
    reads, read_by = page.locator(".bars").all()
    assert reads.locator(".value").all_inner_texts() == [f"{x:.3f}" for x in sorted(row[row > 0], reverse=True)]
    assert read_by.locator(".value").all_inner_texts() == [f"{x:.3f}" for x in sorted(column[column > 0], reverse=True)]
    reads.locator("[role=option]").first.click()
    settled(page)
    assert selection.key == row.argmax()
    read_by.locator("[role=option]").first.click()
    settled(page)
    assert selection.pos == view.patterns[1, 1, :, selection.key].argmax()


def test_a_pinned_head_is_taken_away(open_view, settled):
    view = made(selection=gs.Selection(layer=1, head=0, pos=4, key=2))
    page = open_view(view)
    page.locator("[aria-label=Heads]").focus()
    page.keyboard.press("Enter")
    assert page.get_by_label("show", exact=True).input_value() == "pinned"
    assert pixel(page, 4, 2) == pixel(page, 7, 7)  # nothing is left of a head without itself
    page.locator(".thumb[title='layer 1 head 1']").click()
    settled(page)
    assert view.state["pinned"] == [1, 0] and view.state["minus"] == "pinned"
    two, one = view.patterns[1, 1, 4, 2], view.patterns[1, 0, 4, 2]
    assert said(page) == (
        f"layer 1 head 1: 4 ·France reads 2 ·capital: {two:.3f}; layer 1 head 0: {one:.3f}; difference {two - one:.3f}"
    )
    page.get_by_role("button", name="Pin this head").click()
    page.get_by_role("button", name="Unpin this head").click()
    settled(page)
    assert view.state["pinned"] is None and view.state["minus"] is None


def test_scale_sort_and_band_are_state(open_view, settled):
    view = made(selection=gs.Selection(layer=0, head=0, pos=5, key=4))
    page = open_view(view)
    page.get_by_label("scale").select_option("log")
    assert "on a logarithmic scale" in page.locator(".legend").inner_text()
    page.get_by_label("sort heads by").select_option("induction")
    page.wait_for_selector(".thumb small")
    assert page.locator(".thumb").all_inner_texts() == ["L1 H0\n1.10", "L0 H1\n0.90", "L0 H0\n0.10", "L1 H1\n-0.10"]
    page.locator("[aria-label=Heads]").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    settled(page)
    assert (view.selection.layer, view.selection.head) == (0, 1)
    page.get_by_role("button", name="Band").click()
    settled(page)
    assert view.state == {**AttentionView.STATE, "scale": "log", "sort": "induction", "band": True}
    assert page.locator(".map").get_attribute("aria-colcount") == "3"
    page.locator(".map").focus()
    page.keyboard.press("ArrowRight")  # one further back
    settled(page)
    assert (view.selection.pos, view.selection.key) == (5, 3)
    page.keyboard.press("PageDown")  # a global layer has no band
    assert page.locator(".map").get_attribute("aria-colcount") == "8"


def test_numbers_that_are_none_are_drawn_as_missing_and_counted(open_view):
    def spoil(patterns):
        patterns[1, 0, 5, :6] = [0.1, np.nan, np.inf, 0.1, 0.1, 0.1]

    page = open_view(made(change=spoil, selection=gs.Selection(layer=1, head=0, pos=5, key=1)))
    assert said(page).endswith("5 ·is reads 1 The: no number")
    assert "2 weights that are no numbers" in page.locator(".legend").inner_text()


@pytest.mark.parametrize("words", [["<bos>"], ["<b>", "x" * 10_000, "\0", "\u202eright"]])
def test_one_token_and_hostile_ones(open_view, settled, words):
    view = made(words)
    page = open_view(view, width=700)
    page.locator(".map").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("+")
    settled(page)
    assert said(page).startswith(f"layer 0 head 0: {max(0, len(words) - 2)} ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700


def test_a_page_reads_its_map(open_file):
    view = gs.attention_view(gs.load("nano-moe"), PROMPT, selection=gs.Selection(layer=2, head=1, pos=17, key=4))
    exact = view.answers["row"](layer=2, head=1, pos=17)["weights"][4]
    page = open_file(html_of(view))
    assert said(page).endswith("(±0.002)")
    assert abs(float(said(page).split(": ")[-1].split(" ")[0]) - exact) < 0.003
    page.locator("[aria-label=Heads]").focus()
    page.keyboard.press("ArrowDown")  # every map of a short prompt is there
    assert said(page).startswith("layer 3 head 1: 17 ") and page.locator(".notice").is_hidden()
    assert page.locator(".bars").first.locator("[role=option]").count() > 0


def test_copied_python_gives_the_number(open_view):
    other = PROMPT.replace("John gave", "Mary gave")
    model = gs.load("nano-moe")
    selection = gs.Selection(layer=3, head=2, pos=17, key=10)
    view = gs.attention_view(model, PROMPT, compare=other, selection=selection, state={"minus": "prompt"})
    page = open_view(view)
    shown = said(page)
    page.get_by_role("button", name="Python").click()
    code = page.locator(".aside pre").inner_text()
    assert "_, cache = model.run_with_cache(prompt)\n" in code and "cache.pattern(3, heads=2)[0, 17, 10]" in code
    names = {}
    *before, last = code.splitlines()
    exec("\n".join(before), names)
    assert shown.endswith(f"difference {float(eval(last, names)):.3f}")


def test_a_long_prompt_is_zoomed_and_panned(open_view):
    model = tiny_model("E2B", n_ctx=1100)
    tokens = torch.randint(3, 100, (1, 1100), generator=torch.Generator().manual_seed(0))
    view = gs.attention_view(model, tokens, selection=gs.Selection(layer=1, head=0, pos=900, key=500))
    tiles = []
    answer = view.answers["tile"]
    view.answers["tile"] = lambda **where: (tiles.append(where["z"]), answer(**where))[1]
    page = open_view(view)
    exact = view.answers["row"](layer=1, head=0, pos=900)["weights"][500]
    assert float(said(page).split(": ")[-1]) == pytest.approx(exact, rel=0.1)
    page.wait_for_function("() => document.querySelector('.attention-view .note').textContent.includes('4 × 4')")
    page.locator(".map").focus()
    for _ in range(4):
        page.keyboard.press("+")
    page.wait_for_function("() => !document.querySelector('.attention-view .note').textContent")
    until(page, lambda: (view.state["zoom"] or [0, 0, 1100])[2] < 100)
    first, left, across = view.state["zoom"]
    assert first < 900 < first + across and left < 500 < left + across and across == pytest.approx(1100 / 16)
    until(page, lambda: 0 in tiles)
    assert max(tiles) >= 1
    box = page.locator(".map canvas").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 260, box["y"] + 220, steps=3)
    page.mouse.up()
    until(page, lambda: view.state["zoom"][0] < first and view.state["zoom"][1] < left)
    assert view.selection.pos == 900  # it was dragged, not clicked
    page.get_by_role("button", name="Show the whole map").click()
    until(page, lambda: view.state["zoom"] is None)


def test_a_thousand_tokens_weigh_little(open_view):
    """One layer of eight heads: nothing is asked twice, what crosses is little, and less is saved."""
    n, n_heads = 1024, 8
    pattern = np.tril(np.random.default_rng(0).random((n_heads, n, n), np.float32))
    sent = []

    def answered(array) -> dict:
        sent.append(array.nbytes)
        return {"codes": array} if array.dtype == np.uint8 else {"weights": array}

    small = pattern.reshape(n_heads, 64, 16, 64, 16).max((2, 4))
    answers = {
        "thumbs": lambda of, layer, part: answered(codes(small)),
        "map": lambda of, layer, head: answered(codes(pattern[head])),
        "row": lambda of, layer, head, pos: answered(pattern[head, pos]),
        "column": lambda of, layer, head, key: answered(pattern[head, :, key].copy()),
    }
    layers = [{"kind": "global", "window": None, "kv_heads": 4, "kv_source": None, "parts": 1}]
    view = AttentionView([f" word{i}" for i in range(n)], layers, n_heads, answers, thumb_block=16)
    page = open_view(view)
    said(page)
    until(page, lambda: len(sent) > 3)
    assert sorted(sent) == [n * 4, n * 4, n_heads * 64 * 64, n * n]  # a row, a column, thumbnails, a map
    assert len(str(view.data)) + len(str(view.state)) < 100_000
