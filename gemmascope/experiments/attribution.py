"""Attribution patching: what patching each node would do, by one forward and one backward pass for all of them.

AtP (Nanda 2023, https://www.neelnanda.io/mechanistic-interpretability/attribution-patching) takes the metric to be
linear in the node: effect = (patched value - value) . gradient of the metric. AtP* (Kramar et al. 2024,
arXiv:2403.00745) mends its two blind spots: saturated attention (`qk_fix`) and effects that cancel (`grad_drop`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from gemmascope import ops
from gemmascope.experiments.gradients import by_activations, figures_of, gradients, name_of
from gemmascope.experiments.pairs import paired
from gemmascope.results import Result, about

NODES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_mlp": "hook_resid_mlp",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "ple_out": "hook_ple_out",
    "head": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "neuron": "mlp.hook_post",
    "expert": "moe.hook_out",
}
"""What can be attributed to, and the site whose gradient that takes. An expert is its part of the branch's sum."""
_AXIS = {"head": "head", "q": "head", "k": "kv_head", "v": "kv_head", "neuron": "neuron", "expert": "expert"}
_SLOTS = ("moe.hook_expert_post", "moe.router.hook_indices", "moe.router.hook_weights")
_KEPT = {"q": ("attn.hook_rot_q",), "k": ("attn.hook_rot_k",), "v": ("attn.hook_v_normed",)}


def attribution_patching(
    model,
    clean,
    corrupted,
    metric: Callable[[Tensor], Tensor],
    by: str | Sequence[str] = "head",
    *,
    by_position: bool | None = None,
    direction: str = "denoising",
    qk_fix: bool = False,
    grad_drop: bool = False,
    attention_mask: Tensor | None = None,
) -> Result | dict[str, Result]:
    """Estimates what patching every node of a kind would do to a metric.

    Costs two forward passes and one backward pass over all prompts, whatever the number of nodes and kinds.

    Args:
        clean, corrupted: prompts and their corrupted versions, of one length: texts, or token ids [prompt, pos].
        metric: a differentiable function of logits [prompt, pos, d_vocab] that gives a figure a prompt.
        by: a kind of node, or several, from the same passes: "resid_pre", "resid_mid", "resid_mlp", "resid_post",
            "attn_out", "mlp_out", "ple_out", "head" (at hook_z), "q", "k", "v", "neuron" (of the dense MLP), "expert"
            (its weighted output; 0 where neither run chose it).
        by_position: a cell for each position, or the sum over positions; by default positions for streams only.
        direction: "denoising" patches clean values into the corrupted run, where gradients are taken; "noising" the
            other way round.
        qk_fix: for "q" and "k", attention is computed anew with the patched queries or keys, and what follows it is
            linear (AtP*). The head's other input stays as it was.
        grad_drop: L backward passes, each without the gradient through what one layer adds to the stream; the figure is
            the sum of the absolute effects over L - 1 (AtP*; a node gets none from its own layer). It has no sign.

    Returns:
        a Result whose figures are the estimated change of the metric, by node and prompt; for several kinds, a
        dictionary of them.

    Raises:
        ValueError: for an unknown kind, prompts of different lengths, a metric without gradient or of wrong shape, NaN.
    """
    kinds = [by] if isinstance(by, str) else list(by)
    _check(model, kinds, direction, qk_fix)
    pair = paired(model, clean, corrupted, attention_mask)
    here, there = (pair.corrupted, pair.clean) if direction == "denoising" else (pair.clean, pair.corrupted)
    sites = [name for kind in kinds for name in _sites(model, kind, NODES[kind])]
    wanted = sites + [name for kind in kinds for name in _also(model, kind, qk_fix)]
    with torch.no_grad():
        _, patch = model.run_with_cache(
            there, attention_mask=pair.mask, names_filter=wanted, return_type=None, return_cache_object=False
        )

    kept, dropped = {}, _Dropped()
    z_sites = _sites(model, "head", NODES["head"]) if qk_fix else []
    hooks = [(name, lambda x, hook: kept.__setitem__(hook.name, x)) for name in dict.fromkeys(wanted + z_sites)]
    hooks.append(("hook_embed", lambda x, hook: x.detach().requires_grad_()))
    if grad_drop:
        hooks += [(name, dropped.gate) for out in ("attn_out", "mlp_out", "ple_out") for name in _sites(model, out)]
    run = model._begin(here, pair.mask)
    run.last_only = getattr(metric, "last_only", False)
    with by_activations(model), model.hooks(fwd_hooks=hooks):
        figures = figures_of(metric, model(run))
        targets = list(dict.fromkeys(sites + z_sites))
        found, n_layers = {}, model.cfg.n_layers
        for layer in range(n_layers) if grad_drop else [None]:
            dropped.layer = layer
            again = grad_drop and layer < n_layers - 1
            grads = dict(zip(targets, gradients(figures, [kept[name] for name in targets], keep=again), strict=True))
            both = _Pass(model, kept, patch, grads, run.masks, qk_fix)
            with torch.no_grad():
                for kind in kinds:
                    effect = _effects(both, kind, by_position)
                    effect = effect.abs() / max(1, n_layers - 1) if grad_drop else effect
                    found[kind] = found[kind] + effect if kind in found else effect
    settings = dict(direction=direction, qk_fix=qk_fix, grad_drop=grad_drop, prompts=len(pair.clean))
    results = {}
    for kind, values in found.items():
        if values.isnan().any():
            raise ValueError(
                f"Effects by {kind!r} are NaN: the run that is patched in has activations without meaning."
            )
        results[kind] = Result(
            "attribution patching" + (" (AtP*)" if qk_fix or grad_drop else ""),
            _cells(model, kind, by_position, pair.clean.shape[1]),
            values.T.float().cpu(),
            f"change of {name_of(metric)}",
            about=about(model, by=kind, **settings),
        )
    return results[by] if isinstance(by, str) else results


