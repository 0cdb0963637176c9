"""Distributed alignment search (Geiger et al. 2023, arXiv 2303.02536): where, in which subspace, is a variable?

A pair is a base prompt and a source prompt. With R [d, k] orthonormal, an interchange gives the base run, at a site,
the source's part within the span of R:

    x_base + (x_source - x_base) R R^T

R is trained so that the model then gives the counterfactual answer: the one that follows if the variable alone had the
source's value. Pairs whose answer must stay the base's own keep other variables out of R (Huang et al. 2024, arXiv
2402.17700: cause and isolate).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from gemmascope.interventions import Site
from gemmascope.metrics import Answer, answer_ids
from gemmascope.progress import interruptible
from gemmascope.readout.activations import Change, Prompts, Rows, changing, collect, find_site, last_logits
from gemmascope.results import Result, about
from gemmascope.sites import SiteInfo

Texts = str | Sequence[str] | Tensor | Prompts
OnePosition = int | Sequence[int] | Tensor
"""One position for all pairs, or one for each."""
N_RANDOM = 5
"""Random bases that the control's accuracy is the mean of."""


@dataclass(frozen=True)
class DAS:
    """A subspace that carries a variable, and how well it does."""

    site: str
    basis: Float[Tensor, "d k"]
    """Orthonormal columns."""
    accuracy: Result
    """Interchange accuracy on held-out pairs, which are the samples. Cells by basis: "learned"; "random", the mean of
    N_RANDOM of the same k; "shuffled answers", learned and tested on the answers of other pairs. Baselines: "no swap",
    and "whole site", which swaps all of the activation."""
    losses: Float[Tensor, " step"]
    """Cross-entropy of the counterfactual answer in nats, by training step."""
    held_out: Int[Tensor, " pair"]
    """The pairs that training did not see."""

    def view(self, *, selection=None):
        """The accuracy beside its controls: see `Result.view`."""
        return self.accuracy.view(selection=selection)

    def _repr_html_(self) -> str:
        return self.accuracy._repr_html_()


class _Pairs(NamedTuple):
    """What interchanges need: base prompts, where in them, and what the source has there."""

    model: object
    info: SiteInfo
    base: Prompts
    rows: Rows
    source: Float[Tensor, "pair d"]

    @classmethod
    def of(cls, model, base, source, site, positions, source_positions, batch_size, progress) -> "_Pairs":
        info, base, source = find_site(model, site, write=True), Prompts.of(model, base), Prompts.of(model, source)
        if base.n != source.n:
            raise ValueError(f"There are {base.n} base prompts and {source.n} source prompts: give pairs.")
        rows = base.rows(positions)
        settings = dict(positions=source_positions, batch_size=batch_size, progress=progress)
        values = collect(model, source, info.name, **settings)[info.name]
        if not len(rows.prompt) == len(values) == base.n:
            raise ValueError("An interchange has one position in each prompt: give an int, or one for each pair.")
        if not values.isfinite().all():
            raise ValueError(f"A source's activation at {info.name} is not finite: there is nothing to interchange.")
        return cls(model, info, base, rows, values.float())

    def logits(self, pairs: Int[Tensor, " pair"], basis: Float[Tensor, "d k"] | None) -> Float[Tensor, "pair d_vocab"]:
        """After each base prompt's last token, with the source's part in the span of a basis; None for no swap."""
        batch = self.base.batch(pairs, self.rows)
        hooks = [] if basis is None else changing(self.info.name, batch, _swapping(self.source, basis))
        return last_logits(self.model, batch, hooks)

    @torch.no_grad()
    def right(
        self,
        pairs: Int[Tensor, " pair"],
        answers: Int[Tensor, " all"],
        basis: Float[Tensor, "d k"] | None,
        batch_size: int,
    ) -> Float[Tensor, " pair"]:
        """1 where the answer is the most likely of all tokens, 0 elsewhere."""
        return torch.cat([
            (self.logits(part, basis).argmax(-1).cpu() == answers[part]).float() for part in pairs.split(batch_size)
        ])  # fmt: skip


def _swapping(source: Float[Tensor, "all d"], basis: Float[Tensor, "d k"]) -> Change:
    def change(x: Float[Tensor, "pair d"], row: Int[Tensor, " pair"]) -> Float[Tensor, "pair d"]:
        return x + (source.to(x)[row] - x) @ basis.to(x) @ basis.to(x).T

    return change


