"""What is exported: one file, alone and safe; and the joiner of scripts."""

import re

import numpy as np
import pytest

from gemmascope.widgets import assets
from gemmascope.widgets.base import Selection, View
from gemmascope.widgets.dashboard import Dashboard
from gemmascope.widgets.export import canonical, page
from gemmascope.widgets.model_map import ModelMap
from gemmascope.widgets.token_strip import TokenStrip

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><b>",
    "<!--",
    "\u202eright to left",
    "x" * 10_000,
    "\0",
    "\u2028",
    "'\"&",
    "=HYPERLINK()",
    "{{7*7}}",
]


def strip(words=("a", "b"), **given) -> TokenStrip:
    numbers = np.arange(len(words), dtype=np.float32)
    return TokenStrip(words, np.arange(len(words)), {"surprise": ("nats", numbers)}, **given)


def test_a_page_asks_for_nothing():
    html = page(Dashboard([strip(), strip()], "two"))
    asking = r"https?:|url\(|@import|\bsrc=|\bhref=[\"']|fetch\("
    assert not re.search(asking, html.replace("http://www.w3.org/2000/svg", ""))  # a name that no browser fetches
    assert "default-src 'none'" in html
    assert html.count("function tokenStrip") + html.count("const tokenStrip =") == 1  # one script for both


@pytest.mark.browser
def test_hostile_strings_are_text(open_file, open_view):
    """Nothing executes: the pages' Content-Security-Policy, the network guard and the dialog guard would all say so."""
    board = Dashboard([strip(HOSTILE, setup="\n".join(HOSTILE))], HOSTILE[0], HOSTILE)
    html = page(board, HOSTILE[1])
    assert html.count("<script") == html.count("</script") == 2 and "<b>" not in html and "<!--" not in html
    for opened in (open_file(html), open_view(board)):
        assert opened.locator(".token").count() == len(HOSTILE)
        assert opened.locator(".token").first.inner_text() == "<script>alert(1)</script>"
        assert opened.locator("h2").inner_text() == HOSTILE[0]
        opened.locator("button", has_text="Python").click()
        assert HOSTILE[0] in opened.locator("pre").inner_text()
        opened.locator("button", has_text="Table").click()
        assert "<!--" in opened.locator("table").inner_text()
        assert opened.evaluate("document.documentElement.scrollWidth") <= 1280
    still = board.children[0]._repr_mimebundle_()[0]["text/html"]
    assert "<script" not in still and "&lt;script" in still


@pytest.mark.browser
def test_python_and_javascript_name_a_question_alike(open_file):
    opened = open_file(page(strip()))
    asked = ["row", {"layer": 3, "head": 0, "text": 'é"\n\u2028', "on": True, "none": None, "list": [1, 2]}]
    script = assets.joined("numbers.js") + "\ncanonical(asked)"
    assert opened.evaluate(
        f"asked => {{ {script.replace('canonical(asked)', 'return canonical(asked)')} }}", asked
    ) == (canonical(asked))


def test_joined_modules_do_not_share_a_name(tmp_path, monkeypatch):
    (tmp_path / "a.js").write_text('import { one } from "./b.js";\nexport const two = one;\n')
    (tmp_path / "b.js").write_text("export const one = 1;\n")
    (tmp_path / "c.js").write_text("function one() {}\n")
    monkeypatch.setattr(assets, "HERE", tmp_path)
    assets.joined.cache_clear()
    assert assets.joined("a.js").split("\n") == ["const one = 1;", "", "const two = one;", ""]
    with pytest.raises(ValueError, match="one stands in b.js and in c.js"):
        assets.joined("a.js", "c.js")
    assets.joined.cache_clear()


def test_every_script_is_small():
    for script in assets.HERE.glob("*_view.js"):
        assert len(assets.esm(script.name).encode()) < 100_000


def test_state_and_selection_are_checked():
    with pytest.raises(ValueError, match="The state of a TokenStrip has no 'metrik'; the nearest are metric"):
        strip(state={"metrik": "entropy"})
    view = ModelMap([], [], [], [], [], dtype="float32")
    for wrong in (5, "all", None):
        with pytest.raises(ValueError, match="The state of a ModelMap has a list as 'open', and .* came"):
            view.state = {"open": wrong}
    view.state["open"].append(1)
    assert ModelMap.STATE["open"] == []
    with pytest.raises(ValueError, match="A selection has no 'position'"):
        Selection(position=3)
    with pytest.raises(Exception, match="selection is a TokenStrip; it is a gs.Selection"):
        strip().selection = strip()
    with pytest.raises(ValueError, match="give one at least"):
        Dashboard([], "nothing")


def test_half_a_character_travels():
    """A notebook's messages are UTF-8, which has no lone surrogates."""
    half = "a\ud800b"
    view = strip([half, "b"], setup=half)
    assert view.data["tokens"] == ["a\\ud800b", "b"]
    for text in (view.data["setup"], *view._repr_mimebundle_()[0].values(), page(view, half)):
        str(text).encode("utf-8")


def test_what_goes_wrong_in_an_answer_is_said_in_the_page():
    def wrong(**_):
        raise KeyError("hook_z was not cached: name it in names_filter.")

    view = View({}, answers={"row": wrong})
    assert view.ask({"question": "row", "arguments": {}}, []) == (
        {"error": "hook_z was not cached: name it in names_filter."},
        [],
    )
    assert "no answer to 'col'" in view.ask({"question": "col", "arguments": {}}, [])[0]["error"]
