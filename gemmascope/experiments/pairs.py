"""Clean and corrupted prompts, which an experiment compares position by position."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Prompts and their corrupted versions, of one shape."""

    clean: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"] | None
    """False on padding; None where there is none."""


def paired(model, clean, corrupted, attention_mask: Tensor | None = None) -> Pair:
    """Checks that two sets of prompts can be compared position by position.

    Args:
        clean, corrupted: a text, several texts (left-padded together), or token ids [pos] or [prompt, pos].
        attention_mask: [prompt, pos], for token ids with padding.

    Raises:
        ValueError: for other numbers of prompts, or prompts of different lengths.
    """
    runs = [model._begin(prompts, attention_mask) for prompts in (clean, corrupted)]
    tokens = [run.tokens for run in runs]
    lengths = [
        [run.tokens.shape[1]] * len(run.tokens) if run.mask is None else run.mask.sum(-1).tolist() for run in runs
    ]
    if len(lengths[0]) != len(lengths[1]):
        raise ValueError(
            f"There are {len(lengths[0])} clean prompts and {len(lengths[1])} corrupted ones: give one for each."
        )
    for number, (one, other) in enumerate(zip(*lengths, strict=True)):
        if one != other:
            raise ValueError(
                f"Clean prompt {number} has {one} tokens and its corrupted version {other}: they are compared position "
                "by position, so give versions of one length (model.to_str_tokens shows the tokens)."
            )
    masks = [torch.ones_like(run.tokens, dtype=torch.bool) if run.mask is None else run.mask for run in runs]
    if not torch.equal(*masks):
        raise ValueError("Clean and corrupted prompts are padded at different places: pad both alike.")
    return Pair(*tokens, runs[0].mask)
