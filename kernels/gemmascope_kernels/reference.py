"""Every operation in plain PyTorch: the meaning that faster implementations are tested against.

Legend: b batch, q queries, s keys, H query heads, K kv heads, h head width, n rows or tokens, d width of the stream,
E experts, k experts a token, m width of an expert.
Arithmetic that decides (norms, scores, softmax) is done in float32 at least, float64 when the input is.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gemmascope_kernels.mask import Mask


def wide(x: Tensor) -> Tensor:
    """The dtype in which Gemma 4's norms and softmaxes are computed: float32, or float64 for a float64 model."""
    return x if x.dtype == torch.float64 else x.float()


# Norms and rope


def rms(x: Tensor, eps: float) -> Tensor:
    """Root mean square over the last axis, eps included, that axis kept: [..., d] -> [..., 1], float32 at least."""
    return (wide(x).square().mean(-1, keepdim=True) + eps).sqrt()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight [d], rounded once, at the end."""
    normalized = wide(x) / rms(x, eps)
    return (normalized if weight is None else normalized * wide(weight)).type_as(x)


def norm_add(residual: Tensor, x: Tensor, weight: Tensor, eps: float, scalar: Tensor | None = None) -> Tensor:
    """(residual + rms_norm(x)) * scalar [1], each of the three rounded: the end of a sub-layer."""
    out = residual + rms_norm(x, weight, eps)
    return out if scalar is None else out * scalar


def rope_tables(
    positions: Tensor, d_head: int, theta: float, fraction: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions, each [b, q, h].

    Dimension i turns with dimension i + h/2. Only the first `fraction` of those pairs turn at all, at the frequencies
    they would have if all of them did ("proportional" rope): theta^(-2i/h), and 0 for the rest.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    turning = int(fraction * d_head // 2)
    frequency = torch.zeros(d_head // 2, dtype=exact, device=positions.device)
    frequency[:turning] = 1.0 / theta ** (
        torch.arange(0, 2 * turning, 2, dtype=exact, device=positions.device) / d_head
    )
    angle = (positions[..., None].to(exact) * frequency).repeat(1, 1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rope to x [b, q, heads, h], with tables from `rope_tables`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Queries or keys [b, q, heads, h], normed a head and turned."""
    return rotate(rms_norm(x, weight, eps), cos, sin)


# Attention


