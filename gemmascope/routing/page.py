"""A routing report as pictures and as one page.

The page is one file with plotly.js, its style and its numbers inside. It asks nothing of the network, and its
Content-Security-Policy forbids it to: only its two scripts, named by their hashes, may run.
"""

import base64
import hashlib
import html
import json
import math

import numpy
import pandas
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from gemmascope.plots import BLUE, DARK, GREY, LOOK, ORANGE, RISING, SCALE, escaped, label, look
from gemmascope.routing import statistics as S
from gemmascope.routing.report import MEANING, SHOWN, TESTED, RoutingReport

MAX_LIFT = 8.0
"""Beyond it, the colour no longer changes."""
_FAINT = "rgba(217, 95, 2, 0.6)"
NATS = "nats a token"


# Pictures


def figures(report: RoutingReport) -> dict[str, go.Figure]:
    """See `RoutingReport.plots`."""
    drawn = {"effects": _effects(report)}
    if report.silenced is not None:
        drawn |= {"scatter": _scatter(report), "correlations": _correlations(report)}
    drawn["layers"] = _layers(report)
    if report.labelled:
        drawn["domains"] = _domains(report)
    drawn["margins"] = _margins(report)
    return {name: figure.update_layout(template=look(), margin_t=50) for name, figure in drawn.items()}


def _effect_axis(values, title: str, x: float) -> dict:
    """A colour axis on which no effect is the page's own colour, with its bar at x."""
    reach = float(numpy.nanmax(numpy.abs(numpy.asarray(values, dtype=float)), initial=0.0)) or 1.0
    bar = dict(title=dict(text=title, side="right"), thickness=12, x=x)
    return dict(colorscale=SCALE, cmin=-reach, cmax=reach, colorbar=bar)


def _share_axis(usual: float, values: pandas.Series, title: str, x: float) -> dict:
    """One from 0 on, on which what is usual is the page's own colour."""
    most = max(2 * usual, float(values.max()))
    scale = [[0.0, _FAINT], [usual / most, SCALE[1][1]], [1.0, BLUE]]
    bar = dict(title=dict(text=title, side="right"), thickness=12, x=x)
    return dict(colorscale=scale, cmin=0, cmax=most, colorbar=bar)


def _grid(table: pandas.DataFrame, value: str, axis: str, rows: str = "layer", columns: str = "expert") -> go.Heatmap:
    grid = table.pivot(index=rows, columns=columns, values=value)
    grid = grid.reindex(index=table[rows].unique(), columns=table[columns].unique())  # as they come, not sorted
    return go.Heatmap(
        z=grid.to_numpy(dtype=float),
        x=_labels(grid.columns),
        y=_labels(grid.index),
        coloraxis=axis,
        hovertemplate=f"{rows} %{{y}}<br>{columns} %{{x}}<br>%{{z:.4f}}<extra>{escaped(value)}</extra>",
        hoverongaps=False,
    )


def _labels(names) -> list[str]:
    """Short, unless that makes two of them one: a heatmap would draw one over the other."""
    short = [label(name) for name in names]
    return short if len(set(short)) == len(short) else [escaped(name) for name in names]


