"""The one seam between the model and its kernels: what runs is decided here, for each call.

`GEMMASCOPE_OPS=reference` forces the plain PyTorch definitions of every operation.
"""

import os
from dataclasses import dataclass
from functools import cached_property

import torch
from gemmascope_kernels import reference
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

_CHOICES = ("reference",)

# One implementation each, so there is nothing to choose.
mix_values = reference.mix_values
rms = reference.rms
rope_tables = reference.rope_tables
rotate = reference.rotate
wide = reference.wide
masked_scores = reference.attention_scores
"""attention_scores with the mask given as a tensor [b|1, query, key]: for some heads, or some rows."""


@dataclass(frozen=True)
class Mask:
    """Which keys each query sees, for one kind of layer. The queries are the last `n_queries` positions so far."""

    n_queries: int
    n_keys: int
    """Keys at hand: the most recent ones, when a sliding layer's cache has dropped older ones."""
    device: torch.device
    window: int | None = None
    key_mask: Bool[Tensor, "batch key"] | None = None
    """False on padding. A padding query sees itself, so that no row is empty."""
    image_blocks: Int[Tensor, "batch key"] | None = None
    """Image number of each position, -1 on text: positions of one image see each other, within the window."""

    @property
    def plain(self) -> bool:
        """Causal and nothing else."""
        return (
            self.key_mask is None and self.image_blocks is None and (self.window is None or self.n_keys <= self.window)
        )

    @cached_property
    def visible(self) -> Bool[Tensor, "#batch query key"]:
        """What every query sees."""
        return self.rows(slice(None))

    def rows(self, rows: slice | list[int]) -> Bool[Tensor, "#batch row key"]:
        """What some of the queries see, at the cost of those rows."""
        key = torch.arange(self.n_keys, device=self.device)
        of_query = key[self.n_keys - self.n_queries :][rows]
        query = of_query[:, None]
        seen = key <= query
        if self.image_blocks is not None:
            block = self.image_blocks[:, None, :]
            seen = seen | ((self.image_blocks[:, of_query, None] == block) & (block >= 0))
        if self.window is not None:
            seen = seen & (key > query - self.window) & (key < query + self.window)
        if self.key_mask is not None:
            seen = (seen & self.key_mask[:, None, :]) | (key == query)
        return seen if seen.ndim == 3 else seen[None]


def _forced() -> bool:
    choice = os.environ.get("GEMMASCOPE_OPS", "")
    if choice and choice not in _CHOICES:
        raise ValueError(
            f"GEMMASCOPE_OPS={choice!r} is not known; it takes {', '.join(_CHOICES)}, "
            "or nothing for the fastest that fits."
        )
    return bool(choice)


def attention(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    v: Float[Tensor, "batch key kv_head d_head"],
    mask: Mask,
) -> Float[Tensor, "batch query head d_head"]:
    """Each head's mix of values. Scale 1; a query head reads kv head `head * n_kv_heads // n_heads`."""
    if _forced():
        return reference.attention(q, k, v, mask.visible)
    causal = mask.plain and mask.n_queries == mask.n_keys
    alone = mask.plain and mask.n_queries == 1
    z = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if causal or alone else mask.visible[:, None],
        is_causal=causal and not alone,
        scale=1.0,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return z.transpose(1, 2)


def attention_scores(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    mask: Mask,
) -> Float[Tensor, "batch head query key"]:
    """Masked scores before the softmax, in float32 at least; -inf where a query does not see a key."""
    return reference.attention_scores(q, k, mask.visible)


def grouped_linear(
    x: Float[Tensor, "row d_in"], expert: Int[Tensor, " row"], weight: Float[Tensor, "expert d_out d_in"]
) -> Float[Tensor, "row d_out"]:
    """Each row through the matrix of its own expert."""
    return reference.grouped_linear(x, expert, weight)


def describe(device: str, dtype: str) -> dict[str, str]:
    """Which implementation runs on a device for a dtype, and why: {operation: sentence}."""
    if _forced():
        why = f"plain PyTorch, because GEMMASCOPE_OPS={os.environ['GEMMASCOPE_OPS']}"
        return dict.fromkeys(("attention", "patterns", "experts"), why)
    return {
        "attention": (
            "torch scaled_dot_product_attention; the explicit form in a layer whose scores or pattern a hook writes"
        ),
        "patterns": "recomputed in float32 from the cached queries and keys, only for what is asked",
        "experts": "one matrix product an expert that was chosen, over its rows",
    }
