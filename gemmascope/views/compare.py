"""Two runs of one prompt, before and after an edit, position by position."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gemmascope import ops
from gemmascope.views.run import array

TOP = 8
"""Likeliest tokens that are kept of each run."""
_BLOCK = 2**25
"""Logits in float32 at once: positions are read in blocks of about this many."""


def compared(
    before: Float[Tensor, "pos d_vocab"], after: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"]
) -> dict[str, Any]:
    """What became of each position's next token: `kl`, KL(before || after) in nats [pos], and the mean loss of the
    prompt's own tokens in nats, `loss`, before and after (NaN for a single token)."""
    kl, losses = [], [[], []]
    step = max(1, _BLOCK // before.shape[1])
    targets = tokens[1:].to(before.device)
    for start in range(0, len(before), step):
        part = slice(start, start + step)
        p, q = (ops.wide(logits[part]).log_softmax(-1) for logits in (before, after))
        kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0))  # below 0 only by rounding
        for of_run, log_probs in zip(losses, (p, q), strict=True):
            wanted = targets[part]
            of_run.append(F.nll_loss(log_probs[: len(wanted)], wanted, reduction="none"))
    return {"kl": array(torch.cat(kl)), "loss": [float(torch.cat(of_run).mean()) for of_run in losses]}


def likeliest(
    before: Float[Tensor, "pos d_vocab"], after: Float[Tensor, "pos d_vocab"], top: int = TOP
) -> dict[str, Tensor]:
    """The likeliest next tokens of either run: `ids` [pos, 2 * top], -1 where the second names one of the first again,
    with the probability and the logit of each before and after, `p` and `logit` [run, pos, 2 * top]."""
    top = min(top, before.shape[1])
    step = max(1, _BLOCK // (2 * before.shape[1]))
    pieces = [
        _likeliest(torch.stack((ops.wide(before[start : start + step]), ops.wide(after[start : start + step]))), top)
        for start in range(0, len(before), step)
    ]
    ids, probs, logits = (torch.cat(parts, dim=-2) for parts in zip(*pieces, strict=True))
    return {"ids": ids, "p": probs, "logit": logits}


def _likeliest(runs: Float[Tensor, "run pos d_vocab"], top: int) -> tuple[Tensor, Tensor, Tensor]:
    best = runs.nan_to_num().topk(top, dim=-1).indices
    ids = torch.cat((best[0], best[1]), dim=-1)
    logits = runs.gather(-1, ids.expand(2, -1, -1))
    probs = runs.softmax(-1).gather(-1, ids.expand(2, -1, -1))
    again = (best[1][:, :, None] == best[0][:, None, :]).any(-1)
    return ids.masked_fill(torch.cat((torch.zeros_like(again), again), dim=-1), -1), probs, logits
