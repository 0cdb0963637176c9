"""Path patching: what one part of the model tells another.

Of Wang et al. 2022 (arXiv:2211.00593) and Goldowsky-Dill et al. 2023 (arXiv:2304.05969).
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from gemmascope.experiments.edges import Edge, edge_patching, wiring
from gemmascope.results import Result


def path_patching(
    model,
    clean,
    corrupted,
    metric: Callable[[Tensor], Tensor],
    receivers: str | Sequence[str],
    senders: Sequence[str] | None = None,
    *,
    experts: bool = False,
    norms: str = "live",
    attention_mask: Tensor | None = None,
    cells_per_forward: int = 32,
) -> Result:
    """Patches the direct paths from one sender at a time to the receivers, and measures.

    The receivers read what the sender said in the corrupted run, and whatever else is computed now; all else after them
    follows. Paths from the sender to a receiver through other parts are not patched.

    Args:
        clean, corrupted: prompts and their corrupted versions, of one length.
        metric: logits [prompt, pos, d_vocab] -> one figure a prompt.
        receivers: one or several, patched together: "L3H2.q" (a head's queries), "L1KV0.k" and "L1KV0.v" (a kv head's
            keys and values), "L2.mlp", "L2.router", "L2.experts" (with `experts`: "L2E5"), "L1.ple", "logits".
        senders: "embed", "L0H1", "L0.mlp", "L0.experts" ("L0E5"), "L0.ple"; all that a receiver reads by default.
        experts: each routed expert a node.
        norms: "live": receivers norm their patched input, as the model does; "frozen": with the scale of the clean run,
            so that effects of several senders add up to first order.

    Returns:
        A Result with a cell for each sender.

    Raises:
        ValueError: for a part that the model does not have, a sender that no receiver reads, prompts of other lengths.
    """
    receivers = [receivers] if isinstance(receivers, str) else list(receivers)
    wires = wiring(model, experts)
    wires.cut([("embed", name) for name in receivers if not name.endswith(".signal")])  # raises for unknown names
    there = set(wires.edges)
    known = [name for name in wires.senders if any((name, receiver) in there for receiver in receivers)]
    for name in senders or ():
        if name not in known:
            wires.cut([(name, receiver) for receiver in receivers])  # raises, and says which edge is not there
    cells: dict[str, list[Edge]] = {
        name: [(name, receiver) for receiver in receivers if (name, receiver) in there]
        for name in (known if senders is None else senders)
    }
    result = edge_patching(
        model,
        clean,
        corrupted,
        metric,
        list(cells.values()),
        experts=experts,
        norms=norms,
        attention_mask=attention_mask,
        cells_per_forward=cells_per_forward,
    )
    result.experiment, result.cells = "path patching", result.cells[[]].assign(sender=list(cells))
    result.about["settings"]["receivers"] = receivers
    return result
