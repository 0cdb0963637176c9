"""Does an expert matter? What it does to the model to silence, replace, reroute or force it, beside controls.

Load does not tell: published audits find that no routing statistic predicts causal effect (arXiv 2606.10703). In
Gemma 4 a norm follows the experts' sum, so that

- dropping an expert, with or without renormalising the weights of the others, is one and the same intervention
  ("silence"), and only letting the next best expert in ("reroute") is another;
- multiplying all weights of a token by a number changes nothing.
"""

import random
from collections.abc import Callable, Sequence
from itertools import chain, product

import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from gemmascope import interventions
from gemmascope.experiments.gradients import by_activations, figures_of, gradients
from gemmascope.experiments.sweep import ROWS, unit_of
from gemmascope.interventions import Intervention
from gemmascope.readout.activations import Batch
from gemmascope.results import Result, about
from gemmascope.routing.effects import Given, Labels, RoutingEffect, Texts, checked_experts, routed_layers, run_texts

MODES = ("silence", "reroute", "mean", "replace", "force")
INDICES, WEIGHTS, LOGITS = (f"moe.router.hook_{part}" for part in ("indices", "weights", "logits"))
OTHERS = 4
"""How many other experts of its layer the random-expert control of an expert is the mean of."""


def expert_ablation(
    model,
    texts: Texts,
    mode: str = "silence",
    layers: Sequence[int] | None = None,
    experts: Sequence[int] | None = None,
    *,
    labels: Labels | None = None,
    metric: Callable[[Tensor], Tensor] | None = None,
    controls: bool = True,
    seed: int = 0,
    batch_size: int = ROWS,
    progress: bool = True,
) -> RoutingEffect:
    """Changes what one expert of one layer does at every token, and measures what becomes of the prediction.

    Ctrl-C keeps the texts that are done, and says how many; with none done, it is raised as usual. So it is for
    `fewer_experts` and `branch_ablation`.

    Args:
        mode: "silence": it is weighted by 0 where it was chosen (to renormalise the others changes nothing);
            "reroute": it cannot be chosen and the next best steps in;
            "mean": its weighted output is its mean over the tokens of the texts that chose it;
            "replace": a wrong expert, one of those not chosen, drawn at random at each token, gets its weight;
            "force": it is chosen at every token; where it was not, it takes the place of the least likely expert, with
            the weight that the router's own probability gives it, which may be next to nothing.
        layers, experts: those to change; all by default.
        labels: a label for each text or each token, for `by_label`; a token's label goes with what it predicts.
        metric: also measured: logits [text, pos, d_vocab] -> a figure a text. It sees all texts at once, left-padded.
        controls: also give, for each expert, "random expert": the mean effect of the same change of other experts
            of its layer, at most 4 drawn at random; and, but for "force", "matched load": the same change where as many
            random tokens lose one of their other experts, drawn at random, as lose this one.
        batch_size: texts of a batch.

    Returns:
        a RoutingEffect by layer and expert, in nats a token.

    Raises:
        ValueError: for a dense model, an unknown mode, a layer or expert out of range, labels of the wrong length.
    """
    layers, experts = routed_layers(model, layers), checked_experts(model, experts)
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it is one of {', '.join(MODES)}.")
    if mode == "replace":
        _check_spare(model)
    n_experts, asked = model.cfg.n_experts, list(product(layers, experts))
    others = {cell: others_of(cell, n_experts, seed) for cell in asked} if controls else {}
    singles = list(dict.fromkeys([*asked, *chain.from_iterable(others.values())]))
    matched = asked if controls and mode != "force" else []
    given = Given.of(model, texts, labels)
    means = _mean_outputs(model, given, layers, batch_size) if mode == "mean" else {}
    generator = torch.Generator().manual_seed(seed)
    uses: list[Int[Tensor, "layer expert"]] = []  # of each batch

    def plan(stored: dict[str, Tensor], real: Bool[Tensor, "text pos"]) -> list[list[Intervention]]:
        chosen = {layer: stored[f"blocks.{layer}.{INDICES}"] for layer in layers}
        weights = {layer: stored[f"blocks.{layer}.{WEIGHTS}"] for layer in layers}

        def change(layer: int, hit: Tensor) -> list[Intervention]:
            return _changed(mode, layer, hit, chosen[layer], weights[layer], n_experts, means, generator)

        uses.append(torch.stack([chosen[at][real].flatten().bincount(minlength=n_experts) for at in layers]).cpu())
        made = []
        for layer, expert in singles:
            if mode == "force":
                made.append(interventions.force_expert(layer, expert))
                continue
            made.append(change(layer, chosen[layer] == expert))
        for layer, expert in matched:
            hit = _matched(chosen[layer], expert, real, generator)
            made.append(change(layer, hit))
        return made

    also = [f"blocks.{layer}.{point}" for layer in layers for point in (INDICES, WEIGHTS)]
    name, n_cells = f"expert ablation ({mode})", len(singles) + len(matched)
    found = run_texts(model, given, name, plan, n_cells, also, metric, batch_size, progress)
    n, loss, given = len(asked), found.loss, found.given
    place = {cell: number for number, cell in enumerate(singles)}
    figures = {}
    if controls:
        drawn = [[place[other] for other in others[cell]] for cell in asked]
        figures["random expert"] = torch.stack([loss[rows].mean(0) for rows in drawn])
    if matched:
        figures["matched load"] = loss[len(singles) :]
    cells = pandas.DataFrame(asked, columns=["layer", "expert"])
    used = torch.stack(uses[: found.n_batches]).sum(0)  # a batch that was not done is left out
    load = torch.stack([used[layers.index(layer), expert] for layer, expert in asked]) / given.n_tokens
    what = about(model, mode=mode, seed=seed, texts=given.prompts.n)
    return given.effect(name, cells, found.first(n), figures, what, load, metric)


