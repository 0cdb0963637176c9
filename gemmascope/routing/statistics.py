"""What follows from counts and traces of routing: a plain function for each statistic.

Tables of counts come from `counts.count_routing`, traces from `trace.trace_routing`. E experts, k of them a token, S_t
the set that token t chose. None of these says what an expert is *for*: published audits find that routing statistics do
not predict causal importance (arXiv 2606.10703), so look at `causal.py` beside them.

Unless a function says otherwise, `label` restricts it to one domain, and None takes all.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import pandas
import torch
from jaxtyping import Float, Int
from scipy.cluster import hierarchy
from scipy.stats import binom
from torch import Tensor

from gemmascope.routing.counts import MARGIN_EDGES, VOCABULARY, RoutingCounts
from gemmascope.routing.trace import RoutingTrace, check_expert

ByExpert = Float[Tensor, "*rest expert"]

# How the work is shared out


def load(counts: RoutingCounts, label: str | None = None) -> Float[Tensor, "layer expert"]:
    """f_e = (1 / Tk) sum_t 1[e in S_t]: the share of all choices; a layer's sum to 1, uniform is 1 / E."""
    chosen = counts.total("chosen", label).sum(1).double()
    return chosen / chosen.sum(-1, keepdim=True)


def first_load(counts: RoutingCounts, label: str | None = None) -> Float[Tensor, "layer expert"]:
    """The share of tokens whose first choice is the expert; a layer's sum to 1."""
    chosen = counts.total("chosen", label)[:, 0].double()
    return chosen / chosen.sum(-1, keepdim=True)


def mass(counts: RoutingCounts, label: str | None = None, scaled: bool = True) -> Float[Tensor, "layer expert"]:
    """m_e = (1 / T) sum_t g_te, the mean weight a token gives the expert (0 where it did not choose it).

    `scaled=False` leaves out Gemma 4's per-expert scale: then a layer's sum to 1.
    """
    return _weights(counts, label, scaled).sum(1) / counts.total("tokens", label)


def _weights(counts: RoutingCounts, label: str | None, scaled: bool) -> Float[Tensor, "layer rank expert"]:
    """Summed over tokens. An expert whose scale is 0 has no weight to take the scale from, and gets 0."""
    weights = counts.total("weight", label)
    return weights if scaled else weights / counts.scale.masked_fill(counts.scale == 0, 1)[:, None]


def mean_prob(counts: RoutingCounts, label: str | None = None) -> Float[Tensor, "layer expert"]:
    """P_e = (1 / T) sum_t p_te, the mean of the router's softmax."""
    return counts.total("prob", label) / counts.total("tokens", label)


def effective_experts(shares: ByExpert) -> Float[Tensor, " *rest"]:
    """exp(H(f)) of shares that sum to 1: how many experts, equally used, would be as mixed (Hill number of order 1)."""
    return torch.special.entr(shares).sum(-1).exp()


def gini(shares: ByExpert) -> Float[Tensor, " *rest"]:
    """Gini coefficient: the mean absolute difference of two experts' shares, over twice the mean share. 0 = equal."""
    n = shares.shape[-1]
    ranks = torch.arange(1, n + 1, dtype=shares.dtype)
    return (2 * ranks - n - 1).mul(shares.sort(-1).values).sum(-1) / (n * shares.sum(-1))


def coefficient_of_variation(shares: ByExpert) -> Float[Tensor, " *rest"]:
    """Standard deviation over mean (of the experts as a population; Shazeer et al., arXiv 1701.06538)."""
    return shares.std(-1, correction=0) / shares.mean(-1)


def max_violation(shares: ByExpert) -> Float[Tensor, " *rest"]:
    """MaxVio = (max f - mean f) / mean f (Wang et al., arXiv 2408.15664)."""
    return shares.amax(-1) / shares.mean(-1) - 1


