"""Every notebook runs from top to bottom in a fresh kernel, and is committed small."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MAX_OUTPUT = 300_000
"""Bytes of outputs in one committed notebook: pictures belong there, whole views with their data do not."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@each_notebook
def test_runs_without_an_error(path):
    notebook = nbformat.read(path, as_version=4)
    # Saved widget state would put every array on display into the file.
    where = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, timeout=300, store_widget_state=False, resources=where)
    client.execute()  # raises at the first cell that fails, with the cell and its traceback
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert not errors


@each_notebook
def test_is_committed_small_and_without_widget_state(path):
    notebook = nbformat.read(path, as_version=4)
    assert "widgets" not in notebook.metadata
    assert sum(len(json.dumps(cell.get("outputs", []))) for cell in notebook.cells) < MAX_OUTPUT
