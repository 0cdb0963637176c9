"""How well a probe reads a property, by layer, against what any labels would give."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas
from jaxtyping import Float

from gemmascope.widgets.base import Answers, Question, View

Scored = Float[np.ndarray, "3 place"]
"""A score at each place: its mean over folds, and the low and high end of the mean's 95 % interval."""


class ProbeView(View, script="probe_view.js"):
    """Scores on held-out examples, with their interval, the control's and chance; behind each, what was confused with
    what, the examples, and the probe's score at every token of a text. The control is never hidden: what does not beat
    it is said to be no evidence.

    State: `place` (number of the place that is looked at, where places are no layers), `cell` ([label, said] numbers of
    classes: the examples that are listed; None: all), `example` (its number; None: the first listed), `target` (the
    class whose score colours tokens, where there are more than two; None: the first), `text` (read by the probe).

    Questions, those that the probes at hand can answer:

        held_out {place}            counts [label said], or of a ridge labels and said [example], at most 1,000
        examples {place, cell}      numbers, labels, said, texts of some examples, wrong ones first; count of all
        tokens {example}            texts [pos], scores [place pos direction], pos: the token that was probed
        project {text}              the same of a text, without pos
    """

    STATE = {"place": None, "cell": None, "example": None, "target": None, "text": ""}

    def __init__(
        self,
        axis: Literal["layer", "k", "probe"],
        places: Sequence[int | str],
        unit: str,
        score: Scored,
        chance: Float[np.ndarray, " place"],
        control: Scored | None,
        *,
        folds: int,
        kind: str = "logistic",
        what: str = "",
        versus: str = "control task",
        classes: Sequence[str] = (),
        span: tuple[float, float] = (0.0, 1.0),
        neurons: Sequence[Sequence[Mapping[str, Any]]] = (),
        answers: Answers | None = None,
        exported: Callable[[], Iterable[Question]] = tuple,
        setup: str = "",
        sites: Sequence[str] = (),
        selection=None,
        state=None,
    ):
        """
        Args:
            axis: what differs between places; layers are selected in linked views, too.
            unit: what a score is: "accuracy" or "R^2".
            chance: the score of the most frequent label, or of the mean.
            control: None where there was none, which is said.
            what: what was probed, a few words.
            versus: what the control is.
            classes: names of the labels; none of a ridge.
            span: of a ridge, the smallest and the largest label.
            neurons: of each place, those that are read, as {"name", "layer", "neuron", "expert"}.
            setup: Python that makes `model` and says what `probes` is, for what is copied.
            sites: of each place, the hook point that is read.

        Raises:
            ValueError: for no place, or another number of scores than places.
        """
        if not len(places):
            raise ValueError("There is no score to show: give a probe of one place at least.")
        lengths = {len(score[0]), len(chance), len(places if control is None else control[0])}
        if lengths != {len(places)}:
            raise ValueError(f"There are {len(places)} places and scores for {sorted(lengths)}: give one for each.")
        mean, low, high = score
        self._table = pandas.DataFrame({axis: list(places), unit: mean, "low": low, "high": high, "chance": chance})
        if control is not None:
            self._table = self._table.assign(control=control[0], selectivity=mean - control[0])
        data = {
            "setup": setup,
            "axis": axis,
            "places": places,
            "unit": unit,
            "score": score,
            "chance": chance,
            "control": control,
            "folds": folds,
            "kind": kind,
            "what": what,
            "versus": versus,
            "classes": classes,
            "span": span,
            "neurons": neurons,
            "sites": sites,
            "answered": sorted(answers or {}),
        }
        super().__init__(data, answers=answers, exported=exported, selection=selection, state=state)

    def still(self):
        table, axis = self._table, self._table.columns[0]
        measure = "selectivity" if "selectivity" in table else table.columns[1]
        best = table[measure].idxmax()
        sentence = (
            f"{self.data['what']}: the highest {measure} is {table[measure][best]:.3f}, at {axis} {table[axis][best]}"
        )
        return sentence, table.sort_values(measure, ascending=False)
