"""What each head reads: every head as a thumbnail, one large map, and the numbers of one query and one key."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from jaxtyping import Float, UInt8

from gemmascope.widgets.arrays import quantised
from gemmascope.widgets.base import Answers, View

LONG = 1024
"""Tokens up to which a head's map is one answer; above, it comes in tiles."""
TILE = 256
"""Cells along each side of a tile."""
THUMB = 64
"""Cells along each side of a thumbnail, at most."""
STATE = {
    "scale": ("linear", "sqrt", "log"),
    "minus": (None, "prompt", "pinned"),
}
"""What these entries of the state may be."""


class AttentionView(View, script="attention_view.js"):
    """Heads of all layers, one map of a head, the keys that a query reads and the queries that read a key.

    State: `scale` of the colours, "linear", "sqrt" or "log"; `sort`, the name of the score that orders the heads (None:
    by layer); `pinned`, a head as [layer, head]; `minus`, what the map is compared with: None, "prompt" (the other one)
    or "pinned"; `band`, whether sliding layers show the distance to the key across; `zoom`, the part of the map that is
    seen, as [first query, first key, keys across] (None: all).
    """

    STATE = {"scale": "sqrt", "sort": None, "minus": None, "pinned": None, "band": False, "zoom": None}

    def __init__(
        self,
        tokens: Sequence[str],
        layers: Sequence[Mapping[str, Any]],
        n_heads: int,
        answers: Answers,
        *,
        thumb_block: int,
        other: Sequence[str] | None = None,
        start: tuple[int, int] = (0, 0),
        scores: Mapping[str, str] | None = None,
        strongest: Sequence[tuple[int, int, float]] = (),
        setup: str = "",
        other_setup: str = "",
        exported=None,
        selection=None,
        state=None,
    ):
        """
        Args:
            tokens: the text of each token.
            layers: of each layer, "kind", "window" (None: it sees everything), "kv_heads", "kv_source" (a layer, None:
                its own) and "parts", the number of answers that its thumbnails come in.
            n_heads: heads of every layer.
            answers: "thumbs", "map" (up to LONG tokens), "tile" and "band" (above), "row", "column", and "scores" where
                there are any. What they take and give stands in `gemmascope.views.attention`.
            thumb_block: positions along each side of a thumbnail's cell.
            other: the tokens of a prompt to compare with; every question may then be asked `of` 1.
            start: the layer and head shown until one is selected.
            scores: by which heads may be sorted: name -> its unit.
            strongest: (query, key, weight) of the start's strongest edges, for readers without a kernel.
            setup: Python that makes `model` and `prompt`, for what is copied; `other_setup` makes `other_prompt`.
            exported: a function of this view that names the questions of an exported page.

        Raises:
            ValueError: for no tokens, prompts of two lengths, or a state that cannot be shown.
        """
        if not len(tokens):
            raise ValueError("There are no tokens: attention needs one at least.")
        if other is not None and len(other) != len(tokens):
            raise ValueError(
                f"The prompts have {len(tokens)} and {len(other)} tokens: maps compare where they have the same number."
            )
        self._scores, self._shape, self._compared = dict(scores or {}), (len(layers), n_heads), other is not None
        self._strongest = tokens, start, strongest
        data = {
            "setup": setup,
            "other_setup": other_setup,
            "tokens": tokens,
            "other": other,
            "layers": layers,
            "heads": n_heads,
            "start": start,
            "scores": [{"name": name, "unit": unit} for name, unit in self._scores.items()],
            "thumb_block": thumb_block,
            "tile": TILE if len(tokens) > LONG else None,
        }
        questions = (lambda: exported(self)) if exported else tuple
        super().__init__(data, answers=answers, exported=questions, selection=selection, state=state)
        self._check(self.state)
        self.observe(lambda change: self._check(change["new"]), "state")

    def _check(self, state: Mapping[str, Any]) -> None:
        for name, known in STATE.items():
            if state[name] not in known:
                raise ValueError(f"{name} is {state[name]!r}; it is one of {', '.join(map(repr, known))}.")
        if state["sort"] not in (None, *self._scores):
            raise ValueError(
                f"Heads are sorted by {state['sort']!r}; they can be by {', '.join(self._scores) or 'none'}."
            )
        if state["minus"] == "prompt" and not self._compared:
            raise ValueError("There is no other prompt to take away: give one as compare=.")
        if state["minus"] == "pinned" and state["pinned"] is None:
            raise ValueError("No head is pinned to take away: give one as pinned=[layer, head].")
        if state["pinned"] is not None:
            layer, head = state["pinned"]
            if not (0 <= layer < self._shape[0] and 0 <= head < self._shape[1]):
                raise ValueError(
                    f"Layer {layer} head {head} is pinned; there are {self._shape[0]} by {self._shape[1]}."
                )

    def still(self):
        tokens, (layer, head), strongest = self._strongest
        names = [f"{pos} {token}" for pos, token in enumerate(tokens)]
        rows = [(names[query], names[key], round(weight, 3)) for query, key, weight in strongest]
        sentence = f"Attention of {self._shape[0]} layers of {self._shape[1]} heads over {len(tokens)} tokens"
        if not rows:
            return sentence, None
        return f"{sentence}; layer {layer} head {head} reads", pandas.DataFrame(
            rows, columns=["query", "key", "weight"]
        )


def codes(weights: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Attention as the maps carry it, exact to 0.002."""
    return quantised(weights, 0, 1)