def switch_loss(counts: RoutingCounts, label: str | None = None) -> Float[Tensor, " layer"]:
    """E * sum_e f_e P_e, the balancing loss of Switch Transformers (arXiv 2101.03961); 1 where either is uniform."""
    return counts.n_experts * (load(counts, label) * mean_prob(counts, label)).sum(-1)


def dead_experts(counts: RoutingCounts, label: str | None = None) -> list[tuple[int, int]]:
    """(layer, expert) of those that no token chose."""
    return [(counts.layers[row], expert) for row, expert in (load(counts, label) == 0).nonzero().tolist()]


def balance(counts: RoutingCounts, label: str | None = None) -> pandas.DataFrame:
    """One row a layer: effective experts, Gini, CV, MaxVio and the number of dead experts, all of the load; the Switch
    loss; means over tokens of the entropy (nats), the margin and the largest probability of the router's softmax."""
    shares, n_tokens = load(counts, label), counts.total("tokens", label)
    figures = {
        "effective_experts": effective_experts(shares),
        "gini": gini(shares),
        "cv": coefficient_of_variation(shares),
        "max_violation": max_violation(shares),
        "dead": (shares == 0).sum(-1),
        "switch_loss": switch_loss(counts, label),
    }
    figures |= {name: counts.total(name, label) / n_tokens for name in ("entropy", "margin", "top1")}
    return pandas.DataFrame({"layer": counts.layers} | {name: values.tolist() for name, values in figures.items()})


def margin_histogram(counts: RoutingCounts, label: str | None = None) -> pandas.DataFrame:
    """How close the k-th choice is to the next: columns layer, low, high (of the bin), share of tokens.

    The first bin also has the smaller margins.
    """
    bins = counts.total("margin_bins", label) / counts.total("tokens", label)
    rows = [
        (layer, low, high, share)
        for layer, shares in zip(counts.layers, bins.tolist(), strict=True)
        for (low, high), share in zip(pairwise(MARGIN_EDGES.tolist()), shares, strict=True)
    ]
    return pandas.DataFrame(rows, columns=["layer", "low", "high", "share"])


def rank_weights(counts: RoutingCounts, label: str | None = None, scaled: bool = True) -> Float[Tensor, "layer rank"]:
    """The mean weight of the first, second, ... choice. Without the per-expert scale a layer's sum to 1."""
    return _weights(counts, label, scaled).sum(-1) / counts.total("tokens", label)


# What the work is shared out by


def domain_specialization(counts: RoutingCounts, level: float = 0.95) -> pandas.DataFrame:
    """The share of a domain's tokens that go to each expert (OLMoE, arXiv 2409.02060), beside what it would be if the
    router did not care.

    Columns: label, layer, expert, share, low, high (Poisson bootstrap over prompts, see counts.py), uniform (k / E),
    lift (share / share over all tokens of the corpus), first (share of tokens whose first choice it is; uniform 1 / E).
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: it is between 0 and 1, such as 0.95.")
    overall = counts.total("chosen").sum(1) / counts.n_tokens
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    parts = []
    for number, label in enumerate(counts.labels):
        share = counts.total("chosen", label).sum(1) / counts.total("tokens", label)
        drawn = counts.tables["draw_tokens"][number] > 0  # a resample may leave a rare label out
        resampled = counts.tables["draws"][number][drawn].double()
        resampled /= counts.tables["draw_tokens"][number][drawn, None, None]
        low, high = resampled.quantile(tails, dim=0)
        index = pandas.MultiIndex.from_product([[label], counts.layers, range(counts.n_experts)])
        index.names = ["label", "layer", "expert"]
        figures = {"share": share, "low": low, "high": high, "lift": share / overall}
        figures["first"] = first_load(counts, label)
        table = index.to_frame(index=False).assign(uniform=counts.k / counts.n_experts)
        parts.append(table.assign(**{name: values.flatten().tolist() for name, values in figures.items()}))
    return pandas.concat(parts, ignore_index=True)


def share_interval(count: Tensor, n: Tensor, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The bootstrap interval of a share of n tokens: drawing n of them again gives Binomial(n, count / n) / n exactly,
    so nothing need be drawn. It takes tokens for independent, which neighbours are not; and it is empty at 0 and 1."""
    count, n = torch.broadcast_tensors(count.double(), n.double())
    share = (count / n).numpy()
    low, high = (torch.from_numpy(binom.ppf(q, n.numpy(), share)) / n for q in ((1 - level) / 2, (1 + level) / 2))
    return low, high


