"""Results as plotly figures, which read well on a light and on a dark page."""

import html

import pandas
import plotly.graph_objects as go
from plotly.subplots import make_subplots

SCALE = [[0.0, "#b2182b"], [0.5, "#f7f7f7"], [1.0, "#2166ac"]]
"""Red below zero, blue above."""


def of_result(result, value: str | None = None) -> go.Figure:
    """See `Result.plot`."""
    table = result.table
    value = value or ("recovered" if "recovered" in table else "value")
    figures = [column for column in table if column not in result.axes]
    if value not in figures:
        raise ValueError(f"{value!r} is no figure of this {result.experiment}; it has {', '.join(figures)}.")
    varied = [axis for axis in result.axes if table[axis].nunique() > 1] or result.axes[:1]
    unit = "share recovered" if value == "recovered" else result.unit
    match varied:
        case [axis]:
            figure = go.Figure(go.Bar(x=_labels(table, result, axis), y=table[value], marker_color="#4393c3"))
            figure.update_layout(xaxis_title=axis, yaxis_title=unit)
        case [rows, columns]:
            figure = go.Figure(_heatmap(table, result, rows, columns, value, unit))
            figure.update_layout(xaxis_title=columns, yaxis_title=rows)
            figure.update_yaxes(autorange="reversed")
        case [facets, rows, columns]:
            parts = list(table.groupby(facets, sort=False))
            figure = make_subplots(1, len(parts), subplot_titles=[_text(f"{facets} {name}") for name, _ in parts])
            for number, (_, part) in enumerate(parts, 1):
                figure.add_trace(_heatmap(part, result, rows, columns, value, unit, shared=True), 1, number)
            figure.update_yaxes(autorange="reversed")
            largest = float(table[value].abs().max())
            figure.update_layout(coloraxis=dict(colorscale=SCALE, cmin=-largest, cmax=largest, colorbar_title=unit))
        case _:
            raise ValueError(
                f"A picture has three axes at most and this {result.experiment} varies {', '.join(varied)}: "
                "plot a part of result.table."
            )
    figure.update_layout(
        title=_text(result.experiment),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font_color="#808080",  # legible on white and on black
        margin=dict(l=60, r=20, t=50, b=60),
    )
    return figure


def _heatmap(
    table: pandas.DataFrame, result, rows: str, columns: str, value: str, unit: str, shared: bool = False
) -> go.Heatmap:
    grid = table.pivot_table(index=rows, columns=columns, values=value, sort=False, dropna=False)
    largest = float(grid.abs().max().max()) or 1.0
    colours = dict(coloraxis="coloraxis") if shared else dict(colorscale=SCALE, zmin=-largest, zmax=largest)
    return go.Heatmap(
        z=grid.to_numpy(),
        x=_names(grid.columns, result, columns),
        y=_names(grid.index, result, rows),
        colorbar=None if shared else dict(title=unit),
        hovertemplate=f"{rows} %{{y}}<br>{columns} %{{x}}<br>%{{z:.3f}}<extra></extra>",
        **colours,
    )


def _labels(table: pandas.DataFrame, result, axis: str) -> list[str]:
    return _names(table[axis], result, axis)


def _names(values, result, axis: str) -> list[str]:
    """What stands at an axis: the number, and the token where the axis is of positions and the tokens are known."""
    tokens = result.about.get("tokens")
    if axis not in ("pos", "query", "key") or tokens is None:
        return [_text(value) for value in values]
    return [f"{value} {_text(tokens[value])}" if 0 <= value < len(tokens) else str(value) for value in values]


def _text(value) -> str:
    """plotly reads its labels as HTML."""
    return html.escape(str(value)).replace("\n", "\\n")
