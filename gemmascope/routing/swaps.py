"""Is it the routing or the content? Routing put in from another run, held fast, or chosen anew.

swap_routing      the choice of experts, their weights, the router's input or the experts' input of another prompt
frozen_routing    how much of an intervention's effect passes through later routing
routing_regret    whether other experts would have served a token better (arXiv 2605.07260)
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from math import comb

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gemmascope import interventions
from gemmascope.experiments.pairs import paired
from gemmascope.experiments.sweep import ROWS, Baseline, resumed, run_cells, unit_of
from gemmascope.progress import interruptible
from gemmascope.results import Result, about
from gemmascope.routing.effects import Given, Texts, kept, routed_layers

PARTS = {
    "choice": "moe.router.hook_indices",
    "weights": "moe.router.hook_weights",
    "router input": "moe.router.hook_in",
    "expert input": "moe_ln_pre.hook_normalized",
}
"""What `swap_routing` takes from the other run."""


def swap_routing(
    model,
    clean,
    corrupted,
    metric: Callable[[Tensor], Tensor],
    parts: Sequence[str] = tuple(PARTS),
    layers: Sequence[int] | None = None,
    *,
    by_layer: bool = True,
    rows: int = ROWS,
    resume: Result | None = None,
    progress: bool = True,
) -> Result:
    """Puts a part of the clean run's routing into the corrupted run, and measures.

    Args:
        clean, corrupted: text, texts or token ids [prompt, pos], of the same number of tokens.
        metric: logits [prompt, pos, d_vocab] -> a figure a prompt.
        parts: "choice": the clean run's experts, weighted by the corrupted run's own probabilities;
            "weights": the clean run's weights, rank by rank, on the corrupted run's experts (only how they compare
            within a token counts, a norm follows the sum);
            "router input": the router reads the clean run, so choice and weights together are the clean run's;
            "expert input": the experts read the clean run, and the routing is the corrupted run's: content alone.
        by_layer: in one layer at a time; else in all the layers at once.
        resume: the result of an interrupted call with these arguments.

    Returns:
        a Result by part and layer, or by part, with the baselines "clean" and "corrupted".

    Raises:
        ValueError: for a dense model, an unknown part, or prompts of different lengths.
    """
    layers = routed_layers(model, layers)
    unknown = next((part for part in parts if part not in PARTS), None)
    if unknown is not None:
        raise ValueError(f"parts names {unknown!r}; there are {', '.join(PARTS)}.")
    pair = paired(model, clean, corrupted)
    names = [f"blocks.{layer}.{PARTS[part]}" for part, layer in product(parts, layers)]
    runs = [Baseline(model, model._begin(tokens, pair.mask), metric, names) for tokens in (pair.clean, pair.corrupted)]
    groups = [[layer] for layer in layers] if by_layer else [layers]
    cells, made = [], []
    for part, group in product(parts, groups):
        cells.append([part, *(group if by_layer else [])])
        sites = [f"blocks.{layer}.{PARTS[part]}" for layer in group]
        made.append([interventions.patch(site, runs[0].stored) for site in sites])
    table = pandas.DataFrame(cells, columns=["part", "layer"] if by_layer else ["part"])
    values = run_cells(runs[1], made, rows=rows, done=resumed(resume, table), progress=progress)
    figures = {"clean": runs[0].figures, "corrupted": runs[1].figures}
    return Result("routing swap", table, values, unit_of(metric), figures, about(model, layers=layers))


def frozen_routing(
    model,
    prompts,
    metric: Callable[[Tensor], Tensor],
    changes: Mapping[str, object],
    layers: Sequence[int] | None = None,
    *,
    rows: int = ROWS,
    resume: Result | None = None,
    progress: bool = True,
) -> Result:
    """Content changed with routing free to follow, and with routing held at what it was.

    What is lost when routing is held is the part of the effect that passes through the choice and weights of experts.
    A change of the routing itself, in a layer that is held, is undone.

    Args:
        changes: interventions (gs.patch, gs.zero, ... or lists of them) by name.
        layers: where routing is held; all by default.
        resume: the result of an interrupted call with these arguments.

    Returns:
        a Result by change and routing ("free", "held"), with the baseline "clean": nothing changed.

    Raises:
        ValueError: for a dense model, or as the interventions do.
    """
    layers = routed_layers(model, layers)
    names = [f"blocks.{layer}.{PARTS[part]}" for layer in layers for part in ("choice", "weights")]
    base = Baseline(model, prompts, metric, names)
    held = [interventions.patch(name, base.stored) for name in names]
    cells = list(product(changes, ("free", "held")))
    made = [[changes[name], held if routing == "held" else []] for name, routing in cells]
    table = pandas.DataFrame(cells, columns=["change", "routing"])
    values = run_cells(base, made, rows=rows, done=resumed(resume, table), progress=progress)
    said = about(model, layers=layers)
    return Result("frozen routing", table, values, unit_of(metric), {"clean": base.figures}, said)


@torch.no_grad()
def routing_regret(
    model,
    texts: Texts,
    layers: Sequence[int] | None = None,
    *,
    n_sets: int = 16,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool = True,
) -> Result:
    """Counterfactual routing (arXiv 2605.07260): would other experts have predicted the next token better?

    At one token and layer at a time, other sets of k experts take the place of those chosen, weighted by the router's
    own probabilities, and each is scored by p(next token). Regret is the best score, the chosen set's among them, minus
    the chosen set's. It grows with the number of sets that are tried. Ctrl-C keeps the tokens that are done.

    Args:
        n_sets: sets to try at each token: all that there are, if no more than this; else drawn at random.
        batch_size: texts of a batch. Every token is a pass of its own, of batch_size x n_sets rows.

    Returns:
        a Result by layer, a sample being a predicted token; the baseline "chosen" is p under the chosen set.

    Raises:
        ValueError: for a dense model, a layer out of range, n_sets below 1.
    """
    layers = routed_layers(model, layers)
    if n_sets < 1:
        raise ValueError(f"n_sets is {n_sets}; it is 1 or more.")
    given = Given.of(model, texts)
    n = len(given.rows.pos)
    values, chosen = torch.full((len(layers), n), float("nan")), torch.zeros(n)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=len(layers) * n, unit="token", delay=1, leave=False, disable=not progress)
    with bar, interruptible(lambda: f"{int(values.isfinite().all(0).sum())} of {n} tokens are done, and kept."):
        for _, batch in given.batches(batch_size):
            base = kept(model, batch)
            for pos in batch.pos.unique().tolist():
                here = batch.pos == pos
                prompt, row = batch.prompt[here], batch.row[here]
                target = base.run.tokens[prompt, pos + 1]
                before = base.stored["hook_logits"][prompt, pos].float().softmax(-1).gather(-1, target[:, None])[:, 0]
                chosen[row] = before.cpu()
                for number, layer in enumerate(layers):
                    sets = _other_sets(model, n_sets, base.n_prompts, generator)
                    regret = (_best(base, layer, pos, sets, prompt, target) - before).clamp(min=0)
                    values[number, row] = regret.cpu()
                    bar.update(len(row))
    done = values.isfinite().all(0)
    if n and not done.any():
        raise KeyboardInterrupt("No token was done: there is nothing to keep.")
    values, chosen = values[:, done], chosen[done]
    said = about(model, n_sets=n_sets, seed=seed, texts=given.prompts.n)
    cells = pandas.DataFrame({"layer": layers})
    return Result("routing regret", cells, values, "p(next token)", {"chosen": chosen}, said)


def _best(
    base: Baseline,
    layer: int,
    pos: int,
    sets: Int[Tensor, "set prompt 1 slot"],
    prompt: Int[Tensor, " token"],
    target: Int[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """The best p(target) at a position of some prompts under any of these sets of experts."""
    site = f"blocks.{layer}.{PARTS['choice']}"
    cells = [[interventions.replace(site, one.to(base.run.tokens.device), positions=pos)] for one in sets]
    first = base.first(cells[0])[1]
    p = base.logits(cells, layer, first)[:, prompt, pos - first].float().softmax(-1)
    return p.gather(-1, target.expand(len(cells), -1)[..., None])[..., 0].amax(0)


def _other_sets(model, n_sets: int, n_prompts: int, generator: torch.Generator) -> Int[Tensor, "set prompt 1 slot"]:
    """Sets of experts for each prompt: all, or some at random."""
    n_experts, k = model.cfg.n_experts, model.cfg.experts_per_token
    if comb(n_experts, k) <= n_sets:
        sets = torch.tensor(list(combinations(range(n_experts), k)))
        return sets[:, None, None].expand(-1, n_prompts, 1, -1)
    return torch.rand(n_sets, n_prompts, 1, n_experts, generator=generator).topk(k).indices
