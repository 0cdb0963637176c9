"""Which experts each layer chose for each token, how close the choices were, and what a change of them does."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas
from jaxtyping import Float, Int

from gemmascope.widgets.base import MAX_ROWS, Question, View

WINDOW = 256
"""Positions of one answer about every layer; as many as a page without kernel carries."""
SHOWS = ("experts", "margin", "entropy")
SIDES = ("before", "after")
HOWS = ("reroute", "silence", "force")
"""What may be done to an expert: the next best steps in; its slot says nothing; it is among the chosen."""


@dataclass(frozen=True)
class Routing:
    """What the routers of one run chose."""

    indices: Int[np.ndarray, "layer pos slot"]
    """Chosen experts, numbered within their layer."""
    weights: Float[np.ndarray, "layer pos slot"]
    """Their final weights."""
    margins: Float[np.ndarray, "layer pos"]
    """How close a flip is: the k-th largest probability minus the next."""
    entropy: Float[np.ndarray, "layer pos"]
    """Of the router's softmax, in nats."""
    n_experts: int

    def __post_init__(self) -> None:
        layers, n, k = self.indices.shape
        if not layers or not n or not k:
            raise ValueError(f"There are {layers} layers, {n} tokens and {k} slots: give one of each at least.")
        for name, shape in {"weights": (layers, n, k), "margins": (layers, n), "entropy": (layers, n)}.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, and the indices ask for {shape}.")
        if self.indices.min() < 0 or self.indices.max() >= self.n_experts:
            low, high = int(self.indices.min()), int(self.indices.max())
            raise ValueError(f"Experts {low} to {high} were chosen of {self.n_experts}: they are numbered from 0.")

    @property
    def n(self) -> int:
        """Tokens."""
        return self.indices.shape[1]

    def counts(self) -> Int[np.ndarray, "layer expert"]:
        """How many tokens each expert serves."""
        return np.stack([np.bincount(layer.ravel(), minlength=self.n_experts) for layer in self.indices])

    def window(self, first: int, base: "Routing | None" = None) -> dict[str, np.ndarray]:
        """Every layer's choices at WINDOW positions from `first` on; with `base`, `differs` is 1 where the set of
        chosen experts is another than there."""
        at = np.s_[:, first : first + WINDOW]
        found = {
            "experts": self._narrow(self.indices[at]),
            "weights": self.weights[at],
            "margins": self.margins[at],
            "entropy": self.entropy[at],
        }
        return found if base is None else found | {"differs": self.differs(base)[at].astype(np.uint8)}

    def layer(self, layer: int) -> dict[str, np.ndarray]:
        """One layer's choices at every position."""
        return {"experts": self._narrow(self.indices[layer]), "weights": self.weights[layer]}

    def differs(self, other: "Routing") -> np.ndarray:
        """[layer, pos]: whether the set of chosen experts is another; both are of the same length."""
        return (np.sort(self.indices, -1) != np.sort(other.indices, -1)).any(-1)

    def _narrow(self, experts: np.ndarray) -> np.ndarray:
        return experts.astype(np.uint8 if self.n_experts <= 256 else np.int32)


Change = Mapping[str, Any]
"""{"layer", "expert", "how": one of HOWS, "pos": a position, or None for all of them}."""


@runtime_checkable
class Commits(Protocol):
    """The model with changed routing. A method may be called often with the same changes: it remembers the last run."""

    def routing(self, changes: Sequence[Change]) -> Routing: ...

    def effect(self, changes: Sequence[Change]) -> dict[str, Any]:
        """loss: mean over the prompt in nats [before, after], NaN where nothing follows; kl [pos]: KL(before || after)
        of the next token, in nats; counts [layer, expert]; flips [layer]: tokens whose chosen experts are others now;
        code: lines of Python that make `interventions`."""

    def next_tokens(self, changes: Sequence[Change], pos: int) -> dict[str, Any]:
        """The likeliest next tokens at a position: ids [1, token], those likeliest before first, -1 where one is named
        again; texts, by id; p and logit [2, 1, token], before and after."""


