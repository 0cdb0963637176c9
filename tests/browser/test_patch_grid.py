"""The patching grid in a browser: a sweep that runs, stops and goes on from the page, and a cell run again."""

import pandas
import pytest
import torch

import gemmascope as gs
from gemmascope.results import Result
from gemmascope.widgets.export import page as html_of

pytestmark = pytest.mark.browser

CLEAN = "When Mary and John went to the store, John gave a book to"
CORRUPTED = "When Mary and John went to the store, Mary gave a book to"


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def grid_of(model, **given):
    return gs.patch_grid(model, CLEAN, CORRUPTED, answers=(" Mary", " John"), **given)


def status(page) -> str:
    return page.locator("[role=status]").inner_text()


def left(page) -> str:
    return page.locator(".left").inner_text()


def test_a_sweep_runs_from_the_page_stops_and_goes_on(open_view, settled, model, monkeypatch):
    grid = grid_of(model)
    page = open_view(grid)
    assert left(page) == "0 of 90 cells" and "90 cells not run" in page.locator(".legend").inner_text()
    assert "clean run 9.389, corrupted run -10.403" in page.locator(".baselines").inner_text()
    # Stop after the second pass.
    cells, calls = grid.answers["cells"], []

    def counting(**asked):
        calls.append(asked["first"])
        if len(calls) == 2:
            page.evaluate("() => document.querySelector('.sweeping .commit').click()")
        return cells(**asked)

    grid.answers["cells"] = counting
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("button", name="Go on").wait_for()
    page.wait_for_timeout(100)
    part = int(grid.result.done.sum())
    assert len(calls) == 2 and 0 < part < 90
    # What ran while it was stopped is not run again.
    page.get_by_role("button", name="Go on").click()
    page.get_by_text("90 of 90 cells").wait_for()
    assert grid.result.done.all() and calls == sorted(calls)
    assert page.get_by_role("button", name="Done").is_disabled()
    whole = gs.activation_patching(
        model, CLEAN, CORRUPTED, gs.logit_difference(model, " Mary", " John"), progress=False
    )
    assert torch.equal(grid.result.values, whole.values)
    grid.selection.layer, grid.selection.pos = 2, 10
    value = whole.table.query("layer == 2 and pos == 10")
    said = f"logit difference {value['value'].item():.3f}, {value['recovered'].item():.3f} of the difference recovered"
    assert status(page) == f"layer 2, position 10 ·Mary: {said}"


def test_enter_runs_the_cell_again_and_shows_the_next_token_before_and_after(open_view, settled, model):
    grid = grid_of(model, state={"direction": "noising"})
    page = open_view(grid)
    page.locator(".matrix").focus()
    for key in ("Home", "ArrowDown", "ArrowDown", "ArrowRight", "End"):
        page.keyboard.press(key)
        settled(page)
    assert (grid.selection.layer, grid.selection.pos) == (2, 14)
    assert page.locator(".patch-prompts [aria-selected=true]").inner_text().split("\n")[0] == "14"
    page.keyboard.press("Enter")
    page.locator(".patch-tokens [role=option]").first.wait_for()
    assert "clean 0.997, corrupted 3.0e-5, patched 0.985" in page.get_by_role(
        "option", name="·Mary: clean"
    ).get_attribute("aria-label")
    want = gs.activation_patching(
        model,
        CLEAN,
        CORRUPTED,
        gs.logit_difference(model, " Mary", " John"),
        cells=pandas.DataFrame({"layer": [2], "pos": [14]}),
        direction="noising",
        progress=False,
    )
    assert f"{float(want.mean):.3f}" in page.locator(".figures").inner_text()
    assert not grid.result.done.any()  # the sweep has its own numbers
    page.get_by_role("option", name="·Mary: clean").click()
    settled(page)
    assert grid.selection.token == model.to_single_token(" Mary")
    page.locator(".patch-prompts .differs").click()
    settled(page)
    assert grid.selection.pos == 10 and page.locator(".patch-tokens").is_hidden()


