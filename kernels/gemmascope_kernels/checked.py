"""The operations, as they are called: arguments checked, then run by the implementation that `by` names.

What each one computes stands in `reference.py`, under the same name.
"""

import torch
from torch import Tensor

from gemmascope_kernels import library
from gemmascope_kernels.mask import Mask


def _refuse(op: str, argument: str, came: object, taken: str) -> None:
    raise ValueError(f"{op}: {argument} is {came}; it takes {taken}.")


def _like(op: str, first: str, **tensors: Tensor | None) -> None:
    """Everything floating on one device, and of one dtype."""
    model = tensors[first]
    if not model.is_floating_point():
        _refuse(op, first, model.dtype, "a floating dtype")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != model.device:
            _refuse(op, name, f"on {tensor.device}", f"a tensor on {model.device}, where {first} is")
        if tensor.dtype != model.dtype:
            _refuse(op, name, tensor.dtype, f"{model.dtype}, as {first} has")


def _shape(op: str, **expected: tuple[Tensor | None, tuple[int | None, ...]]) -> None:
    """Each tensor (None passes) has the shape given; None in a shape is any size."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        fits = tensor.ndim == len(shape) and all(
            size is None or size == got for size, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            _refuse(op, name, list(tensor.shape), f"shape [{', '.join('any' if n is None else str(n) for n in shape)}]")


def _check_edges(op: str, q: Tensor, k: Tensor, mask: Mask) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.ndim != 4:
            _refuse(op, name, list(tensor.shape), "[batch, position, head, width]")
    b, n_queries, n_heads, _ = q.shape
    n_keys, n_kv_heads = k.shape[1:3]
    _shape(op, k=(k, (b, None, None, None)))
    if not n_kv_heads or n_heads % n_kv_heads:
        _refuse(op, "q", f"{n_heads} heads", f"a multiple of the {n_kv_heads} heads of k")
    if (mask.n_queries, mask.n_keys) != (n_queries, n_keys) or n_queries > n_keys:
        _refuse(
            op,
            "mask",
            f"of {mask.n_queries} queries and {mask.n_keys} keys",
            f"one of {n_queries} queries (q) and {n_keys} keys (k), queries being the last of the keys",
        )
    if mask.window is not None and mask.window < 1:
        _refuse(op, "mask.window", mask.window, "at least 1, or None")
    _shape(
        op,
        **{
            "mask.key_mask": (mask.key_mask, (b, n_keys)),
            "mask.image_blocks": (mask.image_blocks, (b, n_keys)),
            "mask.knockouts": (mask.knockouts, (None, 4, 2)),
        },
    )
    if mask.key_mask is not None and mask.key_mask.dtype != torch.bool:
        _refuse(op, "mask.key_mask", mask.key_mask.dtype, "bool")


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, head_gain: Tensor | None = None, *, by: str
) -> tuple[Tensor, Tensor]:
    """z [b, q, H, h] and lse [b, H, q]: see `reference.attention`."""
    _check_edges("attention", q, k, mask)
    _like("attention", "q", q=q, k=k, v=v)
    _shape("attention", v=(v, (*k.shape[:3], None)))
    b, n_queries, n_heads, width = q.shape
    widths = k.shape[-1], v.shape[-1]
    if width not in (widths[0], sum(widths)):
        _refuse("attention", "q", f"{width} wide", f"{widths[0]} as k, or {sum(widths)} as k and v together")
    if head_gain is not None:
        _shape("attention", head_gain=(head_gain, (b if head_gain.shape[0] == b else 1, n_heads)))
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, head_gain)):
            # Outside the op, so that a head that is off still has a gradient towards being on.
            z, lse = library.attention(by, mask, q=q, k=k, v=v, head_gain=None)
            return (z * head_gain[:, None, :, None]).type_as(z), lse
    return library.attention(by, mask, q=q, k=k, v=v, head_gain=head_gain)


def _check_readout(op: str, q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> None:
    _check_edges(op, q, k, mask)
    _like(op, "q", q=q, k=k)
    _shape(op, k=(k, (None, None, None, q.shape[-1])), lse=(lse, (q.shape[0], q.shape[2], q.shape[1])))


def attention_tiles(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask,
    heads: Tensor | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    by: str,
) -> Tensor:
    """The pattern of some heads, queries and keys [b, head, row, key]: see `reference.attention_tiles`."""
    _check_readout("attention_tiles", q, k, lse, mask)
    for name, chosen, size in (("heads", heads, q.shape[2]), ("rows", rows, q.shape[1]), ("keys", keys, k.shape[1])):
        if chosen is not None:
            _indices("attention_tiles", name, chosen, 1, size)
    return library.attention_tiles(by, mask, q=q, k=k, lse=lse, heads=heads, rows=rows, keys=keys)


def _indices(op: str, name: str, indices: Tensor, ndim: int, size: int) -> None:
    if indices.dtype != torch.long or indices.ndim != ndim:
        _refuse(op, name, f"{indices.dtype} of shape {list(indices.shape)}", f"int64 with {ndim} axes")
    if indices.numel() and not torch.compiler.is_compiling() and not indices.is_meta:
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= size:
            _refuse(op, name, low if low < 0 else high, f"indices 0 to {size - 1}")


def attention_pool(
    q: Tensor, k: Tensor, lse: Tensor, mask: Mask, block: int, reduce: str = "mean", *, by: str
) -> Tensor:
    """The pattern by square blocks [b, H, q blocks, key blocks]: see `reference.attention_pool`."""
    _check_readout("attention_pool", q, k, lse, mask)
    if block < 1:
        _refuse("attention_pool", "block", block, "at least 1")
    if reduce not in ("mean", "max"):
        _refuse("attention_pool", "reduce", repr(reduce), "'mean' or 'max'")
    return library.attention_pool(by, mask, q=q, k=k, lse=lse, block=block, reduce=reduce)


def attention_colsum(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, *, by: str) -> Tensor:
    """Attention that each key gets [b, H, s]: see `reference.attention_colsum`."""
    _check_readout("attention_colsum", q, k, lse, mask)
    return library.attention_colsum(by, mask, q=q, k=k, lse=lse)


def attention_topk(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, n: int, *, by: str) -> tuple[Tensor, Tensor]:
    """The n keys each query attends to most, values and indices [b, H, q, n]: see `reference.attention_topk`."""
    _check_readout("attention_topk", q, k, lse, mask)
    if not 1 <= n <= k.shape[1]:
        _refuse("attention_topk", "n", n, f"1 to {k.shape[1]}, the number of keys")
    return library.attention_topk(by, mask, q=q, k=k, lse=lse, n=n)


def attention_entropy(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, *, by: str) -> Tensor:
    """Entropy of each row [b, H, q], in nats: see `reference.attention_entropy`."""
    _check_readout("attention_entropy", q, k, lse, mask)
    return library.attention_entropy(by, mask, q=q, k=k, lse=lse)


def attention_by_source(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Mask, source: Tensor, n_sources: int, *, by: str
) -> Tensor:
    """z split by groups of keys [b, q, H, source, h]: see `reference.attention_by_source`."""
    op = "attention_by_source"
    _check_readout(op, q, k, lse, mask)
    _like(op, "q", q=q, v=v)
    _shape(op, v=(v, (*k.shape[:3], None)), source=(source, (q.shape[0] if len(source) == len(q) else 1, k.shape[1])))
    _indices(op, "source", source, 2, n_sources)
    return library.attention_by_source(by, mask, q=q, k=k, v=v, lse=lse, source=source, n_sources=n_sources)


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
    *,
    by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """probs [n, E], indices [n, k] and weights [n, k]: see `reference.route`."""
    _like("route", "x", x=x, scale=scale, proj=proj, per_expert_scale=per_expert_scale)
    _shape("route", x=(x, (None, None)), proj=(proj, (None, x.shape[-1])), scale=(scale, (x.shape[-1],)))
    n_experts = len(proj)
    _shape(
        "route",
        per_expert_scale=(per_expert_scale, (n_experts,)),
        logit_bias=(logit_bias, (n_experts,)),
        allowed=(allowed, (n_experts,)),
        indices=(indices, (len(x), k)),
    )
    if not 1 <= k <= n_experts:
        _refuse("route", "k", k, f"1 to {n_experts}, the number of experts")
    if allowed is not None:
        if allowed.dtype != torch.bool:
            _refuse("route", "allowed", allowed.dtype, "bool")
        if not torch.compiler.is_compiling() and not allowed.is_meta and int(allowed.sum()) < k:
            _refuse("route", "allowed", f"True for {int(allowed.sum())} experts", f"at least the {k} a token goes to")
    if indices is not None:
        _indices("route", "indices", indices, 2, n_experts)
    return library.route(
        by,
        x=x,
        scale=scale,
        proj=proj,
        per_expert_scale=per_expert_scale,
        k=k,
        eps=eps,
        logit_bias=logit_bias,
        allowed=allowed,
        indices=indices,
    )


def _check_experts(op: str, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    _like(op, "x", x=x, gate_up=gate_up, down=down)
    _shape(op, x=(x, (None, None)), gate_up=(gate_up, (None, None, x.shape[-1])))
    n_experts, double = gate_up.shape[:2]
    _shape(
        op,
        down=(down, (n_experts, x.shape[-1], double // 2)),
        indices=(indices, (len(x), None)),
        weights=(weights, tuple(indices.shape)),
    )
    if indices.dtype != torch.long:
        _refuse(op, "indices", indices.dtype, "int64")
    if indices.is_cpu:  # on a GPU, looking would wait for it
        _indices(op, "indices", indices, 2, n_experts)


def experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slot_gain: Tensor | None = None,
    *,
    by: str,
) -> Tensor:
    """The chosen experts' weighted sum [n, d]: see `reference.experts`."""
    _check_experts("experts", x, indices, weights, gate_up, down)
    weights = weights if slot_gain is None else weights * slot_gain
    return library.experts(by, x=x, indices=indices, weights=weights, gate_up=gate_up, down=down)