class RouterView(View, script="router_view.js"):
    """Every token's experts in every layer, their load, and what happens when one is switched off or forced.

    State: `show` colours the grid by "experts", "margin" or "entropy"; `only` is the one layer in it (None: all);
    `changes` are the changes of the routing that are on, as {"layer", "expert", "how", "pos"}; `committed` are those
    whose effect is shown, and `side` says whether the grid is that of "before" or "after" them.
    """

    STATE = {"show": "experts", "only": None, "changes": [], "committed": [], "side": "after"}

    def __init__(
        self,
        tokens: Sequence[str],
        routing: Routing,
        *,
        other: tuple[Sequence[str], Routing] | None = None,
        commits: Commits | None = None,
        setup: str = "",
        selection=None,
        state=None,
    ):
        """
        Args:
            tokens: the text of each token.
            other: tokens and routing of another prompt through the same model, to compare with.
            commits: what runs the model with changed routing; without, there is nothing to commit.
            setup: Python that makes `model` and `prompt`, for what is copied.

        Raises:
            ValueError: for another number of tokens than the routing has, another model's routing to compare with, a
                state that is none, or changes in it that nothing can run.
        """
        routings = {"The prompt": (tokens, routing)} | ({} if other is None else {"The other prompt": other})
        for name, (texts, its) in routings.items():
            if len(texts) != its.n:
                raise ValueError(f"{name} has {len(texts)} tokens and the routing of {its.n}: give one for each.")
        if other is not None and (len(other[1].indices), other[1].n_experts) != self._shape(routing):
            raise ValueError("The other prompt went through other layers or experts: compare runs of one model.")
        for name, known in {"show": SHOWS, "side": SIDES, "only": (None, *range(len(routing.indices)))}.items():
            if state and state.get(name, known[0]) not in known:
                raise ValueError(f"{name} is {state[name]!r}; it is one of {', '.join(map(str, known))}.")
        if commits is None and any((state or {}).get(name) for name in ("changes", "committed")):
            raise ValueError("There is no model here to run changes: make the view by gs.router_view(model, prompt).")
        self._tokens, self._routing, self._aligned = tokens, routing, other is not None and other[1].n == routing.n
        self._commits = commits
        answers = {"window": routing.window, "layer": routing.layer}
        if self._aligned:
            answers["window_other"] = lambda first: other[1].window(first, routing)
        if commits is not None:
            answers |= {
                "effect": commits.effect,
                "next": commits.next_tokens,
                "window_after": lambda changes, first: commits.routing(changes).window(first, routing),
                "layer_after": lambda changes, layer: commits.routing(changes).layer(layer),
            }
        finite = routing.weights[np.isfinite(routing.weights)]
        margins = routing.margins[np.isfinite(routing.margins)]
        data = {
            "setup": setup,
            "tokens": tokens,
            "experts": routing.n_experts,
            "slots": routing.indices.shape[-1],
            "window": WINDOW,
            "counts": routing.counts(),
            "weight": float(finite.max(initial=0)),
            "margin": float(margins.max(initial=0)),
            "missing": routing.weights.size - finite.size,
            "live": commits is not None,
            "other": None if other is None else self._compared(*other),
        }
        super().__init__(data, answers=answers, exported=self._exported, selection=selection, state=state)

    @staticmethod
    def _shape(routing: Routing) -> tuple[int, int]:
        return len(routing.indices), routing.n_experts

    def _compared(self, tokens: Sequence[str], other: Routing) -> dict[str, Any]:
        differs = other.differs(self._routing) if self._aligned else None
        said = None if differs is None else {"choices": int(differs.sum()), "tokens": int(differs.any(0).sum())}
        return {"tokens": tokens, "counts": other.counts(), "differs": said}

    def _exported(self) -> Iterator[Question]:
        """All the choices of a prompt that fits one window, and the effect of what was committed."""
        n, layers = self._routing.n, len(self._routing.indices)
        if n > WINDOW:
            return
        yield "window", {"first": 0}
        if self._aligned:
            yield "window_other", {"first": 0}
        for layer in range(layers):
            yield "layer", {"layer": layer}
        changes = self.state["committed"]
        if changes and self._commits is not None:
            yield "effect", {"changes": changes}
            yield "window_after", {"changes": changes, "first": 0}
            for layer in range(layers):
                yield "layer_after", {"changes": changes, "layer": layer}
            for pos in range(n):
                yield "next", {"changes": changes, "pos": pos}

    def still(self):
        routing = self._routing
        layers, n, k = routing.indices.shape
        tokens = f"{n} token{'s' if n > 1 else ''}"
        closest = np.argsort(routing.margins, axis=None, kind="stable")[:MAX_ROWS]
        at = [np.unravel_index(place, (layers, n)) for place in closest]
        rows = [
            {
                "pos": int(pos),
                "token": self._tokens[pos],
                "layer": int(layer),
                "experts": ", ".join(map(str, routing.indices[layer, pos])),
                "margin": float(routing.margins[layer, pos]),
            }
            for layer, pos in at
        ]
        said = (
            f"{tokens} through {layers} layers of {routing.n_experts} experts, {k} a token; the closest choices first"
        )
        return said, pandas.DataFrame(rows)