def fewer_experts(
    model,
    texts: Texts,
    ks: Sequence[int] = (1,),
    layers: Sequence[int] | None = None,
    *,
    by_layer: bool = True,
    labels: Labels | None = None,
    metric: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = ROWS,
    progress: bool = True,
) -> RoutingEffect:
    """Keeps the k likeliest of each token's experts: "top-1 only" for k = 1 (MoE Lens, arXiv 2603.05806).

    The others are weighted by 0. More experts than the model was trained with are another thing (experts join that were
    never summed), and are not taken.

    Args:
        by_layer: in one layer at a time; else in all the layers at once.
        labels, metric, batch_size: as in `expert_ablation`.

    Returns:
        a RoutingEffect by layer and k, or by k.

    Raises:
        ValueError: for a dense model, a k that is not from 1 to the model's own, or as `expert_ablation` does.
    """
    layers, own = routed_layers(model, layers), model.cfg.experts_per_token
    wrong = next((k for k in ks if not 1 <= k <= own), None)
    if wrong is not None:
        raise ValueError(f"k is {wrong}; {model.cfg.model_name} chooses {own} experts a token, so k is 1 to {own}.")
    groups = [[layer] for layer in layers] if by_layer else [layers]
    rows = [(group, k) for group in groups for k in ks]
    made = [
        [interventions.zero((WEIGHTS, layer), slots=range(k, own)) for layer in group if k < own] for group, k in rows
    ]
    given = Given.of(model, texts, labels)
    found = run_texts(model, given, "fewer experts", lambda *_: made, len(made), [], metric, batch_size, progress)
    axes = ["layer", "k"] if by_layer else ["k"]
    cells = pandas.DataFrame([([group[0]] if by_layer else []) + [k] for group, k in rows], columns=axes)
    what = about(model, layers=layers, texts=found.given.prompts.n)
    return found.given.effect("fewer experts", cells, found, {}, what, None, metric)