def _frequent(counts: RoutingCounts, of: str, min_count: int) -> Int[Tensor, " id"]:
    """The ids seen often enough."""
    if of not in VOCABULARY:
        raise ValueError(f"of is {of!r}; tokens were counted by {', '.join(VOCABULARY)}.")
    if not counts.vocabulary:
        raise ValueError("These counts have no vocabulary: count with vocabulary=True.")
    ids = (counts.seen[of] >= min_count).nonzero()[:, 0]
    if not len(ids):
        raise ValueError(f"No token occurs {min_count} times: count more text, or lower min_count.")
    return ids


def vocabulary_specialization(
    counts: RoutingCounts, of: str = "input", min_count: int = 10
) -> Float[Tensor, "layer expert"]:
    """How much an expert lives on few token ids: sum_x N(x, e) share(x, e) / sum_x N(x, e), with share(x, e) =
    N(x, e) / N(x) (OLMoE, arXiv 2409.02060): for a choice of the expert, the mean share of that token id that goes to
    it. 1 where every id is always or never routed to it; equal to its share of tokens where ids do not matter.

    OLMoE's released code looks at first choices only; here every rank counts. NaN for experts that got none.

    Args:
        of: count by "input" id, by the "next" id in the text, or by the "predicted" next id.
        min_count: leave out ids that occur less often, whose shares are high by chance.
    """
    squares, total = torch.zeros(2, len(counts.layers), counts.n_experts, dtype=torch.float64)
    for ids in _frequent(counts, of, min_count).split(1024):  # of a large model, all at once are gigabytes
        routed = counts.vocabulary[of][ids].double()
        squares += (routed**2 / counts.seen[of][ids, None, None]).sum(0)
        total += routed.sum(0)
    return squares / total


def expert_vocabulary(
    counts: RoutingCounts, layer: int, expert: int, of: str = "input", top: int = 10, min_count: int = 10
) -> pandas.DataFrame:
    """The token ids that go to an expert most surely: id, token (where texts are known), count, share, low, high (95 %
    bootstrap over the tokens of that id), uniform (k / E) and overall (the expert's share of all tokens)."""
    row = check_expert(len(counts.layers), counts.n_experts, layer, expert)
    ids = _frequent(counts, of, min_count)
    n, routed = counts.seen[of][ids], counts.vocabulary[of][ids, row, expert]
    table = pandas.DataFrame({"id": ids.tolist(), "count": n.tolist(), "routed": routed.tolist()})
    if counts.texts:
        texts = counts.texts
        table.insert(1, "token", [texts[token] for token in table["id"]])
    table["share"] = table["routed"] / table["count"]
    table = table.sort_values(["share", "count"], ascending=False, kind="stable")[:top].reset_index(drop=True)
    low, high = share_interval(torch.tensor(table["routed"]), torch.tensor(table["count"]))
    overall = float(counts.total("chosen")[row, :, expert].sum() / counts.n_tokens)
    table = table.drop(columns="routed").assign(low=low.tolist(), high=high.tolist())
    return table.assign(uniform=counts.k / counts.n_experts, overall=overall)


