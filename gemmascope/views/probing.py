"""Probes as a view: their scores, where they err, and what they say of text."""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Int
from torch import Tensor

from gemmascope.readout.activations import Positions, Prompts, collect, find_site
from gemmascope.readout.probing import UNITS, LayerProbes, Probe, SparseProbes
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.results import Result, fingerprint
from gemmascope.views.run import array, loading, twin
from gemmascope.widgets.base import Question, Selection
from gemmascope.widgets.probe_view import ProbeView, Scored

LISTED = 12
"""Examples listed at once."""
CONTEXT = 16
"""Tokens before the probed one that stand for an example in the list."""
MAX_TOKENS = 1024
"""Tokens of a text that a view reads."""
MAX_DOTS = 1000
"""Examples in the picture of a ridge."""
EXPORTED = {"examples": 24, "cells": 128}
"""What an exported page carries at most: examples by token, and lists of examples."""


def probe_view(
    result,
    *,
    model=None,
    prompts=None,
    positions: Positions = -1,
    site=None,
    selection: Selection | None = None,
    state: Mapping | None = None,
) -> ProbeView:
    """How well a property is read, layer by layer, against the control task and chance.

    Args:
        result: LayerProbes, SparseProbes, or a single Probe.
        model: the model that was probed, to read text with the probes.
        prompts: those that were probed, to see the probes read them; with `positions` as they were given then.
        site: of a single Probe, the site whose activations it was fitted to: ("resid_post", 3), say.
        selection: the Selection to follow: clicking a layer selects it in linked views.
        state: what to show at first: see ProbeView.

    Raises:
        KeyError: for a site that is not there.
        ValueError: for another model than was probed, a single Probe with a model and no site, or prompts and positions
            that are not as many as the examples.
    """
    shared = dict(selection=selection, state=state)
    match result:
        case SparseProbes():
            return _of_sparse(result, **shared)
        case LayerProbes():
            probes, about = result.probes, result.scores.about
            if model is not None and fingerprint(model) != about["fingerprint"]:
                raise ValueError(
                    f"The probes are of {about['model']} with the fingerprint {about['fingerprint']}, and "
                    f"{model.cfg.model_name} has {fingerprint(model)}: give the model that was probed."
                )
            name = about["settings"]["site"]
            sites = {layer: (name, layer) for layer in probes}
            given = (
                "layer",
                list(probes),
                result.scores,
                result.control,
                f"{about['settings']['kind']} probe of {name}",
            )
            python = "# probes: what probe_layers gave\n# text: what is read"
        case Probe():
            if model is not None and site is None:
                raise ValueError('A single probe does not know its site: give it, as site=("resid_post", 3).')
            probes, sites = {0: result}, {0: site}
            unit, at = UNITS[result.kind], pandas.DataFrame({"probe": [0]})
            scores = Result("probe", at, result.scores[None], unit, {"chance": result.chance})
            control = None if result.control is None else Result("control", at, result.control[None], unit)
            given = ("probe", ["probe"], scores, control, f"{result.kind} probe")
            python = "# probe: the Probe that this view shows"
        case _:
            raise ValueError(
                f"There is no view of a {type(result).__name__}: give LayerProbes, SparseProbes or a Probe."
            )
    if prompts is not None and model is None:
        raise ValueError("The prompts cannot be read without the model: give it as model=.")
    axis, places, scores, control, what = given
    reading = None if model is None else _Reading(model, probes, sites, prompts, positions)
    answers = _answers(list(probes.values()), reading)
    first = next(iter(probes.values()))

    def exported() -> Iterator[Question]:
        listed: list[int] = []
        for place in range(len(places)):
            yield "held_out", {"place": place}
            yield "examples", {"place": place, "cell": None}
            listed += answers["examples"](place=place, cell=None)["numbers"]
        cells = [(place, cell) for place, one in enumerate(probes.values()) for cell in _cells(one)]
        for place, cell in cells[: EXPORTED["cells"]]:
            yield "examples", {"place": place, "cell": cell}
        if "tokens" in answers:
            for example in list(dict.fromkeys(listed))[: EXPORTED["examples"]]:
                yield "tokens", {"example": example}
        if "project" in answers and view.state["text"]:
            yield "project", {"text": view.state["text"]}

    view = ProbeView(
        axis,
        places,
        scores.unit,
        _scored(scores),
        np.array([float(one.chance.mean()) for one in probes.values()], np.float32),
        None if control is None else _scored(control),
        folds=scores.values.shape[1],
        kind=first.kind,
        what=what,
        classes=[str(one) for one in first.classes],
        span=(0.0, 1.0) if first.classes else (min(first.labels), max(first.labels)),
        answers=answers,
        exported=exported,
        setup=python if model is None else f"{loading(model)}\n{python}",
        sites=[] if reading is None else reading.names,
        **shared,
    )
    return view


def _scored(result: Result) -> Scored:
    return np.stack([array(result.mean), *array(result.interval())])


def _of_sparse(result: SparseProbes, **shared: Any) -> ProbeView:
    chosen, random = (result.scores.only(neurons=which) for which in ("chosen", "random"))
    site = result.scores.about["settings"]["site"]
    layer = int(site.split(".")[1])

    def named(neuron: int | tuple[int, int]) -> dict[str, Any]:
        if isinstance(neuron, int):
            return {"name": f"neuron {neuron}", "layer": layer, "neuron": neuron, "expert": None}
        expert, within = neuron
        return {"name": f"expert {expert} neuron {within}", "layer": layer, "neuron": within, "expert": expert}

    ks = chosen.cells["k"].tolist()
    return ProbeView(
        "k",
        ks,
        chosen.unit,
        _scored(chosen),
        np.full(len(ks), float(chosen.baselines["chance"].mean()), np.float32),
        _scored(random),
        folds=chosen.values.shape[1],
        what=f"k-sparse probe of {site}",
        versus="random neurons",
        neurons=[[named(one) for one in result.neurons[k]] for k in ks],
        **shared,
    )