def branch_ablation(
    model,
    texts: Texts,
    layers: Sequence[int] | None = None,
    *,
    by_layer: bool = True,
    labels: Labels | None = None,
    metric: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = ROWS,
    progress: bool = True,
) -> RoutingEffect:
    """No experts against wrong experts: does it matter that a layer has experts, or that they are the right ones?

    Args:
        by_layer: in one layer at a time; else in all the layers at once.
        labels, metric, batch_size: as in `expert_ablation`.

    Returns:
        a RoutingEffect by layer and experts, or by experts: "none", the branch adds nothing; "wrong", k experts that
        were not chosen, drawn at random at each token, take the weights of those that were, rank by rank.

    Raises:
        ValueError: for a dense model, one without k experts to spare, or as `expert_ablation` does.
    """
    layers, n_experts = routed_layers(model, layers), model.cfg.n_experts
    _check_spare(model)
    groups = [[layer] for layer in layers] if by_layer else [layers]
    given, generator = Given.of(model, texts, labels), torch.Generator().manual_seed(seed)

    def plan(stored: dict[str, Tensor], real: Tensor) -> list[list[Intervention]]:
        made = []
        for group in groups:
            chosen = {layer: stored[f"blocks.{layer}.{INDICES}"] for layer in group}
            wrong = {layer: _wrong(chosen[layer], n_experts, generator) for layer in group}
            made.append([interventions.zero(("hook_moe_out", layer)) for layer in group])
            made.append([interventions.patch((INDICES, layer), wrong[layer]) for layer in group])
            made[-1] += [interventions.patch((WEIGHTS, layer), stored[f"blocks.{layer}.{WEIGHTS}"]) for layer in group]
        return made

    also = [f"blocks.{layer}.{point}" for layer in layers for point in (INDICES, WEIGHTS)]
    found = run_texts(model, given, "branch ablation", plan, 2 * len(groups), also, metric, batch_size, progress)
    cells = [([group[0]] if by_layer else []) + [experts] for group in groups for experts in ("none", "wrong")]
    table = pandas.DataFrame(cells, columns=["layer", "experts"] if by_layer else ["experts"])
    what = about(model, layers=layers, seed=seed, texts=found.given.prompts.n)
    return found.given.effect("branch ablation", table, found, {}, what, None, metric)


# Which slots lose their expert, and what that means


def _changed(
    mode: str,
    layer: int,
    hit: Bool[Tensor, "text pos slot"],
    chosen: Int[Tensor, "text pos slot"],
    weights: Float[Tensor, "text pos slot"],
    n_experts: int,
    means: dict[int, Float[Tensor, "expert d_model"]],
    generator: torch.Generator,
) -> list[Intervention]:
    """The change of the slots that are hit; none where none is."""
    if not hit.any():
        return []
    if mode == "silence":
        return [Intervention((WEIGHTS, layer), "scale", {}, ~hit, "silence")]
    if mode == "reroute":
        banned = torch.zeros(*hit.shape[:2], n_experts, device=hit.device)
        banned.scatter_add_(2, chosen, torch.zeros_like(hit, dtype=torch.float).masked_fill(hit, float("-inf")))
        return [interventions.add((LOGITS, layer), banned)]
    if mode == "replace":
        new = torch.where(hit, _wrong(chosen, n_experts, generator), chosen)
        return [interventions.patch((INDICES, layer), new), interventions.patch((WEIGHTS, layer), weights)]
    out = ("moe.hook_expert_out", layer)
    mean = means[layer][chosen] * hit[..., None]
    return [Intervention(out, "scale", {}, ~hit[..., None], "silence"), interventions.add(out, mean)]


def _check_spare(model) -> None:
    n, k = model.cfg.n_experts, model.cfg.experts_per_token
    if n < 2 * k:
        raise ValueError(f"{model.cfg.model_name} chooses {k} of {n} experts a token: {k} wrong ones are not left.")


def _wrong(
    chosen: Int[Tensor, "text pos slot"], n_experts: int, generator: torch.Generator
) -> Int[Tensor, "text pos slot"]:
    """Experts that were not chosen, at random."""
    draw = torch.rand(*chosen.shape[:2], n_experts, generator=generator).to(chosen.device)
    return draw.scatter(2, chosen, -1.0).topk(chosen.shape[-1]).indices


