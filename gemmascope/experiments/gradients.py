"""Gradients of a metric by activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gemmascope.metrics import measured


@contextmanager
def by_activations(model) -> Iterator[None]:
    """Inside, gradients are on, and none is kept for a weight: that would cost as much memory as the weights."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learned:
        weight.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in learned:
            weight.requires_grad_(True)


def name_of(metric: Callable) -> str:
    return getattr(metric, "name", None) or getattr(metric, "__name__", "metric")


def figures_of(metric: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The metric of each prompt, which must have a gradient.

    Raises:
        ValueError: for a wrong shape, NaN, or a metric without gradient.
    """
    figures = measured(metric, logits)
    if not figures.requires_grad:
        raise ValueError(
            f"{name_of(metric)} has no gradient (an argmax, a detach or an accuracy has none): attribution needs one, "
            "so give a differentiable metric, or patch activations instead."
        )
    return figures


def gradients(figures: Tensor, of: Sequence[Tensor], keep: bool = False) -> list[Tensor]:
    """The gradient of each prompt's figure by its own activations; 0 where there is none.

    Raises:
        ValueError: for a gradient that is NaN.
    """
    found = torch.autograd.grad(figures.sum(), list(of), retain_graph=keep, materialize_grads=True, allow_unused=True)
    if any(gradient.isnan().any() for gradient in found):
        raise ValueError(
            "A gradient is NaN: the metric has none at this run (a logarithm or a root of 0, for example)."
        )
    return list(found)
