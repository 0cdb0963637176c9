"""Small Gemma 4 models trained in seconds on tasks whose answer is known."""

from collections.abc import Callable

import torch
from torch import Tensor

from gemmascope.model.text import HookedGemma4
from gemmascope.testing import tiny_model


def untrained(architecture: str, **changes) -> HookedGemma4:
    """A tiny model as training wants it: norms of gain 1, and post-norms less, so that the token is not drowned."""
    model = tiny_model(architecture, **changes)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            part = name.split(".")[-2]
            if part in ("ln1_post", "ln2_post"):
                tensor.fill_(0.3)
            elif tensor.ndim < 2 and part not in ("q_norm", "k_norm"):
                tensor.fill_(1)
    return model


def fit(model, loss: Callable[[int], Tensor], steps: int, lr: float, after: Callable[[], None] = lambda: None) -> None:
    """AdamW on loss(step), the rate rising at first and falling over the last 40 %; `after` follows every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20, (steps - step) / (0.4 * steps))
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after()
    model.requires_grad_(False)
