"""The one seam between the model and its kernels: which implementation runs is decided here, for each call.

On CUDA it is Triton, elsewhere the fast plain PyTorch of `gemmascope_kernels.cpu`. `GEMMASCOPE_OPS` overrules:
`triton`, `cpu` (which runs on any device) or `reference`, the definitions.
"""

import importlib.util
import os
from functools import cache

import torch
from gemmascope_kernels import checked, cpu_mlp, cpu_norms, cpu_products, library, reference
from gemmascope_kernels.mask import Mask as Mask
from gemmascope_kernels.mask import box as box
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

# One implementation each, so there is nothing to choose.
expert_weights = reference.expert_weights
mix_values = reference.mix_values
rope_tables = reference.rope_tables
wide = reference.wide
masked_scores = reference.attention_scores
"""attention_scores with the mask given as a tensor [b|1, query, key]: for some heads, or some rows."""


def _by(device: torch.device) -> str:
    """The implementation that runs on a device now."""
    forced = os.environ.get("GEMMASCOPE_OPS", "")
    if forced and forced not in library.MODULES:
        raise ValueError(
            f"GEMMASCOPE_OPS={forced!r} is not known; it takes {', '.join(library.MODULES)}, "
            "or nothing for the fastest that fits."
        )
    return forced or ("triton" if device.type == "cuda" and _has_triton() else "cpu")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# Attention


def attention(
    q: Float[Tensor, "batch query head d_qk"],
    k: Float[Tensor, "batch key kv_head d_k"],
    v: Float[Tensor, "batch key kv_head d_head"],
    mask: Mask,
    head_gain: Float[Tensor, "#batch head"] | None = None,
) -> tuple[Float[Tensor, "batch query head d_head"], Float[Tensor, "batch head query"]]:
    """Each head's mix of values, and the log of each row's normaliser. Scale 1; `head_gain` multiplies heads."""
    return checked.attention(q, k, v, mask, head_gain, by=_by(q.device))


def attention_scores(
    q: Float[Tensor, "batch query head d_head"], k: Float[Tensor, "batch key kv_head d_head"], mask: Mask
) -> Float[Tensor, "batch head query key"]:
    """Masked scores before the softmax, in float32 at least; -inf where a query does not see a key."""
    return reference.attention_scores(q, k, mask.visible)


def attention_tiles(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, heads=None, rows=None, keys=None) -> Tensor:
    """The pattern of some heads, queries and keys (indices, all by default): [batch, head, row, key]."""
    return checked.attention_tiles(q, k, lse, mask, heads, rows, keys, by=_by(q.device))


def attention_pool(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, block: int, reduce: str = "mean") -> Tensor:
    """The "mean" or "max" of the pattern in square blocks: [batch, head, query block, key block]."""
    return checked.attention_pool(q, k, lse, mask, block, reduce, by=_by(q.device))


