"""Switches for the components of a model, and what switching some off does to the next token."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas

from gemmascope.widgets.base import Answers, Question, View

BLOCK = 512
"""Positions whose likeliest tokens are told at once."""
KINDS = ("zero", "mean", "resample")
NAMES = {
    "attn": "attention",
    "head": "head",
    "mlp": "feed-forward",
    "dense": "dense branch",
    "moe": "expert branch",
    "expert": "expert",
    "neuron": "neuron",
    "ple": "per-layer embedding",
}
"""Component -> how it is called."""


class AblationBench(View, script="ablation_bench.js"):
    """Components switched off, and the next token before and after.

    Switches are staged until a commit runs the model. State:
        on          the ablations that are staged: [component, layer, index or None], the component one of NAMES
        kind        "zero", "mean" or "resample"
        experts     what is done to an expert: "reroute", the next best steps in, or "silence", its slot says nothing
        donor       which reference prompt is resampled from
        live        whether each switch commits
        sets        name -> components, as `on` has them
        log         what was committed, the last 50 at most
        at          which entry of the log is shown; -1: the run without ablations
        toggled     the layers that were folded, or unfolded in a model too large to show all
    """

    STATE = {
        "on": [],
        "kind": "zero",
        "experts": "reroute",
        "donor": 0,
        "live": False,
        "sets": {},
        "log": [],
        "at": -1,
        "toggled": [],
    }

    def __init__(
        self,
        tokens: Sequence[str],
        layers: Sequence[Mapping[str, Any]],
        parts: Sequence[str],
        *,
        n_heads: int,
        n_experts: int = 0,
        kinds: Mapping[str, str],
        donors: Sequence[str] = (),
        pair: Mapping[int, str] | None = None,
        edits: Callable[..., list],
        setup: str = "",
        answers: Answers | None = None,
        selection=None,
        state: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            tokens: the text of each token.
            layers: of each layer its kind, "sliding" or "global", and the number of its neurons.
            parts: the components that every layer has whole, of NAMES.
            n_experts: experts of each layer; 0 where there are none.
            kinds: kind of ablation -> why it cannot be had, empty where it can.
            donors: the reference prompts, to resample from.
            pair: id -> text of the two tokens whose logit difference is told, first minus second.
            edits: on, kind, experts and donor of the state -> what `interventions` gives.
            setup: Python that makes `model` and `prompt`.

        Raises:
            ValueError: for no tokens, or a state that names a component or a kind that is not there.
        """
        if not len(tokens):
            raise ValueError("There are no tokens: a bench needs one at least.")
        self._edits = edits
        self._sizes = {"head": [n_heads] * len(layers), "expert": [n_experts] * len(layers)}
        self._sizes["neuron"] = [layer["neurons"] for layer in layers]
        self._parts, self._n_layers = tuple(parts), len(layers)
        for component in (state or {}).get("on", ()):
            self._check(component)
        kind = (state or {}).get("kind", "zero")
        if kind not in kinds or kinds[kind]:
            raise ValueError(f"kind is {kind!r}; it is one of {', '.join(k for k, why in kinds.items() if not why)}.")
        donor = (state or {}).get("donor", 0)
        if not 0 <= donor < max(1, len(donors)):
            raise ValueError(f"donor is {donor}; the reference prompts are 0 to {len(donors) - 1}.")
        data = {
            "setup": setup,
            "tokens": tokens,
            "layers": layers,
            "parts": parts,
            "heads": n_heads,
            "experts": n_experts,
            "kinds": kinds,
            "donors": [str(donor)[:80] for donor in donors],
            "pair": None if pair is None else [{"id": token, "text": text} for token, text in pair.items()],
            "names": NAMES,
            "block": BLOCK,
        }
        super().__init__(data, answers=answers, exported=self._carried, selection=selection, state=state)

    def _check(self, component: Sequence) -> None:
        what, layer, index = component
        there = what in self._parts if index is None else what in self._sizes
        if there and 0 <= layer < self._n_layers and (index is None or 0 <= index < self._sizes[what][layer]):
            return
        raise ValueError(f"state['on'] names {list(component)}, which this model does not have.")

    @property
    def interventions(self) -> list:
        """What is switched off now, committed or not, as `model(prompt, interventions=...)` takes it."""
        return self._edits(**{name: self.state[name] for name in ("on", "kind", "experts", "donor")})

    @property
    def commits(self) -> pandas.DataFrame:
        """A row for each commit: what was off, and the figures at the position that was selected. KL and loss are in
        nats."""
        return pandas.DataFrame(
            [
                {
                    "off": ", ".join(map(_name, entry["on"])) or "nothing",
                    "kind": entry["kind"],
                    "pos": entry["pos"],
                    "kl": entry["kl"],
                    **_before_after("loss", entry["loss"]),
                    **(_before_after("difference", entry["difference"]) if self.data["pair"] else {}),
                    **_before_after("token", [one["text"] for one in entry["first"]]),
                    **_before_after("p", [one["p"] for one in entry["first"]]),
                }
                for entry in self.state["log"]
            ],
            columns=None if self.state["log"] else ["off", "kind", "pos", "kl", "loss_before", "loss_after"],
        )

    def _committed(self) -> dict[str, Any]:
        at, log = self.state["at"], self.state["log"]
        given = log[at] if 0 <= at < len(log) else {**self.STATE, "on": []}
        return {name: given[name] for name in ("on", "kind", "experts", "donor")}

    def _carried(self) -> Iterable[Question]:
        """What is committed, at the last positions."""
        last = (len(self.data["tokens"]) - 1) // BLOCK
        return [("effect", {**self._committed(), "block": block}) for block in range(max(0, last - 1), last + 1)]

    def still(self):
        committed = self._committed()
        off = ", ".join(map(_name, committed["on"])) or "nothing"
        sentence = f"Ablation bench of {len(self.data['tokens'])} tokens: {off} switched off ({committed['kind']})"
        return sentence, self.commits if self.state["log"] else None


def _name(component: Sequence) -> str:
    what, layer, index = component
    return f"layer {layer} {NAMES[what]}" + ("" if index is None else f" {index}")


def _before_after(name: str, pair: Sequence | None) -> dict[str, Any]:
    before, after = pair if pair is not None else (None, None)
    return {f"{name}_before": before, f"{name}_after": after}