def others_of(cell: tuple[int, int], n_experts: int, seed: int) -> list[tuple[int, int]]:
    """The experts of the random-expert control of one."""
    layer, expert = cell
    rest = [(layer, other) for other in range(n_experts) if other != expert]
    return random.Random(f"{seed}/{layer}/{expert}").sample(rest, min(OTHERS, len(rest)))


def _matched(
    chosen: Int[Tensor, "text pos slot"], expert: int, real: Bool[Tensor, "text pos"], generator: torch.Generator
) -> Bool[Tensor, "text pos slot"]:
    """As many random tokens as chose an expert, and at each a random slot that is not its own; fewer where there are no
    more that have such a slot, at one expert a token."""
    own, real = (chosen == expert).cpu(), real.cpu()
    free, n = real & ~own.all(-1), int((own.any(-1) & real).sum())
    order = torch.rand(real.shape, generator=generator).masked_fill(~free, 2.0)
    tokens = torch.zeros(real.numel(), dtype=torch.bool)
    tokens[order.flatten().argsort()[: min(n, int(free.sum()))]] = True
    slot = torch.rand(own.shape, generator=generator).masked_fill(own, -1.0).argmax(-1)
    hit = F.one_hot(slot, own.shape[-1]).bool() & tokens.view(real.shape)[..., None]
    return hit.to(chosen.device)


@torch.no_grad()
def _mean_outputs(
    model, given: Given, layers: list[int], batch_size: int
) -> dict[int, Float[Tensor, "expert d_model"]]:
    """Each expert's mean weighted output, over the tokens that chose it."""
    cfg, at = model.cfg, lambda point, layer: f"blocks.{layer}.moe.{point}"
    totals = {layer: torch.zeros(cfg.n_experts, cfg.d_model, device=cfg.device) for layer in layers}
    counts = {layer: torch.zeros(cfg.n_experts, device=cfg.device) for layer in layers}
    names = [at(point, layer) for layer in layers for point in ("hook_expert_out", "router.hook_indices")]
    for _, batch in given.batches(batch_size):
        _, cache = model.run_with_cache(batch.tokens, attention_mask=batch.mask, names_filter=names, return_type=None)
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.mask is None else batch.mask
        for layer in layers:
            chosen = cache[at("router.hook_indices", layer)][real].flatten()
            totals[layer].index_add_(0, chosen, cache[at("hook_expert_out", layer)][real].flatten(0, 1).float())
            counts[layer].index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float))
    return {layer: totals[layer] / counts[layer].clamp(min=1)[:, None] for layer in layers}


# All silencings at once


def silencing_estimate(
    model,
    texts: Texts,
    metric: Callable[[Tensor], Tensor] | None = None,
    layers: Sequence[int] | None = None,
    *,
    batch_size: int = ROWS,
) -> Result:
    """Estimates what silencing each expert would do, by one forward and one backward pass for all of them.

    The effect of a slot's output on what the feed-forward adds to the stream is computed exactly, through both norms
    that follow (a norm makes an expert's gain curved: at k = 1 its gradient is 0); what follows is taken to be linear,
    as in attribution patching. Divergences cannot be estimated so: their gradient at the full model is 0.

    Args:
        metric: logits [text, pos, d_vocab] -> a figure a text, with a gradient; it sees all texts at once. By default
            the loss, the mean over each text's predictions.

    Returns:
        a Result by layer and expert: the estimated change, by text. `agreement` compares it with `expert_ablation`.

    Raises:
        ValueError: for a dense model, a layer out of range, a metric without gradient.
    """
    layers, n_experts = routed_layers(model, layers), model.cfg.n_experts
    given = Given.of(model, texts)
    size = batch_size if metric is None else given.prompts.n
    values = torch.zeros(len(layers) * n_experts, given.prompts.n)
    for numbers, batch in given.batches(size):
        run, kept = model._begin(batch.tokens, batch.mask), {}
        outs = [f"blocks.{layer}.hook_mlp_out" for layer in layers]
        names = outs + [f"blocks.{layer}.{point}" for layer in layers for point in _BRANCHES]
        hooks = [(name, _keeping(kept)) for name in names]
        hooks.append(("hook_embed", lambda x, hook: x.detach().requires_grad_()))
        with by_activations(model), model.hooks(fwd_hooks=hooks):
            figures = figures_of(metric or _loss_of(batch, run.tokens), model(run))
            slopes = gradients(figures, [kept[name] for name in outs])
        with torch.no_grad():
            parts = [_silenced(model, layer, kept, slope) for layer, slope in zip(layers, slopes, strict=True)]
        values[:, numbers] = torch.cat(parts, dim=1).T.float().cpu()
    unit = f"change of {'loss (nats/token)' if metric is None else unit_of(metric)}"
    cells = pandas.DataFrame(list(product(layers, range(n_experts))), columns=["layer", "expert"])
    return Result("silencing estimate", cells, values, unit, {}, about(model, texts=given.prompts.n))