def attention_colsum(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Float[Tensor, "batch head key"]:
    """The attention each key gets from all queries."""
    return checked.attention_colsum(q, k, lse, mask, by=_by(q.device))


def attention_topk(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, n: int) -> tuple[Tensor, Tensor]:
    """The n keys each query attends to most: values, indices [batch, head, query, n]; (0, -1) past what it sees."""
    return checked.attention_topk(q, k, lse, mask, n, by=_by(q.device))


def attention_entropy(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Float[Tensor, "batch head query"]:
    """The entropy of each row, in nats."""
    return checked.attention_entropy(q, k, lse, mask, by=_by(q.device))


def attention_by_source(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Mask, source: Int[Tensor, "#batch key"], n_sources: int
) -> Float[Tensor, "batch query head source d_head"]:
    """z, split by groups of keys; sums to z over them."""
    return checked.attention_by_source(q, k, v, lse, mask, source, n_sources, by=_by(q.device))


# Mixture of experts


def route(
    x: Float[Tensor, "row d_model"],
    scale: Float[Tensor, " d_model"],
    proj: Float[Tensor, "expert d_model"],
    per_expert_scale: Float[Tensor, " expert"],
    k: int,
    eps: float,
    logit_bias: Float[Tensor, " expert"] | None = None,
    allowed: Bool[Tensor, " expert"] | None = None,
    indices: Int[Tensor, "row slot"] | None = None,
) -> tuple[Float[Tensor, "row expert"], Int[Tensor, "row slot"], Float[Tensor, "row slot"]]:
    """All probabilities, the k likeliest experts (or those that `indices` forces), and their weights."""
    return checked.route(x, scale, proj, per_expert_scale, k, eps, logit_bias, allowed, indices, by=_by(x.device))


def experts(
    x: Float[Tensor, "row d_model"],
    indices: Int[Tensor, "row slot"],
    weights: Float[Tensor, "row slot"],
    gate_up: Float[Tensor, "expert two_d_expert d_model"],
    down: Float[Tensor, "expert d_model d_expert"],
    slot_gain: Float[Tensor, "row slot"] | None = None,
) -> Float[Tensor, "row d_model"]:
    """The weighted sum of the chosen experts' outputs; `slot_gain` multiplies the weights."""
    return checked.experts(x, indices, weights, gate_up, down, slot_gain, by=_by(x.device))


def expert_slots(
    x: Float[Tensor, "row d_model"],
    indices: Int[Tensor, "row slot"],
    weights: Float[Tensor, "row slot"],
    gate_up: Float[Tensor, "expert two_d_expert d_model"],
    down: Float[Tensor, "expert d_model d_expert"],
    slot_gain: Float[Tensor, "row slot"] | None = None,
) -> Float[Tensor, "row slot d_model"]:
    """Each chosen expert's weighted output; they sum to `experts`."""
    return checked.expert_slots(x, indices, weights, gate_up, down, slot_gain, by=_by(x.device))


def linear(x: Float[Tensor, "*row d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "*row d_out"]:
    """Rows times one matrix: PyTorch's product, or, where that is slow in this dtype, one in float32."""
    by = _by(x.device)
    if by == "cpu" and cpu_products.in_float32(x, weight):
        return checked.linear(x.flatten(0, -2), weight, by=by).unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


def mlp(
    x: Float[Tensor, "*row d_model"],
    gate: Float[Tensor, "d_mlp d_model"],
    up: Float[Tensor, "d_mlp d_model"],
    down: Float[Tensor, "d_model d_mlp"],
) -> Float[Tensor, "*row d_model"]:
    """down(gelu(gate(x)) * up(x)): on a CPU without gradients, some rows at a time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return linear(geglu(linear(x, gate), linear(x, up)), down)
    if _by(x.device) == "cpu" and x.is_cpu:
        return cpu_mlp.mlp(x.flatten(0, -2), gate, up, down).view(x.shape)
    return linear(torch.ops.aten.gelu_(linear(x, gate), approximate="tanh").mul_(linear(x, up)), down)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, inside experts with the bits that `experts` gives."""
    if _by(gate.device) == "cpu" and gate.is_cpu and not torch.compiler.is_compiling():
        return checked.geglu(gate, up, by="cpu")
    return reference.geglu(gate, up)


def grouped_linear(
    x: Float[Tensor, "row d_in"], expert: Int[Tensor, " row"], weight: Float[Tensor, "expert d_out d_in"]
) -> Float[Tensor, "row d_out"]:
    """Each row through the matrix of its own expert."""
    return checked.grouped_linear(x, expert, weight, by=_by(x.device))


# Norms. In plain PyTorch they are called as they are, so that a compiler sees inside; a Triton kernel is an op.


def _plain_norms(device: torch.device):
    return reference if _by(device) == "reference" else cpu_norms


def rms(x: Tensor, eps: float) -> Tensor:
    """Root mean square over the last axis, eps included, that axis kept: [..., d] -> [..., 1], float32 at least."""
    return _plain_norms(x.device).rms(x, eps)


def rotate(
    x: Float[Tensor, "batch pos head d_head"], cos: Tensor, sin: Tensor
) -> Float[Tensor, "batch pos head d_head"]:
    """Turns queries or keys by their positions."""
    return _plain_norms(x.device).rotate(x, cos, sin)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight, over the last axis, in float32 until the end."""
    by = _by(x.device)
    return (
        checked.rms_norm(x, weight, eps, by=by) if by == "triton" else _plain_norms(x.device).rms_norm(x, weight, eps)
    )


def norm_add(residual: Tensor, x: Tensor, weight: Tensor, eps: float, scalar: Tensor | None = None) -> Tensor:
    """(residual + rms_norm(x)) * scalar, the end of a sub-layer."""
    by = _by(x.device)
    if by == "triton":
        return checked.norm_add(residual, x, weight, eps, scalar, by=by)
    return _plain_norms(x.device).norm_add(residual, x, weight, eps, scalar)


def norm_rope(
    x: Float[Tensor, "batch pos head d_head"], weight: Float[Tensor, " d_head"], cos: Tensor, sin: Tensor, eps: float
) -> Float[Tensor, "batch pos head d_head"]:
    """Queries or keys, normed a head and turned by their positions."""
    by = _by(x.device)
    if by == "triton":
        return checked.norm_rope(x, weight, cos, sin, eps, by=by)
    return _plain_norms(x.device).norm_rope(x, weight, cos, sin, eps)


def describe(device: str, dtype: str) -> dict[str, str]:
    """Which implementation runs on a device for a dtype, and why: {operation: sentence}."""
    by = _by(torch.device(device))
    forced = os.environ.get("GEMMASCOPE_OPS")
    why = f", because GEMMASCOPE_OPS={forced}" if forced else ""
    if by == "reference":
        return dict.fromkeys(("attention", "read-outs", "experts", "router, norms"), f"the plain definitions{why}")
    if by == "triton":
        why = why or ", because the device is CUDA and Triton is installed"
        return {
            "attention": f"fused Triton kernels{why}; a layer whose scores or pattern a hook writes computes those",
            "read-outs": f"Triton kernels{why}, from queries, keys and normalisers, without the whole pattern",
            "experts": f"grouped Triton products{why}; two launches for up to 4 tokens",
            "router, norms": f"fused Triton kernels{why}",
        }
    why = why or ("" if torch.device(device).type == "cpu" else ", because Triton is not installed")
    products = f"{dtype} products"
    if torch.device(device).type == "cpu" and not cpu_products.fast(getattr(torch, dtype)):
        products += " of few rows and float32 ones of many, which this CPU multiplies faster"
    return {
        "attention": f"chunks of queries over the keys they see, in {products}{why}; "
        "a layer whose scores or pattern a hook writes computes those",
        "read-outs": f"chunks of the pattern, in float32{why}",
        "experts": f"rows sorted by expert, each expert's in {products}{why}",
        "router, norms": f"plain PyTorch, in as few passes as it takes{why}",
    }
