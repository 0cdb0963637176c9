"""A strip of tokens with numbers of the run."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from gemmascope.views.run import array, run_of
from gemmascope.widgets.base import Selection
from gemmascope.widgets.token_strip import TokenStrip


def token_strip(
    model,
    prompt,
    metrics: Mapping[str, Sequence[float]] | None = None,
    *,
    selection: Selection | None = None,
    state: Mapping | None = None,
) -> TokenStrip:
    """The prompt as tokens, coloured by a number each has.

    Args:
        prompt: text, token ids, or a cache of one prompt.
        metrics: further numbers, name -> one for each token. "surprise" (-log p of the token, in nats; none for the
            first) and "entropy" (of the next token's distribution, in nats) are there.
        selection: the Selection to follow, to link it with other views.

    Raises:
        ValueError: for another number of numbers than tokens.
    """
    run = run_of(model, prompt)
    with run.using():
        log_probs = run.logits.float().log_softmax(-1)
        surprise = F.nll_loss(log_probs[:-1], run.tokens[1:].to(log_probs.device), reduction="none")
        surprise = torch.cat((surprise.new_full((1,), torch.nan), surprise))
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    numbers = {"surprise": ("nats", array(surprise)), "entropy": ("nats", array(entropy))}
    numbers |= {name: ("", array(torch.as_tensor(values))) for name, values in (metrics or {}).items()}
    return TokenStrip(run.texts, array(run.tokens), numbers, setup=run.setup, selection=selection, state=state)
