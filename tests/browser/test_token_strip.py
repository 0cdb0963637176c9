"""The strip of tokens in a browser, and with it what every view has: selection, state, notices, what is taken along."""

import numpy as np
import pytest

from gemmascope.widgets.token_strip import TokenStrip

pytestmark = pytest.mark.browser

WORDS = ["<bos>", "When", " Mary", " and", " John", " went", "\n", " John", " gave", " milk", " to", " Mary"]


def strip(**given) -> TokenStrip:
    surprise = np.linspace(0, 5, len(WORDS)).astype(np.float32)
    surprise[0] = np.nan
    metrics = {"surprise": ("nats", surprise), "entropy": ("nats", surprise[::-1].copy())}
    return TokenStrip(WORDS, np.arange(len(WORDS)), metrics, setup="prompt = 'a'", **given)


def selected(page) -> str:
    return page.locator(".token[aria-selected=true]").inner_text()


def test_arrows_move_the_selection_and_python_sees_it(open_view, settled):
    view = strip()
    page = open_view(view)
    page.locator(".strip").focus()
    for key, at in {"ArrowLeft": 10, "Home": 0, "Shift+ArrowRight": 10, "End": 11, "ArrowUp": 4}.items():
        page.keyboard.press(key)
        settled(page)
        assert view.selection.pos == at, key
        assert page.locator("[role=status]").inner_text().startswith(f"{at} ")
    view.selection.pos = 2
    assert selected(page) == "·Mary"
    page.locator(".token").nth(8).click()
    settled(page)
    assert view.selection.pos == 8


def test_the_metric_is_state(open_view, settled):
    view = strip(state={"metric": "entropy"})
    page = open_view(view)
    assert "entropy has no value" in page.locator("[role=status]").inner_text()
    page.locator("select").select_option("surprise")
    settled(page)
    assert view.state == {"metric": "surprise"}
    assert page.locator("[role=status]").inner_text() == "11 ·Mary, id 11, surprise 5.000 nats"
    assert "1 token without a number" in page.locator(".controls").inner_text()


def test_two_strips_are_linked_in_the_browser(open_file):
    from gemmascope.widgets.dashboard import Dashboard
    from gemmascope.widgets.export import page as html_of

    page = open_file(html_of(Dashboard([strip(), strip()], "two")))
    page.locator(".token").nth(3).click()
    assert page.locator(".token[aria-selected=true]").all_inner_texts() == ["·and", "·and"]
