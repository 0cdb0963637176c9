"""What every read-out asks of its prompts, positions and answers."""

from typing import NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from gemmascope.metrics import Answer, answer_ids


class Prompts(NamedTuple):
    """Prompts as the model reads them."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"] | None
    """False on padding; None when all prompts have the same length."""


class Positions(NamedTuple):
    """Where to read."""

    index: list[int]
    """Columns of the tokens, from 0."""
    names: list[int]
    """What a table calls them: the same, but counted from the end (-1) among prompts of different lengths."""


def encoded(model, prompt) -> Prompts:
    """Text, texts or token ids as tokens; texts of different lengths are padded on the left."""
    run = model._begin(prompt)
    return Prompts(run.tokens, run.mask)


def positions_in(prompts: Prompts, positions: int | list[int] | None) -> Positions:
    """Checks positions; None means all.

    Raises:
        ValueError: for a position that some prompt does not have, or None for prompts of different lengths.
    """
    n_pos = prompts.tokens.shape[1]
    if positions is None and prompts.mask is not None:
        raise ValueError(
            "The prompts have different lengths, so a position is not the same place in all: "
            "count from the end, as in positions=[-1]."
        )
    given = list(range(n_pos)) if positions is None else [positions] if isinstance(positions, int) else list(positions)
    if not given:
        raise ValueError("There are no positions: give at least one, or None for all.")
    for position in given:
        if not -n_pos <= position < n_pos:
            raise ValueError(f"Position {position} is out of range: the prompt has {n_pos} tokens, 0 to {n_pos - 1}.")
        if prompts.mask is not None and (position >= 0 or not prompts.mask[:, position].all()):
            shortest = int(prompts.mask.sum(-1).min())
            raise ValueError(
                f"Position {position} is not in all prompts, which have different lengths: "
                f"count from the end, -{shortest} to -1."
            )
    index = [position % n_pos for position in given]
    return Positions(index, index if prompts.mask is None else given)


def answers(model, answer: Answer, n_prompts: int) -> Int[Tensor, " prompt"]:
    """One token id for each prompt.

    Raises:
        ValueError: for a text that is not one token, an id out of range, or another number of answers.
    """
    ids = answer_ids(model, answer.tolist() if isinstance(answer, Tensor) else answer)
    if len(ids) not in (1, n_prompts):
        raise ValueError(f"There are {len(ids)} answers for {n_prompts} prompts: give one, or one for each.")
    return ids.expand(n_prompts)


def names_of_tokens(model, ids: list[int]) -> list:
    """The text of each token, or its id where the model has no tokenizer."""
    return list(ids) if model.tokenizer is None else model.tokenizer.to_str_tokens(ids)
