"""Experts that go with a behaviour: found by contrast, checked by ablation, and used to steer.

localise            experts that succeed with the model: success against failure, with significance and ablation
risk_difference     SteerMoE (Fayyaz et al. 2025, arXiv 2509.09660): experts that one set of texts uses more
steering_hooks      SteerMoE: those promoted or suppressed
expert_npmi         RICE (arXiv 2505.14681): experts that go with certain tokens
reweight_experts    RICE: those weighted more, or less
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemmascope import interventions
from gemmascope.experiments.sweep import ROWS, Baseline, run_cells
from gemmascope.interventions import Intervention
from gemmascope.metrics import Answer, answer_ids
from gemmascope.readout.activations import Batch, Positions, Prompts, Rows
from gemmascope.readout.prompts import answers as answers_of
from gemmascope.results import Result, about
from gemmascope.routing.effects import Texts, checked_experts, routed_layers

Experts = Sequence[tuple[int, int]]
"""(layer, expert) pairs."""
INDICES = "moe.router.hook_indices"


def _used(
    model, prompts: Prompts, positions: Positions, layers: list[int], batch_size: int
) -> tuple[Bool[Tensor, "row cell"], Rows]:
    """Whether a token (row) chose the expert of a cell (layer, expert)."""
    rows, n_experts = prompts.rows(positions), model.cfg.n_experts
    used = torch.zeros(len(rows.pos), len(layers), n_experts, dtype=torch.bool)
    names = [f"blocks.{layer}.{INDICES}" for layer in layers]
    for batch in prompts.batches(batch_size, rows):
        _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.mask, names_filter=names, return_type=None)
        for number, name in enumerate(names):
            chosen = cache[name][batch.prompt, batch.pos].cpu()
            used[batch.row, number] = torch.zeros(len(chosen), n_experts, dtype=torch.bool).scatter_(1, chosen, True)
    return used.flatten(1), rows


def _cells(model, layers: list[int]) -> pandas.DataFrame:
    return pandas.DataFrame(list(product(layers, range(model.cfg.n_experts))), columns=["layer", "expert"])


# Success against failure


@dataclass(frozen=True)
class Localisation:
    """Experts that are chosen more, or less, where the model answers rightly."""

    contrast: Result
    """The share of a prompt's tokens that chose the expert, the mean over successes minus that over failures."""
    p: Float[Tensor, " cell"]
    """Its significance, corrected for the number of experts."""
    check: Result
    """The change of log p(answer), in nats, when an expert is silenced; a sample is a success. Cells by layer, expert
    and role: "found", or "random" (as many others, of the same layers)."""

    @property
    def table(self) -> pandas.DataFrame:
        """A row for each expert: difference, p, and where it was silenced, what that did to log p(answer)."""
        table = self.contrast.cells.assign(difference=self.contrast.mean.tolist(), p=self.p.tolist())
        silenced = self.check.cells.assign(silenced=self.check.mean.tolist())
        return table.merge(silenced, "left", ["layer", "expert"]).sort_values("p", kind="stable", ignore_index=True)

    def view(self, *, selection=None):
        """The contrast as a grid of layers and experts: see `Result.view`."""
        return self.contrast.view(selection=selection)

    def _repr_html_(self) -> str:
        return self.table.to_html(max_rows=12, escape=True)