def test_what_is_patched_is_state_and_its_python_gives_the_number(open_view, settled, model):
    grid = grid_of(model, site="z", by=("layer", "head", "pos"))
    page = open_view(grid)
    page.locator(".matrix").focus()
    for key in ("PageDown", "]"):
        page.keyboard.press(key)
        settled(page)
    assert (grid.selection.layer, grid.selection.head) == (1, 1)
    page.get_by_label("patch", exact=True).focus()
    page.get_by_label("patch", exact=True).select_option("moe.hook_expert_out")
    settled(page)
    assert grid.state["site"] == "moe.hook_expert_out" and grid.state["by"] == ["layer", "expert"]
    assert page.evaluate("() => document.activeElement.ariaLabel") == "patch"  # the keyboard stays where it was
    page.get_by_label("direction").select_option("noising")
    page.get_by_label("measure").select_option("KL (nats)")
    settled(page)
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("48 of 48 cells").wait_for()
    grid.selection.layer, grid.selection.expert = 3, 5
    shown = status(page)
    page.get_by_role("button", name="Python").click()
    names: dict = {}
    *lines, last = page.locator(".aside pre").inner_text().splitlines()
    exec("\n".join(lines), names)
    row = eval(last, names)
    assert shown.startswith("layer 3, expert 5: KL (nats) ")
    assert shown.endswith(f"{row['recovered']:.3f} of the difference recovered")
    assert torch.equal(names["result"].values, grid.result.values)
    # A bad state set from Python is said in the view, and leaves it usable.
    grid.state = {**grid.state, "by": ["layer", "head"]}
    page.get_by_role("alert").get_by_text("has no head").wait_for()
    page.get_by_label("patch", exact=True).select_option("z")
    page.get_by_text("0 of 24 cells").wait_for()
    assert page.get_by_role("alert").count() == 0
    # A kernel that went away while it runs.
    grid.kernel_is_gone = True
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("alert").get_by_text("The kernel is gone").wait_for()
    assert page.get_by_role("button", name="Run", exact=True).is_enabled()


def test_a_point_selected_elsewhere_can_be_taken(open_view, settled, model):
    grid = grid_of(model)
    page = open_view(grid)
    grid.selection.site = "blocks.2.attn.hook_z"
    page.get_by_role("button", name="Patch attn.hook_z").click()
    settled(page)
    assert grid.state["site"] == "z" and grid.state["by"] == ["layer", "head"]
    assert page.get_by_role("button", name="Patch attn.hook_z").count() == 0


def test_an_exported_grid_holds_what_has_run(open_file, model):
    grid = grid_of(model, site="z", by=("layer", "head"))
    page_settings = dict(grid.state)
    first = 0
    while first < 12:
        first += grid.answer("cells", {**page_settings, "first": first})["numbers"]["shape"][0]
    page = open_file(html_of(grid), scheme="dark", width=600)
    assert "12 cells not run" in page.locator(".legend").inner_text()
    assert page.get_by_role("button", name="Run").count() == 0 and page.locator("select").count() == 0
    page.locator(".matrix canvas").click(position={"x": 100, "y": 65})
    assert f"logit difference\n{float(grid.result.mean[0]):.3f}" in page.locator(".figures").inner_text()


def test_any_result_is_a_grid(open_file):
    cells = pandas.MultiIndex.from_product([["ab", "<b>"], range(3), range(4)], names=["kind", "layer", "pos"])
    figures = torch.linspace(-1, 2, 24)[:, None].clone()
    figures[7] = torch.nan
    tokens = ["w", "</script><script>alert(1)</script>", "\u202ey", "z"]
    result = Result(
        "made up", cells.to_frame(index=False), figures, "nats", {"clean": torch.ones(1)}, {"tokens": tokens}, "clean"
    )
    page = open_file(html_of(result.view()))
    assert status(page) == "kind ab, layer 0, position 0 w: nats -1.000"  # the largest effect: farthest from 1
    page.locator(".matrix").focus()
    page.keyboard.press("End")
    assert status(page) == "kind ab, layer 0, position 3 z: nats -0.609"
    page.keyboard.press("Home")
    page.keyboard.press("]")
    page.keyboard.press("ArrowRight")
    assert status(page).startswith("kind <b>, layer 0, position 1 </script>")
    page.get_by_label("kind").select_option("0")
    page.keyboard.press("Tab")
    assert status(page).startswith("kind ab, layer 0, position 1")
    assert "1 cell not run" in page.locator(".legend").inner_text()
    page = open_file(html_of(result.only(kind="ab", layer=1).view(selection=gs.Selection(pos=3))))
    assert status(page).startswith("position 3 z: not run")


