"""Figures can be read, on a white and on a dark paper, and are plain plotly figures."""

import pandas
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from gemmascope import plots
from gemmascope.results import Result


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """As WCAG 2 has it."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("template", [plots.LOOK, plots.DARK], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_paper(template):
    layout = template.layout
    assert contrast(layout.font.color, layout.paper_bgcolor) >= 4.5
    assert layout.plot_bgcolor == layout.paper_bgcolor
    for colour in (*layout.colorway, plots.ORANGE, plots.BLUE, plots.GREY):
        assert contrast(colour, layout.paper_bgcolor) >= 3, colour


@pytest.fixture
def curve() -> Result:
    return Result("curve", pandas.DataFrame({"layer": range(3)}), torch.randn(3, 5), "x")


def test_figures_are_dark_where_plotly_is(curve, monkeypatch):
    assert curve.plot().layout.template.layout.paper_bgcolor == "#ffffff"
    monkeypatch.setattr(plotly.io.templates, "default", "plotly_dark")
    assert curve.plot().layout.template.layout.paper_bgcolor == "#111111"


def test_a_plot_is_a_plain_figure_of_a_few_kilobytes(curve):
    assert type(curve.plot()) is go.Figure
    assert len(curve.plot().to_json()) < 10_000
