"""The probe's view in a browser: layers, what was confused, examples, a text that is typed."""

import numpy as np
import pytest

import gemmascope as gs
from gemmascope.widgets.export import page as html_of
from gemmascope.widgets.probe_view import ProbeView

pytestmark = pytest.mark.browser

SCORE = np.array([[0.5, 0.7, 0.95], [0.4, 0.6, 0.9], [0.6, 0.8, 1.0]], np.float32)
CONTROL = np.array([[0.5, 0.65, 0.5], [0.4, 0.5, 0.4], [0.6, 0.7, 0.6]], np.float32)
CHANCE = np.full(3, 0.5, np.float32)
WORDS = ["<b>to</b>", " Mary", "\u202e", "x" * 300]


def scores(**more) -> dict:
    by_place = np.linspace(-2, 2, 3 * len(WORDS), dtype=np.float32).reshape(3, len(WORDS), 1)
    return {"texts": WORDS, "scores": by_place, **more}


def project(text: str) -> dict:
    if "long" in text:
        raise ValueError("The text has 2000 tokens and 1024 can be read here: shorten it.")
    return scores()


def examples(place: int, cell: list[int] | None) -> dict:
    numbers = [3, 1, 2] if cell is None else [2]
    names = ["plural"] * len(numbers)
    said = ["singular"] + names[1:]
    return {"numbers": numbers, "labels": names, "said": said, "texts": WORDS[: len(numbers)], "count": 40}


def made(**given) -> ProbeView:
    answers = {
        "held_out": lambda place: {"counts": np.array([[9, 1], [2, 8]], np.int32)},
        "examples": examples,
        "tokens": lambda example: scores(pos=1),
        "project": project,
    }
    classes = ["singular", "plural"]
    given = {"control": CONTROL, "folds": 5, "classes": classes, "answers": answers, **given}
    return ProbeView("layer", [0, 2, 4], "accuracy", SCORE, CHANCE, what="a probe", **given)


def said(page) -> str:
    return page.locator("[role=status]").inner_text()


def test_a_layer_is_chosen_and_judged_by_its_control(open_view, settled):
    view = made()
    page = open_view(view)
    assert said(page).startswith("layer 4: accuracy 0.950") and "selectivity 0.450" in said(page)
    assert "which is more than the interval" in page.locator(".verdict").inner_text()
    page.locator(".layers").focus()
    page.keyboard.press("ArrowLeft")
    settled(page)
    assert view.selection.layer == 2
    assert "The control task gives 0.650, selectivity 0.050" in page.locator(".verdict").inner_text()
    assert "no evidence" in page.locator(".verdict").inner_text() and "no evidence" in said(page)
    view.selection.layer = 1  # of a linked view: the nearest layer that was probed
    assert said(page).startswith("layer 0") or said(page).startswith("layer 2")
    box = page.locator(".layers svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 12, box["y"] + 40)
    settled(page)
    assert view.selection.layer == 4


def test_without_a_control_that_is_said(open_view):
    page = open_view(made(control=None))
    assert "no control task" in page.locator(".legend").inner_text()
    assert "nothing says what other labels would give" in page.locator(".verdict").inner_text()


def test_a_confusion_is_chosen_and_its_examples_read(open_view, settled):
    view = made()
    page = open_view(view)
    page.wait_for_selector(".token.probed")
    assert page.locator(".count").all_inner_texts() == ["9", "1", "2", "8"]
    assert "3 of 20 examples read wrongly" in page.locator(".said").inner_text()
    page.locator(".count").nth(2).click()
    settled(page)
    assert view.state["cell"] == [1, 0]
    page.wait_for_function("() => document.querySelectorAll('.probed-examples [role=option]').length === 1")
    page.locator(".confusion").focus()
    page.keyboard.press("Escape")
    settled(page)
    assert view.state["cell"] is None
    page.wait_for_function("() => document.querySelectorAll('.probed-examples [role=option]').length === 3")
    page.locator(".probed-examples").focus()
    page.keyboard.press("ArrowDown")
    settled(page)
    assert view.state["example"] == 1
    page.wait_for_function("() => document.querySelector('.body').textContent.includes('example 1;')")
    page.locator(".strip").first.focus()
    page.keyboard.press("Home")
    assert said(page).startswith("0 <b>to</b>: score") and "p = " in said(page)


def test_text_is_read_and_errors_are_said(open_view, settled):
    view = made()
    page = open_view(view)
    box, notice = page.get_by_label("Text to read"), page.locator(".notice")
    page.get_by_role("button", name="Read it").click()
    assert "no text to read" in notice.inner_text()
    box.fill("too long")
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('.notice').textContent.includes('shorten it')")
    box.fill("Mary gave")
    box.press("Enter")
    page.wait_for_selector(".strip[aria-label='Text read'] .token")
    settled(page)
    assert view.state["text"] == "Mary gave" and notice.is_hidden()
    assert page.locator(".strip[aria-label='Text read'] .token").all_inner_texts()[0] == "<b>to</b>"
    view.kernel_is_gone = True
    box.fill("again")
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('.notice').textContent.includes('kernel')")
    assert page.get_by_role("button", name="Read it").is_enabled()


def test_copied_python_gives_the_scores_shown(open_view):
    model = gs.load("nano-moe")
    texts, labels = ["Mary gave John a", "The garden of John"] * 6, ["a", "b"] * 6
    probes = gs.probe_layers(model, texts, labels, layers=[1, 4], folds=2, progress=False)
    page = open_view(probes.view(model=model, state={"text": "John 😀"}, selection=gs.Selection(layer=1)))
    page.wait_for_selector(".strip[aria-label='Text read'] .token")
    page.locator(".strip[aria-label='Text read']").focus()
    page.keyboard.press("Home")
    shown = said(page)
    page.get_by_role("button", name="Python").click()
    *lines, last = page.locator(".aside pre").inner_text().splitlines()
    found: dict = {"probes": probes}
    exec("\n".join(lines), found)
    assert f"score {float(eval(last, found)[0, 0]):.3f}," in shown


def test_a_page_works_offline(open_file):
    def exported():
        for place in range(3):
            yield "held_out", {"place": place}
            yield "examples", {"place": place, "cell": None}
        for example in (1, 2, 3):
            yield "tokens", {"example": example}

    page = open_file(html_of(made(exported=exported)))
    page.wait_for_selector(".token.probed")
    page.locator(".layers").focus()
    page.keyboard.press("Home")
    page.locator(".probed-examples [role=option]").nth(2).click()
    page.wait_for_function("() => document.querySelector('.body').textContent.includes('example 2;')")
    assert page.locator(".notice").is_hidden()
    assert page.get_by_label("Text to read").is_disabled()