_BRANCHES = ("hook_dense_out", "moe.hook_expert_out", INDICES)


def _keeping(kept: dict[str, Tensor]) -> Callable:
    return lambda x, hook: kept.__setitem__(hook.name, x)


def _loss_of(batch: Batch, tokens: Int[Tensor, "text pos"]) -> Callable[[Tensor], Float[Tensor, " text"]]:
    """The metric that is the mean loss over each text's predictions."""
    targets, text = tokens[batch.prompt, batch.pos + 1], batch.prompt.to(tokens.device)

    def loss(logits: Float[Tensor, "text pos d_vocab"]) -> Float[Tensor, " text"]:
        nats = F.cross_entropy(logits[batch.prompt, batch.pos].float(), targets, reduction="none")
        return nats.new_zeros(len(logits)).index_add_(0, text, nats) / text.bincount(minlength=len(logits))

    return loss


def _silenced(model, layer: int, kept: dict[str, Tensor], slope: Tensor) -> Float[Tensor, "text expert"]:
    """The gradient at the feed-forward's output times its exact change, when one slot is silent, summed by expert."""
    block = model.blocks[layer]
    dense, slots, chosen = (kept[f"blocks.{layer}.{point}"].detach() for point in _BRANCHES)
    branch, effects = slots.sum(-2), []
    full = block.ln2_post(dense + block.moe_ln_post(branch))
    for slot in slots.unbind(-2):
        without = block.ln2_post(dense + block.moe_ln_post(branch - slot))
        effects.append(((without - full) * slope).sum(-1))
    effect = torch.stack(effects, -1).flatten(1)
    return effect.new_zeros(len(effect), model.cfg.n_experts).scatter_add_(1, chosen.flatten(1), effect)


def agreement(estimate: Result, exact: Result) -> dict[str, float]:
    """How well an estimate orders effects, and gets the sign of the largest.

    Over all pairs of a cell and a sample where the exact effect is not 0 (it is 0 where the expert was never chosen).

    Returns:
        "spearman": their rank correlation; "sign": the share of the tenth with the largest exact effects where both
        have one sign; "pairs": how many there are.

    Raises:
        ValueError: for results of different cells or samples, or no effect at all.
    """
    if not estimate.cells.equals(exact.cells) or estimate.values.shape != exact.values.shape:
        sizes = [f"{len(one.cells)} cells of {one.values.shape[1]} samples" for one in (estimate, exact)]
        raise ValueError(f"The estimate has {sizes[0]} and the exact effect {sizes[1]}: take both of the same.")
    there = exact.values != 0
    ours, theirs = estimate.values[there], exact.values[there]
    if not len(theirs):
        raise ValueError("No exact effect differs from 0: there is nothing to agree on.")
    top = theirs.abs().argsort(descending=True)[: -(-len(theirs) // 10)]
    ranks = [pandas.Series(one.tolist()).rank() for one in (ours, theirs)]
    same = (ours[top].sign() == theirs[top].sign()).float().mean()
    return {"spearman": float(ranks[0].corr(ranks[1])), "sign": float(same), "pairs": len(theirs)}
