"""What each part of a model added to a logit, or to the difference of two."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas
from jaxtyping import Float

from gemmascope.widgets.base import View

FORMS = ("waterfall", "grid")
KINDS = {"embed": "embedding", "attn": "attention", "mlp": "feed-forward", "ple": "per-layer input"}
"""Component -> what the page calls it."""


class AttributionView(View, script="attribution_view.js"):
    """Direct logit attribution: what each component adds to the logit of token A minus that of token B at a position,
    as a waterfall or as a grid; opened layer by layer into heads and the tokens they took it from, experts and neurons.

    State: `form`, "waterfall" or "grid"; `correct` and `wrong`, ids of A and B. Without A, it is the likeliest token
    at the position; without both, B is the runner-up; with A and without B, the logit of A alone is explained.
    """

    STATE = {"form": "waterfall", "correct": None, "wrong": None}

    def __init__(
        self,
        tokens: Sequence[str],
        layers: Sequence[Mapping[str, Any]],
        first: Mapping[str, Any],
        *,
        kinds: Sequence[str],
        n_heads: int,
        n_experts: int = 0,
        softcap: float | None = None,
        setup: str = "",
        answers: Mapping | None = None,
        exported=tuple,
        selection=None,
        state: Mapping | None = None,
    ):
        """
        Args:
            tokens: the text of each token.
            layers: of each layer, its kind, window and kv_source.
            first: the answer to "components" at the position shown first: pos, correct, wrong, values, total, rest.
            kinds: what writes to the stream in a layer, of "attn", "mlp" and "ple".
            n_experts: of a layer; 0 in a dense model.
            softcap: what the logits are capped at, after what is explained here.

        Raises:
            ValueError: for no tokens, another number of values than components, or a form that there is not.
        """
        if not len(tokens):
            raise ValueError("There are no tokens: give one at least.")
        n_parts = 1 + len(layers) * len(kinds)
        if len(first["values"]) != n_parts:
            raise ValueError(f"{len(first['values'])} values came for {n_parts} components: give one for each.")
        form = (state or {}).get("form", FORMS[0])
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; it is {' or '.join(map(repr, FORMS))}.")
        self._first = self._described(tokens, first), self._table(first["values"], len(layers), kinds)
        data = {
            "setup": setup,
            "tokens": tokens,
            "layers": layers,
            "kinds": kinds,
            "n_heads": n_heads,
            "n_experts": n_experts,
            "softcap": softcap,
            "pos": first["pos"],
        }
        super().__init__(data, answers=answers, exported=exported, selection=selection, state=state)

    @staticmethod
    def _described(tokens: Sequence[str], first: Mapping[str, Any]) -> str:
        pos, wrong = first["pos"], first["wrong"]
        minus = "" if wrong is None else f" minus that of {wrong['text']!r}"
        return (
            f"The logit of {first['correct']['text']!r}{minus} after token {pos}, {tokens[pos]!r}, is "
            f"{first['total']:.3f} before the soft cap; the components that moved it most"
        )

    @staticmethod
    def _table(values: Float[np.ndarray, " part"], n_layers: int, kinds: Sequence[str]) -> pandas.DataFrame:
        parts = [("", KINDS["embed"]), *((layer, KINDS[kind]) for layer in range(n_layers) for kind in kinds)]
        table = pandas.DataFrame(parts, columns=["layer", "component"]).assign(adds=values)
        return table.sort_values("adds", key=abs, ascending=False, ignore_index=True)

    def still(self):
        return self._first
