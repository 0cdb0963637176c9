"""The explore page in a real browser: it draws alone, and one selection drives every view, by mouse and by keyboard."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gemmascope.widgets import explore as widget

pytestmark = pytest.mark.browser

WORDS = ("<bos>", "When", " Mary", " and", " John", " went", "\n", " John", " gave", " milk", " to", " Mary")
VOCAB = [*dict.fromkeys(WORDS), "<0xC3>", " a", " the", "<img src=x onerror=alert(1)>", " internationalisation", "."]
WINDOW = 4


def fields(words=WORDS, *, n_layers=3, n_heads=4, n_experts: int | None = 8, block=1, model="made-up") -> dict:
    """What the page is given, from made-up numbers that agree with one another."""
    rng = np.random.default_rng(0)
    n, n_rows, vocab = len(words), n_layers + 1, list(dict.fromkeys([*VOCAB, *words]))
    probs = rng.dirichlet(np.full(len(vocab), 0.3), (n_rows, n))
    lens_ids = np.argsort(-probs).transpose(1, 0, 2)[..., :5]
    courses = np.stack([probs[:, p].T[lens_ids[p]] for p in range(n)])
    surprise = rng.uniform(0, 5, n)
    surprise[0] = np.nan
    side = -(-n // block)
    q, k = np.indices((side, side))
    kinds = tuple("global" if layer % 2 else "sliding" for layer in range(n_layers))
    visible = {"global": k <= q, "sliding": (k <= q) & ((q - k - 1) * block < WINDOW - 1)}
    patterns = np.stack([rng.integers(1, 256, (n_heads, side, side)) * visible[kind] for kind in kinds])
    return dict(
        model_name=model,
        prompt="".join(words[1:]),
        tokens=tuple(words),
        ids=np.array([vocab.index(word) for word in words], np.int32),
        surprise=surprise.astype(np.float32),
        lens_ids=lens_ids.astype(np.int32),
        lens_probs=courses.astype(np.float32),
        lens_tokens=dict(enumerate(vocab)),
        patterns=patterns.astype(np.uint8),
        block=block,
        layer_kinds=kinds,
        window=WINDOW,
        n_kv_heads=tuple(1 if kind == "global" else 2 for kind in kinds),
        kv_sources=(*[None] * (n_layers - 1), 0),
        n_experts=n_experts,
        expert_indices=rng.permuted(np.tile(np.arange(8), (n_layers, n, 1)), axis=-1)[..., :2].astype(np.int32)
        if n_experts
        else None,
        expert_weights=rng.uniform(0.1, 1, (n_layers, n, 2)).astype(np.float32) if n_experts else None,
    )


@pytest.fixture
def open_page(browser, tmp_path: Path) -> Iterator[Callable]:
    """Opens the page about some fields. At the end: nothing was asked of the network and nothing went wrong."""
    contexts, troubles = [], []

    def open_(given: dict, width=1280, height=900, color_scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=color_scheme)
        contexts.append(context)
        path = tmp_path / "page.html"
        path.write_text(widget.page(**given), encoding="utf-8")

        def guard(route):
            if route.request.url == path.as_uri():
                return route.continue_()
            troubles.append(f"asked for {route.request.url}")
            route.abort()

        context.route("**/*", guard)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_selector("main")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert troubles == []


def shown(text: str) -> str:
    return text.replace(" ", "·").replace("\n", "⏎")


def section(page, name: str):
    return page.locator(f"section[aria-label='{name}']")


def readout(page, name: str) -> str:
    return section(page, name).locator(".readout").inner_text()


def spoken(page) -> str:
    return page.locator("[role=status]").inner_text()


def map_point(page, query: int, key: int) -> dict:
    """Where a cell of the large map is on its canvas: the map fills what the gutter of labels leaves."""
    box = page.locator(".map canvas").bounding_box()
    cell = (box["width"] - 92 - 4) / len(WORDS)
    return {"x": 92 + (key + 0.5) * cell, "y": 92 + (query + 0.5) * cell}


def map_pixel(page, query: int, key: int) -> list[int]:
    at = map_point(page, query, key)
    script = "(el, at) => [...el.getContext('2d').getImageData(at.x, at.y, 1, 1).data]"
    return page.locator(".map canvas").evaluate(script, at)


def test_the_first_screen_shows_the_last_token_and_a_structured_head(open_page):
    given = fields()
    page = open_page(given)
    layer, head = widget.most_structured_head(given["patterns"])
    assert page.title() == f"made-up: {shown(given['prompt'])}"
    assert page.locator(".token[aria-selected=true]").inner_text() == "·Mary"
    nats = given["surprise"][11]
    assert readout(page, "Tokens") == f"11 ·Mary, id 2, surprise {nats:.2f} nats (p {np.exp(-nats):.3f})"
    assert readout(page, "Attention").startswith(f"layer {layer} head {head}: 11 ·Mary reads ")
    assert [h2.inner_text() for h2 in page.locator("h2").all()] == ["Logit lens", "Attention", "Experts"]
    assert page.locator(".token").first.inner_text() == "<bos>" and "⏎" in page.locator(".strip").inner_text()
    assert "K, V: layer 0" in section(page, "Attention").locator(".row").last.inner_text()


@pytest.mark.parametrize("width", [1280, 700])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_every_canvas_is_drawn(open_page, width, scheme):
    page = open_page(fields([*WORDS, " antidisestablishmentarianism" * 3]), width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    spill = """els => els.filter(el => el.scrollWidth > el.clientWidth + 1 && el.clientWidth
        && getComputedStyle(el).overflowX === 'visible' && getComputedStyle(el).display !== 'inline'
    ).map(el => el.outerHTML.slice(0, 200))"""
    # Not asked of: what a scroller holds, what only a screen reader meets, the ticks that stand at the ends of a scale.
    boxes = page.locator("main *:not(.inner, .inner *, .spoken, svg *, .scale, .scale *, :has(.scale))")
    assert boxes.count() > 100 and boxes.evaluate_all(spill) == []
    colours = """els => els.map(el => new Set(new Uint32Array(
        el.getContext('2d').getImageData(0, 0, el.width, el.height).data.buffer)).size)"""
    assert min(page.locator("canvas").evaluate_all(colours)) > 10


def test_a_token_selects_its_position_everywhere(open_page):
    page = open_page(fields())
    page.locator(".token").nth(4).click()
    assert readout(page, "Tokens").startswith("4 ·John, id 4")
    assert "4 ·John" in readout(page, "Logit lens") and ": 4 ·John reads" in readout(page, "Attention")
    assert "4 ·John" in readout(page, "Experts") and spoken(page) == readout(page, "Tokens")
    page.locator(".token").nth(0).click()
    assert "nothing before it" in readout(page, "Tokens")


def test_a_lens_cell_opens_its_tokens_and_a_token_its_course(open_page):
    given = fields()
    page = open_page(given)
    lens = section(page, "Logit lens")
    lens.locator("[data-row='1'][data-pos='3']").click()
    name = [shown(given["lens_tokens"][i]) for i in given["lens_ids"][3, 1]]
    prob = given["lens_probs"][3, 1, :, 1]
    listed = [[n, f"{p:.3f}"] for n, p in zip(name, prob, strict=True)]
    assert lens.locator("h3").first.inner_text() == "layer 0 at 3 ·and"
    options = lens.locator("[role=option]")
    assert [text.split() for text in options.all_inner_texts()] == listed
    assert spoken(page) == f"layer 0 at 3 ·and: {name[0]} {prob[0]:.3f}"
    options.nth(2).click()
    assert lens.locator("h3").last.inner_text() == f"{name[2]} over layers"
    assert spoken(page) == f"layer 0 at 3 ·and: {name[2]} {prob[2]:.3f}"
    dots = lens.locator("circle").evaluate_all("els => els.map(el => Number(el.getAttribute('cy')))")
    heights = np.max(dots) - np.array(dots)
    course = given["lens_probs"][3, 1, 2]
    np.testing.assert_allclose(heights / heights.max(), (course - course.min()) / np.ptp(course), atol=0.01)
    assert readout(page, "Attention").startswith("layer 0 ")  # one layer is selected, not one a view


def test_heads_and_map_give_the_exact_weight(open_page):
    given = fields()
    page = open_page(given)
    value = lambda layer, head, q, k: f"{given['patterns'][layer, head, q, k] / 255:.3f}"  # noqa: E731
    page.locator("#head-1-2").click()
    assert section(page, "Attention").locator("h3").first.inner_text() == "layer 1 head 2, global"
    before = map_pixel(page, 9, 2)
    page.locator(".map canvas").hover(position=map_point(page, 9, 2))
    assert readout(page, "Attention") == f"layer 1 head 2: 9 ·milk reads 2 ·Mary: {value(1, 2, 9, 2)}"
    page.mouse.move(0, 0)
    assert ": 11 ·Mary reads" in readout(page, "Attention")  # hovering selects nothing
    page.locator(".map canvas").click(position=map_point(page, 9, 2))
    assert spoken(page) == f"layer 1 head 2: 9 ·milk reads 2 ·Mary: {value(1, 2, 9, 2)}"
    assert page.locator(".token[aria-selected=true]").inner_text() == "·milk"
    weights = given["patterns"][1, 2, 9] / 255
    bars = page.locator(".token .reads").evaluate_all("els => els.map(el => el.getBoundingClientRect().height)")
    np.testing.assert_allclose(bars, weights * 8, atol=0.1)
    keys = section(page, "Attention").locator("[role=option] .value").all_inner_texts()
    assert keys == [f"{w:.3f}" for w in sorted(weights, reverse=True)[:8]]
    page.locator("#head-0-2").click()
    assert map_pixel(page, 9, 2) != before  # sliding, and 2 is behind the window
    page.locator(".map canvas").click(position=map_point(page, 9, 2))
    assert spoken(page).endswith("reads 2 ·Mary: outside the window")


def test_an_expert_shows_the_tokens_it_serves(open_page):
    given = fields()
    page = open_page(given)
    experts = section(page, "Experts")
    chip = experts.locator("[data-row='1'][data-pos='5'] .chip").nth(1)
    expert = int(chip.inner_text())
    slots = given["expert_indices"][1], given["expert_weights"][1]
    lighter = slots[0][5][np.argmin(slots[1][5])]
    assert expert == lighter
    chip.click()
    served = [pos for pos in range(len(WORDS)) if expert in slots[0][pos]]
    assert 0 < len(served) < len(WORDS)
    assert f"expert {expert} serves {len(served)} of 12 tokens" in experts.inner_text()
    dotted = page.locator(".token").evaluate_all("els => els.flatMap((el, i) => el.matches('.served') ? [i] : [])")
    assert dotted == served
    chosen = "els => els.map(el => [el.parentNode.dataset.row, el.textContent])"
    framed = experts.locator(".chip.chosen").evaluate_all(chosen)
    assert framed == [["1", str(expert)]] * len(served)
    weight = slots[1][served[0]][list(slots[0][served[0]]).index(expert)]
    tokens = experts.locator(".bars").last.locator("[role=option]")
    assert tokens.first.inner_text().split()[-1] == f"{weight:.3f}"
    tokens.first.click()
    assert page.locator(".token[aria-selected=true]").get_attribute("id") == f"token-{served[0]}"
    assert f"expert {expert} serves" in experts.inner_text()  # walking along its tokens keeps the expert


def test_a_model_without_experts_has_no_section_for_them(open_page):
    page = open_page(fields(n_experts=None))
    assert [h2.inner_text() for h2 in page.locator("h2").all()] == ["Logit lens", "Attention"]
    assert "expert" not in page.locator("body > main").inner_text().lower()


def test_every_view_is_one_tab_stop_and_arrows_move_in_it(open_page):
    page = open_page(fields())
    stops = []
    for _ in range(9):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        ring = page.evaluate("(s => `${s.outlineStyle} ${s.outlineWidth}`)(getComputedStyle(document.activeElement))")
        assert ring == "solid 2px"
    views = ["Tokens", "Logit lens", "Most probable tokens", "Heads", "Attention map", "Keys read", "Experts"]
    assert [stop.split(":")[0] for stop in stops] == [*views, "Experts of this token", "Tokens of this expert"]

    active = "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).textContent"
    page.locator("[aria-label=Tokens][role=grid]").focus()
    moves = {"ArrowLeft": 10, "Home": 0, "Shift+ArrowRight": 10, "End": 11, "ArrowRight": 11, "ArrowUp": 4}
    for key, at in moves.items():
        page.keyboard.press(key)
        assert spoken(page).startswith(f"{at} {shown(WORDS[at])}, id"), key
        assert page.evaluate(active) == shown(WORDS[at])

    page.locator("[role=grid][aria-label='Logit lens']").focus()
    page.keyboard.press("Home")
    page.keyboard.press("Shift+ArrowDown")
    assert spoken(page).startswith("output at 0 <bos>: ")
    for row in ("layer 1", "layer 0", "embed", "embed"):
        page.keyboard.press("ArrowUp")
        assert spoken(page).startswith(f"{row} at 0 <bos>: ")

    page.locator("[aria-label=Heads]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    assert spoken(page).startswith("layer 1 head 0: 0 <bos> reads 0 <bos>: ")
    page.locator(".map").focus()
    for key in ("]", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert spoken(page).startswith("layer 1 head 1: 2 ·Mary reads ")
    page.keyboard.press("End")
    assert spoken(page) == "layer 1 head 1: 2 ·Mary reads 11 ·Mary: not yet written"
    assert page.locator("#map-cursor").inner_text() == spoken(page)
    page.keyboard.press("PageDown")
    assert spoken(page).startswith("layer 2 head 1: ")

    tokens = page.locator("[aria-label='Most probable tokens']")
    tokens.press("ArrowDown")
    assert tokens.locator("[role=option]").nth(1).get_attribute("aria-selected") == "true"
    assert page.evaluate(active) == tokens.locator("[role=option]").nth(1).text_content()


def luminance(rgb: list[int]) -> float:
    return float(np.dot(rgb[:3], [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("switched", [False, True])
def test_dark_mode_draws_more_as_more_contrast(open_page, switched):
    given = fields()
    given["patterns"][1, 0, 11, 2:5] = 0, 60, 255
    page = open_page(given, color_scheme="light" if switched else "dark")
    if switched:
        page.emulate_media(color_scheme="dark")
    page.locator("#head-1-0").click()
    paper = [int(c) for c in page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")]
    steps = [luminance(paper), *(luminance(map_pixel(page, 11, key)) for key in (2, 3, 4))]
    assert steps[0] < 60 and steps == sorted(steps) and steps[3] - steps[1] > 150
    cell = section(page, "Logit lens").locator("[data-row='2'][data-pos='11']")
    colours = "el => (s => [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).map(Number)))(getComputedStyle(el))"
    fill, ink = cell.evaluate(colours)
    assert abs(luminance(fill) - luminance(ink)) > 90


def test_a_long_prompt_says_that_its_maps_are_pooled(open_page):
    words = [f" w{i}" for i in range(600)]
    page = open_page(fields(words, n_layers=2, n_heads=2, n_experts=None, block=3))
    assert "a block of 3 x 3 positions" in section(page, "Attention").locator(".note").inner_text()
    assert ": 597 to 599 reads " in readout(page, "Attention")
    drawn = section(page, "Logit lens").locator("[role=gridcell]")
    assert 3 * 10 < drawn.count() < 3 * 60  # only the columns in sight
    page.locator("[role=grid][aria-label='Logit lens']").press("Home")
    assert section(page, "Logit lens").locator("[data-pos='0'][aria-selected=true]").is_visible()
    assert page.locator(".token").count() == 600


def test_strings_stay_text(open_page):
    evil = ("<bos>", "</script>", "<b>", '"', "&", "<img src=x onerror=alert(1)>", "\u202e", "\u200b", "&lt;")
    page = open_page(fields(evil, model="</h1><script>alert(2)</script>"))
    assert page.locator("h1").inner_text() == "</h1><script>alert(2)</script>"
    assert page.locator(".token").all_inner_texts() == [*map(shown, evil[:6]), "\\u{202e}", "\\u{200b}", "&lt;"]
    assert page.locator("b, img, h1 script").count() == 0


NUMBERS = (widget.HERE / "numbers.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("block, window", [(1, None), (1, 4), (3, None), (3, 1), (3, 4), (4, 2)])
def test_visible_is_the_models_mask_pooled(browser, block, window):
    n = 11
    q, k = np.indices((n, n))
    mask = (k <= q) & (True if window is None else q - k < window)
    side = -(-n // block)
    padded = np.pad(mask, (0, side * block - n))
    expected = padded.reshape(side, block, side, block).any((1, 3))
    page = browser.new_page()
    cells = "range(side).map((q) => range(side).map((k) => visible(q, k, block, n, window)))"
    script = f"({{ n, block, window, side }}) => {{ {NUMBERS}; return {cells}; }}"
    assert page.evaluate(script, dict(n=n, block=block, window=window, side=side)) == expected.tolist()
    page.close()


def test_thumbnails_keep_the_largest_weight(browser):
    codes = np.random.default_rng(0).integers(0, 256, (7, 7))
    padded = np.pad(codes, (0, 2)).reshape(3, 3, 3, 3).max((1, 3))
    page = browser.new_page()
    script = f"(map) => {{ {NUMBERS}; return [...poolMax(map, 7, 3)]; }}"
    assert page.evaluate(script, codes.flatten().tolist()) == padded.flatten().tolist()
    page.close()