class _Reading:
    """Runs texts through the model, and gives every probe's score at every token."""

    def __init__(self, model, probes: dict[int, Probe], sites: dict[int, Any], prompts, positions: Positions):
        self.model, self.probes, self.sites = twin(model), probes, sites
        self.names = [find_site(model, site).name for site in sites.values()]
        self.lock = threading.RLock()
        n = len(next(iter(probes.values())).labels)
        if prompts is None:
            self.prompts = None
            return
        self.prompts = Prompts.of(model, prompts)
        self.rows = self.prompts.rows(positions)
        if len(self.rows.prompt) != n:
            raise ValueError(
                f"The prompts have {len(self.rows.prompt)} examples at these positions, and the probes {n}: give the "
                "prompts and positions that were probed."
            )

    def example(self, number: int) -> tuple[Int[Tensor, " pos"], int]:
        """The tokens of an example's prompt, padding left out, and the place of the one that was probed."""
        prompt, pos = int(self.rows.prompt[number]), int(self.rows.pos[number])
        tokens = self.prompts.tokens[prompt]
        if self.prompts.mask is None:
            return tokens, pos
        real = self.prompts.mask[prompt]
        return tokens[real], int(real[:pos].sum())

    def text(self, number: int) -> str:
        """An example in short."""
        tokens, pos = self.example(number)
        first = max(0, pos - CONTEXT)
        return ("…" if first else "") + "".join(self.texts(tokens[first : pos + 1]))

    def texts(self, tokens: Int[Tensor, " pos"]) -> list[str]:
        return [str(text) for text in names_of_tokens(self.model, tokens.tolist())]

    def scores(self, tokens: Int[Tensor, " pos"]) -> dict[str, Any]:
        with self.lock, torch.inference_mode():
            found = collect(self.model, tokens, list(self.sites.values()), positions=None, progress=False)
            each = [one.score(found[site]) for one, site in zip(self.probes.values(), self.sites.values(), strict=True)]
        return {"texts": self.texts(tokens), "scores": array(torch.stack(each))}

    def project(self, text: str) -> dict[str, Any]:
        if not text.strip():
            raise ValueError("There is no text to read: type some.")
        tokens = self.model.to_tokens(text)[0]
        most = min(MAX_TOKENS, self.model.cfg.n_ctx)
        if len(tokens) > most:
            raise ValueError(f"The text has {len(tokens)} tokens and {most} can be read here: shorten it.")
        return self.scores(tokens)


def _answers(probes: list[Probe], reading: _Reading | None) -> dict[str, Callable[..., dict[str, Any]]]:
    order = {one: number for number, one in enumerate(probes[0].classes)}
    with_prompts = reading is not None and reading.prompts is not None

    def held_out(place: int) -> dict[str, Any]:
        one = probes[place]
        if not order:
            step = -(-len(one.labels) // MAX_DOTS)
            return {"labels": np.array(one.labels[::step]), "said": np.array(one.held_out[::step])}
        counts = np.zeros((len(order), len(order)), np.int32)
        np.add.at(counts, ([order[x] for x in one.labels], [order[x] for x in one.held_out]), 1)
        return {"counts": counts}

    @functools.lru_cache(maxsize=256)
    def chosen(place: int, cell: tuple[int, int] | None) -> list[int]:
        one = probes[place]
        pairs = list(zip(one.labels, one.held_out, strict=True))
        if cell is not None:
            return [i for i, (label, said) in enumerate(pairs) if (order[label], order[said]) == cell]
        if order:
            return sorted(range(len(pairs)), key=lambda i: pairs[i][0] == pairs[i][1])
        return sorted(range(len(pairs)), key=lambda i: -abs(pairs[i][0] - pairs[i][1]))

    def examples(place: int, cell: list[int] | None) -> dict[str, Any]:
        one, numbers = probes[place], chosen(place, None if cell is None else tuple(cell))
        shown = numbers[:LISTED]
        said = (lambda x: str(x)) if order else (lambda x: f"{x:.3g}")
        return {
            "numbers": shown,
            "labels": [said(one.labels[i]) for i in shown],
            "said": [said(one.held_out[i]) for i in shown],
            "texts": [reading.text(i) if with_prompts else f"example {i}" for i in shown],
            "count": len(numbers),
        }

    def tokens(example: int) -> dict[str, Any]:
        ids, pos = reading.example(example)
        return reading.scores(ids) | {"pos": pos}

    answers: dict[str, Callable[..., dict[str, Any]]] = {"held_out": held_out, "examples": examples}
    if reading is not None:
        answers["project"] = reading.project
    if with_prompts:
        answers["tokens"] = tokens
    return answers


def _cells(one: Probe) -> list[list[int]]:
    """The pairs of label and what was said that are there, by number of class; none of a ridge."""
    order = {name: number for number, name in enumerate(one.classes)}
    pairs = set(zip(one.labels, one.held_out, strict=True)) if order else ()
    return sorted([order[label], order[said]] for label, said in pairs)
