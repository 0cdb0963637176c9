"""The architecture as a tree: every layer, its modules and its hook points."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas

from gemmascope.widgets.base import View


class ModelMap(View, script="model_map.js"):
    """Layers with what differs between them; each opens to its four steps, their modules and hook points.

    State: `open`, the layers that are open (-1 is the embedding, the number of layers the head); `filter`, a text or
    regular expression that hook points have in their name or meaning.
    """

    STATE = {"open": [], "filter": ""}

    def __init__(
        self,
        facts: Sequence[str],
        steps: Sequence[tuple[str, str]],
        sites: Sequence[Mapping[str, Any]],
        groups: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]],
        *,
        dtype: str,
        norms: bool = False,
        setup: str = "",
        answers=None,
        exported=tuple,
        selection=None,
        state=None,
    ):
        """
        Args:
            facts: what is said of the whole model, a few words each; the name first.
            steps: (name, what it does) of each step of a block, in order.
            sites: hook points, one row for all layers that have it: {"name" (with "{l}" for the layer), "axes",
                "meaning", "step" (None outside blocks), "module", "expansion" (computed on demand)}.
            groups: what layers of one sort have: {"sites" (numbers of rows above), "modules" (name -> weights,
                each its name and shape)}.
            layers: the embedding, each layer and the head: {"name", "group", "parameters", "bytes", "sizes" (axis ->
                entries)}, and of a layer what differs: "kind", "window", "heads", "kv_heads", "kv_source", "k_is_v",
                "mlp", "experts" (how many, how many a token, how wide; None where there are none), "ple" (its width).
            dtype: what the bytes are of.
            norms: whether "norms" {layer} is answered: a norm for each site of the layer's group, NaN where there is
                none.

        Raises:
            ValueError: for a layer of a group that is not there.
        """
        wrong = next((layer["name"] for layer in layers if not 0 <= layer["group"] < len(groups)), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is of a group that is not there; there are {len(groups)}.")
        data = {
            "facts": facts,
            "steps": steps,
            "sites": sites,
            "groups": groups,
            "layers": layers,
            "dtype": dtype,
            "norms": norms,
            "setup": setup,
        }
        super().__init__(data, answers=answers, exported=exported, selection=selection, state=state)

    def still(self):
        blocks = self.data["layers"][1:-1]
        shown = ("name", "kind", "window", "kv_heads", "kv_source", "mlp", "parameters")
        table = pandas.DataFrame([{name: block[name] for name in shown} for block in blocks])
        return ", ".join(self.data["facts"]), table