def _check(model, kinds: list[str], direction: str, qk_fix: bool) -> None:
    for kind in kinds:
        if kind not in NODES:
            near = ", ".join(get_close_matches(kind, NODES, n=3, cutoff=0.0))
            raise ValueError(f"There is no kind of node {kind!r}; the nearest are {near}.")
        if not _sites(model, kind):
            raise ValueError(f"{model.cfg.model_name} has no {NODES[kind]}: it cannot be attributed to by {kind!r}.")
    if direction not in ("denoising", "noising"):
        raise ValueError(f"direction is {direction!r}; it is 'denoising' (clean into corrupted) or 'noising'.")
    if qk_fix and not {"q", "k"} & set(kinds):
        raise ValueError(f"qk_fix corrects 'q' and 'k', and by is {', '.join(kinds)}: add them, or leave it out.")


def _sites(model, kind: str, point: str | None = None) -> list[str]:
    """The hook points of a kind of node, or one beside it, in the layers that have it."""
    names = [f"blocks.{layer}.{point or NODES[kind]}" for layer in range(model.cfg.n_layers)]
    return [name for name in names if name in model.sites]


def _also(model, kind: str, qk_fix: bool) -> list[str]:
    """What else a kind of node needs of both runs."""
    points = _SLOTS if kind == "expert" else ()
    if qk_fix and kind in ("q", "k"):
        points = tuple(point for part in _KEPT.values() for point in part)
    return [name for point in points for name in _sites(model, kind, point)]


def _layers(model, kind: str) -> list[int]:
    return [int(name.split(".")[1]) for name in _sites(model, kind)]


def _with_positions(kind: str, by_position: bool | None) -> bool:
    return by_position if by_position is not None else kind not in _AXIS


def _cells(model, kind: str, by_position: bool | None, n_pos: int) -> pandas.DataFrame:
    shape = {"head": model.cfg.n_heads, "q": model.cfg.n_heads, "expert": model.cfg.n_experts}
    rows = []
    for layer in _layers(model, kind):
        geometry = model.layer(layer)
        n = shape.get(kind) or {"k": geometry.n_kv_heads, "v": geometry.n_kv_heads, "neuron": geometry.d_mlp}.get(kind)
        for pos in range(n_pos) if _with_positions(kind, by_position) else [None]:
            rows += [(layer, pos, part) for part in (range(n) if n else [None])]
    return pandas.DataFrame(rows, columns=["layer", "pos", _AXIS.get(kind, "none")]).dropna(axis=1)


class _Dropped:
    """The layer whose contributions to the stream pass no gradient back, for now."""

    layer: int | None = None

    def gate(self, x: Tensor, hook) -> None:
        layer = int(hook.name.split(".")[1])
        x.register_hook(lambda gradient: gradient * 0 if layer == self.layer else None)