def expert_slots(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    slot_gain: Tensor | None = None,
    *,
    by: str,
) -> Tensor:
    """Each chosen expert's weighted output [n, k, d]: see `reference.expert_slots`."""
    _check_experts("expert_slots", x, indices, weights, gate_up, down)
    weights = weights if slot_gain is None else weights * slot_gain
    return library.expert_slots(by, x=x, indices=indices, weights=weights, gate_up=gate_up, down=down)


def linear(x: Tensor, weight: Tensor, *, by: str) -> Tensor:
    """x weight^T [n, out]: see `reference.linear`."""
    _like("linear", "x", x=x, weight=weight)
    _shape("linear", x=(x, (None, None)), weight=(weight, (None, x.shape[-1])))
    return library.linear(by, x=x, weight=weight)


def geglu(gate: Tensor, up: Tensor, *, by: str) -> Tensor:
    """gelu(gate) * up: see `reference.geglu`."""
    _like("geglu", "gate", gate=gate, up=up)
    _shape("geglu", up=(up, tuple(gate.shape)))
    return library.geglu(by, gate=gate, up=up)


def grouped_linear(x: Tensor, expert: Tensor, weight: Tensor, *, by: str) -> Tensor:
    """Each row through the matrix of its expert [n, out]: see `reference.grouped_linear`."""
    _like("grouped_linear", "x", x=x, weight=weight)
    _shape(
        "grouped_linear", x=(x, (None, None)), weight=(weight, (None, None, x.shape[-1])), expert=(expert, (len(x),))
    )
    if expert.is_cpu:
        _indices("grouped_linear", "expert", expert, 1, len(weight))
    return library.grouped_linear(by, x=x, expert=expert, weight=weight)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, by: str) -> Tensor:
    """x / rms(x) * weight: see `reference.rms_norm`."""
    _like("rms_norm", "x", x=x, weight=weight)
    _shape("rms_norm", weight=(weight, (x.shape[-1],)))
    return library.rms_norm(by, x=x, weight=weight, eps=eps)


def norm_add(
    residual: Tensor, x: Tensor, weight: Tensor, eps: float, scalar: Tensor | None = None, *, by: str
) -> Tensor:
    """(residual + rms_norm(x)) * scalar: see `reference.norm_add`."""
    _like("norm_add", "x", x=x, residual=residual, weight=weight, scalar=scalar)
    _shape("norm_add", residual=(residual, tuple(x.shape)), weight=(weight, (x.shape[-1],)), scalar=(scalar, (1,)))
    return library.norm_add(by, residual=residual, x=x, weight=weight, eps=eps, scalar=scalar)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, *, by: str) -> Tensor:
    """Queries or keys [b, q, heads, h], normed and turned: see `reference.norm_rope`."""
    _like("norm_rope", "x", x=x, weight=weight, cos=cos, sin=sin)
    _shape("norm_rope", x=(x, (None,) * 4), weight=(weight, (x.shape[-1],)))
    table = (len(x) if len(cos) == len(x) else 1, x.shape[1], x.shape[-1])
    _shape("norm_rope", cos=(cos, table), sin=(sin, table))
    return library.norm_rope(by, x=x, weight=weight, cos=cos, sin=sin, eps=eps)