@torch.no_grad()
def localise(
    model,
    prompts: str | Sequence[str] | Tensor | Prompts,
    answers: Answer,
    success: Sequence[bool] | Tensor | None = None,
    layers: Sequence[int] | None = None,
    *,
    positions: Positions = None,
    n_check: int = 5,
    alpha: float = 0.05,
    draws: int = 2000,
    seed: int = 0,
    batch_size: int = ROWS,
    progress: bool = True,
) -> Localisation:
    """Which experts succeed with the model?

    The contrast of successes and failures is tested by permuting them; p is two-sided and holds for all experts at once
    (the largest difference of each permutation is what a difference is compared with: Westfall & Young 1993). A
    contrast is no cause, so the experts found are silenced. Ctrl-C ends that check, which keeps the prompts that are
    done.

    Args:
        answers: the single token, or its id, that is right, for each prompt.
        success: whether each prompt is answered rightly; by default, whether the answer is the likeliest next token.
        positions: which tokens of a prompt count, as in `gs.collect`; all by default.
        n_check: how many of the experts with p <= alpha are silenced, the smallest p first.

    Raises:
        ValueError: for a dense model, an answer of more than a token, `success` or answers of the wrong number, or
            nothing but successes or failures.
    """
    layers, given = routed_layers(model, layers), Prompts.of(model, prompts)
    right = answers_of(model, answers, given.n)
    if success is None:
        runs = [
            model(batch.tokens, attention_mask=batch.mask)[batch.prompt, batch.pos].argmax(-1)
            for batch in given.batches(batch_size, given.rows(-1))
        ]
        good = (torch.cat(runs) == right).cpu()
    else:
        good = torch.as_tensor(success, dtype=torch.bool)
        if len(good) != given.n:
            raise ValueError(f"success has {len(good)} entries for {given.n} prompts: give one for each.")
    if good.all() or not good.any():
        which = "success" if good.all() else "failure"
        raise ValueError(f"Every one of the {given.n} prompts is a {which}: there is nothing to contrast it with.")
    used, rows = _used(model, given, positions, layers, batch_size)
    share = torch.zeros(given.n, used.shape[1]).index_add_(0, rows.prompt, used.float())
    share = share / rows.prompt.bincount(minlength=given.n).clamp(min=1)[:, None]
    difference, p = permutation_test(share, good, draws, seed)
    cells = _cells(model, layers)
    order = [number for number in p.argsort(stable=True).tolist() if p[number] <= alpha][:n_check]
    found = [divmod(number, model.cfg.n_experts) for number in order]
    found = [(layers[place], expert) for place, expert in found]
    check = _check(model, given, good.nonzero()[:, 0], right, found, seed, batch_size, progress)
    said = about(model, successes=int(good.sum()), failures=int((~good).sum()), draws=draws, seed=seed)
    contrast = Result("success against failure", cells, difference[:, None], "difference in share", {}, said)
    return Localisation(contrast, p, check)


def permutation_test(
    x: Float[Tensor, "sample cell"], group: Bool[Tensor, " sample"], draws: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, " cell"], Float[Tensor, " cell"]]:
    """Difference of the means of two groups, and its two-sided p over permutations, corrected for all cells by the
    largest difference of each (Westfall & Young 1993). The groups as they are count as one permutation."""

    def differences(weights: Float[Tensor, "draw sample"]) -> Float[Tensor, "draw cell"]:
        n = weights.sum(-1, keepdim=True)
        return weights @ x / n - (1 - weights) @ x / (weights.shape[1] - n)

    x = x.double()
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(draws, len(group), generator=generator).argsort(-1)
    observed = differences(group[None].double())[0]
    largest = differences(group[orders].double()).abs().amax(-1)
    p = (1 + (largest[:, None] >= observed.abs() - 1e-12).sum(0)) / (1 + draws)
    return observed.float(), p.float()


def _check(
    model,
    given: Prompts,
    successes: Int[Tensor, " success"],
    right: Int[Tensor, " prompt"],
    found: list[tuple[int, int]],
    seed: int,
    batch_size: int,
    progress: bool,
) -> Result:
    """The experts found, and as many others of their layers, silenced one at a time on the successes."""
    rng, cells = random.Random(seed), [(*cell, "found") for cell in found]
    for layer, _ in found:
        taken = {expert for of, expert, _ in cells if of == layer}
        rest = [expert for expert in range(model.cfg.n_experts) if expert not in taken]
        cells += [(layer, rng.choice(rest), "random")] if rest else []
    made = [interventions.drop_expert(layer, expert, reroute=False) for layer, expert, _ in cells]
    values = []
    for part in successes.split(batch_size):
        batch = given.batch(part, given.rows(-1))
        base = Baseline(model, model._begin(batch.tokens, batch.mask), _answered(batch, right[part]))
        change = run_cells(base, made, then="what was found stays", progress=progress) - base.figures
        if change.isnan().any():  # interrupted
            values = values or [change]
            break
        values.append(change)
    table = pandas.DataFrame(cells, columns=["layer", "expert", "role"])
    return Result(
        "ablation check", table, torch.cat(values, 1), "change of log p(answer) (nats)", {}, about(model, seed=seed)
    )


def _answered(batch: Batch, right: Int[Tensor, " prompt"]) -> Callable[[Tensor], Float[Tensor, " prompt"]]:
    """The log probability of each prompt's answer, after its own last token."""
    rows = torch.arange(len(right))
    return lambda logits: logits[rows, batch.pos].float().log_softmax(-1)[rows, right]


# SteerMoE


def risk_difference(
    model,
    texts: Texts,
    others: Texts,
    layers: Sequence[int] | None = None,
    *,
    positions: Positions = None,
    batch_size: int = ROWS,
) -> Result:
    """SteerMoE's detection (arXiv 2509.09660): D_e = A1 / N1 - A2 / N2, the share of the tokens of `texts` that chose
    an expert minus that of `others`.

    Args:
        positions: which tokens count, as in `gs.collect`; all by default.

    Returns:
        a Result by layer and expert, with one sample, D in [-1, 1].

    Raises:
        ValueError: for a dense model, a layer out of range, a position that a text does not have.
    """
    layers = routed_layers(model, layers)
    sides = [_used(model, Prompts.of(model, one), positions, layers, batch_size)[0] for one in (texts, others)]
    difference = sides[0].float().mean(0) - sides[1].float().mean(0)
    said = about(model, tokens=[len(side) for side in sides])
    return Result("risk difference", _cells(model, layers), difference[:, None], "difference in share", {}, said)