def position_specialization(counts: RoutingCounts, label: str | None = None) -> pandas.DataFrame:
    """The share of the tokens at some places of their prompt that go to each expert: columns first, last (places, from
    0), layer, expert, share, low, high (95 % bootstrap over tokens), uniform (k / E)."""
    n, routed = counts.total("buckets", label), counts.total("positions", label)
    there = (n > 0).nonzero()[:, 0]
    n, routed = n[there, None, None], routed[there]
    low, high = share_interval(routed, n)
    index = pandas.MultiIndex.from_product([there.tolist(), counts.layers, range(counts.n_experts)])
    table = index.to_frame(index=False, name=["first", "layer", "expert"])
    table.insert(1, "last", 2 ** (table["first"] + 1) - 2)
    table["first"] = 2 ** table["first"] - 1
    figures = {"share": routed / n, "low": low, "high": high}
    table = table.assign(**{name: values.flatten().tolist() for name, values in figures.items()})
    return table.assign(uniform=counts.k / counts.n_experts)


def _labelled(counts: RoutingCounts) -> None:
    if len(counts.labels) < 2:
        came = ", ".join(counts.labels) or "none"
        raise ValueError(f"This compares domains, and there is one label ({came}): count texts of two labels at least.")


def nmi(counts: RoutingCounts) -> Float[Tensor, " layer"]:
    """Normalised mutual information of a token's first-choice expert and its label: I / ((H(expert) + H(label)) / 2),
    scikit-learn's normalized_mutual_info_score. 1 where either tells the other, 0 where they are independent."""
    _labelled(counts)
    joint = counts.tables["chosen"][:, :, 0].transpose(0, 1).double()  # [layer, label, expert]
    information, one, other = _information(joint)
    return information / ((one + other) / 2)


def _information(joint: Float[Tensor, "layer a b"]) -> tuple[Tensor, Tensor, Tensor]:
    """(mutual information, entropy of a, entropy of b) of counts, in nats."""
    joint = joint / joint.sum((1, 2), keepdim=True)
    both, a, b = (torch.special.entr(p).flatten(1).sum(-1) for p in (joint, joint.sum(2), joint.sum(1)))
    return a + b - both, a, b


def domain_similarity(
    counts: RoutingCounts, by: str = "js", top: int | None = None
) -> Float[Tensor, "layer label label"]:
    """How alike the loads of two domains are, in the order of `counts.labels`.

    by "js": Jensen-Shannon divergence in bits, 0 (same) to 1 (no expert in common); "cosine" of the loads; "jaccard":
    experts in both sets of the `top` most loaded (k by default), over those in either.
    """
    _labelled(counts)
    shares = torch.stack([load(counts, label) for label in counts.labels], dim=1)  # [layer, label, expert]
    if by == "js":
        one, other = shares[:, :, None], shares[:, None]
        entropy = lambda p: torch.special.entr(p).sum(-1) / math.log(2)  # noqa: E731
        return (entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2).clamp(min=0)
    if by == "cosine":
        unit = shares / shares.norm(dim=-1, keepdim=True)
        return unit @ unit.mT
    if by == "jaccard":
        return _jaccard(_top_sets(shares, counts.k if top is None else top))
    raise ValueError(f"by is {by!r}; it is 'js', 'cosine' or 'jaccard'.")


def _top_sets(shares: ByExpert, top: int) -> ByExpert:
    """1 for the `top` largest, else 0."""
    if not 1 <= top <= shares.shape[-1]:
        raise ValueError(f"top is {top}: it is a number of experts, 1 to {shares.shape[-1]}.")
    return torch.zeros_like(shares).scatter_(-1, shares.topk(top).indices, 1.0)


def _jaccard(sets: Float[Tensor, "layer label expert"]) -> Float[Tensor, "layer label label"]:
    common, size = sets @ sets.mT, sets.sum(-1)
    return common / (size[:, :, None] + size[:, None] - common)


