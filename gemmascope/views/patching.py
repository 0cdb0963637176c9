"""Patching sweeps as a grid that fills in while it runs, and any finished sweep as one."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import pandas
import torch
from torch import Tensor

from gemmascope import ops
from gemmascope.experiments.patching import PatchingSweep, aligned
from gemmascope.experiments.sweep import Queue, unit_of
from gemmascope.interventions import flat
from gemmascope.metrics import Answer, answer_ids, kl_divergence, log_prob, logit_difference, measured
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.results import Result
from gemmascope.views.result_words import note_of, title_of, tokens_of
from gemmascope.views.run import Run, array, run_of
from gemmascope.widgets.base import Selection
from gemmascope.widgets.patch_grid import PatchGrid

_SITES = ("resid_pre", "attn_out", "mlp_out", "z", "moe.hook_expert_out")
"""Offered, where the model has them."""
TOP, LEAST, FEWEST = 5, 1e-3, 3
"""Likeliest next tokens of each of the three runs that a cell names; of those of all runs, the ones that reach a
probability of LEAST in one of them, and FEWEST in any case."""
_SETTINGS = ("site", "by", "direction", "metric")
"""The entries of a grid's state that say which sweep it is."""


class _Metric(NamedTuple):
    of: Callable[[Tensor], Tensor]
    tokens: list[str]
    """The texts of the tokens that it is about."""
    python: str | None
    """The expression that makes it; None for one's own."""


def patch_grid(
    model,
    clean,
    corrupted,
    metric: Callable[[Tensor], Tensor] | None = None,
    *,
    answers: tuple[Answer, Answer] | None = None,
    site: str = "resid_pre",
    by: Sequence[str] = ("layer", "pos"),
    selection: Selection | None = None,
    state: Mapping | None = None,
) -> PatchGrid:
    """Activation patching, run from the page: which place carries what differs between two prompts.

        grid = gs.patch_grid(model, clean, corrupted, answers=(" Mary", " John"))
        grid.result      # the gs.Result of what has run, as gs.activation_patching gives it

    Args:
        clean, corrupted: text, token ids, or a cache of one prompt. Prompts of different lengths are patched where
            `gs.aligned` finds the same tokens.
        metric: a figure of one's own, logits [prompt, pos, d_vocab] -> [prompt]; it comes first.
        answers: the right and the wrong next token; the likeliest of either run by default.
        site, by: what is patched at first, and the axes of its cells; see `gs.activation_patching`.
        selection: the Selection to follow, to link it with other views.
        state: `site`, `by`, `direction` ("denoising" or "noising"), `metric` (its name), and for three axes `facet`
            (the entry of the first whose picture is shown), as in `grid.state`.

    Raises:
        ValueError: for two prompts that are the same or share no token, an answer that is not one token, or a sweep
            that the model does not have.
    """
    runs = {"clean": run_of(model, clean), "corrupted": run_of(model, corrupted)}
    ids = [run.tokens.tolist() for run in runs.values()]
    if ids[0] == ids[1]:
        raise ValueError(
            "The clean and the corrupted prompt are the same tokens: there is nothing to find between them."
        )
    pairs = None if len(ids[0]) == len(ids[1]) else aligned(runs["clean"].model, *(run.tokens for run in runs.values()))
    if pairs == []:
        raise ValueError(
            "The prompts have different lengths and no token in common: there is nothing to patch between."
        )
    metrics = _metrics(runs, metric, answers)
    sweeps = _Sweeps(runs, metrics, pairs)
    sites = _sites(runs["clean"].model, pairs is not None)
    first = {"site": site, "by": list(by), "direction": "denoising", "metric": next(iter(metrics))} | dict(state or {})
    sweeps.grid(**first)  # raises now what the page would say later
    if first.get("facet") is not None:
        first["facet"] = _facet(sweeps.result(**first), first["facet"])
    answering = runs["clean"].answering
    view = PatchGrid(
        f"activation patching, {model.cfg.model_name}",
        lambda now: sweeps.result(**now),
        prompts={name: run.texts for name, run in runs.items()},
        columns=_columns(*map(len, ids), pairs),
        sites=sites,
        metrics=[{"name": name, "tokens": one.tokens, "python": one.python} for name, one in metrics.items()],
        setup=_setup(*runs.values()),
        call="" if pairs is None else ", positions=gs.aligned(model, clean, corrupted)",
        answers={question: answering(getattr(sweeps, question)) for question in ("grid", "cells", "cell")},
        exported=lambda: [("grid", {name: view.state[name] for name in _SETTINGS})],
        selection=selection,
        state=first,
    )
    return view