def fit_das(
    model,
    base: Texts,
    source: Texts,
    answers: Answer,
    site: Site,
    k: int,
    *,
    positions: OnePosition = -1,
    source_positions: OnePosition | None = None,
    steps: int = 100,
    lr: float = 0.05,
    batch_size: int = 32,
    held_out: float = 0.25,
    control: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> DAS:
    """Learns the k-dimensional subspace of a site whose interchange gives the counterfactual answers.

    The model's weights get no gradients. Interrupted, it keeps the basis learned so far and leaves out the control.

    Args:
        answers: the counterfactual answer of each pair, one token each (text or id): what should follow the base
            prompt once the variable has the source's value.
        positions, source_positions: where the activation is, in a base prompt and in its source (the same by default).
        lr: Adam's, on a matrix whose columns are made orthonormal at each step (QR).
        held_out: share of the pairs that is kept for testing.
        control: learn a second time, on shuffled answers.

    Raises:
        KeyError, ValueError: for a site or position that is not there, answers that are not one token or not one for
            each pair, or a k larger than the site.
    """
    source_positions = positions if source_positions is None else source_positions
    pairs = _Pairs.of(model, base, source, site, positions, source_positions, batch_size, progress)
    n, d = pairs.source.shape
    right = answer_ids(model, answers).cpu()
    if len(right) != n:
        raise ValueError(f"There are {len(right)} answers for {n} pairs: give one for each.")
    if not 1 <= k <= d:
        raise ValueError(f"k is {k}; {pairs.info.name} has {d} dimensions, so take 1 to {d}.")
    n_test = round(held_out * n)
    if not 1 <= n_test < n:
        raise ValueError(f"held_out={held_out} leaves {n - n_test} of {n} pairs to learn from and {n_test} to test.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    train, test = order[n_test:], order[:n_test].sort().values

    def learn(answers: Tensor, what: str) -> tuple[Tensor, Tensor]:
        return _learn(pairs, train, answers, k, steps, lr, batch_size, seed, what, progress)

    def accuracy(basis: Tensor | None, answers: Tensor = right) -> Tensor:
        return pairs.right(test, answers, basis, batch_size)

    basis, losses = learn(right, "learning")
    random = [torch.linalg.qr(torch.randn(d, k, generator=generator)).Q for _ in range(N_RANDOM)]
    values = torch.full((3, n_test), torch.nan)
    values[0], values[1] = accuracy(basis), torch.stack([accuracy(one) for one in random]).mean(0)
    if control and len(losses) == steps:
        shuffled = right[torch.randperm(n, generator=generator)]
        other, other_losses = learn(shuffled, "learning the control")
        if len(other_losses) == steps:
            values[2] = accuracy(other, shuffled)
    cells = pandas.DataFrame({"basis": ["learned", "random", "shuffled answers"]})
    baselines = {"no swap": accuracy(None), "whole site": accuracy(torch.eye(d))}
    what = about(model, site=pairs.info.name, k=k, steps=len(losses), lr=lr, batch_size=batch_size, seed=seed)
    result = Result("distributed alignment search", cells, values, "interchange accuracy", baselines, what)
    return DAS(pairs.info.name, basis, result, losses, test)


def _learn(
    pairs: _Pairs,
    train: Int[Tensor, " train"],
    answers: Int[Tensor, " all"],
    k: int,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    what: str,
    progress: bool,
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " step"]]:
    """The basis and the loss of each step that was done."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.linalg.qr(torch.randn(pairs.source.shape[1], k, generator=generator)).Q.requires_grad_()
    optimiser = torch.optim.Adam([free], lr)
    losses = []
    with interruptible("the subspace is that of the steps so far."):
        with _frozen(pairs.model), torch.enable_grad():
            for _ in tqdm(range(steps), what, delay=1, leave=False, disable=not progress):
                some = train[torch.randperm(len(train), generator=generator)[:batch_size]]
                logits = pairs.logits(some, torch.linalg.qr(free).Q)
                loss = F.cross_entropy(logits.float(), answers[some].to(logits.device))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.detach().cpu())
    return torch.linalg.qr(free.detach()).Q, torch.stack(losses) if losses else torch.empty(0)


@contextmanager
def _frozen(model) -> Iterator[None]:
    """The weights ask for no gradient: then nothing before the site is kept for the backward pass."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@torch.no_grad()
def interchange(
    model,
    base: Texts,
    source: Texts,
    site: Site,
    basis: Float[Tensor, "d k"],
    *,
    positions: OnePosition = -1,
    source_positions: OnePosition | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Float[Tensor, "pair d_vocab"]:
    """Logits after each base prompt, on the CPU, with the source's part in the span of an orthonormal basis."""
    source_positions = positions if source_positions is None else source_positions
    pairs = _Pairs.of(model, base, source, site, positions, source_positions, batch_size, progress)
    if len(basis) != pairs.source.shape[1]:
        raise ValueError(f"The basis has {len(basis)} rows and {pairs.info.name} has {pairs.source.shape[1]} entries.")
    parts = torch.arange(pairs.base.n).split(batch_size)
    return torch.cat([pairs.logits(part, basis).cpu() for part in parts])
