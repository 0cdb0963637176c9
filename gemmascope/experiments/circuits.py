"""Circuits by edge attribution.

EAP is of Syed et al. 2023 (arXiv:2310.10348), EAP-IG of Hanna et al. 2024 (arXiv:2403.17806).

The score of an edge estimates what the metric changes by when the edge carries the corrupted run: the sender's
contribution, corrupted - clean, times the gradient of the metric by the reader's input, summed over positions. Both are
those of `edges.py`, so that the score is the derivative of the exact patch: contributions through post-norms frozen at
each run's scale, gradients through the true Jacobian of the reader's own norm. EAP takes the gradient in the clean run,
EAP-IG its mean over runs whose embeddings lie between corrupted and clean.
"""

import heapq
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from gemmascope.experiments.edges import Contributions, Edge, Wiring, contributions, run_with_edges_patched
from gemmascope.experiments.gradients import by_activations, figures_of, gradients, name_of
from gemmascope.experiments.pairs import Pair, paired
from gemmascope.metrics import measured
from gemmascope.results import Result, about

_SOURCES = ("embed", "signal")


def edge_attribution(
    model,
    clean,
    corrupted,
    metric: Callable[[Tensor], Tensor],
    method: str = "eap",
    *,
    steps: int = 5,
    experts: bool = False,
    attention_mask: Tensor | None = None,
) -> "Circuit":
    """Scores every edge of a model: the estimated change of the metric when only that edge carries the corrupted run.

    Costs one forward and one backward pass over all prompts ("eap"), or `steps` of them ("eap-ig"). Memory is that of
    one stream for each reader and sender; products of the two are contracted layer by layer.

    Args:
        clean, corrupted: prompts and their corrupted versions, of one length: texts, or token ids [prompt, pos].
        metric: a differentiable function of logits [prompt, pos, d_vocab] that gives a figure a prompt.
        method: "eap", or "eap-ig" with gradients at `steps` points on the line between the two embeddings (and
            per-layer signals), the clean run the last.
        experts: each routed expert a node, in place of each layer's branch.

    Raises:
        ValueError: for prompts of different lengths, a metric without gradient or of wrong shape, another
            method, NaN.
    """
    if method not in ("eap", "eap-ig"):
        raise ValueError(f"method is {method!r}; it is 'eap' or 'eap-ig'.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it is 1 or more.")
    pair = paired(model, clean, corrupted, attention_mask)
    with torch.no_grad():
        prompts, last_only = (pair.corrupted, pair.clean), getattr(metric, "last_only", False)
        ends = [contributions(model, tokens, pair.mask, experts, last_only) for tokens in prompts]
        wires = ends[0].wiring
        baselines = {"clean": measured(metric, ends[1].logits), "corrupted": measured(metric, ends[0].logits)}
    shares = [1.0] if method == "eap" else [step / steps for step in range(1, steps + 1)]
    scores = sum(_gradient(model, pair, metric, *ends, share) for share in shares) / len(shares)
    settings = dict(method=method, steps=len(shares), experts=experts, prompts=len(pair.clean), norms="live")
    result = Result(
        "edge attribution",
        pandas.DataFrame(wires.edges, columns=["sender", "receiver"]),
        scores[:, wires.exists.to(scores.device)].T.float().cpu(),
        f"change of {name_of(metric)}",
        about=about(model, **settings),
    )
    return Circuit(result, wires, {name: x.cpu() for name, x in baselines.items()}, _Setting(model, pair, metric))


def _gradient(
    model, pair: Pair, metric, corrupted: Contributions, clean: Contributions, share: float
) -> Float[Tensor, "prompt reader sender"]:
    """The derivative of the metric by how much of each edge is patched, at none, this far from corrupted to clean."""
    embed, signal = corrupted.towards(clean, share)
    with by_activations(model):
        shape = (len(pair.clean), *corrupted.wiring.exists.shape)
        cut = torch.zeros(shape, dtype=model.cfg.dtype, device=model.cfg.device, requires_grad=True)
        at = dict(fixed=clean, embed=embed, signal=signal, last_only=getattr(metric, "last_only", False))
        logits = run_with_edges_patched(model, pair.clean, corrupted, cut, pair.mask, **at)
        return gradients(figures_of(metric, logits), [cut])[0]


@dataclass(frozen=True)
class _Setting:
    """What a circuit was found on, and is tested on."""

    model: Any
    pair: Pair
    metric: Callable[[Tensor], Tensor]


