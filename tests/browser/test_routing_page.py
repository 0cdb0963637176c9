"""The page of a routing report in a real browser: every picture is drawn, nothing is asked of the network."""

import random

import pytest

import gemmascope as gs
from gemmascope.zoo.corpus import DOMAINS, Corpus

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report():
    model = gs.load("nano-moe")
    rng, corpus = random.Random(0), Corpus(model.tokenizer.backend)
    labels = [domain for domain in DOMAINS for _ in range(2)]
    texts = [model.tokenizer.decode(corpus.document(rng, domain).ids[1:]) for domain in labels]
    return gs.report(model, texts, labels, sample=4, progress=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_every_picture_is_drawn(browser, report, tmp_path, scheme, width):
    path, troubles = report.to_html(tmp_path / "page.html"), []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()

    def guard(route):
        if route.request.url == path.as_uri():
            return route.continue_()
        troubles.append(f"asked for {route.request.url}")
        return route.abort()

    context.route("**/*", guard)
    page.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function(f"document.querySelectorAll('.main-svg').length >= {len(report.plots)}")
    drawn = page.locator("div[id^=plot-]")
    assert drawn.count() == len(report.plots)
    for number in range(drawn.count()):
        assert drawn.nth(number).locator("image, path.point, .point path").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert troubles == []
