"""The README's example prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import gemmascope
from gemmascope.config import PRESETS
from gemmascope.model.text import HookedGemma4
from gemmascope.weights import shipped_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "code, printed",
    re.findall(r"```python\n((?:(?!```).)*)```\n\n```text\n(.*?)```", README, re.DOTALL),
    ids=["ten", "experiments"],
)
def test_example_prints_what_is_written(code, printed):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue() == printed


def test_table_of_sizes():
    import torch

    models = README.split("\n## Models\n")[1].split("\n## ")[0]
    rows = {row.split("`")[1]: row.split("|")[2:5] for row in models.splitlines() if row.startswith("| `")}
    assert set(rows) == {*PRESETS, *shipped_models()}
    for name, cfg in PRESETS.items():
        with torch.device("meta"):
            billions = sum(weight.numel() for weight in HookedGemma4(cfg).parameters()) / 1e9
        expected = [f"{billions:.2f} B", f"{2 * billions:.1f}", f"{4 * billions:.1f}"]
        assert [cell.strip() for cell in rows[name]] == expected
    for name in shipped_models():
        millions = sum(weight.numel() for weight in gemmascope.load(name).parameters()) / 1e6
        assert rows[name][0].strip() == f"{millions:.1f} M"


def test_tree_names_every_file():
    tree = README.split("## The tree")[1]
    for path in sorted((ROOT / "gemmascope").glob("*.py")) + sorted((ROOT / "gemmascope" / "model").glob("[a-z]*.py")):
        assert path.name in tree, path.name
