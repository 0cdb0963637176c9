"""Every view in JupyterLab and Notebook 7, without a network: it draws, the keyboard moves the selection, Python and
the linked views follow; and a kernel that is gone is said."""

import pytest

from tests.browser.every_view import SETUP, VIEWS
from tests.browser.jupyter import Jupyter, Notebook

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory, browser):
    server = Jupyter(tmp_path_factory.mktemp("jupyter"))
    yield server
    server.close()


@pytest.fixture
def open_notebook(jupyter, browser):
    """open_notebook(app, *cells): at the end, nothing was asked of the network and nothing went wrong."""
    opened = []

    def open_(app: str, *cells: str) -> Notebook:
        context = browser.new_context(viewport={"width": 1400, "height": 1600})
        name = f"{app}{len(opened)}.ipynb"
        jupyter.write(name, *cells)
        opened.append(Notebook(jupyter, context, name, app))
        opened[-1].context = context
        return opened[-1]

    yield open_
    for notebook in opened:
        notebook.context.close()
    jupyter.end_kernels()
    assert [notebook.outside for notebook in opened] == [[]] * len(opened)
    assert [notebook.errors for notebook in opened] == [[]] * len(opened)


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_every_view(open_notebook, app):
    notebook = open_notebook(app, SETUP, *(f"{name} = {code}\n{name}" for name, code in VIEWS.items()))
    notebook.run_all()
    page = notebook.page
    for number in range(len(VIEWS)):  # cells out of sight are not painted
        cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number + 1)
        cell.scroll_into_view_if_needed()
        cell.locator(".gsc[data-drawn]").first.wait_for(timeout=30_000)
    strip = page.get_by_role("grid", name="Tokens", exact=True)
    strip.scroll_into_view_if_needed()
    strip.focus()
    for key, at in {"Home": 0, "ArrowRight": 1, "Shift+ArrowRight": 11, "ArrowLeft": 10}.items():
        page.keyboard.press(key)
        page.wait_for_function(f"() => /^{at} /.test(document.querySelector('.gsc .readout').textContent)")
    assert notebook.python("print(selection.pos)") == "10"
    linked = "els => els.filter(el => /\\b10 .John/.test(el.textContent)).length"
    assert page.locator(".gsc").evaluate_all(linked) >= 4
    notebook.python("selection.pos = 2")
    page.wait_for_function("() => /^2 /.test(document.querySelector('.gsc .readout').textContent)")


def test_a_kernel_that_is_gone_is_said(open_notebook):
    notebook = open_notebook("lab", SETUP, VIEWS["AttentionView"])
    notebook.run_all()
    view = notebook.page.locator(".gsc[data-drawn]")
    view.wait_for(timeout=30_000)
    notebook.page.evaluate("() => window.jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
    notebook.page.wait_for_timeout(500)
    view.locator("[aria-label=Heads]").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowLeft", "ArrowLeft"):
        notebook.page.keyboard.press(key)
    notice = view.locator(".notice")
    notice.wait_for(state="visible", timeout=15_000)
    assert notice.inner_text() == "The kernel is gone or was restarted: run this cell again."
    notebook.errors.clear()  # Lab's own words on the shut kernel