@dataclass
class Circuit:
    """Scored edges, and which of them are kept. In a notebook it shows the strongest ones."""

    result: Result
    """The score of every edge and prompt; axes "sender" and "receiver"."""
    wiring: Wiring = field(repr=False)
    baselines: dict[str, Float[Tensor, " prompt"]] = field(repr=False)
    """The metric in the "clean" and the "corrupted" run."""
    setting: _Setting = field(repr=False)
    kept: tuple[Edge, ...] | None = field(default=None, repr=False)
    """The edges of the circuit; None for all."""

    @property
    def edges(self) -> pandas.DataFrame:
        """The circuit's edges: columns sender, receiver, score (the mean over prompts)."""
        table = self.result.cells.assign(score=self.result.mean.tolist())
        if self.kept is None:
            return table
        kept = set(self.kept)
        return table[[edge in kept for edge in zip(table.sender, table.receiver, strict=True)]]

    @property
    def nodes(self) -> list[str]:
        """The circuit's nodes, in the order of a forward pass, "logits" last."""
        found = {name for edge in self._edges() for name in (edge[0], *self.wiring.owners[edge[1]])}
        return [name for name in (*self.wiring.senders, "logits") if name in found]

    def __repr__(self) -> str:
        n = len(self.result.cells)
        kept = n if self.kept is None else len(self.kept)
        return f"Circuit({kept} of {n} edges, {len(self.nodes)} nodes, by {self.result.about['settings']['method']})"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.top(12).to_html(escape=True)}"

    def view(self, *, selection=None):
        """The circuit's edges as a grid of senders and receivers, empty where there is none: see `Result.view`."""
        rows = self.edges.index
        cells, values = self.result.cells.loc[rows].reset_index(drop=True), self.result.values[rows.tolist()]
        return replace(self.result, cells=cells, values=values).view(selection=selection)

    def _edges(self) -> list[Edge]:
        return self.wiring.edges if self.kept is None else list(self.kept)

    def top(self, n: int = 10) -> pandas.DataFrame:
        """The edges with the largest scores, whatever their sign."""
        table = self.edges
        return table.loc[table.score.abs().sort_values(ascending=False).index[:n]]

    # Choosing edges

    def prune(self, n_edges: int | None = None, threshold: float | None = None, greedy: bool = False) -> "Circuit":
        """The circuit of the strongest edges, without those that lie on no path from the input to the logits.

        Args:
            n_edges: how many edges to take; some may go again, being on no path.
            threshold: take the edges with |score| at least this.
            greedy: take edges from the logits backwards, each time the strongest that enters a node already taken
                (Hanna et al. 2024), so that few go again.
        """
        if (n_edges is None) == (threshold is None):
            raise ValueError("Give either n_edges or threshold.")
        if n_edges is not None and n_edges < 0:
            raise ValueError(f"n_edges is {n_edges}; it is 0 or more.")
        strength = {(e.sender, e.receiver): abs(e.score) for e in self.edges.itertuples()}
        if threshold is not None:
            strength = {edge: score for edge, score in strength.items() if score >= threshold}
        n = len(strength) if n_edges is None else n_edges
        taken = self._greedily(strength, n) if greedy else sorted(strength, key=strength.get, reverse=True)[:n]
        return replace(self, kept=tuple(self._on_a_path(taken)))

    def _greedily(self, strength: dict[Edge, float], n: int) -> list[Edge]:
        into: dict[str, list[Edge]] = {}
        for edge in strength:
            for node in self.wiring.owners[edge[1]]:
                into.setdefault(node, []).append(edge)
        taken: dict[Edge, None] = {}
        reached, open_edges = {"logits"}, [(-strength[edge], edge) for edge in into.get("logits", [])]
        heapq.heapify(open_edges)
        while open_edges and len(taken) < n:
            _, edge = heapq.heappop(open_edges)
            taken[edge] = None
            if edge[0] not in reached:
                reached.add(edge[0])
                for further in into.get(edge[0], []):
                    heapq.heappush(open_edges, (-strength[further], further))
        return list(taken)

    def _on_a_path(self, edges: Sequence[Edge]) -> list[Edge]:
        """In forward order one look finds what the input reaches, in backward order what reaches the logits."""
        order = {edge: number for number, edge in enumerate(self.wiring.edges)}
        edges = sorted(edges, key=order.__getitem__)
        reached, forward = set(_SOURCES), []
        for sender, reader in edges:
            if sender in reached:
                forward.append((sender, reader))
                reached.update(self.wiring.owners[reader])
        needed, both = {"logits"}, []
        for sender, reader in reversed(forward):
            if needed.intersection(self.wiring.owners[reader]):
                both.append((sender, reader))
                needed.add(sender)
        return both[::-1]

    # Testing it

    def faithfulness(self, n_edges: Sequence[int] | None = None, greedy: bool = False) -> Result:
        """The metric when every edge outside the circuit carries the corrupted run (real patching, no gradients).

        Args:
            n_edges: circuits pruned to these numbers of edges, one cell each; by default the circuit as it is.

        Returns:
            a Result with axes "n_edges" (asked for) and "n_kept" (on a path); `recovered` is the faithfulness, 1 for
            the clean run's figure and 0 for the corrupted one's.
        """
        return self._patched("faithfulness", n_edges, greedy, inside=False)

    def completeness(self, n_edges: Sequence[int] | None = None, greedy: bool = False) -> Result:
        """The metric when every edge of the circuit carries the corrupted run and the rest is clean.

        A complete circuit leaves nothing: `recovered` is near 0. Arguments and axes as in `faithfulness`.
        """
        return self._patched("completeness", n_edges, greedy, inside=True)

    @torch.no_grad()
    def _patched(self, what: str, n_edges: Sequence[int] | None, greedy: bool, inside: bool) -> Result:
        model, pair, metric = self.setting.model, self.setting.pair, self.setting.metric
        circuits = [self] if n_edges is None else [self.prune(n, greedy=greedy) for n in n_edges]
        asked = [len(self._edges())] if n_edges is None else list(n_edges)
        last_only = getattr(metric, "last_only", False)
        other = contributions(model, pair.corrupted, pair.mask, self.wiring.each_expert, last_only)
        values = []
        for circuit in circuits:
            kept = set(circuit._edges())
            cut = kept if inside else set(self.wiring.edges) - kept
            logits = run_with_edges_patched(model, pair.clean, other, cut, pair.mask, last_only=last_only)
            values.append(measured(metric, logits).cpu())
        return Result(
            what,
            pandas.DataFrame({"n_edges": asked, "n_kept": [len(circuit._edges()) for circuit in circuits]}),
            torch.stack(values),
            name_of(metric),
            self.baselines,
            about(model, **self.result.about["settings"], greedy=greedy),
        )

    # Other formats

    def to_networkx(self):
        """A networkx.MultiDiGraph: nodes as in `nodes`, an edge for each reader (its key), with `weight` the score.

        An edge into a kv head ends at every head that reads it.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError("to_networkx needs networkx, which is not installed: pip install networkx.") from error
        graph = networkx.MultiDiGraph()
        graph.add_nodes_from(self.nodes)
        for source, target, reader, weight in self._links():
            graph.add_edge(source, target, key=reader, weight=weight)
        return graph

    def _links(self) -> list[tuple[str, str, str, float]]:
        rows = self.edges.itertuples()
        return [
            (row.sender, node, row.receiver, row.score) for row in rows for node in self.wiring.owners[row.receiver]
        ]

    def to_json(self, path: str | Path, slug: str = "circuit", prompt: int = 0) -> None:
        """Writes the attribution-graph format that Neuronpedia and circuit-tracer's viewer read.

        Nodes are summed over positions, so all stand at the last token; a link's weight is the sum of its edges' scores
        (q, k and v of a head), the mean over prompts.

        Args:
            slug: the graph's name there.
            prompt: which prompt to print above it.
        """
        model, tokens = self.setting.model, self.setting.pair.clean[prompt]
        words = [str(token) for token in tokens.tolist()] if model.tokenizer is None else model.to_str_tokens(tokens)
        links: dict[Edge, float] = {}
        for source, target, _, weight in self._links():
            links[source, target] = links.get((source, target), 0.0) + weight
        influence = {name: sum((abs(w) for edge, w in links.items() if edge[0] == name), 0.0) for name in self.nodes}
        graph = {
            "metadata": {
                "slug": slug,
                "scan": model.cfg.model_name,
                "transcoder_list": [],
                "prompt_tokens": words,
                "prompt": "".join(words),
                "schema_version": 1,
                "info": {"generator": {"name": "gemmascope", "version": self.result.about["versions"]["gemmascope"]}},
                "generation_settings": self.result.about["settings"],
            },
            "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
            "nodes": [self._json_node(name, len(words) - 1, influence[name]) for name in self.nodes],
            "links": [{"source": source, "target": target, "weight": w} for (source, target), w in links.items()],
        }
        Path(path).write_text(json.dumps(graph, indent=1))

    def _json_node(self, name: str, pos: int, influence: float) -> dict[str, Any]:
        n_layers = self.setting.model.cfg.n_layers
        if name in _SOURCES:
            layer, kind = "E", "embedding"
        elif name == "logits":
            layer, kind = str(n_layers + 1), "logit"
        else:
            layer, kind = re.match(r"L(\d+)", name)[1], "cross layer transcoder"  # what viewers call a node inside
        names = (*self.wiring.senders, "logits")
        return {
            "node_id": name,
            "feature": names.index(name),
            "layer": layer,
            "ctx_idx": pos,
            "feature_type": kind,
            "token_prob": 0.0,
            "is_target_logit": name == "logits",
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": name,
            "clerp": name,
            "influence": influence,
            "activation": None,
        }