def three_axes() -> Result:
    cells = pandas.MultiIndex.from_product([["ab", "cd"], range(3), range(4)], names=["kind", "layer", "pos"])
    figures = torch.zeros(24, 1)
    figures[[5, 14, 21]] = torch.tensor([[0.2], [-0.4], [0.3]])  # ab 1 1, cd 0 2, cd 2 1
    return Result("made up", cells.to_frame(index=False), figures, "nats")


def test_it_starts_at_the_strongest_cell_of_what_is_selected(open_view, settled):
    view = three_axes().view()
    page = open_view(view)
    assert status(page) == "kind cd, layer 0, position 2: nats -0.400"
    view.selection.pos = 1
    assert status(page) == "kind cd, layer 2, position 1: nats 0.300"
    view.state = {"facet": "ab"}
    assert status(page) == "kind ab, layer 1, position 1: nats 0.200"
    # What is chosen in the page is state, and the list keeps the keyboard.
    kinds = page.get_by_label("kind")
    kinds.focus()
    kinds.select_option("cd")
    settled(page)
    assert view.state["facet"] == "cd" and status(page).startswith("kind cd, layer 1, position 1")
    assert page.evaluate("() => document.activeElement.ariaLabel") == "kind"
    assert status(open_view(three_axes().view(state={"facet": "ab"}))).startswith("kind ab, layer 1, position 1")


def test_a_sweep_that_has_run_stands_at_its_strongest_cell(open_view, settled, model):
    grid = grid_of(model)
    page = open_view(grid)
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("button", name="Done").wait_for()
    settled(page)
    best = grid.result.top(1).iloc[0]
    assert status(page).startswith(f"layer {best['layer']:.0f}, position {best['pos']:.0f} ·Mary")
    assert page.locator(".patch-prompts [aria-selected=true]").inner_text().split("\n")[0] == f"{best['pos']:.0f}"
    assert "across: position, with the tokens of the corrupted prompt" in page.locator(".legend").inner_text()


@pytest.mark.parametrize(
    "largest, ticks",
    [(12.34, ["-12.3", "0", "12.3"]), (0.0123, ["-0.0123", "0", "0.0123"]), (1.23e-6, ["-1.23e-6", "0", "1.23e-6"])],
)
def test_a_scale_has_three_digits_of_its_range(open_file, largest, ticks):
    result = Result("x", pandas.DataFrame({"layer": [0, 1]}), torch.tensor([[-largest], [0.0]]), "nats")
    page = open_file(html_of(result.view()))
    assert sorted(page.locator(".tick").all_inner_texts()) == sorted(ticks)
    if largest == 0.0123:
        assert status(page) == "layer 0: nats -0.0123"


def test_names_have_room_and_the_panel_stands_beside_the_grid(open_file):
    names = ["receiver -> last, the second mention", "last -> store"]
    cells = pandas.MultiIndex.from_product([names, range(3)], names=["span", "layer"]).to_frame(index=False)
    html = html_of(Result("knockout", cells, torch.rand(6, 1), "nats").view())
    drawn = """() => { const own = CanvasRenderingContext2D.prototype.fillText; window.drawn = [];
        CanvasRenderingContext2D.prototype.fillText = function (text, ...at) {
            window.drawn.push(text); own.call(this, text, ...at); }; }"""

    def opened(width):
        page = open_file(html, width=width, prepare=lambda page: page.add_init_script(f"({drawn})()"))
        box = {name: page.locator(f".{name}").bounding_box() for name in ("matrix", "panel")}
        return page.evaluate("() => window.drawn"), box["matrix"], box["panel"]

    texts, matrix, panel = opened(1280)
    assert names[0] in texts and not any("…" in text for text in texts)
    assert 0 < panel["x"] - matrix["x"] - matrix["width"] < 60 and panel["x"] < 640
    texts, matrix, panel = opened(400)
    assert any(text.startswith("receiver -> ") and text.endswith("…") for text in texts)
    assert matrix["width"] <= 372 and panel["y"] > matrix["y"] + matrix["height"]
