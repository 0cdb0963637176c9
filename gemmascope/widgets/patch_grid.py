"""A patching sweep as a grid: what each cell carries from one run into another, filled in while it runs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from gemmascope.widgets.base import MAX_ROWS, View


class PatchGrid(View, script="patch_grid.js"):
    """The cells of a sweep, one colour each: of a finished one, or of one that runs from the page and can be stopped.

    State: `site`, `by` (its axes), `direction` and `metric` of the sweep that is shown; None in a finished one; and of
    three axes, `facet`, the entry of the first whose picture is shown where the selection names none.
    """

    STATE = {"site": None, "by": None, "direction": None, "metric": None, "facet": None}

    def __init__(
        self,
        title: str,
        result: Callable[[Mapping[str, Any]], Any],
        *,
        note: str = "",
        prompts: Mapping[str, Sequence[str]] | None = None,
        columns: Int[np.ndarray, "column 2"] | None = None,
        sites: Sequence[Mapping[str, Any]] = (),
        metrics: Sequence[Mapping[str, Any]] = (),
        setup: str = "",
        call: str = "",
        answers=None,
        exported=tuple,
        selection=None,
        state=None,
    ):
        """
        Args:
            title: what was run, in a few words.
            result: state -> the table behind the grid, with `top(n)`.
            note: what a cell is; a grid that runs from the page has its own.
            prompts: the tokens of "clean" and "corrupted".
            columns: the positions (clean, corrupted) that stand above each other, -1 where one has no partner.
            sites: what can be patched: {"site", "hook" (its name without the block), "meaning", "by" (lists of axes)}.
            metrics: {"name", "tokens" (texts it is about), "python" (an expression)}.
            setup: Python that makes `model`, `clean` and `corrupted`, for what is copied.
            call: further arguments of the call that is copied.
            answers: "grid", and for one that can be run "cells" and "cell"; see `gemmascope.views.patching`.

        Raises:
            ValueError: for prompts without columns, or a column beyond a prompt.
        """
        if (prompts is None) != (columns is None):
            raise ValueError("prompts come with columns, which say what stands above what: give both, or neither.")
        if prompts is not None:
            for name, positions in zip(("clean", "corrupted"), columns.T, strict=True):
                if len(positions) and positions.max() >= len(prompts[name]):
                    raise ValueError(f"columns names position {positions.max()} of {len(prompts[name])} ({name}).")
        self._result = result
        pair = None if prompts is None else {**prompts, "columns": columns.tolist()}
        offers = {"sites": sites, "metrics": metrics, "call": call} if sites else None
        data = {"title": title, "note": note, "setup": setup, "prompts": pair, "offers": offers}
        super().__init__(data, answers=answers, exported=exported, selection=selection, state=state)

    @property
    def result(self) -> Any:
        """The gs.Result of the sweep that is shown, NaN in cells that have not run."""
        return self._result(self.state)

    def still(self):
        result = self.result
        return f"{self.data['title']}: {result!r}", result.top(MAX_ROWS).dropna(subset="value")
