"""What each layer would say next, as a table of positions by layers."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas
from jaxtyping import Int

from gemmascope.widgets.base import Answers, Question, View

SITES = ("resid_post", "resid_mid", "resid_mlp")
"""What of a layer is read: the stream after it, after its attention, after its feed-forward part."""
CHOICES = {
    "lens": ("logit", "tuned"),
    "site": SITES,
    "colour": ("probability", "entropy", "KL"),
    "measure": ("probability", "log probability", "rank"),
}


class LensView(View, script="lens_view.js"):
    """The token that each place of the stream makes likeliest; a click lists the likeliest there, and how probable each
    is after every layer. Pinned tokens stay in the chart wherever the selection goes.

    State: `lens` ("logit", or "tuned" where there is one), `site` (one of SITES), `colour` of the table ("probability",
    "entropy" or "KL"), `measure` of the chart ("probability", "log probability" or "rank"), `pins` (ids of tokens).

    Questions. A row is a place in the stream: 0 the embedding, l + 1 layer l.

        table {lens, site, block}       of the positions block * size to block * size + size - 1: ids and probs
                                        [pos row rank], entropy and kl [pos row] in nats, texts {id: text}
        course {lens, site, pos, ids}   of the tokens that the table lists at a position, and of further ids:
                                        ids [token], probs and ranks [token row], texts {id: text}
    """

    STATE = {
        "lens": "logit",
        "site": "resid_post",
        "colour": "probability",
        "measure": "probability",
        "pins": [],
    }

    def __init__(
        self,
        tokens: Sequence[str],
        ids: Int[np.ndarray, " pos"],
        n_layers: int,
        n_vocabulary: int,
        *,
        answers: Answers,
        size: int = 256,
        tuned: bool = False,
        exported: Callable[[], Iterable[Question]] = tuple,
        carried: Mapping[str, int] | None = None,
        setup: str = "",
        selection=None,
        state=None,
    ):
        """
        Args:
            tokens: the text of each token.
            size: positions in a block of the table.
            tuned: whether a tuned lens answers as well.
            carried: {"table": pos, "course": pos}: what an exported page carries is of the positions from there on.
            setup: Python that makes `model` and `prompt`, for what is copied.

        Raises:
            ValueError: for no tokens, another number of ids than tokens, or a state that there is not.
        """
        if not len(tokens) or len(tokens) != len(ids):
            raise ValueError(f"There are {len(tokens)} tokens and {len(ids)} ids: give an id for each of some tokens.")
        wanted = {**self.STATE, **(state or {})}
        for name, choices in CHOICES.items():
            if wanted[name] not in choices:
                raise ValueError(f"The {name} of a lens cannot be {wanted[name]!r}: take {', '.join(choices)}.")
        if wanted["lens"] == "tuned" and not tuned:
            raise ValueError("There is no tuned lens to show: give one as tuned=.")
        if wanted["lens"] == "tuned" and wanted["site"] != "resid_post":
            raise ValueError(f"A tuned lens reads the stream after a layer, resid_post, and not {wanted['site']}.")
        beyond = [one for one in wanted["pins"] if not isinstance(one, int) or not 0 <= one < n_vocabulary]
        if beyond:
            raise ValueError(f"Pins are ids of tokens, 0 to {n_vocabulary - 1}, and {beyond[0]!r} came.")
        self._tokens, self._last_block = tokens, (len(tokens) - 1) // size
        data = {
            "setup": setup,
            "tokens": tokens,
            "ids": np.asarray(ids).tolist(),
            "layers": n_layers,
            "vocabulary": n_vocabulary,
            "size": size,
            "tuned": tuned,
            "carried": carried or {"table": 0, "course": 0},
        }
        super().__init__(data, answers=answers, exported=exported, selection=selection, state=state)

    def still(self):
        asked = {name: self.state[name] for name in ("lens", "site")}
        answer = self.answers["table"](**asked, block=self._last_block)
        first = len(self._tokens) - len(answer["ids"])
        table = pandas.DataFrame(
            {
                "pos": range(first, len(self._tokens)),
                "token": self._tokens[first:],
                "says next": [answer["texts"][str(one)] for one in answer["ids"][:, -1, 0].tolist()],
                "probability": answer["probs"][:, -1, 0],
                "entropy of the embedding": answer["entropy"][:, 0],
                "entropy": answer["entropy"][:, -1],
            }
        )
        rows = answer["ids"].shape[1]
        return f"A lens on {len(self._tokens)} positions and {rows} places of the stream; last positions first", table[
            ::-1
        ]