def _effects(report: RoutingReport) -> go.Figure:
    """The load of every expert, and beside it what silencing it does, and what the control does."""
    table = report.experts
    panels = {"load": "load: share of choices"}
    if report.silenced is not None:
        panels |= {"loss": "effect: silenced", "matched load": "control: matched load"}
    figure = make_subplots(
        1, len(panels), shared_yaxes=True, subplot_titles=[*panels.values()], horizontal_spacing=0.03
    )
    for column, name in enumerate(panels, 1):
        shown = table.dropna(subset=name)  # of many experts, some were silenced
        figure.add_trace(_grid(shown, name, "coloraxis" if name == "load" else "coloraxis2"), 1, column)
    figure.update_xaxes(type="category", title="expert", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    figure.update_yaxes(title="layer", col=1)
    figure.update_layout(coloraxis=_share_axis(1 / report.counts.n_experts, table["load"], "share", 1.01))
    if report.silenced is not None:
        figure.update_layout(coloraxis2=_effect_axis(table[["loss", "matched load"]], f"change of loss ({NATS})", 1.11))
    return figure.update_layout(height=max(300, 150 + 26 * len(report.counts.layers)), margin_r=170)


def _scatter(report: RoutingReport) -> go.Figure:
    """Effect over load, each expert beside its control."""
    table = report.experts.dropna(subset="loss")
    names = [f"layer {layer}, expert {expert}" for layer, expert in zip(table["layer"], table["expert"], strict=True)]
    x = report.counts.k * table["load"]
    error = None
    if "low" in table:
        above, below = table["high"] - table["loss"], table["loss"] - table["low"]
        error = dict(array=above, arrayminus=below, symmetric=False, thickness=1, width=0, color=BLUE)
    figure = go.Figure()
    shown = dict(mode="markers", x=x, text=names, hovertemplate="%{text}<br>%{x:.3f} of tokens<br>%{y:.4f}")
    control = dict(color=ORANGE, symbol="circle-open", size=7)
    figure.add_trace(go.Scatter(y=table["loss"], error_y=error, name="silenced", marker=dict(color=BLUE), **shown))
    figure.add_trace(go.Scatter(y=table["matched load"], name="control: matched load", marker=control, **shown))
    return figure.update_layout(
        xaxis_title="share of tokens that choose the expert",
        yaxis_title=f"change of loss ({NATS})",
        legend=dict(orientation="h", y=1.12),
    )


def _correlations(report: RoutingReport) -> go.Figure:
    """How far each statistic goes with the effect."""
    figure = go.Figure()
    for (of, part), color in zip(report.correlations.groupby("of", sort=False), (BLUE, ORANGE), strict=True):
        above, below = part["high"] - part["spearman"], part["spearman"] - part["low"]
        error = dict(array=above, arrayminus=below, symmetric=False, thickness=1.5)
        figure.add_trace(
            go.Bar(y=part["statistic"], x=part["spearman"], error_x=error, name=of, orientation="h", marker_color=color)
        )
    figure.update_xaxes(range=[-1.02, 1.02], title="Spearman correlation over experts")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    height = 140 + 34 * report.correlations["statistic"].nunique()
    return figure.update_layout(height=height, legend=dict(orientation="h", y=1.1), bargap=0.3)


def _layers(report: RoutingReport) -> go.Figure:
    """Statistics of each layer, and what the layer's routing is worth."""
    table, n = report.layers, report.counts.n_experts
    shares = {
        "effective experts / E": table["effective_experts"] / n,
        "Gini of the load": table["gini"],
        "entropy / log E": table["entropy"] / math.log(n),
    }
    shares |= {name: table[column] for column, name in _BY_LAYER.items() if column in table}
    effects = {name: table[column] for column, name in _EFFECTS.items() if column in table}
    titles = ["statistics", f"change of loss ({NATS})"][: 1 + bool(effects)]
    figure = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=0.08)
    colors = [BLUE, ORANGE, "#1b9e77", "#cc79a7", GREY, "#b8860b"]
    for column, lines in enumerate((shares, effects), 1):
        for (name, values), color in zip(lines.items(), colors, strict=False):
            line = go.Scatter(
                x=table["layer"], y=values, name=name, mode="lines+markers", marker_color=color,
                legend="legend" if column == 1 else "legend2",
            )  # fmt: skip
            figure.add_trace(line, 1, column)
    figure.update_xaxes(title="layer", dtick=max(1, len(table) // 10))
    figure.update_yaxes(range=[0, 1.02], col=1)
    below = dict(yanchor="top", y=-0.22, xanchor="left")
    return figure.update_layout(legend=below | dict(x=0), legend2=below | dict(x=0.54), height=480)


_BY_LAYER = {"nmi": "NMI with the label", "same_first": "first choice repeated"}
_BY_LAYER |= {"next_layer": "told of the next layer"}
_EFFECTS = {"silenced": "one expert silenced (mean)", "first_only": "first choice alone"}
_EFFECTS |= {"none": "no experts", "wrong": "wrong experts"}


def _domains(report: RoutingReport) -> go.Figure:
    """Whose experts they are, and under that, whom it hurts to silence them."""
    table = report.domains
    cell = table["layer"].astype(str) + "." + table["expert"].astype(str)
    table = table.assign(cell=cell, lift=table["lift"].clip(upper=MAX_LIFT))
    panels = {"lift": "use by the label, over use by all text (1: as much)"}
    if "loss" in table:
        panels["loss"] = f"effect on the label's predictions: silenced ({NATS})"
    figure = make_subplots(len(panels), 1, shared_xaxes=True, subplot_titles=[*panels.values()], vertical_spacing=0.12)
    for row, name in enumerate(panels, 1):
        axis = "coloraxis" if row == 1 else "coloraxis2"
        figure.add_trace(_grid(table, name, axis, "label", "cell"), row, 1)
    figure.update_xaxes(type="category", showgrid=False, nticks=60)
    figure.update_xaxes(title="layer.expert", row=len(panels))
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    figure.update_layout(coloraxis=_share_axis(1.0, table["lift"], "times", 1.01))
    if len(panels) == 2:
        figure.update_layout(coloraxis2=_effect_axis(table["loss"], NATS, 1.01))
        for axis, y in (("coloraxis", 0.78), ("coloraxis2", 0.22)):
            figure.update_layout({axis: dict(colorbar=dict(len=0.48, y=y))})
    return figure.update_layout(height=130 + len(panels) * max(150, 28 * len(report.counts.labels) + 40))


def _margins(report: RoutingReport) -> go.Figure:
    """How close the last choice is to the next: where it is next to nothing, small changes flip it."""
    table = S.margin_histogram(report.counts)
    table["margin"] = table["low"].map("{:.0e}".format)
    figure = go.Figure(_grid(table, "share", "coloraxis", "layer", "margin"))
    figure.update_xaxes(type="category", showgrid=False, title="probability of the last choice less that of the next")
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed", title="layer")
    bar = dict(title=dict(text="share of tokens", side="right"), thickness=12)
    height = max(300, 170 + 26 * len(report.counts.layers))
    return figure.update_layout(coloraxis=dict(colorscale=RISING, cmin=0, colorbar=bar), height=height)


# Pages

TITLES = {
    "effects": "Load, and what it says of effect",
    "scatter": "Does load tell what matters?",
    "correlations": "Does any statistic?",
    "layers": "Layer by layer",
    "domains": "Whose experts?",
    "margins": "How close the choices are",
}
NOTES = {
    "effects": "Left: how the work is shared out; the page's own colour is the uniform share. Middle: the change of "
    "the loss when the expert is silenced at every token (to renormalise the others would change nothing: a norm "
    "follows their sum). Right: the control, as many random tokens that lose another of their experts.",
    "scatter": "An expert above the control's circle at its own load matters more than its number of tokens says.",
    "correlations": "Rank correlation, over experts, of each statistic with the effect, and with what of it is beyond "
    "the matched-load control. All intervals hold together at 95 %. The last is no statistic but the effect's own "
    "estimate from one backward pass.",
    "layers": "Left: what was counted. Right: what becomes of the loss when the layer's experts are changed.",
    "domains": "Above: which labels use an expert more than text as a whole does. Below: whose predictions suffer when "
    "it is silenced. An expert that is a label's own in the first and not in the second is used, and not needed.",
    "margins": "Tokens far to the left are routed by next to nothing.",
}
STYLE = """
:root { color-scheme: light dark; --line: rgba(128, 128, 128, 0.3); --quiet: rgba(128, 128, 128, 0.09); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 0 auto; padding: 1.5rem; background: Canvas;
  color: CanvasText; }
h1 { font-size: 1.6rem; margin: 0 0 0.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.2rem; }
p { margin: 0.4rem 0; max-width: 80ch; }
.note, dd, footer { color: GrayText; }
@supports (color: color-mix(in srgb, red, blue)) {
  .note, dd, footer { color: color-mix(in srgb, CanvasText 65%, Canvas); }
}
.findings { background: var(--quiet); border-left: 3px solid #3182bd; padding: 0.6rem 1rem; }
.findings li { margin: 0.25rem 0; }
.findings ul { margin: 0; padding-left: 1.1rem; }
.plot { overflow-x: auto; }
.plot > div { min-width: 720px; }
.table { overflow: auto; max-height: 30rem; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap; border: 0; }
thead th { position: sticky; top: 0; background: Canvas; box-shadow: 0 1px var(--line); }
tbody tr:nth-child(odd) { background: var(--quiet); }
.words th, .words td { text-align: left; white-space: normal; }
summary { cursor: pointer; margin: 0.6rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; font-size: 13px; }
dt { font-weight: 600; } dd { margin: 0; }
footer { margin-top: 3rem; font-size: 13px; }
"""
SCRIPT = """
const { figures, looks } = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function draw() {
  for (const [name, { data, layout }] of Object.entries(figures)) {
    const template = dark.matches ? looks.dark : looks.light;
    Plotly.react(`plot-${name}`, data, { ...layout, template }, { responsive: true, displaylogo: false });
  }
}
dark.addEventListener("change", draw);
draw();
"""
MAX_ROWS = 200
"""Rows of a table on the page; what it leaves out, it says."""


def page(report: RoutingReport) -> str:
    """The whole page as HTML."""
    about = report.counts.about
    drawn = report.plots
    pictures = {name: json.loads(figure.to_json()) for name, figure in drawn.items()}
    looks = {"light": LOOK.to_plotly_json(), "dark": DARK.to_plotly_json()}
    data = json.dumps({"figures": pictures, "looks": looks})
    data = data.replace("<", "\\u003c")  # so that no text can end the <script> it stands in
    library = get_plotlyjs()
    scripts = f"{_hash(library)} {_hash(SCRIPT)}"
    policy = f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    model = html.escape(about["model"])
    made = f"{about['model']} (weights {about['fingerprint']}, {about['dtype']}), {versions}."
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Routing of {model}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Routing of {model}</h1>
{_list(report.findings)}
<noscript><p>The pictures are drawn by a script that this page carries; allow scripts to see them.</p></noscript>
{"".join(map(_section, drawn))}
{_tables(report)}
<footer>{html.escape(made)}</footer>
<script type="application/json" id="figures">{data}</script>
<script>{library}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def summary(report: RoutingReport) -> str:
    """What a notebook shows."""
    return f"<p>{html.escape(repr(report))}</p>{_list(report.findings)}{_html(report.leading, 8)}"


def _section(name: str) -> str:
    plot = f'<div class="plot"><div id="plot-{name}"></div></div>'
    return f'<h2>{TITLES[name]}</h2>\n<p class="note">{NOTES[name]}</p>\n{plot}\n'


def _list(sentences: list[str]) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="findings"><ul>{items}</ul></div>'


def _tables(report: RoutingReport) -> str:
    columns = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(said)}</dd>"
        for name, said in MEANING.items()
        if name in report.experts
    )
    first = "loads" if report.silenced is None else "effects"
    parts = [
        f"<h2>Experts</h2><p class='note'>The largest {first} first.</p>{_table(report.leading)}",
        f"<details><summary>What the columns mean</summary><dl>{columns}</dl></details>",
        f"<h2>Layers</h2>{_table(report.layers)}",
    ]
    if report.silenced is not None:
        asked = ", ".join(f"“{of}” is {column}" for column, of in TESTED.items())
        note = f"Rank correlations over experts: {asked}."
        parts.append(f"<h2>Statistics and effects</h2><p class='note'>{note}</p>{_table(report.correlations)}")
    note = "Reads: the tokens that go to the expert most surely. Writes: those its mean contribution promotes."
    parts.append(f"<h2>Words</h2><p class='note'>{note}</p>{_table(report.words, 'table words')}")
    note = f"Chosen together more than by chance, the {SHOWN} largest lifts."
    parts.append(f"<h2>Pairs of experts</h2><p class='note'>{note}</p>{_table(report.pairs)}")
    if report.labelled:
        note = "Jensen-Shannon divergence of their loads in bits: 0, the same; 1, no expert in common."
        alike = report.similarity.rename_axis("label").reset_index()
        parts.append(f"<h2>Labels</h2><p class='note'>{note}</p>{_table(alike)}")
        by_lift = report.domains.sort_values("lift", ascending=False)
        parts.append(f"<details><summary>Each label's experts</summary>{_table(by_lift)}</details>")
    return "\n".join(parts)


def _table(table: pandas.DataFrame, kind: str = "table") -> str:
    more = f"<p class='note'>{MAX_ROWS} of {len(table)} rows.</p>" if len(table) > MAX_ROWS else ""
    return f'<div class="{kind}">{_html(table[:MAX_ROWS], MAX_ROWS)}</div>{more}'


def _html(table: pandas.DataFrame, rows: int) -> str:
    return table[:rows].to_html(index=False, escape=True, border=0, na_rep="", float_format=_figure)


def _figure(value: float) -> str:
    """Three digits that matter, without an exponent where it can be done without."""
    return "0" if value == 0 else f"{value:.3g}" if 1e-4 <= abs(value) < 1e6 else f"{value:.1e}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
