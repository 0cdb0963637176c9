"""Inputs for every operation: odd sizes, every kind of mask, large logits, strides. Tests and benchmarks draw here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemmascope_kernels import reference
from gemmascope_kernels.mask import Mask, box

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One call of one op. `make(like)` draws its arguments, with the dtype and device of the tensor `like`."""

    op: str
    name: str
    make: Callable[[Tensor], dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from the float64 result, as a share of that result's largest entry."""


def draw(like: Tensor, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers that every dtype holds exactly, so that all implementations start from the same ones."""
    return (torch.randn(shape, device=like.device) * scale).to(torch.bfloat16).to(torch.float16).to(like.dtype)


def _qkv(
    like: Tensor,
    b: int,
    n_queries: int,
    n_keys: int,
    heads: tuple[int, int],
    width: int,
    *,
    score: float = 2.0,
    permuted: bool = False,
    shared: int | None = None,
) -> dict[str, Tensor]:
    """q, k and v whose scores spread by about `score`; `shared` columns of keys make the K = V form."""
    q_width, k_width = (width, width) if shared is None else (shared + width, shared)
    sizes = {"q": (n_queries, heads[0], q_width), "k": (n_keys, heads[1], k_width), "v": (n_keys, heads[1], width)}
    scale = {"q": score * q_width**-0.5, "k": 1.0, "v": 1.0}
    made = {}
    for name, (pos, head, wide) in sizes.items():
        # A permuted tensor has its heads outermost, as after a transpose.
        shape = (b, head, pos, wide) if permuted else (b, pos, head, wide)
        made[name] = draw(like, *shape, scale=scale[name])
        made[name] = made[name].transpose(1, 2) if permuted else made[name]
    return made


def _mask(like: Tensor, qkv: dict[str, Tensor], kinds: str = "", window: int | None = None) -> Mask:
    """A mask with padding, images, cut edges ("knock": the rest sums to 1 again; "zero": it does not), as named."""
    b, n_queries, n_heads, _ = qkv["q"].shape
    n_keys, made = qkv["k"].shape[1], {}
    if "padding" in kinds:
        made["key_mask"] = torch.ones(b, n_keys, dtype=torch.bool, device=like.device)
        made["key_mask"][0, : n_keys // 3] = False
        made["key_mask"][-1, -3:] = False
    if "images" in kinds:
        blocks = torch.full((b, n_keys), -1, device=like.device)
        blocks[:, 2 : n_keys // 3], blocks[-1, n_keys // 2 : -2] = 0, 1
        made["image_blocks"] = blocks
    if "knock" in kinds or "zero" in kinds:
        sizes, first = (b, n_heads, n_keys, n_keys), n_keys - n_queries
        made["knockouts"] = torch.stack(
            [
                box(0, 1, first + n_queries // 2, slice(0, n_keys), sizes),  # a whole row of one head
                box(slice(0, b), slice(0, n_heads), slice(first, n_keys), slice(1, 3), sizes),
                box(b - 1, slice(0, n_heads), n_keys - 1, n_keys - 1, sizes),
            ]
        ).to(like.device)
        made["renormalize"] = "knock" in kinds
    return Mask(n_queries=n_queries, n_keys=n_keys, device=like.device, window=window, **made)


def _attention(kinds: str = "", window: int | None = None, gain: bool = False, **shape: Any) -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        made = _qkv(like, **shape)
        made["mask"] = _mask(like, made, kinds, window)
        if gain:
            n_heads = shape["heads"][0]
            made["head_gain"] = torch.linspace(-0.5, 2, n_heads, device=like.device, dtype=like.dtype)[None]
            made["head_gain"][:, n_heads // 2] = 0
        return made

    return make


_SMALL = dict(b=2, n_queries=37, n_keys=37, heads=(4, 2), width=16)

_ATTENTION = {
    "causal": _attention(**_SMALL),
    "sliding": _attention(window=9, **_SMALL),
    "one-token": _attention(b=1, n_queries=1, n_keys=1, heads=(2, 1), width=16),
    "decode": _attention(b=2, n_queries=1, n_keys=131, heads=(8, 1), width=32),
    "decode-padded": _attention("padding", window=70, b=2, n_queries=1, n_keys=70, heads=(4, 4), width=16),
    "chunk": _attention(window=20, b=1, n_queries=5, n_keys=61, heads=(4, 1), width=32),
    "long-sliding": _attention(window=17, b=1, n_queries=301, n_keys=301, heads=(2, 1), width=16),
    "padding": _attention("padding", **_SMALL),
    "images": _attention("padding images", window=12, **_SMALL),
    "cut": _attention("knock padding", window=20, **_SMALL),
    "zeroed": _attention("zero", **_SMALL),
    "gain": _attention("zero", window=20, gain=True, **_SMALL),
    "permuted": _attention(window=9, permuted=True, **_SMALL),
    "large-logits": _attention(score=60.0, **_SMALL),
    "wide": _attention(window=33, b=1, n_queries=41, n_keys=41, heads=(2, 1), width=256),
    "wider": _attention(b=1, n_queries=19, n_keys=35, heads=(2, 1), width=512),
    "shared": _attention(shared=16, b=2, n_queries=21, n_keys=21, heads=(4, 1), width=64),
    "shared-decode": _attention("padding", shared=16, b=2, n_queries=1, n_keys=45, heads=(4, 2), width=64),
}

_READ = {
    "causal": _attention(**_SMALL),
    "sliding": _attention("padding", window=9, **_SMALL),
    "chunk": _attention(window=20, b=1, n_queries=5, n_keys=61, heads=(4, 1), width=32),
    "images": _attention("images", window=12, **_SMALL),
    "cut": _attention("knock", **_SMALL),
    "zeroed": _attention("zero", window=20, **_SMALL),
    "large-logits": _attention(score=60.0, permuted=True, **_SMALL),
}


def _read(base: Callable, with_v: bool = False, **rest: Any) -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        made = base(like)
        q, k, v, mask = (made[name] for name in ("q", "k", "v", "mask"))
        _, lse = reference.attention(q.double(), k.double(), v.double(), mask)
        lse = lse.to(reference.wide(like).dtype)
        given = {name: value(made) if callable(value) else value for name, value in rest.items()}
        return {"q": q, "k": k} | ({"v": v} if with_v else {}) | {"lse": lse, "mask": mask} | given

    return make


def _sources(made: dict[str, Any]) -> Tensor:
    k = made["k"]
    return (torch.arange(k.shape[1], device=k.device) * 3 // k.shape[1])[None].repeat(k.shape[0], 1)


def _some(axis: int, of: str) -> Callable:
    """Every second index of an axis of q or k, the last one first."""
    return lambda made: torch.arange(made[of].shape[axis] - 1, -1, -2, device=made[of].device)


_READOUTS = {
    ("attention_tiles", "all"): {},
    ("attention_tiles", "some"): {"heads": _some(2, "q"), "rows": _some(1, "q"), "keys": _some(1, "k")},
    ("attention_pool", "mean"): {"block": 8, "reduce": "mean"},
    ("attention_pool", "max"): {"block": 5, "reduce": "max"},
    ("attention_colsum", "all"): {},
    ("attention_topk", "3"): {"n": 3},
    ("attention_entropy", "all"): {},
    ("attention_by_source", "3"): {"with_v": True, "source": _sources, "n_sources": 3},
}


def _routing(n: int, d: int, n_experts: int, k: int, what: str = "") -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        made = {
            "x": draw(like, n, d, scale=3.0),
            "scale": 1 + draw(like, d, scale=0.2),
            "proj": draw(like, n_experts, d, scale=2.0),
            "per_expert_scale": 1 + draw(like, n_experts, scale=0.2),
            "k": k,
            "eps": EPS,
        }
        exact = reference.wide(like)
        if "bias" in what:
            made["logit_bias"] = draw(exact, n_experts, scale=0.5)
        if "some" in what:
            made["allowed"] = torch.arange(n_experts, device=like.device) % 3 != 1
        if "forced" in what:
            made["indices"] = (torch.arange(n, device=like.device)[:, None] + torch.arange(k, device=like.device)) % (
                n_experts
            )
        return made

    return make


def _mixture(n: int, d: int, m: int, n_experts: int, k: int, gain: bool = False, one_expert: bool = False) -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        exact = reference.wide(like)
        logits = torch.randn(n, n_experts, device=like.device)
        if one_expert:  # all tokens share their first choice, and most experts get nothing
            logits[:, 0] += 100
        made = {
            "x": draw(like, n, d),
            "indices": logits.topk(k).indices,
            "weights": draw(exact, n, k).abs() + 0.1,
            "gate_up": draw(like, n_experts, 2 * m, d, scale=d**-0.5),
            "down": draw(like, n_experts, d, m, scale=m**-0.5),
        }
        if gain:
            made["slot_gain"] = draw(exact, n, k)
        return made

    return make


def _grouped(n: int, d_in: int, d_out: int, n_experts: int) -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        expert = torch.randint(0, n_experts - 1, (n,), device=like.device)  # the last one gets nothing
        weight = draw(like, n_experts, d_out, d_in, scale=d_in**-0.5)
        return {"x": draw(like, n, d_in), "expert": expert, "weight": weight}

    return make


def _linear(n: int, d_in: int, d_out: int) -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        return {"x": draw(like, n, d_in), "weight": draw(like, d_out, d_in, scale=d_in**-0.5)}

    return make


def _gates(*shape: int, split: bool = False) -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        if split:  # halves of one tensor, as experts have them
            gate, up = draw(like, *shape[:-1], 2 * shape[-1], scale=3.0).chunk(2, dim=-1)
            return {"gate": gate, "up": up}
        return {"gate": draw(like, *shape, scale=3.0), "up": draw(like, *shape)}

    return make


def _norm(what: str, *shape: int, **rest: Any) -> Callable:
    def make(like: Tensor) -> dict[str, Any]:
        made = {"x": draw(like, *shape, scale=3.0), "weight": 1 + draw(like, shape[-1], scale=0.3), "eps": EPS}
        if what == "permuted":
            made["x"] = draw(like, shape[1], shape[0], *shape[2:]).transpose(0, 1)
        if what == "bare":
            made["weight"] = None
        if what in ("add", "scaled"):
            made["residual"] = draw(like, *shape)
            made["scalar"] = torch.full((1,), 0.625, device=like.device, dtype=like.dtype) if what == "scaled" else None
        if what == "rope":
            positions = torch.arange(shape[1], device=like.device)[None] * 3 + torch.arange(shape[0])[:, None]
            made["cos"], made["sin"] = reference.rope_tables(positions, shape[-1], 1e4, 0.5, like.dtype)
        return made

    return make


CASES = (
    *(Case("attention", name, make) for name, make in _ATTENTION.items()),
    *(
        Case(op, f"{kind}-{name}", _read(base, **rest))
        for (op, kind), rest in _READOUTS.items()
        for name, base in _READ.items()
    ),
    Case("route", "small", _routing(13, 40, 8, 2)),
    Case("route", "one-token", _routing(1, 128, 16, 4)),
    Case("route", "odd", _routing(21, 65, 11, 3)),
    Case("route", "biased", _routing(13, 40, 8, 2, "bias some")),
    Case("route", "forced", _routing(13, 40, 8, 3, "forced")),
    *(
        Case(op, name, make)
        for op in ("experts", "expert_slots")
        for name, make in {
            "small": _mixture(13, 24, 16, 8, 2),
            "one-token": _mixture(1, 40, 24, 8, 3),
            "four": _mixture(4, 33, 17, 5, 2, gain=True),
            "many": _mixture(70, 40, 24, 4, 2, gain=True),
            "lopsided": _mixture(37, 24, 16, 16, 1, one_expert=True),
            "odd": _mixture(84, 33, 25, 8, 2, gain=True),
        }.items()
    ),
    Case("grouped_linear", "few", _grouped(3, 24, 17, 5)),
    Case("grouped_linear", "many", _grouped(70, 33, 40, 4)),
    Case("linear", "one", _linear(1, 24, 17)),
    Case("linear", "many", _linear(70, 33, 40)),
    Case("geglu", "odd", _gates(7, 33)),
    Case("geglu", "split", _gates(3, 70, 40, split=True)),
    Case("rms_norm", "rows", _norm("", 7, 40)),
    Case("rms_norm", "odd", _norm("", 3, 5, 131)),
    Case("rms_norm", "bare", _norm("bare", 2, 5, 3, 16)),
    Case("rms_norm", "permuted", _norm("permuted", 3, 5, 24)),
    Case("norm_add", "stream", _norm("add", 2, 5, 40)),
    Case("norm_add", "scaled", _norm("scaled", 3, 7, 65)),
    Case("norm_rope", "queries", _norm("rope", 2, 5, 3, 16)),
    Case("norm_rope", "wide", _norm("rope", 1, 3, 2, 256)),
)
"""Every case, in the order of the ops."""