def result_view(result: Result, *, selection: Selection | None = None, state: Mapping | None = None) -> PatchGrid:
    """See `Result.view`."""
    _ = result.pictured  # raises for too many axes
    state = dict(state or {})
    other = next((name for name in state if name != "facet"), None)
    if other is not None:
        raise ValueError(f"The state of a finished result has no {other!r}; it has facet.")
    if state.get("facet") is not None:
        state["facet"] = _facet(result, state["facet"])
    return PatchGrid(
        title_of(result),
        lambda state: result,
        note=note_of(result),
        setup="# result: the gs.Result that this view shows",
        answers={"grid": lambda: _grid(result)},
        exported=lambda: [("grid", {})],
        selection=selection,
        state=state,
    )


def _facet(result: Result, facet: Any) -> Any:
    """An entry of the first of three axes, as the axis has it."""
    axes = result.pictured
    if len(axes) < 3:
        raise ValueError(f"facet is {facet!r}, and a picture of {', '.join(axes)} has no facets: they need three axes.")
    entries = result.cells[axes[0]].drop_duplicates().tolist()
    found = next((entry for entry in entries if entry == facet), None)
    if found is None:
        raise ValueError(f"facet is {facet!r}; it is an entry of {axes[0]}: {', '.join(map(str, entries))}.")
    return found


class _Sweeps:
    """The sweeps between two prompts, by their settings. The latest stands ready to run; of the others, the figures."""

    def __init__(self, runs: dict[str, Run], metrics: dict[str, _Metric], pairs: list[tuple[int, int]] | None):
        self.runs, self.metrics, self.pairs = runs, metrics, pairs
        self.values: dict[tuple, Tensor] = {}
        self.order: dict[tuple, list[int]] = {}
        """The cells that have run, in their order: what a page has not heard of is told again."""
        self._latest: tuple[tuple, PatchingSweep] | None = None
        self._queue: Queue | None = None

    # Answers

    def grid(self, **settings: Any) -> dict[str, Any]:
        """Axes, figures so far, baselines."""
        sweep, key = self._sweep(settings)
        return {**_grid(sweep.result(self.values[key])), "heard": len(self.order[key])}

    def cells(self, first: int, **settings: Any) -> dict[str, Any]:
        """The cells after the first ones that the page knows: those that ran meanwhile, or one more pass."""
        sweep, key = self._sweep(settings)
        order = self.order[key]
        if first >= len(order) and self.values[key].isnan().any():
            if self._queue is None:
                self._queue = Queue(sweep.runs[sweep.base], sweep.made, done=self.values[key])
            order += self._queue.step()
            self.values[key] = self._queue.values
        numbers = order[first:]
        return {"numbers": np.array(numbers, np.int32), "values": array(self.values[key][numbers, 0])}

    def cell(self, number: int, **settings: Any) -> dict[str, Any]:
        """One cell, run alone: its figure, and the likeliest next tokens of the clean, corrupted and patched run."""
        sweep, _ = self._sweep(settings)
        base = sweep.runs[sweep.base]
        made = flat(sweep.made[number]())
        logits = base.logits([made], base.first(made)[0])[0]
        last = torch.stack([*(run.logits[-1] for run in self.runs.values()), logits[0, -1]])
        probs = ops.wide(last).softmax(-1)
        best = probs.topk(min(TOP, probs.shape[1])).indices.unique()
        most, order = probs[:, best].amax(0).sort(descending=True)
        ids = best[order[: max(FEWEST, int((most >= LEAST).sum()))]].tolist()
        return {
            "value": float(measured(base.metric, logits)[0]),
            "ids": ids,
            "tokens": [str(text) for text in names_of_tokens(base.model, ids)],
            "probs": array(probs[:, ids]),
        }

    # For Python

    def result(self, **settings: Any) -> Result:
        with self.runs["clean"].using():
            sweep, key = self._sweep(settings)
        return sweep.result(self.values[key].clone())

    def _sweep(self, settings: Mapping[str, Any]) -> tuple[PatchingSweep, tuple]:
        """The sweep, laid out, and its key."""
        site, by, direction, metric = (settings[name] for name in _SETTINGS)
        key = site, tuple(by), direction, metric
        if self._latest is None or self._latest[0] != key:
            if metric not in self.metrics:
                raise ValueError(f"This grid has no metric {metric!r}; it has {', '.join(self.metrics)}.")
            prompts = (run.tokens[None] for run in self.runs.values())
            model, of = self.runs["clean"].model, self.metrics[metric].of
            sweep = PatchingSweep(model, *prompts, of, site, by, direction, positions=self.pairs)
            self._latest, self._queue = (key, sweep), None
            self.values.setdefault(key, torch.full((len(sweep.cells), 1), torch.nan))
            self.order.setdefault(key, [])
        return self._latest[1], key


