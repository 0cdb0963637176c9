"""Results as plotly figures, which read well on a light and on a dark page.

No one colour of text has a contrast of 4.5 on white and on JupyterLab's dark #111 (4.35 is the most there can be), so a
figure brings its paper: white, or dark where plotly's own default is (`plotly.io.templates.default = "plotly_dark"`).
"""

import html

import pandas
import plotly.graph_objects as go
import plotly.io
from pandas.api.types import is_float_dtype, is_numeric_dtype
from plotly.subplots import make_subplots

ORANGE, BLUE, GREY = "#d95f02", "#3182bd", "#808080"
"""Told apart by colour-blind readers, and by 3 to 1 from either paper."""
SCALE = [[0.0, ORANGE], [0.5, "rgba(128, 128, 128, 0.1)"], [1.0, BLUE]]
"""Orange below the midpoint, blue above; at it the paper shows through."""
RISING = [[0.0, "rgba(128, 128, 128, 0.1)"], [1.0, BLUE]]
"""For figures that are never negative, such as attention."""
_AXIS = dict(
    gridcolor="rgba(128, 128, 128, 0.25)",
    zerolinecolor="rgba(128, 128, 128, 0.5)",
    automargin=True,
    title_standoff=10,  # from the labels, however long they are
)


def _look(paper: str, ink: str) -> go.layout.Template:
    layout = dict(
        paper_bgcolor=paper,
        plot_bgcolor=paper,
        font_color=ink,
        colorway=[BLUE, ORANGE, "#1b9e77", "#cc79a7", GREY],
        colorscale=dict(diverging=SCALE, sequential=RISING, sequentialminus=SCALE),
        xaxis=_AXIS,
        yaxis=_AXIS,
        height=380,
        margin=dict(l=60, r=20, t=60, b=60),
    )
    interval = dict(error_x_color=ink, error_y_color=ink)  # also seen on a bar
    return go.layout.Template(layout=layout, data=dict(bar=[go.Bar(**interval)], scatter=[go.Scatter(**interval)]))


LOOK, DARK = _look("#ffffff", "#3b3e44"), _look("#111111", "#c9ccd1")
"""Templates that any plotly figure can take: `px.imshow(x, template=plots.LOOK)`. They differ in paper and ink alone,
so that a figure can change its template."""
MAX_LABEL = 20
"""Letters of a label at an axis; longer ones are cut."""


def look() -> go.layout.Template:
    """The template of a figure: dark where plotly's default is."""
    return DARK if "dark" in (plotly.io.templates.default or "") else LOOK


def of_result(result, value: str | None = None) -> go.Figure:
    """See `Result.plot`."""
    table = result.table
    value = value or ("recovered" if "recovered" in table else "value")
    figures = [column for column in table if column not in result.axes]
    if value not in figures:
        raise ValueError(f"{value!r} is no figure of this {result.experiment}; it has {', '.join(figures)}.")
    unit = "share recovered" if value == "recovered" else result.unit
    match result.pictured:
        case [axis]:
            figure = _curve(table, result, axis, value)
            figure.update_layout(xaxis_title=axis, yaxis_title=unit)
        case [rows, columns]:
            figure = _heatmaps([("", table)], result, rows, columns, value, unit)
        case [facets, rows, columns]:
            parts = [(escaped(f"{facets} {name}"), part) for name, part in table.groupby(facets, sort=False)]
            figure = _heatmaps(parts, result, rows, columns, value, unit)
    what = ", ".join(filter(None, (result.experiment, result.about.get("model"))))
    return figure.update_layout(title=escaped(what), template=look())


def _curve(table: pandas.DataFrame, result, axis: str, value: str) -> go.Figure:
    """A line along numbers, bars for names; with the 95 % interval and the baselines, where the figures have them."""
    names = _names(table[axis], result, axis)
    error = None
    if value == "value" and "low" in table:
        above, below = table["high"] - table["value"], table["value"] - table["low"]
        error = dict(array=above, arrayminus=below, symmetric=False, thickness=1.5)
    if is_numeric_dtype(table[axis]) and names == table[axis].map(str).tolist():
        figure = go.Figure(go.Scatter(x=table[axis], y=table[value], error_y=error, mode="lines+markers"))
        if not is_float_dtype(table[axis]) and (table[axis].diff().dropna() == 1).all():
            figure.update_xaxes(dtick=max(1, len(table) // 20))  # no layer 2.5
    else:
        figure = go.Figure(go.Bar(x=names, y=table[value], error_y=error, marker_opacity=0.6))
    for name, baseline in result.baselines.items() if value == "value" else ():
        figure.add_hline(float(baseline.mean()), line=dict(dash="dot", color=GREY), annotation_text=escaped(name))
    return figure


def _heatmaps(
    parts: list[tuple[str, pandas.DataFrame]], result, rows: str, columns: str, value: str, unit: str
) -> go.Figure:
    """Side by side, on one colour scale whose middle is a cell that did nothing."""
    titles = [title for title, _ in parts] if len(parts) > 1 else None
    figure = make_subplots(1, len(parts), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.02)
    for number, (_, part) in enumerate(parts, 1):
        grid = part.pivot_table(index=rows, columns=columns, values=value, sort=False, dropna=False)
        trace = go.Heatmap(
            z=grid.to_numpy(),
            x=_names(grid.columns, result, columns),
            y=_names(grid.index, result, rows),
            coloraxis="coloraxis",
            hovertemplate=f"{rows} %{{y}}<br>{columns} %{{x}}<br>%{{z:.3f}}<extra></extra>",
            xgap=1,
            ygap=1,
        )
        figure.add_trace(trace, 1, number)
    figure.update_xaxes(type="category", title=columns, showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    figure.update_yaxes(title=rows, col=1)
    middle = result.of_nothing(value)
    table = pandas.concat([part for _, part in parts])[value]
    reach = float((table - middle).abs().max()) or 1.0
    bar = dict(title=dict(text=escaped(unit), side="right"), thickness=14)
    if middle == 0 and (table >= 0).all() and result.base is None:
        figure.update_layout(coloraxis=dict(colorscale=RISING, cmin=0, cmax=reach, colorbar=bar))
    else:
        figure.update_layout(coloraxis=dict(colorscale=SCALE, cmin=middle - reach, cmax=middle + reach, colorbar=bar))
    return figure.update_layout(height=max(300, 150 + 28 * parts[0][1][rows].nunique()))


def _names(values, result, axis: str) -> list[str]:
    """What stands at an axis: the number, and the token where the axis is of positions and the tokens are known."""
    tokens = [result.token_at(axis, value) for value in values]
    return [
        label(value) if token is None else f"{value} {label(token)}"
        for value, token in zip(values, tokens, strict=True)
    ]


def label(value) -> str:
    text = str(value)
    return escaped(text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…")


def escaped(value) -> str:
    """plotly reads its texts as HTML."""
    return html.escape(str(value)).replace("\n", "\\n")
