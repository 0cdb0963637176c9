"""axe-core finds nothing serious in any view, light or dark."""

from pathlib import Path

import pytest

from tests.browser.every_view import SETUP, VIEWS

axe = pytest.importorskip("axe_playwright_python")
AXE = Path(axe.__file__).with_name("axe.min.js").read_text("utf-8")


@pytest.fixture(scope="module")
def names() -> dict:
    made = {}
    exec(SETUP, made)
    return made


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", VIEWS)
def test_no_serious_finding(open_view, names, name, scheme):
    page = open_view(eval(VIEWS[name], names), scheme=scheme, width=1000)
    page.wait_for_timeout(200)
    page.evaluate(AXE)
    found = page.evaluate("() => axe.run('main', { resultTypes: ['violations'] })")
    told = [
        (one["id"], one["impact"], [node["html"][:200] for node in one["nodes"][:3]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert told == []