@dataclass
class _Pass:
    """Both runs, and the gradients at the one that is patched."""

    model: object
    kept: dict[str, Tensor]
    patch: Mapping[str, Tensor]
    grads: dict[str, Tensor]
    masks: dict[str, ops.Mask]
    qk_fix: bool

    def change(self, name: str) -> Tensor:
        return self.patch[name] - self.kept[name]


def _effects(of: _Pass, kind: str, by_position: bool | None) -> Float[Tensor, "prompt cell"]:
    parts = []
    for layer, name in zip(_layers(of.model, kind), _sites(of.model, kind), strict=True):
        positions = _with_positions(kind, by_position)
        if of.qk_fix and kind in ("q", "k"):
            effect = _query_effect(of, layer) if kind == "q" else _key_effect(of, layer, positions)
        elif kind == "expert":
            effect = _slot_products(of.patch, of, layer) - _slot_products(of.kept, of, layer)
        else:
            effect = of.change(name) * of.grads[name]
            effect = effect if kind == "neuron" else effect.sum(-1)  # else [prompt, pos] or [prompt, pos, head]
        parts.append((effect if positions else effect.sum(1, keepdim=True)).flatten(1))
    return torch.cat(parts, dim=1)


def _slot_products(run: Mapping[str, Tensor], of: _Pass, layer: int) -> Float[Tensor, "prompt pos expert"]:
    """Each expert's weighted output in a run, times the gradient at the sum that it is part of."""
    post, indices, weights = (run[f"blocks.{layer}.{point}"] for point in _SLOTS)
    slots = of.model.blocks[layer].moe.down(post, (indices, weights))
    products = torch.einsum("bpkd,bpd->bpk", slots, of.grads[f"blocks.{layer}.{NODES['expert']}"])
    return products.new_zeros(*products.shape[:2], of.model.cfg.n_experts).scatter_add(2, indices, products)


# Attention computed anew (AtP*, section 3.1.1)


def _attention(of: _Pass, layer: int) -> tuple[str, Tensor, Tensor]:
    """Where a layer's keys are, its scores, and the gradient at its pattern: [prompt, head, query, key]."""
    source = of.model.layer(layer).kv_source
    keys = f"blocks.{layer if source is None else source}.attn."
    mask = of.masks[of.model.layer(layer).kind]
    scores = ops.attention_scores(of.kept[f"blocks.{layer}.attn.hook_rot_q"], of.kept[keys + "hook_rot_k"], mask)
    v = of.kept[keys + "hook_v_normed"]
    v = v.repeat_interleave(of.model.cfg.n_heads // v.shape[2], dim=2)
    gradient = torch.einsum("bqhe,bshe->bhqs", of.grads[f"blocks.{layer}.attn.hook_z"], v)
    return keys + "hook_rot_k", scores, gradient


def _query_effect(of: _Pass, layer: int) -> Float[Tensor, "prompt pos head"]:
    keys, scores, gradient = _attention(of, layer)
    mask = of.masks[of.model.layer(layer).kind]
    patched = ops.attention_scores(of.patch[f"blocks.{layer}.attn.hook_rot_q"], of.kept[keys], mask)
    return ((patched.softmax(-1) - scores.softmax(-1)) * gradient).sum(-1).mT


def _key_effect(of: _Pass, layer: int, positions: bool) -> Float[Tensor, "prompt pos kv_head"]:
    """All keys of a head at once, or each position's alone. Layers that share the keys add up."""
    total = 0
    for reader, shape in enumerate(of.model.cfg.layers):
        if reader != layer and shape.kv_source != layer:
            continue
        keys, scores, gradient = _attention(of, reader)
        q, mask = of.kept[f"blocks.{reader}.attn.hook_rot_q"], of.masks[shape.kind]
        patched = ops.attention_scores(q, of.patch[keys], mask)
        pattern = scores.softmax(-1)
        if positions:
            # One score of a row moves: its key's share goes from p to p', and the others give way in proportion.
            change = (patched - scores).nan_to_num(nan=0.0)  # where both are -inf
            p = pattern.clamp(1e-12, 1 - 1e-6)
            new = torch.sigmoid(torch.logit(p) + change)
            others = ((pattern * gradient).sum(-1, keepdim=True) - p * gradient) / (1 - p)
            effect = ((new - p) * (gradient - others) * scores.isfinite()).sum(-2).mT
        else:
            effect = ((patched.softmax(-1) - pattern) * gradient).sum((-2, -1))[:, None]
        total = total + effect.unflatten(-1, (shape.n_kv_heads, -1)).sum(-1)
    return total
