"""Direct logit attribution of one prompt, opened part by part."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from gemmascope.cache import ActivationCache
from gemmascope.metrics import Answer, answer_ids
from gemmascope.readout.attribution import Shares, at_positions, shares
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.views.run import Run, array, run_of
from gemmascope.widgets.attribution_view import AttributionView
from gemmascope.widgets.base import Question, Selection

LIKELIEST = 10
"""Tokens to choose from at a position."""
NEURONS = 24
"""Neurons shown of a feed-forward, a dense branch or an expert."""
HELD = 2**24
"""Numbers held at once of the positions around the one that is explained, 64 MB; of a small model, all."""
EXPORTED_SOURCES = 200_000
"""Numbers on sources that an exported page carries at most: of every head, and of prompts up to 256 tokens."""


def attribution_view(
    model,
    prompt,
    correct: Answer | None = None,
    wrong: Answer | None = None,
    *,
    pos: int = -1,
    selection: Selection | None = None,
    state: Mapping | None = None,
) -> AttributionView:
    """What each component added to the logit of one token, or to that of one minus another's, at a position.

        gs.attribution_view(model, "When Mary and John went to the store, John gave a book to", " Mary", " John")

    Args:
        prompt: text, token ids, or a cache of one prompt.
        correct, wrong: a token's text or id. By default the two likeliest tokens, wherever the selection goes; where
            only `correct` is given, the logit of that token is explained.
        pos: the position whose logits are explained until one is selected.
        selection: the Selection to follow, to link it with other views.

    Raises:
        ValueError: for an answer that is not one token, or a position that is not there.
        KeyError: for a cache that lacks an activation, with what to name in `names_filter`.
    """
    run = run_of(model, prompt)
    if not -run.n <= pos < run.n:
        raise ValueError(f"Position {pos} is out of range: the prompt has {run.n} tokens, 0 to {run.last}.")
    cfg, reader = run.model.cfg, _Reader(run)
    given = {name: _one(model, one) for name, one in (("correct", correct), ("wrong", wrong)) if one is not None}
    state = {**given, **(state or {})}
    asked = {"pos": pos % run.n, "correct": state.get("correct"), "wrong": state.get("wrong")}
    questions = (reader.components, reader.heads, reader.experts, reader.sources, reader.neurons, reader.token)
    answers = {question.__name__: run.answering(question) for question in questions}
    return AttributionView(
        run.texts,
        run.layers(),
        answers["components"](**asked),
        kinds=reader.kinds,
        n_heads=cfg.n_heads,
        n_experts=cfg.n_experts or 0,
        softcap=cfg.final_softcap,
        setup=run.setup,
        answers=answers,
        exported=lambda: reader.exported(asked, answers),
        selection=selection,
        state=state,
    )


class _Place(NamedTuple):
    """What is read at one position."""

    cache: ActivationCache
    """Of this position alone."""
    logits: Float[Tensor, " d_vocab"]
    likeliest: list[int]


class _Reader:
    """Answers to the page. `correct` and `wrong` are ids or None, as the state has them."""

    def __init__(self, run: Run):
        self.run, self.cfg = run, run.model.cfg
        cfg = self.cfg
        self.kinds = ["attn", "mlp", "ple"] if cfg.d_ple else ["attn", "mlp"]
        experts = (cfg.experts_per_token or 0) * (cfg.d_expert or 0)
        size = cfg.n_layers * (4 * cfg.d_model + cfg.n_heads * cfg.d_head_global + 2 * cfg.d_mlp_narrow + experts)
        self.stride = max(1, HELD // size)  # positions held together
        self.at = functools.lru_cache(maxsize=1)(self._at)
        self.held = functools.lru_cache(maxsize=2)(self._held)
        self.of_layer = functools.lru_cache(maxsize=2)(self._of_layer)

    def _held(self, number: int) -> ActivationCache:
        return at_positions(self.run.cache, slice(number * self.stride, (number + 1) * self.stride))

    def _at(self, pos: int) -> _Place:
        logits = self.run.logits[pos].float()
        likeliest = logits.topk(min(LIKELIEST, len(logits))).indices.tolist()
        held = self.held(pos // self.stride)
        return _Place(held._at(Slice(pos % self.stride)), logits, likeliest)

    def pair(self, pos: int, correct: int | None, wrong: int | None) -> tuple[int, int | None]:
        """The tokens that are compared: see the state of AttributionView."""
        if correct is not None:
            return correct, wrong
        first, second = [token for token in self.at(pos).likeliest if token != wrong][:2]
        return first, second if wrong is None else wrong

    def shares(self, pos: int, correct: int | None, wrong: int | None, by: str, layer: int | None = None) -> Shares:
        """Of the parts of one layer, or of all."""
        layers = None if layer is None else [layer]
        tokens = self.pair(pos, correct, wrong)
        return shares(self.run.cache, *tokens, by=by, pos=pos, layers=layers, at=self.at(pos).cache)

    # The questions

    def components(self, pos: int, correct: int | None, wrong: int | None) -> dict[str, Any]:
        """Every component, in the order of the run; what they leave; and the tokens to choose from."""
        found = self.shares(pos, correct, wrong, "component")
        first, second = self.pair(pos, correct, wrong)
        _, logits, likeliest = self.at(pos)
        return {
            "pos": pos,
            "correct": self._named(first),
            "wrong": None if second is None else self._named(second),
            "values": array(found.values[0]),
            "total": found.total.item(),
            "rest": (found.total - found.values.sum(1)).item(),
            "capped": (logits[first] - (0 if second is None else logits[second])).item(),
            "likeliest": [self._named(token) for token in likeliest],
            "probs": array(logits.softmax(-1)[likeliest]),
        }

    def heads(self, pos: int, correct: int | None, wrong: int | None) -> dict[str, Any]:
        """[layer, head]"""
        found = self.shares(pos, correct, wrong, "head")
        return {"values": array(found.values[0].unflatten(0, (self.cfg.n_layers, -1)))}

    def experts(self, pos: int, correct: int | None, wrong: int | None) -> dict[str, Any]:
        """[layer, dense branch and experts], NaN for an expert that the token did not choose."""
        values = self.shares(pos, correct, wrong, "expert").values[0].unflatten(0, (self.cfg.n_layers, -1))
        cache = self.at(pos).cache
        chosen = torch.stack([cache["moe.router.hook_indices", l].flatten() for l in range(self.cfg.n_layers)])
        ran = torch.zeros_like(values, dtype=torch.bool).scatter(1, 1 + chosen.to(values.device), True)
        ran[:, 0] = True
        return {"values": array(values.masked_fill(~ran, torch.nan))}

    def sources(self, pos: int, correct: int | None, wrong: int | None, layer: int, head: int) -> dict[str, Any]:
        """What a head took from each token, and the attention it paid it."""
        values, attention = self.of_layer(pos, correct, wrong, layer)
        return {"values": values[head], "attention": attention[head]}

    def _of_layer(
        self, pos: int, correct: int | None, wrong: int | None, layer: int
    ) -> Float[np.ndarray, "2 head key"]:
        """What all heads took and the attention they paid: they come at one price."""
        found = self.shares(pos, correct, wrong, "source", layer)
        pattern = self.run.cache.pattern(layer, rows=[pos])
        return np.stack([array(x.reshape(self.cfg.n_heads, -1)) for x in (found.values[0], pattern)])

    def neurons(
        self, pos: int, correct: int | None, wrong: int | None, layer: int, expert: int | None
    ) -> dict[str, Any]:
        """The neurons of a feed-forward, its dense branch (`expert` None) or an expert that add most, and the others'
        sum."""
        found = self.shares(pos, correct, wrong, "neuron", layer)
        values = found.values[0]
        if self.cfg.n_experts:
            mine = found.cells["expert"] == ("dense" if expert is None else expert)
            if not mine.any():
                raise ValueError(f"Expert {expert} of layer {layer} was not chosen at position {pos}.")
            values = values[torch.tensor(mine.tolist())]
        most = values.abs().topk(min(NEURONS, len(values))).indices
        shown = values[most]
        return {
            "neurons": array(most),
            "values": array(shown),
            "n": len(values),
            "rest": (values.sum() - shown.sum()).item(),
        }

    def token(self, text: str) -> dict[str, Any]:
        """A token by its text."""
        return self._named(_one(self.run.model, text))

    def _named(self, token: int) -> dict[str, Any]:
        return {"id": token, "text": str(names_of_tokens(self.run.model, [token])[0])}

    # Without a kernel

    def exported(self, asked: dict[str, Any], answers: Mapping) -> Iterator[Question]:
        """All that can be opened at the first position."""
        yield "components", asked
        yield "heads", asked
        cfg, layers = self.cfg, range(self.cfg.n_layers)
        ran: Float[np.ndarray, "layer branch"] = np.zeros((cfg.n_layers, 1), np.float32)
        if cfg.n_experts:
            yield "experts", asked
            ran = answers["experts"](**asked)["values"]
        for layer in layers:
            for branch in np.isfinite(ran[layer]).nonzero()[0].tolist():
                yield "neurons", {**asked, "layer": layer, "expert": branch - 1 if branch else None}
        if self.run.n <= 256 and cfg.n_layers * cfg.n_heads * self.run.n <= EXPORTED_SOURCES:
            for layer in layers:
                for head in range(cfg.n_heads):
                    yield "sources", {**asked, "layer": layer, "head": head}


def _one(model, answer: Answer) -> int:
    ids = answer_ids(model, answer)
    if len(ids) != 1:
        raise ValueError(f"{answer!r} names {len(ids)} tokens: a view compares one with one.")
    return int(ids)