def _grid(result: Result) -> dict[str, Any]:
    """A sweep as a page draws it: `cell` [facet, row, column] is the number of a cell, -1 where there is none."""
    table, axes = result.table, result.pictured
    column = "recovered" if "recovered" in table else "value"
    places, entries = zip(*(pandas.factorize(table[axis], use_na_sentinel=False) for axis in axes), strict=True)
    cell = np.full([1] * (3 - len(axes)) + [len(one) for one in entries], -1, np.int32)
    cell[(*[0] * (3 - len(axes)), *places)] = np.arange(len(table))
    named = [
        {"name": axis, "entries": list(one), "tokens": [result.token_at(axis, entry) for entry in one]}
        for axis, one in zip(axes, entries, strict=True)
    ]
    for axis in named:
        axis["of"] = tokens_of(result) if any(token is not None for token in axis["tokens"]) else None
    return {
        "axes": named,
        "cell": cell,
        "values": array(result.mean),
        "interval": array(torch.tensor(table[["low", "high"]].to_numpy())) if "low" in table else None,
        "unit": result.unit,
        "baselines": {name: float(figures.mean()) for name, figures in result.baselines.items()},
        "based": result.base is not None,
        "shares": column == "recovered",
        "nothing": result.of_nothing(column),
    }


def _metrics(runs: dict[str, Run], own: Callable | None, answers: tuple[Answer, Answer] | None) -> dict[str, _Metric]:
    model = runs["clean"].model
    right, wrong = _answers(runs) if answers is None else answers
    for answer in (right, wrong):
        if len(answer_ids(model, answer)) != 1:
            raise ValueError("answers are two tokens, the right one and the wrong one.")
    ids = [int(answer_ids(model, answer)) for answer in (right, wrong)]
    texts, (said, other) = [str(text) for text in names_of_tokens(model, ids)], map(_python, (right, wrong), ids)
    made = [
        _Metric(logit_difference(model, *ids), texts, f"gs.logit_difference(model, {said}, {other})"),
        _Metric(log_prob(model, ids[0]), texts[:1], f"gs.log_prob(model, {said})"),
        _Metric(kl_divergence(runs["clean"].logits[None]), [], "gs.kl_divergence(model(clean))"),
    ]
    given = {} if own is None else {unit_of(own): _Metric(own, [], None)}
    return given | {name: one for one in made if (name := unit_of(one.of)) not in given}


def _answers(runs: dict[str, Run]) -> list[str | int]:
    """The likeliest next token of the clean run; and of the corrupted one, another."""
    model, (clean, corrupted) = runs["clean"].model, (run.logits[-1].float() for run in runs.values())
    right = int(clean.argmax())
    wrong = next(token for token in corrupted.topk(2).indices.tolist() if token != right)
    return [_text(model, token) for token in (right, wrong)]


def _text(model, token: int) -> str | int:
    """A token's text where that is enough to name it, else its id."""
    text = names_of_tokens(model, [token])[0]
    try:
        return text if isinstance(text, str) and model.to_single_token(text) == token else token
    except ValueError:
        return token


def _python(answer: Answer, token: int) -> str:
    return repr(answer if isinstance(answer, str) else token)


def _sites(model, pairs: bool) -> list[dict[str, Any]]:
    """What is offered, with the axes that its cells may have; with pairs of positions they need "pos"."""
    found = []
    for short in _SITES:
        layer = next(
            (layer for layer in range(model.cfg.n_layers) if model.full_name((short, layer)) in model.sites), None
        )
        if layer is None:
            continue
        name = model.full_name((short, layer))
        parts = {"z": ["head"], "moe.hook_expert_out": ["expert", "slot"]}.get(short, [])
        by = [["layer", part] for part in parts] + [["layer", "pos"]] + [["layer", part, "pos"] for part in parts]
        hook = name.removeprefix(f"blocks.{layer}.")
        by = [axes for axes in by if "pos" in axes or not pairs]
        found.append({"site": short, "hook": hook, "meaning": model.sites[name].meaning, "by": by})
    return found


def _columns(n_clean: int, n_corrupted: int, pairs: list[tuple[int, int]] | None) -> np.ndarray:
    """The positions of two prompts above each other: partners, and between them what has none."""
    columns, seen = [], (0, 0)
    for pair in [*([(i, i) for i in range(n_clean)] if pairs is None else pairs), (n_clean, n_corrupted)]:
        columns += zip_longest(range(seen[0], pair[0]), range(seen[1], pair[1]), fillvalue=-1)
        columns.append(pair)
        seen = pair[0] + 1, pair[1] + 1
    return np.array(columns[:-1], np.int32).reshape(-1, 2)


def _setup(clean: Run, corrupted: Run) -> str:
    """Python that makes `model`, `clean` and `corrupted`."""
    *made, prompt = clean.setup.splitlines()
    others = [line for line in corrupted.setup.splitlines() if line.startswith("import ") and line not in made]
    named = (
        f"{name}{line.removeprefix('prompt')}"
        for name, line in (("clean", prompt), ("corrupted", corrupted.setup.splitlines()[-1]))
    )
    return "\n".join([*others, *made, *named])