def steering_hooks(
    model, promote: Experts = (), suppress: Experts = (), eps: float = 0.01
) -> list[tuple[str, Callable]]:
    """SteerMoE's steering (arXiv 2509.09660): on the router's log-softmax scores s, s_e = max(s) + eps promotes an
    expert and s_e = min(s) - eps suppresses it, before the top k are chosen.

    With more than k experts of a layer promoted, k of them are chosen.

        with model.hooks(fwd_hooks=steering_hooks(model, promote=[(2, 5)])):
            model.generate(...)

    Raises:
        ValueError: for a dense model, a layer or expert out of range, or an expert both promoted and suppressed.
    """
    promote, suppress = _checked(model, promote), _checked(model, suppress)
    both = set(promote) & set(suppress)
    if both:
        layer, expert = min(both)
        raise ValueError(f"Expert {expert} of layer {layer} is both promoted and suppressed: choose one.")
    hooks = []
    for layer in sorted({layer for layer, _ in [*promote, *suppress]}):
        ups, downs = ([expert for at, expert in given if at == layer] for given in (promote, suppress))

        def steer(logits: Tensor, hook, ups=ups, downs=downs) -> Tensor:
            scores = logits.float().log_softmax(-1)
            high, low = scores.amax(-1, keepdim=True) + eps, scores.amin(-1, keepdim=True) - eps
            scores[..., ups] = high.expand(*high.shape[:-1], len(ups))
            scores[..., downs] = low.expand(*low.shape[:-1], len(downs))
            return scores.type_as(logits)

        hooks.append((f"blocks.{layer}.moe.router.hook_logits", steer))
    return hooks


# RICE


def expert_npmi(
    model,
    texts: Texts,
    tokens: Answer,
    layers: Sequence[int] | None = None,
    *,
    batch_size: int = ROWS,
) -> Result:
    """RICE's detection (arXiv 2505.14681): nPMI(x, e) = log2(p(x, e) / (p(x) p(e))) / -log2 p(x, e).

    Probabilities are over the tokens of the texts: that a token is x, that it chooses expert e. 1: e is chosen at x and
    only there; 0: they are independent; -1: e is never chosen at x. RICE ranks experts by the mean over its tokens.

    Args:
        tokens: such as RICE's "thinking tokens": single tokens, or their ids.

    Returns:
        a Result by layer and expert; a sample is a token x.

    Raises:
        ValueError: for a dense model, a text that is not a token, or a token that the texts do not hold.
    """
    layers, given = routed_layers(model, layers), Prompts.of(model, texts)
    ids = answer_ids(model, tokens).cpu()
    used, rows = _used(model, given, None, layers, batch_size)
    read = given.tokens.cpu()[rows.prompt, rows.pos]
    is_x = (read[:, None] == ids).double()
    if not is_x.any(0).all():
        missing = int(ids[~is_x.any(0)][0])
        raise ValueError(f"The texts do not hold token {missing}: give texts that do, or leave it out.")
    values = npmi(is_x.T @ used.double() / len(used), is_x.mean(0)[:, None], used.double().mean(0)).T
    said = about(model, tokens=ids.tolist(), texts=given.n)
    return Result("nPMI of tokens and experts", _cells(model, layers), values.float(), "nPMI", {}, said)


def npmi(both: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Normalised pointwise mutual information of two events, from p(both), p(one), p(other); -1 where both never is
    (Bouma 2009), 1 where both always is."""
    values = (both / (one * other)).log2() / -both.log2()
    return torch.where(both == 0, -1.0, torch.where(both == 1, 1.0, values))


def reweight_experts(model, experts: Experts, factor: float) -> list[Intervention]:
    """RICE's steering (arXiv 2505.14681): multiplies the weight of experts wherever they are chosen.

    In Gemma 4 only a weight relative to the token's other experts counts: at a token whose experts are all multiplied,
    nothing changes.

    Raises:
        ValueError: for a dense model, a layer or expert out of range.
    """
    return [
        interventions.scale(("moe.router.hook_weights", layer), factor, experts=expert)
        for layer, expert in _checked(model, experts)
    ]


def _checked(model, experts: Experts) -> list[tuple[int, int]]:
    layers = routed_layers(model, [layer for layer, _ in experts])
    return list(zip(layers, checked_experts(model, [int(expert) for _, expert in experts]), strict=True))
