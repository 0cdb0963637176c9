"""Attention knock-outs: which words must read which, and in which layers (Geva et al. 2023, arXiv:2304.14767)."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import pandas
import torch
from torch import Tensor

from gemmascope.experiments.sweep import ROWS, Baseline, resumed, run_cells, unit_of
from gemmascope.hooks import entries
from gemmascope.interventions import Indices, Intervention, knockout
from gemmascope.model.inputs import Pass
from gemmascope.results import Result, about

Span = Indices | str
"""Positions, which may be negative; or a piece of text that each prompt holds once."""


def attention_knockout(
    model,
    prompts,
    metric: Callable[[Tensor], Tensor],
    spans: Mapping[str, Span],
    edges: Sequence[tuple[str, str]] | None = None,
    *,
    by: Sequence[str] = ("layer",),
    window: int = 1,
    layers: Sequence[int] | None = None,
    renormalize: bool = True,
    rows: int = ROWS,
    resume: Result | None = None,
    progress: bool = True,
) -> Result:
    """Cuts the attention from the tokens of one span to those of another, layer by layer, and measures.

    Args:
        prompts: text, texts or token ids.
        metric: logits [prompt, pos, d_vocab] -> one figure a prompt.
        spans: names for parts of the prompts: {"subject": "Mary", "last": -1, "start": slice(0, 4)}.
        edges: pairs (from, to) of span names: information flows from the keys of the first to the queries of the
            second. By default, from each span to the last one given.
        by: "layer", and "head" to cut head by head (otherwise all heads at once).
        window: how many layers are cut together, centred on the layer of the cell (more of them after it when even).
        renormalize: whether what is left of a row sums to 1 again.

    Returns:
        A Result by edge, layer and head, with the baseline "clean": no edge cut.

    Raises:
        ValueError: for a span that a prompt does not hold once, an edge that no query can see, a metric of wrong shape.
    """
    run = model._begin(prompts)
    where = {name: positions_of(model, run, span, name) for name, span in spans.items()}
    names = list(spans)
    edges = [(name, names[-1]) for name in names[:-1]] if edges is None else list(edges)
    if not edges:
        raise ValueError("There is no edge to cut: give two spans at least, or edges=[(from, to), ...].")
    unknown = next((name for edge in edges for name in edge if name not in where), None)
    if unknown is not None:
        raise ValueError(f"No span is called {unknown!r}; there are {', '.join(names)}.")
    if window < 1:
        raise ValueError(f"window is {window}; it is 1 layer or more.")
    if "layer" not in by or set(by) - {"layer", "head"}:
        raise ValueError(f'by is {list(by)}; it is ("layer",) or ("layer", "head").')
    for source, target in edges:
        blind = all(min(keys) > max(queries) for keys, queries in zip(where[source], where[target], strict=True))
        if blind and all(mask.image_blocks is None for mask in run.masks.values()):
            raise ValueError(
                f"No token of {target!r} sees one of {source!r}, which comes after it: swap the edge's ends."
            )
    n_layers = model.cfg.n_layers
    heads = range(model.cfg.n_heads) if "head" in by else [None]
    cells, cuts = [], []
    for source, target in edges:
        for layer in range(n_layers) if layers is None else [range(n_layers)[layer] for layer in layers]:
            first = layer - (window - 1) // 2
            cut_layers = range(max(0, first), min(n_layers, first + window))
            for head in heads:
                cells.append([f"{source} -> {target}", layer, *([] if head is None else [head])])
                cuts.append(_cuts(cut_layers, where[target], where[source], head, renormalize))
    table = pandas.DataFrame(cells, columns=["edge", "layer", *(["head"] if "head" in by else [])])
    base = Baseline(model, run, metric)
    values = run_cells(base, cuts, rows=rows, done=resumed(resume, table), progress=progress)
    said = about(model, window=window, renormalize=renormalize, spans={name: where[name] for name in names})
    return Result("attention knockout", table, values, unit_of(metric), {"clean": base.figures}, said, "clean")


def _cuts(
    layers: Sequence[int], queries: list[list[int]], keys: list[list[int]], head: int | None, renormalize: bool
) -> list[Intervention]:
    """The cuts of one cell; prompts whose spans stand at the same positions share one."""
    alike = defaultdict(list)
    for prompt, pair in enumerate(zip(queries, keys, strict=True)):
        alike[tuple(map(tuple, pair))].append(prompt)
    return [
        cut
        for (of_queries, of_keys), batch in alike.items()
        for cut in knockout(layers, of_queries, of_keys, head, batch, renormalize)
    ]


@torch.no_grad()
def attention_to(model, prompts, spans: Mapping[str, Span]) -> Result:
    """How much the tokens of each span attend to the tokens of each: the mean over queries of what a row gives to them.

    Only the rows of these queries are computed.

    Args:
        spans: as in `attention_knockout`.

    Returns:
        A Result by "to" (the span that reads), "from" (the span that is read), layer and head.

    Raises:
        ValueError: for a span that a prompt does not hold once.
    """
    run = model._begin(prompts)
    where = {name: positions_of(model, run, span, name) for name, span in spans.items()}
    needed = [name for name in model.sites if name.endswith(("hook_rot_q", "hook_rot_k"))]
    _, cache = model.run_with_cache(prompts, names_filter=needed, return_type=None)
    cells, values = [], []
    for layer in range(model.cfg.n_layers):
        for to, queries in where.items():
            rows = sorted({position for prompt in queries for position in prompt})
            pattern = cache.pattern(layer, rows=rows)
            for source, keys in where.items():
                figures = [
                    pattern[prompt][:, [rows.index(position) for position in queries[prompt]]][..., keys[prompt]]
                    .sum(-1)
                    .mean(-1)
                    for prompt in range(len(pattern))
                ]
                values.append(torch.stack(figures, dim=-1))
                cells += [(to, source, layer, head) for head in range(pattern.shape[1])]
    table = pandas.DataFrame(cells, columns=["to", "from", "layer", "head"])
    values = torch.cat(values).float().cpu()
    return Result("attention between spans", table, values, "attention", {}, about(model))


def positions_of(model, run: Pass, span: Span, name: str) -> list[list[int]]:
    """The positions of a span in each prompt.

    Raises:
        ValueError: for a position that does not exist, or a text that a prompt holds never or more than once.
    """
    n_prompts, n_pos = run.tokens.shape
    if not isinstance(span, str):
        found = [entries(span, n_pos, "position", f"span {name!r}")] * n_prompts
    else:
        found = [_find(model.to_str_tokens(tokens), span, name) for tokens in run.tokens]
    if not all(found):
        raise ValueError(f"Span {name!r} is empty: give one position at least.")
    return found


def _find(pieces: list[str], text: str, name: str) -> list[int]:
    whole, ends, at = "".join(pieces), [], 0
    for piece in pieces:
        at += len(piece)
        ends.append(at)
    times = whole.count(text) if text else 0
    if times != 1:
        raise ValueError(
            f"Span {name!r}: {text!r} stands {times} times in {whole!r}; give a text that is there once, or positions."
        )
    start = whole.index(text)
    starts = [0, *ends[:-1]]
    return [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < start + len(text) and b > start]
