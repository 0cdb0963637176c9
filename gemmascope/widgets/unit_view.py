"""One unit of a model: what it responds to, what it writes, and what turning it up or down does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas

from gemmascope.widgets.base import Answers, Question, View


class UnitView(View, script="unit_view.js"):
    """A unit's activations over some texts, its top examples, the logits it writes, and a slider to steer with.

    State:
        own         a text of the user's own
        text, pos   the place that is looked at: the number of a text, or "own"; None: where the unit is most active
        mode        how it is changed: "scale" or "add"
        strength    by how much; None: off, or by its largest activation
        steered     what was committed: {"text", "mode", "strength"}, or None
    """

    STATE = {"own": "", "text": None, "pos": None, "mode": None, "strength": None, "steered": None}

    def __init__(
        self,
        name: str,
        meaning: str,
        *,
        n_texts: int,
        signed: bool,
        modes: Sequence[str],
        selects: Mapping[str, Any],
        answers: Answers,
        selection=None,
        state: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            name: the unit: "layer 3 neuron 17".
            meaning: what its activation is.
            n_texts: how many texts there are to read.
            signed: whether an activation may be negative.
            modes: the ways it can be changed, "scale" and "add".
            selects: what it is in a selection.
            answers: "read" (start) and "found" tell what was found; "own" (text), "wrote" (text, pos) and "steer"
                (text, pos, mode, strength) are of one text.

        Raises:
            ValueError: for a mode in `state` that the unit does not have.
        """
        mode = (state or {}).get("mode")
        if mode is not None and mode not in modes:
            raise ValueError(f"mode is {mode!r}; {name} can be changed by {', '.join(modes)}.")
        data = {
            "name": name,
            "meaning": meaning,
            "texts": n_texts,
            "signed": signed,
            "modes": modes,
            "selects": selects,
        }
        super().__init__(data, answers=answers, exported=self._carried, selection=selection, state=state)

    @property
    def examples(self) -> pandas.DataFrame:
        """The top examples among the texts read so far, the most active first: the number of the text, the position and
        token of the peak, and the activation there."""
        top = self.answers["read"](start=0)["top"]
        rows = [
            (one["text"], one["at"], one["tokens"][at := one["at"] - one["first"]], one["values"][at]) for one in top
        ]
        return pandas.DataFrame(rows, columns=["text", "pos", "token", "activation"])

    def _carried(self) -> Iterable[Question]:
        """What is found in all texts, what the unit writes at its peaks, and the user's own."""
        state, found = self.state, self.answers["found"]()
        peaks = [(one["text"], one["at"]) for one in (*found["top"], *found["bottom"])]
        questions = [("found", {})] + [("wrote", {"text": text, "pos": pos}) for text, pos in dict.fromkeys(peaks)]
        if state["own"]:
            questions.append(("own", {"text": state["own"]}))
        if not peaks:
            return questions
        text, pos = peaks[0] if state["text"] is None else (state["text"], state["pos"])
        place = {"text": state["own"] if text == "own" else text, "pos": pos}
        if place not in [asked for _, asked in questions]:
            questions.append(("wrote", place))
        if state["steered"] and state["steered"]["text"] == place["text"]:
            questions.append(("steer", {**state["steered"], **place}))
        return questions

    def still(self):
        return f"{self.data['name']}: its top examples in {self.data['texts']} texts", self.examples