def standing_committee(counts: RoutingCounts, top: int | None = None) -> pandas.DataFrame:
    """Experts that every domain relies on (after COMMITTEEAUDIT, arXiv 2601.03425, whose exact index was not read).

    One row a layer: `committee`, the experts that are among the `top` (k by default) of *every* domain by routing mass
    without the per-expert scale; `share`, the mass they get, each domain counting the same; `uniform`, what as many
    experts get if all get the same; `jaccard`, the mean over pairs of domains of their top sets; `gini` of the mass.
    """
    _labelled(counts)
    by_label = torch.stack([mass(counts, label, scaled=False) for label in counts.labels], dim=1)
    sets, mean = _top_sets(by_label, counts.k if top is None else top), by_label.mean(1)
    always = sets.all(1)
    off_diagonal = ~torch.eye(len(counts.labels), dtype=torch.bool)
    return pandas.DataFrame({
        "layer": counts.layers,
        "committee": [tuple(row.nonzero()[:, 0].tolist()) for row in always],
        "share": (mean * always).sum(-1).tolist(),
        "uniform": (always.sum(-1) / counts.n_experts).tolist(),
        "jaccard": _jaccard(sets)[:, off_diagonal].mean(-1).tolist(),
        "gini": gini(mean).tolist(),
    })  # fmt: skip


# Choices together, in time and in depth


class Coactivation(NamedTuple):
    """How experts are chosen together, [layer, expert, expert] each."""

    conditional: Float[Tensor, "layer expert expert"]
    """P(j in S | i in S), row i; 1 on the diagonal, NaN where i is never chosen."""
    lift: Float[Tensor, "layer expert expert"]
    """P(i and j) / (P(i) P(j)), NaN on the diagonal and where one is never chosen. k experts of E without preference
    have (1 - 1 / k) / (1 - 1 / E), which is below 1: a choice takes a place."""
    pmi: Float[Tensor, "layer expert expert"]
    """log2 of the lift, -inf for pairs that never occur."""


def coactivation(counts: RoutingCounts, label: str | None = None) -> Coactivation:
    """Over *all* pairs in S_t. (OLMoE's released script counts only pairs of neighbouring rank, arXiv 2409.02060.)"""
    ordered = counts.total("pairs", label).double()
    single = counts.total("chosen", label).sum(1).double()
    both = ordered + ordered.mT + torch.diag_embed(single)
    lift = both * counts.total("tokens", label) / (single[:, :, None] * single[:, None])
    lift.diagonal(dim1=1, dim2=2).fill_(float("nan"))
    return Coactivation(both / single[:, :, None], lift, lift.log2())


def cluster_order(similarity: Float[Tensor, "expert expert"]) -> list[int]:
    """An order in which experts that go together stand together: the leaves of average-linkage clustering of a
    symmetric matrix, such as one layer of `coactivation(...).lift`. NaN counts as 0."""
    filled = similarity.double().nan_to_num(0.0, 0.0, 0.0)
    first, second = torch.triu_indices(*filled.shape, 1)
    distances = (filled.max() - filled)[first, second]
    return hierarchy.leaves_list(hierarchy.linkage(distances.numpy(), "average", optimal_ordering=True)).tolist()


def temporal_locality(counts: RoutingCounts, label: str | None = None) -> pandas.DataFrame:
    """Do neighbouring tokens go to the same expert (Mixtral, arXiv 2401.04088, section 5)? One row a layer.

    `same_first`: share of pairs with the same first choice; by chance 1 / E (`chance_first`), or sum f_e^2 with the
    first choices as unequal as they are (`chance_load`). `any_common`: share with an expert in common; by chance
    1 - C(E - k, k) / C(E, k) (`chance_common`).
    """
    steps = counts.total("steps", label)
    if not steps:
        raise ValueError("No prompt has two tokens, so none has neighbours.")
    repeats, n, k = counts.total("repeats", label) / steps, counts.n_experts, counts.k
    return pandas.DataFrame({
        "layer": counts.layers,
        "same_first": repeats[:, 0].tolist(),
        "chance_first": 1 / n,
        "chance_load": (first_load(counts, label) ** 2).sum(-1).tolist(),
        "any_common": repeats[:, 1].tolist(),
        "chance_common": 1 - math.comb(n - k, k) / math.comb(n, k),
    })  # fmt: skip