def attention_scores(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """Scores [b, H, q, s] of q [b, q, H, h] and k [b, s, K, h]: scale 1, -inf where `visible` [b|1, q, s] is False."""
    grouped = wide(q).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqkgh,bskh->bkgqs", grouped, wide(k)).flatten(1, 2)
    return scores if visible is None else scores.masked_fill(~visible[:, None], float("-inf"))


def mix_values(pattern: Tensor, v: Tensor) -> Tensor:
    """z [b, q, H, h] from a pattern [b, H, q, s] and v [b, s, K, h]."""
    grouped = pattern.to(v.dtype).unflatten(1, (v.shape[2], -1))
    return torch.einsum("bkgqs,bskh->bqkgh", grouped, v).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
    """Scores, -inf where an edge takes no part in the softmax; and where the pattern is zeroed after it."""
    scores = attention_scores(q, k, mask.visible)
    if mask.knockouts is None:
        return scores, None
    cut = mask.knocked(q.shape[0], q.shape[2], slice(None))
    return (scores.masked_fill(cut, float("-inf")), None) if mask.renormalize else (scores, cut)


def _pattern(scores: Tensor, lse: Tensor, cut: Tensor | None) -> Tensor:
    unseen = scores == float("-inf")
    difference = (scores - lse[..., None]).masked_fill(unseen, float("-inf"))  # a row without edges has lse = -inf
    pattern = difference.exp()
    return pattern if cut is None else pattern.masked_fill(cut, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, head_gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each head's mix of values, z [b, q, H, h], and the log of each softmax's normaliser, lse [b, H, q], float32.

    q [b, q, H, h], k [b, s, K, h], v [b, s, K, h]; scale 1; head i reads kv head i * K // H. `head_gain` [b|1, H]
    multiplies heads. A row without edges gives zeros, and lse -inf.

    The K = V form, for layers whose keys are, but for the turning columns, their values times a weight that can be
    moved into the query: where q is as wide as k and v together, its first columns meet k and the rest meet v.
    """
    if q.shape[-1] != k.shape[-1]:
        k = torch.cat((k, v), dim=-1)
    scores, cut = _scores(q, k, mask)
    lse = scores.logsumexp(-1)
    z = mix_values(_pattern(scores, lse, cut), v)
    return (z if head_gain is None else (z * head_gain[:, None, :, None]).type_as(z)), lse


# What can be read from (q, k, lse). Each is a function of the pattern, which is exp(score - lse).


def attention_tiles(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask,
    heads: Tensor | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """The pattern of some heads, queries and keys (int64, each all by default): [b, head, row, key], float32."""
    pattern = _pattern(*_with_lse(q, k, lse, mask))
    for axis, chosen in ((1, heads), (2, rows), (3, keys)):
        pattern = pattern if chosen is None else pattern.index_select(axis, chosen)
    return pattern


def _with_lse(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor | None]:
    scores, cut = _scores(q, k, mask)
    return scores, lse, cut


def attention_pool(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, block: int, reduce: str = "mean") -> Tensor:
    """The pattern by square blocks, their "mean" or "max": [b, H, ceil(q / block), ceil(s / block)], float32.

    Blocks start at the first query and the first key; the last ones may be smaller, and the mean is over what is there.
    """
    pattern = attention_tiles(q, k, lse, mask)
    pad = [-size % block for size in pattern.shape[-2:]]
    tiles = F.pad(pattern, (0, pad[1], 0, pad[0])).unflatten(-1, (-1, block)).unflatten(-3, (-1, block))
    if reduce == "max":
        return tiles.amax((-3, -1))
    rows, columns = (
        pattern.new_tensor([min(block, size - start) for start in range(0, size, block)]) for size in pattern.shape[-2:]
    )
    return tiles.sum((-3, -1)) / (rows[:, None] * columns)


def attention_colsum(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    """How much attention each key gets, summed over queries: [b, H, s], float32."""
    return attention_tiles(q, k, lse, mask).sum(-2)


def attention_topk(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, n: int) -> tuple[Tensor, Tensor]:
    """The n keys that each query attends to most, and how much: values [b, H, q, n], indices [b, H, q, n], descending.

    A query that sees fewer has value 0 and index -1 in the places left.
    """
    values, indices = attention_tiles(q, k, lse, mask).topk(n, dim=-1)
    return values, indices.masked_fill(values == 0, -1)


def attention_entropy(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    """-sum P log P of each row, in nats: [b, H, q], float32. 0 for a row without edges."""
    pattern = attention_tiles(q, k, lse, mask)
    return -(pattern * pattern.masked_fill(pattern == 0, 1).log()).sum(-1)  # log 0 would have no derivatives


def attention_by_source(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Mask, source: Tensor, n_sources: int
) -> Tensor:
    """z split by where it came from: [b, q, H, source, h], which sums to z over the sources.

    `source` [b|1, s] int64 gives each key's source, 0 to n_sources - 1.
    """
    pattern = attention_tiles(q, k, lse, mask)
    parts = [mix_values(pattern.masked_fill((source != number)[:, None, None], 0), v) for number in range(n_sources)]
    return torch.stack(parts, dim=3)


# Mixture of experts


def route(
    x: Tensor,
    scale: Tensor,
    proj: Tensor,
    per_expert_scale: Tensor,
    k: int,
    eps: float,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which experts each token goes to: probs [n, E] float32 of all, indices [n, k] int64, their weights [n, k].

    x [n, d], scale [d], proj [E, d], per_expert_scale [E]. Each step is rounded as Gemma 4 does: norm, times scale,
    times d^-0.5, projection; the softmax is float32. `logit_bias` [E] is added to the logits, `allowed` [E] bool leaves
    experts out, and `indices` [n, k] forces the choice; weights are the chosen experts' probabilities, renormalised,
    times their scale (0 where all of them underflow). Which of two equally likely experts comes first is not said.
    """
    logits = F.linear(rms_norm(x, None, eps) * scale * x.shape[-1] ** -0.5, proj)
    return choose(logits, per_expert_scale, k, logit_bias, allowed, indices)


def choose(
    logits: Tensor,
    per_expert_scale: Tensor,
    k: int,
    logit_bias: Tensor | None,
    allowed: Tensor | None,
    indices: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`route`, from the logits [n, E]."""
    logits = wide(logits) if logit_bias is None else wide(logits) + logit_bias
    probs = (logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))).softmax(-1)
    if indices is None:
        indices = probs.topk(k, dim=-1).indices
    return probs, indices, expert_weights(probs, indices, per_expert_scale)


def expert_weights(probs: Tensor, indices: Tensor, per_expert_scale: Tensor) -> Tensor:
    """Weights [..., k] of the chosen experts, from the probabilities [..., E] of all."""
    chosen = probs.gather(-1, indices)
    total = chosen.sum(-1, keepdim=True)
    return chosen / total.masked_fill(total == 0, 1) * per_expert_scale[indices]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] times weight^T, [n, out], weight [out, in]."""
    return x @ weight.T


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, of any shape, with the tanh form of gelu."""
    return F.gelu(gate, approximate="tanh") * up


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(gelu(gate(x)) * up(x)): x [n, d], gate and up [m, d], down [d, m], giving [n, d]."""
    return linear(geglu(linear(x, gate), linear(x, up)), down)


def grouped_linear(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """Row n of x [n, in] times the matrix of its expert, weight [E, out, in]: [n, out]. Rows need not be sorted."""
    order = expert.argsort(stable=True)
    rows = x[order].split(expert.bincount(minlength=weight.shape[0]).tolist())
    parts = [part @ matrix.T for part, matrix in zip(rows, weight, strict=True) if len(part)]
    return torch.cat(parts)[order.argsort()]


def expert_slots(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, slot_gain: Tensor | None = None
) -> Tensor:
    """Each chosen expert's weighted output [n, k, d]: weight * down(gelu(gate(x)) * up(x)).

    x [n, d], indices and weights [n, k], gate_up [E, 2m, d] (gate's rows first), down [E, d, m]; `slot_gain` [n, k]
    multiplies the weights.
    """
    n, k = indices.shape
    gate, up = grouped_linear(x.repeat_interleave(k, 0), indices.flatten(), gate_up).chunk(2, dim=-1)
    out = grouped_linear(geglu(gate, up), indices.flatten(), down).unflatten(0, (n, k))
    weights = weights if slot_gain is None else weights * slot_gain
    return (out * weights[..., None]).type_as(out)


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, slot_gain: Tensor | None = None
) -> Tensor:
    """The sum of `expert_slots` over the slots: [n, d]."""
    return expert_slots(x, indices, weights, gate_up, down, slot_gain).sum(-2)
