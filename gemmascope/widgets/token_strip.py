"""The prompt as tokens, coloured by a number each has."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas
from jaxtyping import Float, Int

from gemmascope.widgets.base import View


class TokenStrip(View, script="token_strip.js"):
    """Tokens in a strip, coloured by any number each has: the shared cursor of all views of a prompt.

    State: `metric`, the name of the number that colours them (None: the first).
    """

    STATE = {"metric": None}

    def __init__(
        self,
        tokens: Sequence[str],
        ids: Int[np.ndarray, " pos"],
        metrics: Mapping[str, tuple[str, Float[np.ndarray, " pos"]]],
        *,
        setup: str = "",
        selection=None,
        state=None,
    ):
        """
        Args:
            tokens: the text of each token.
            metrics: name -> (unit, a number for each token, NaN where there is none).
            setup: Python that makes `model` and `prompt`, for what is copied.

        Raises:
            ValueError: for no tokens, no metric, or another number of entries than tokens.
        """
        if not len(tokens) or not metrics:
            raise ValueError(f"There are {len(tokens)} tokens and {len(metrics)} metrics: give one of each at least.")
        for name, (_, values) in metrics.items():
            if len(values) != len(tokens):
                raise ValueError(f"{name} has {len(values)} numbers for {len(tokens)} tokens: give one for each.")
        self._metrics = {name: values for name, (_, values) in metrics.items()}
        data = {
            "setup": setup,
            "tokens": tokens,
            "ids": np.asarray(ids).tolist(),
            "metrics": [{"name": name, "unit": unit, "values": values} for name, (unit, values) in metrics.items()],
        }
        super().__init__(data, selection=selection, state=state)

    def still(self):
        tokens = self.data["tokens"]
        table = pandas.DataFrame({"token": tokens} | self._metrics)
        first = table.columns[1]
        return f"{len(tokens)} tokens, those of most {first} first", table.sort_values(first, ascending=False)