def transitions(counts: RoutingCounts, label: str | None = None) -> Float[Tensor, "step expert expert"]:
    """P(first choice j in the next layer | first choice i in this one), row i; NaN where i is never first."""
    moves = counts.total("moves", label).double()
    return moves / moves.sum(-1, keepdim=True)


def transition_information(counts: RoutingCounts, label: str | None = None) -> pandas.DataFrame:
    """What the first choice of a layer tells about the next layer's: columns layer, next, nats (mutual information),
    normalised (over the mean of both entropies, 0 to 1)."""
    information, one, other = _information(counts.total("moves", label).double())
    return pandas.DataFrame({
        "layer": counts.layers[:-1],
        "next": counts.layers[1:],
        "nats": information.tolist(),
        "normalised": (information / ((one + other) / 2)).tolist(),
    })  # fmt: skip


def paths(trace: RoutingTrace, length: int | None = None, start: int = 0) -> pandas.DataFrame:
    """Expert paths: a token's first choices through `length` layers (all by default) from layer `start` on (arXiv
    2604.17837). One row a path, the most frequent first: path, count, share; with labels, also purity (the share of its
    commonest label) and label (which one). Tokens of the whole trace have a purity too: that of `purity_baseline`.
    """
    start = check_expert(len(trace.layers), trace.n_experts, start)
    stop = len(trace.layers) if length is None else start + length
    if not start < stop <= len(trace.layers):
        raise ValueError(f"length is {length}: from layer {start} on there are {len(trace.layers) - start} layers.")
    taken = trace.indices[start:stop][:, trace.real][..., 0].T
    table = pandas.DataFrame({"path": list(map(tuple, taken.tolist()))})
    if trace.labels is None:
        found = table.value_counts("path").rename("count").reset_index()
        return found.assign(share=found["count"] / len(table))
    table["label"] = [trace.label_names[number] for number in trace.labels[trace.real].tolist()]
    by_label = table.value_counts(["path", "label"]).rename("count").reset_index()
    commonest = by_label.sort_values("count", ascending=False, kind="stable").drop_duplicates("path").set_index("path")
    found = by_label.groupby("path")["count"].sum().sort_values(ascending=False, kind="stable").reset_index()
    most = commonest.loc[found["path"]]
    return found.assign(
        share=found["count"] / len(table),
        purity=(most["count"].to_numpy() / found["count"]),
        label=most["label"].to_numpy(),
    )


def purity_baseline(trace: RoutingTrace) -> float:
    """The share of the commonest label: what the token-weighted mean purity of `paths` is if paths tell nothing (more
    for paths that few tokens take, which are pure by chance)."""
    if trace.labels is None or len(trace.label_names) < 2:
        raise ValueError("Purity compares labels: trace texts of two labels at least.")
    return float(trace.labels[trace.real].bincount().max() / trace.real.sum())


def saturation(trace: RoutingTrace, final: RoutingTrace) -> Float[Tensor, " layer"]:
    """Mean over tokens of |S_t & S'_t| / k between two traces of the same tokens (router saturation, OLMoE, arXiv
    2409.02060, there between checkpoints): of two models, dtypes, or prompts of equal length. By chance k / E.

    Raises:
        ValueError: where layers, choices or padding differ in shape.
    """
    one, other = trace.batched().to("cpu"), final.batched().to("cpu")
    if one.indices.shape != other.indices.shape or not torch.equal(one.real, other.real):
        came = [list(each.indices.shape) for each in (one, other)]
        raise ValueError(
            f"The traces do not cover the same places ([layer, prompt, pos, slot] {came[0]} and {came[1]}, or their "
            "padding differs): trace prompts of the same length with both."
        )
    common = (one.indices[..., :, None] == other.indices[..., None, :]).any(-1)[:, one.real]
    return common.double().mean((1, 2))
