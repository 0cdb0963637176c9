"""The experts of a prompt, and the model with one of them switched off or forced."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gemmascope.interventions import Intervention, drop_expert, flat, force_expert
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.routing.trace import ROUTER, RoutingTrace, check_expert, refuse_dense
from gemmascope.views.compare import compared, likeliest
from gemmascope.views.run import Run, array, run_of
from gemmascope.widgets.base import Selection
from gemmascope.widgets.router_view import HOWS, Change, RouterView, Routing

TOP = 6
"""Next tokens shown of those likeliest before, and of those likeliest after."""


def router_view(
    model, prompt, *, compare=None, selection: Selection | None = None, state: Mapping | None = None
) -> RouterView:
    """Every token's experts in every layer: their weights, how close the choice was, what an expert is used for. Switch
    an expert off, or force one, commit, and see what becomes of the prediction and of the other layers' choices.

    Args:
        prompt: text, token ids, a cache of one prompt, or a Run.
        compare: another of these. Of the same length, the choices are compared position by position; else the loads.
        selection: the Selection to follow, to link it with other views.

    Raises:
        ValueError: for a dense model, or a change in `state` of a layer, expert or position that is not there.
        KeyError: for a cache without the routers' indices, weights and probs.
    """
    refuse_dense(model)
    run = run_of(model, prompt)
    commits = _Commits(run, _routing_of(run))
    for changes in ("changes", "committed"):
        commits.interventions((state or {}).get(changes, []))
    other = None
    if compare is not None:
        beside = run_of(model, compare)
        other = beside.texts, _routing_of(beside)
    return RouterView(
        run.texts, commits.before, other=other, commits=commits, setup=run.setup, selection=selection, state=state
    )


def trace_view(
    trace: RoutingTrace, prompt: int = 0, *, selection: Selection | None = None, state: Mapping | None = None
) -> RouterView:
    """The view of one prompt of a trace, padding left out. It has no model, so nothing can be committed.

    Args:
        selection: the Selection to follow, to link it with other views.

    Raises:
        ValueError: for a prompt that is not there, or changes in `state`.
    """
    batched = trace.to("cpu").batched()
    if not -len(batched.real) <= prompt < len(batched.real):
        raise ValueError(f"There is no prompt {prompt}: the trace holds prompts 0 to {len(batched.real) - 1}.")
    real = batched.real[prompt]
    setup, texts = "", ["–"] * int(real.sum())
    if batched.tokens is not None:
        ids, named = batched.tokens[prompt, real].tolist(), trace.about.get("texts", {})
        texts = [named.get(str(token), str(token)) for token in ids]
        setup = f"import gemmascope as gs\nimport torch\nmodel = gs.load({trace.about.get('model')!r})\n"
        setup += f"prompt = torch.tensor({[ids]})"
    return RouterView(texts, _arrays(batched, prompt), setup=setup, selection=selection, state=state)


def _arrays(trace: RoutingTrace, prompt: int = 0) -> Routing:
    """One prompt of a batched trace, without its padding."""

    def of(x: Tensor) -> np.ndarray:
        return array(x[:, prompt][:, trace.real[prompt]])

    return Routing(of(trace.indices), of(trace.weights), of(trace.margins), of(trace.entropy), trace.n_experts)


def _routing_of(run: Run) -> Routing:
    with run.using():
        return _arrays(run.cache.routing.batched())


class _Commits:
    """A prompt's run with changed routing. The last one is kept: what is asked next is asked of it."""

    def __init__(self, run: Run, before: Routing):
        self.run, self.before = run, before
        self._last: tuple[list[Change], Tensor, Routing] | None = None

    def interventions(self, changes: Sequence[Change]) -> list[Intervention]:
        return flat([intervention for intervention, _ in map(self._made, changes)])

    def _made(self, change: Change) -> tuple[list[Intervention], str]:
        """A change as interventions, and as Python.

        Raises:
            ValueError: for a layer, expert, position or kind of change that is not there.
        """
        layer, expert, how, pos = (change.get(name) for name in ("layer", "expert", "how", "pos"))
        if how not in HOWS or not isinstance(layer, int) or not isinstance(expert, int):
            raise ValueError(f"A change is a layer, an expert, and how: {', '.join(HOWS)}; it is {dict(change)}.")
        check_expert(len(self.before.indices), self.before.n_experts, layer, expert)
        if pos is not None and not 0 <= pos < self.run.n:
            raise ValueError(f"Position {pos} does not exist: the prompt has positions 0 to {self.run.last}.")
        at = "" if pos is None else f", positions={pos}"
        if how == "force":
            return force_expert(layer, expert, positions=pos), f"gs.force_expert({layer}, {expert}{at})"
        rerouted = how == "reroute"
        code = f"gs.drop_expert({layer}, {expert}{'' if rerouted else ', reroute=False'}{at})"
        return drop_expert(layer, expert, reroute=rerouted, positions=pos), code

    def _check_spare(self, changes: Sequence[Change]) -> None:
        """Raises ValueError where too few experts are left to choose from."""
        layers, n, k = self.before.indices.shape
        off = np.zeros((layers, n, self.before.n_experts), bool)
        for change in changes:
            if change["how"] == "reroute":
                pos = change.get("pos")
                off[change["layer"], slice(None) if pos is None else pos, change["expert"]] = True
        short = np.argwhere(off.sum(-1) > self.before.n_experts - k)
        if len(short):
            raise ValueError(
                f"Layer {short[0][0]} chooses {k} of {self.before.n_experts} experts, so at most "
                f"{self.before.n_experts - k} of them can be switched off at a token."
            )

    def _after(self, changes: Sequence[Change]) -> tuple[Tensor, Routing]:
        """Logits [pos, d_vocab] and routing with the changes."""
        changes = [dict(change) for change in changes]
        if self._last is None or self._last[0] != changes:
            interventions = self.interventions(changes)
            self._check_spare(changes)
            with self.run.using() as model:
                layers = range(model.cfg.n_layers)
                names = [f"blocks.{layer}.moe.router.hook_{what}" for layer in layers for what in ROUTER]
                logits, cache = model.run_with_cache(
                    self.run.tokens[None], names_filter=names, interventions=interventions
                )
                self._last = changes, logits[0], _arrays(cache.routing)
        return self._last[1:]

    def routing(self, changes: Sequence[Change]) -> Routing:
        with self.run.using():
            return self._after(changes)[1]

    def effect(self, changes: Sequence[Change]) -> dict[str, Any]:
        with self.run.using():
            logits, routing = self._after(changes)
            said = compared(self.run.logits, logits, self.run.tokens)
        lines = [f"    {code}," for _, code in map(self._made, changes)]
        return said | {
            "counts": routing.counts(),
            "flips": routing.differs(self.before).sum(-1),
            "code": ["interventions = [", *lines, "]"],
        }

    def next_tokens(self, changes: Sequence[Change], pos: int) -> dict[str, Any]:
        with self.run.using() as model:
            here = slice(pos, pos + 1)
            found = likeliest(self.run.logits[here], self._after(changes)[0][here], TOP)
            ids = [token for token in found["ids"][0].tolist() if token >= 0]
            texts = dict(zip(ids, map(str, names_of_tokens(model, ids)), strict=True))
        return {name: array(x) for name, x in found.items()} | {"texts": texts}
