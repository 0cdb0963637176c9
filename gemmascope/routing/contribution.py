"""What each expert adds: to the stream, exactly; to the logits, in tokens; over a corpus, on average.

With D the gain of a norm over its scale, frozen from the run, block l adds

    ffn_l = D_ff (D_dense dense + D_moe sum_slots w_e E_e(x))

so an expert's exact part is D_ff D_moe w_e E_e(x). To the final stream it counts times the later layer scalars, and
through the final norm (frozen) and the unembedding it is an exact part of every logit before the soft cap;
`gs.direct_logit_attribution(..., by="expert")` gives that of one logit, for all layers.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from gemmascope import ops
from gemmascope.hooks import Reader
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.results import about
from gemmascope.routing.geometry import batches
from gemmascope.routing.trace import RoutingTrace, check_expert, refuse_dense


class Parts(NamedTuple):
    """What one feed-forward added to the stream: `dense + slots.sum(-2)` is `hook_mlp_out`."""

    dense: Float[Tensor, "*batch_and_pos d_model"]
    slots: Float[Tensor, "*batch_and_pos slot d_model"]
    """Each chosen expert's part, the router's most probable first."""
    experts: Int[Tensor, "*batch_and_pos slot"]
    weights: Float[Tensor, "*batch_and_pos slot"]


_READ = ("ln2_post.hook_scale", "moe_ln_post.hook_scale", "hook_dense_out", "moe.hook_expert_out") + (
    "moe.router.hook_indices",
    "moe.router.hook_weights",
)


def _parts(model, layer: int, get) -> Parts:
    """From `get(name)`, the activations of a block."""
    block = model.blocks[layer]
    joint_scale, moe_scale, dense, out, experts, weights = (get(name) for name in _READ)
    joint = ops.wide(block.ln2_post.weight.detach()) / joint_scale
    frozen = joint * ops.wide(block.moe_ln_post.weight.detach()) / moe_scale
    return Parts(ops.wide(dense) * joint, ops.wide(out) * frozen[..., None, :], experts, weights)


@torch.no_grad()
def parts_of(cache, layer: int) -> Parts:
    """The exact parts of one layer's feed-forward, from the cache of a run.

    Raises:
        ValueError: for a dense model, or a layer that is not there.
        KeyError: for a cache that lacks what they are made of.
    """
    refuse_dense(cache.model)
    layer = check_expert(cache.model.cfg.n_layers, cache.model.cfg.n_experts, layer)
    return _parts(cache.model, layer, lambda name: cache[f"blocks.{layer}.{name}"].to(cache.model.cfg.device))


@torch.no_grad()
def contribution_table(model, prompt) -> pandas.DataFrame:
    """Every part of every feed-forward, token by token.

    Columns: prompt, pos (columns of the tokens as they were read, padding left out), layer, expert (its number, or
    "dense"), rank (of choice; -1 for dense), weight (NaN for dense), norm (of what it added to the stream), share (its
    product with ffn_l, over |ffn_l|^2: a layer's sum to 1, and may be negative), cosine (with the sum of the experts'
    parts: near 1 for an expert that speaks for the branch, MoE Lens, arXiv 2603.05806).
    """
    refuse_dense(model)
    _, cache = model.run_with_cache(prompt, return_type=None)
    real = cache.routing.real
    prompts, pos = real.nonzero().unbind(1)
    tables = []
    for layer in range(model.cfg.n_layers):
        parts = parts_of(cache, layer)
        norm, share, cosine = (x[real] for x in _measures(parts))
        experts = [["dense", *row] for row in parts.experts[real].tolist()]
        n_parts = norm.shape[-1]
        tables.append(pandas.DataFrame({
            "prompt": prompts.repeat_interleave(n_parts).tolist(),
            "pos": pos.repeat_interleave(n_parts).tolist(),
            "layer": layer,
            "expert": pandas.Series([expert for row in experts for expert in row], dtype=object),
            "rank": list(range(-1, n_parts - 1)) * len(pos),
            "weight": F.pad(parts.weights[real], (1, 0), value=float("nan")).flatten().tolist(),
            "norm": norm.flatten().tolist(),
            "share": share.flatten().tolist(),
            "cosine": cosine.flatten().tolist(),
        }))  # fmt: skip
    return pandas.concat(tables, ignore_index=True)


def _measures(parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """(norm, share, cosine) [*batch_and_pos, 1 + slot], the dense branch first."""
    every = torch.cat((parts.dense[..., None, :], parts.slots), dim=-2)
    whole, branch = every.sum(-2, keepdim=True), parts.slots.sum(-2, keepdim=True)
    share = (every * whole).sum(-1) / whole.square().sum(-1)
    return every.norm(dim=-1), share, F.cosine_similarity(every, branch, dim=-1)


@torch.no_grad()
def expert_logit_lens(model, prompt, layer: int, *, pos: int = -1, top: int = 5) -> pandas.DataFrame:
    """The tokens that each chosen expert of a layer, and the dense branch, promotes and suppresses at one position.

    Exact: `logit` is what the part added to that token's logit before the soft cap, all norms at the scales of the run.

    Returns:
        expert ("dense" or its number), weight, norm (in the final stream), direction ("promotes", "suppresses"), token,
        id, logit; the strongest first.

    Raises:
        ValueError: for several prompts, a dense model, or a layer or position that is not there.
    """
    refuse_dense(model)
    layer = check_expert(model.cfg.n_layers, model.cfg.n_experts, layer)
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top is {top}: it is a number of tokens, 1 to {model.cfg.d_vocab}.")
    _, cache = model.run_with_cache(prompt, return_type=None)
    n_prompts, n_pos = cache["hook_embed"].shape[:2]
    if n_prompts != 1:
        raise ValueError(f"The lens reads one prompt, and {n_prompts} came: give them one at a time.")
    if not -n_pos <= pos < n_pos:
        raise ValueError(f"Position {pos} is out of range: the prompt has {n_pos} tokens, 0 to {n_pos - 1}.")
    parts = parts_of(cache, layer)
    every = torch.cat((parts.dense[0, pos][None], parts.slots[0, pos]))
    every = every * cache._later_scalars(model.cfg.n_layers)[layer].to(every.device)
    logits = (every * cache._frozen("ln_final", model.ln_final)[0, pos]) @ ops.wide(model.W_U)
    names: list[Any] = ["dense", *parts.experts[0, pos].tolist()]
    weights = [float("nan"), *parts.weights[0, pos].tolist()]
    rows = []
    for name, weight, part, row in zip(names, weights, every, logits, strict=True):
        for direction, largest in (("promotes", True), ("suppresses", False)):
            best = row.topk(top, largest=largest)
            for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                rows.append((name, weight, float(part.norm()), direction, token, value))
    table = pandas.DataFrame(rows, columns=["expert", "weight", "norm", "direction", "id", "logit"])
    table.insert(4, "token", names_of_tokens(model, table["id"].tolist()))
    return table


def exciting_tokens(
    trace: RoutingTrace, layer: int, expert: int, *, top: int = 10, context: int = 5
) -> pandas.DataFrame:
    """The tokens of a trace that excite an expert most: its largest probabilities in the router's softmax.

    Returns:
        prompt, pos, id, token and context (the tokens before it and itself; where texts are known), prob, rank (of
        choice, -1 where the expert was not chosen).
    """
    row = check_expert(len(trace.layers), trace.n_experts, layer, expert)
    if trace.tokens is None:
        raise ValueError("This trace does not know its tokens, as cache.routing does not: take trace_routing.")
    all_of, texts = trace.batched().to("cpu"), trace.about.get("texts")
    prompts, columns = all_of.real.nonzero().unbind(1)
    probs = all_of.probs[row, :, :, expert][all_of.real]
    rows = []
    for where in probs.topk(min(top, len(probs))).indices.tolist():
        prompt, column = int(prompts[where]), int(columns[where])
        ids = all_of.tokens[prompt][all_of.real[prompt]].tolist()
        pos = int(all_of.positions[prompt, column])
        chosen = (all_of.indices[row, prompt, column] == expert).nonzero()[:, 0].tolist()
        found = {"prompt": prompt, "pos": pos, "id": ids[pos]}
        if texts is not None:
            shown = [texts[str(token)] for token in ids[max(0, pos - context) : pos + 1]]
            found |= {"token": shown[-1], "context": "".join(shown)}
        rows.append(found | {"prob": float(probs[where]), "rank": chosen[0] if chosen else -1})
    return pandas.DataFrame(rows)


@dataclass
class ExpertProfile:
    """What the experts of every layer did over a corpus, on average over the tokens that chose them."""

    experts: pandas.DataFrame
    """One row for each layer and expert: tokens (that chose it), norm, share, cosine (means of what
    `contribution_table` says of it; NaN for an expert that no token chose), max_output (the largest entry of |E_e(x)|,
    before its weight and the norms)."""
    layers: pandas.DataFrame
    """One row a layer: dense_norm, routed_norm, dense_share, routed_share (means over tokens; the two shares of the
    feed-forward sum to 1), top1_cosine (of the first choice's part with the routed branch)."""
    written: Float[Tensor, "layer expert d_model"]
    """The mean of what an expert adds to the final stream, over the tokens that chose it; 0 for one that none chose."""
    model: Any
    about: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def written_tokens(self, layer: int, expert: int, top: int = 10) -> pandas.DataFrame:
        """The tokens an expert writes: the logit lens W_U norm(...) of its mean contribution, with the final norm's own
        scale for it. Columns: token, id, logit, the largest first."""
        layer = check_expert(len(self.written), self.written.shape[1], layer, expert)
        logits = self.model.ln_final(self.written[layer, expert].to(self.model.cfg.device)) @ ops.wide(self.model.W_U)
        best = logits.topk(min(top, len(logits)))
        ids = best.indices.tolist()
        return pandas.DataFrame({"token": names_of_tokens(self.model, ids), "id": ids, "logit": best.values.tolist()})

    def super_experts(self, quantile: float = 0.995, fraction: float = 0.1) -> pandas.DataFrame:
        """Experts with extreme outputs (Super Experts, arXiv 2507.23279): max_output above that quantile of all experts
        of the model, and above that fraction of the largest. The rows of `experts`, the largest first.

        The paper also asks that the layer be one where massive activations form, which is not checked here; whether
        attention sinks collapse without the expert is for an ablation to say.
        """
        outputs = self.experts["max_output"]
        extreme = (outputs > outputs.quantile(quantile)) & (outputs > fraction * outputs.max())
        return self.experts[extreme].sort_values("max_output", ascending=False)


@torch.no_grad()
def profile_experts(model, prompts, *, batch_size: int = 16, progress: bool = True) -> ExpertProfile:
    """Runs the prompts once and keeps sums only: memory does not depend on their number.

    Args:
        prompts: texts, token ids [prompt, pos], or `Prompts(tokens, mask)` of gemmascope.readout.activations.

    Raises:
        ValueError: for a dense model, or no prompts.
    """
    refuse_dense(model)
    cfg = model.cfg
    sums = [_LayerSums(cfg, cfg.device) for _ in range(cfg.n_layers)]
    for tokens, mask in batches(model, prompts, batch_size, progress, "contributions"):
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        held: dict[str, Tensor] = {}

        def store(name: str, tensor: Tensor, held=held, real=real) -> None:
            _, number, what = name.split(".", 2)
            held[what] = tensor
            if what == "ln2_post.hook_scale":  # the last that a layer shows: nothing of it is kept
                sums[int(number)].add(_parts(model, int(number), held.get), held, real)
                held.clear()

        sites = [f"blocks.{layer}.{name}" for layer in range(cfg.n_layers) for name in _READ]
        with model.hooks([(site, Reader(store)) for site in sites]):
            model(tokens, attention_mask=mask, return_type=None)
    later, written = 1.0, []
    for block, layer in zip(reversed(model.blocks), reversed(sums), strict=True):
        later = later * ops.wide(block.layer_scalar.detach()).double()
        written.insert(0, layer.vector * later / layer.tokens.clamp(min=1)[:, None])
    return ExpertProfile(
        experts=pandas.concat([layer.by_expert(number) for number, layer in enumerate(sums)], ignore_index=True),
        layers=pandas.DataFrame([{"layer": number} | layer.whole() for number, layer in enumerate(sums)]),
        written=torch.stack(written).float().cpu(),
        model=model,
        about=about(model),
    )


class _LayerSums:
    """Sums over tokens, for each expert of one layer and for its branches."""

    def __init__(self, cfg, device):
        self.tokens = torch.zeros(cfg.n_experts, dtype=torch.float64, device=device)
        self.figures = torch.zeros(cfg.n_experts, 3, dtype=torch.float64, device=device)
        self.vector = torch.zeros(cfg.n_experts, cfg.d_model, dtype=torch.float64, device=device)
        self.largest = torch.zeros(cfg.n_experts, device=device)
        self.branches = torch.zeros(5, dtype=torch.float64, device=device)
        self.n = 0

    def add(self, parts: Parts, held: dict[str, Tensor], real: Tensor) -> None:
        parts = Parts(*(x[real] for x in parts))
        norm, share, cosine = _measures(parts)
        experts = parts.experts.flatten()
        figures = torch.stack((norm, share, cosine), dim=-1).double()
        self.tokens.index_add_(0, experts, torch.ones_like(experts, dtype=torch.float64))
        self.figures.index_add_(0, experts, figures[:, 1:].flatten(0, 1))
        self.vector.index_add_(0, experts, parts.slots.flatten(0, 1).double())
        weights = ops.wide(parts.weights).abs()[..., None]
        output = ops.wide(held["moe.hook_expert_out"][real]).abs() / weights
        output = output.masked_fill(weights == 0, 0).amax(-1).flatten().type_as(self.largest)
        self.largest.scatter_reduce_(0, experts, output, "amax")
        routed = parts.slots.sum(-2).norm(dim=-1).double()
        whole = (figures[:, 0, 0], routed, figures[:, 0, 1], figures[:, 1:, 1].sum(-1), figures[:, 1, 2])
        self.branches += torch.stack(whole).sum(-1)
        self.n += len(norm)

    def by_expert(self, layer: int) -> pandas.DataFrame:
        norm, share, cosine = (self.figures / self.tokens[:, None]).T.tolist()
        table = {"layer": layer, "expert": range(len(norm)), "tokens": self.tokens.long().tolist()}
        return pandas.DataFrame(
            table | {"norm": norm, "share": share, "cosine": cosine, "max_output": self.largest.tolist()}
        )

    def whole(self) -> dict[str, float]:
        names = ("dense_norm", "routed_norm", "dense_share", "routed_share", "top1_cosine")
        return dict(zip(names, (self.branches / self.n).tolist(), strict=True))
