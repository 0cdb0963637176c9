"""What an experiment measures: functions of logits [prompt, pos, d_vocab] that give one figure a prompt.

Any function of that form is a metric. Those made here check that answers are single tokens, and say which position they
read, so that no others need be unembedded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Logits = Float[Tensor, "prompt pos d_vocab"]
Answer = str | int | Sequence[str | int] | Tensor
"""A token's text or id: one for all prompts, or one for each."""


@dataclass(frozen=True)
class Metric:
    """A named figure of the logits at one position."""

    name: str
    of: Callable[[Float[Tensor, "prompt d_vocab"]], Float[Tensor, " prompt"]]
    pos: int = -1

    def __call__(self, logits: Logits) -> Float[Tensor, " prompt"]:
        return self.of(logits[:, self.pos].float())

    @property
    def last_only(self) -> bool:
        """Whether the logits of the last position are all it needs."""
        return self.pos == -1


def answer_ids(model, answer: Answer) -> Int[Tensor, " prompt_or_one"]:
    """The ids of answers, [1] for one that holds for all prompts.

    Raises:
        ValueError: for a text that is not one token.
    """
    if isinstance(answer, Tensor):
        return answer.reshape(-1).to(model.cfg.device)
    answers = [answer] if isinstance(answer, str | int) else list(answer)
    ids = [model.to_single_token(one) if isinstance(one, str) else int(one) for one in answers]
    wrong = next((token for token in ids if not 0 <= token < model.cfg.d_vocab), None)
    if wrong is not None:
        raise ValueError(f"Token id {wrong} is out of range: {model.cfg.model_name} has 0 to {model.cfg.d_vocab - 1}.")
    return torch.tensor(ids, device=model.cfg.device)


def _at(values: Float[Tensor, "prompt d_vocab"], ids: Tensor) -> Float[Tensor, " prompt"]:
    if len(ids) not in (1, len(values)):
        raise ValueError(f"There are {len(ids)} answers for {len(values)} prompts: give one, or one for each.")
    return values.gather(-1, ids.to(values.device).expand(len(values))[:, None])[:, 0]


def logit_difference(model, correct: Answer, wrong: Answer, pos: int = -1) -> Metric:
    """Logit of the correct token minus that of the wrong one, after the soft cap.

    Raises:
        ValueError: for an answer that is not one token.
    """
    right, other = answer_ids(model, correct), answer_ids(model, wrong)
    return Metric("logit difference", lambda logits: _at(logits, right) - _at(logits, other), pos)


def logit(model, answer: Answer, pos: int = -1) -> Metric:
    """Logit of one token, after the soft cap."""
    ids = answer_ids(model, answer)
    return Metric("logit", lambda logits: _at(logits, ids), pos)


def log_prob(model, answer: Answer, pos: int = -1) -> Metric:
    """Log probability of one token, in nats."""
    ids = answer_ids(model, answer)
    return Metric("log probability (nats)", lambda logits: _at(logits.log_softmax(-1), ids), pos)


def prob(model, answer: Answer, pos: int = -1) -> Metric:
    """Probability of one token."""
    ids = answer_ids(model, answer)
    return Metric("probability", lambda logits: _at(logits.softmax(-1), ids), pos)


def kl_divergence(reference: Logits, pos: int = -1) -> Metric:
    """KL(reference || now) of the next-token distributions, in nats; `reference` are the logits of another run."""
    held = reference[:, pos].detach().float().log_softmax(-1)

    def of(logits: Float[Tensor, "prompt d_vocab"]) -> Float[Tensor, " prompt"]:
        return F.kl_div(logits.log_softmax(-1), held.to(logits.device), log_target=True, reduction="none").sum(-1)

    return Metric("KL (nats)", of, pos)


def measured(metric: Callable[[Tensor], Tensor], logits: Logits) -> Float[Tensor, " prompt"]:
    """What a metric says of logits, checked: one finite figure a prompt.

    Raises:
        ValueError: for another shape, or NaN.
    """
    figures = metric(logits)
    name = getattr(metric, "name", None) or getattr(metric, "__name__", "the metric")
    if not isinstance(figures, Tensor) or figures.shape not in ((len(logits),), ()):
        came = list(figures.shape) if isinstance(figures, Tensor) else type(figures).__name__
        raise ValueError(
            f"{name} gave {came} for logits {list(logits.shape)}: "
            f"a metric returns one figure a prompt, [{len(logits)}]."
        )
    if figures.isnan().any():
        raise ValueError(f"{name} gave NaN: an activation or an intervention made the logits meaningless.")
    return figures.expand(len(logits)).float() if figures.ndim == 0 else figures.float()
