"""Attention in plain PyTorch, tile by tile: fast on a CPU, and never an S x S buffer. `cpu_readouts` reads from it.

1. `tiles` cuts a call into some queries of some heads, and the keys that those queries see. The query heads that share
   a kv head are rows of one matrix, so that each tile is a few large matrix products.
2. Masks act where they differ from "all visible": on the two triangles at the ends of a tile's keys, on knocked-out
   boxes, and on whole tiles only where there is padding or an image.
3. Products stand in `cpu_products`, which knows in which dtype this machine multiplies.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gemmascope_kernels.cpu_products import (
    add_product,
    fast,
    grain,
    mix,
    operands,
    product,
    product_in_full,
    product_less,
)
from gemmascope_kernels.mask import Mask
from gemmascope_kernels.reference import wide

TILE = 1 << 20
"""Scores in a tile of several heads; above it, a tile has one kv head."""
MOST = 1 << 22
"""Scores in a tile of one kv head; above it, a tile has fewer queries."""
SMALL = 1 << 16
"""Entries of a bias that is kept for the tiles and layers to come."""
SHORT = 1 << 25
"""Multiplications of scores, a batch entry: up to here PyTorch's flash kernel is faster, being a single call."""
NARROW = {torch.float32: 256, torch.bfloat16: 64}
"""Widths of heads up to which it is faster on causal calls of any length: it keeps their scores in the cache."""
SHORT_BACKWARD = {torch.float64: 1 << 22, torch.float32: 1 << 22, torch.bfloat16: 1 << 18}
"""Like SHORT, for its backward, of all batch entries together."""
NARROW_BACKWARD = {torch.float32: 128, torch.bfloat16: 64}
"""Like NARROW, for its backward."""


@dataclass(frozen=True)
class Tile:
    """Some queries of some heads, with all the keys that they see. Flat: batch and kv head in one axis, n."""

    batch: slice
    heads: slice
    kv_heads: slice
    flat: slice
    """The (batch, kv head) pairs, where these two are one axis."""
    rows: slice
    keys: slice
    hidden: list[tuple[slice, Tensor]]
    """Columns that some row does not see, and what to add there: 0 or -inf, [b|1, row, column]."""
    cuts: list[tuple[slice, slice, slice, slice]]
    """Where in [batch, head, row, key] of this tile edges are knocked out."""

    def of_queries(self, x: Tensor) -> Tensor:
        """x [b, q, H, d] -> [n, group * row, d]."""
        return self._flat(x[self.batch, self.rows, self.heads])

    def of_keys(self, x: Tensor) -> Tensor:
        """x [b, s, K, d] -> [n, key, d]."""
        flat = self._flat(x[self.batch, self.keys, self.kv_heads])
        # oneDNN's batched bfloat16 product is up to 5 times slower where keys of one head are not side by side.
        return flat.contiguous() if flat.dtype == torch.bfloat16 and len(flat) > 1 else flat

    def of_rows(self, x: Tensor) -> Tensor:
        """x [b, H, q] -> [n, group * row, 1]."""
        return x[self.batch, self.heads, self.rows].reshape(self._n, -1, 1)

    def by_head(self, x: Tensor) -> Tensor:
        """x [n, group * row, d] -> [batch, head, row, d], a view."""
        return x.view(-1, self.heads.stop - self.heads.start, self.rows.stop - self.rows.start, x.shape[-1])

    def hide(self, scores: Tensor) -> None:
        """-inf in place, on flat scores, where a row does not see a key."""
        scores = self.by_head(scores)
        for columns, bias in self.hidden:
            scores[..., columns] += (bias if len(bias) == 1 else bias[self.batch])[:, None]

    def cut(self, x: Tensor, value: float | Tensor) -> None:
        """Sets flat x to a value (or to one for each row, [n, group * row, 1]) on the edges that are knocked out."""
        x, values = self.by_head(x), self.by_head(value) if isinstance(value, Tensor) else None
        for index in self.cuts:
            x[index] = value if values is None else values[index[:3]]

    @property
    def _n(self) -> int:
        return self.flat.stop - self.flat.start

    def _flat(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (self.kv_heads.stop - self.kv_heads.start, -1)).permute(0, 2, 3, 1, 4)
        return x.reshape(self._n, -1, x.shape[-1])


def tiles(q: Tensor, k: Tensor, mask: Mask) -> Iterator[Tile]:
    """The tiles of a call, queries in order."""
    (batch, n_queries, n_heads, _), (n_keys, n_kv_heads) = q.shape, k.shape[1:3]
    group, offset = n_heads // n_kv_heads, n_keys - n_queries
    boxes = [] if mask.knockouts is None else mask.knockouts.tolist()
    furthest = _image_ends(mask)
    most_rows = min(128, max(64, 512 // group))
    geometry, hidden, start = None, [], 0
    while start < n_queries:
        seen, n_rows = min(start + offset, mask.window or n_keys) + most_rows, most_rows
        while n_rows > 1 and group * n_rows * seen > MOST:
            n_rows //= 2
        stop = min(n_queries, start + n_rows)
        rows, positions = slice(start, stop), slice(start + offset, stop + offset)
        keys = _visible_keys(mask, positions, furthest)
        new = (stop - start, positions.start - keys.start, keys.stop - keys.start)
        if not _only_band(mask) or new != geometry:  # within a band, one tile is like the next
            geometry, hidden = new, _hidden(mask, positions, keys)
        n = max(1, TILE // (group * (stop - start) * (keys.stop - keys.start)))
        for i, j in _pairs(batch, n_kv_heads, n):
            heads = slice(j.start * group, j.stop * group)
            flat = slice(i.start * n_kv_heads + j.start, (i.stop - 1) * n_kv_heads + j.stop)
            yield Tile(i, heads, j, flat, rows, keys, hidden, _cuts(boxes, (i, heads, positions, keys)))
        start = stop


def _pairs(batch: int, n_kv_heads: int, n: int) -> Iterator[tuple[slice, slice]]:
    """(batch, kv head) pairs, n at a time: several batch entries whole, or some heads of one."""
    entries, heads = max(1, n // n_kv_heads), min(n, n_kv_heads)
    for i in range(0, batch, entries):
        for j in range(0, n_kv_heads, heads):
            yield slice(i, min(i + entries, batch)), slice(j, min(j + heads, n_kv_heads))


def _image_ends(mask: Mask) -> Tensor | None:
    """For each position, the key after the last one of its image (in any batch entry), or after itself: [key]."""
    if mask.image_blocks is None:
        return None
    images = mask.image_blocks.long()
    after = torch.arange(1, mask.n_keys + 1, device=images.device).expand_as(images)
    number = images.clamp_min(0)
    last = after.new_zeros(len(images), int(number.max()) + 1).scatter_reduce(1, number, after, "amax")
    return torch.where(images < 0, after, last.gather(1, number)).amax(0)


def _visible_keys(mask: Mask, positions: slice, furthest: Tensor | None) -> slice:
    stop = positions.stop
    if furthest is not None:
        ahead = mask.n_keys if mask.window is None else stop - 1 + mask.window
        stop = max(stop, min(int(furthest[positions].max()), ahead))
    start = 0 if mask.window is None else max(0, positions.start - mask.window + 1)
    size = stop - start + -(stop - start) % grain(stop - start)  # some of these are hidden
    return slice(start, min(start + size, mask.n_keys))


def _hidden(mask: Mask, positions: slice, keys: slice) -> list[tuple[slice, Tensor]]:
    """The columns of a tile that are not all visible, and their bias."""
    future = (positions.start + 1, keys.stop)
    past = (keys.start, keys.start if mask.window is None else positions.stop - mask.window)
    apart = _only_band(mask) and past[1] <= future[0]
    ranges = [past, future] if apart else [(keys.start, keys.stop)]
    return [(slice(a - keys.start, b - keys.start), _bias(mask, positions, slice(a, b))) for a, b in ranges if a < b]


def _only_band(mask: Mask) -> bool:
    return mask.key_mask is None and mask.image_blocks is None


def _bias(mask: Mask, positions: slice, keys: slice) -> Tensor:
    """0 where the query at a position sees a key, -inf where it does not: [b|1, position, key]."""
    if not _only_band(mask):
        offset = mask.n_keys - mask.n_queries
        return bias_of(mask.rows(slice(positions.start - offset, positions.stop - offset), keys))
    sizes = (positions.stop - positions.start, keys.stop - keys.start)
    band = _band if sizes[0] * sizes[1] <= SMALL else _band.__wrapped__
    return band(*sizes, positions.start - keys.start, mask.window, mask.device)


@lru_cache(maxsize=32)
def _band(n_rows: int, n_columns: int, own: int, window: int | None, device: torch.device) -> Tensor:
    """The bias of a causal or sliding band, where the first row stands itself in column `own`: the same in every layer,
    and in most tiles."""
    everywhere = torch.full((1, n_rows, n_columns), float("-inf"), device=device)
    future = everywhere.triu(own + 1)
    return future if window is None else future.add_(everywhere.tril_(own - window))


def bias_of(seen: Tensor) -> Tensor:
    """0 for True, -inf for False."""
    return torch.where(seen, 0.0, float("-inf"))


def _cuts(boxes: list[list[list[int]]], tile: tuple[slice, ...]) -> list[tuple[slice, ...]]:
    """The boxes [start, stop] of each axis where they meet a tile, counted from the tile's start."""
    cuts = []
    for box in boxes:
        overlap = [(max(a, s.start), min(b, s.stop)) for (a, b), s in zip(box, tile, strict=True)]
        if all(a < b for a, b in overlap):
            cuts.append(tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(overlap, tile, strict=True)))
    return cuts


# Scores


def scores(q: Tensor, keys: list[Tensor], tile: Tile) -> Tensor:
    """Flat masked scores of flat q and keys, float32 at least. Of several keys, each meets its columns of q."""
    total = None
    for columns, key in zip(q.split([key.shape[-1] for key in keys], dim=-1), keys, strict=True):
        part = product_in_full(columns, key.transpose(1, 2))
        total = part if total is None else total.add_(part)
    tile.hide(total)
    return total


def pattern(q: Tensor, keys: list[Tensor], lse: Tensor, tile: Tile, renormalize: bool) -> Tensor:
    """exp(score - lse), flat, lse [n, group * row, 1]; with `renormalize`, without the edges that are knocked out."""
    scored = scores(q, keys, tile)
    if renormalize:
        tile.cut(scored, float("-inf"))
    return exp_(scored.sub_(guarded(lse)))


def exp_(x: Tensor) -> Tensor:
    """exp in place. torch.exp is MKL's, which takes 10 to 80 times as long where the result is 0 or nearly."""
    return x.mul_(math.log2(math.e)).exp2_()


def guarded(lse: Tensor) -> Tensor:
    """inf for -inf: a row without edges then has the pattern exp(-inf) = 0."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))


# Attention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, head_gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if _flash_takes(q, k, v, mask) and _flash_is_faster(q, mask):
        z, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_by_head(q, k, v), **_short(q, mask))
        unsaid = (q * 0).sum(-1)  # torch 2.13 answers a query that is NaN with zeros: this is NaN there, and else 0
        return _gained(z.transpose(1, 2).add_(unsaid[..., None]), head_gain), lse.add_(unsaid.transpose(1, 2))
    z = v.new_empty(*q.shape[:3], v.shape[-1])
    lse = wide(q[:0]).new_empty(q.shape[0], q.shape[2], q.shape[1])
    for tile in tiles(q, k, mask):
        queries, key, values = operands(tile.of_queries(q), tile.of_keys(k), tile.of_keys(v))
        scored = scores(queries, _meet(q, key, values), tile)
        if mask.renormalize:
            tile.cut(scored, float("-inf"))
        weights, total, normaliser = _normalised(scored)
        if not mask.renormalize:
            tile.cut(weights, 0)
        lse[tile.batch, tile.heads, tile.rows] = tile.by_head(normaliser)[..., 0]
        z[tile.batch, tile.rows, tile.heads] = tile.by_head(mix(weights, total, values)).transpose(1, 2)
    return _gained(z, head_gain), lse


def _gained(z: Tensor, head_gain: Tensor | None) -> Tensor:
    return z if head_gain is None else z.mul_(head_gain[:, None, :, None])


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> bool:
    same_width = q.shape[-1] == k.shape[-1] == v.shape[-1]
    return q.device.type == "cpu" and mask.knockouts is None and same_width and q.numel() > 0


def _flash_is_faster(q: Tensor, mask: Mask) -> bool:
    if _narrow(q, mask, NARROW):
        return True
    most = SHORT
    if mask.n_queries < mask.n_keys:
        most >>= 3  # here, heads that share a kv head are one matrix however few the queries
    if mask.n_queries == 1 and q.dtype == torch.bfloat16:
        # A single query takes that kernel 10 times as long as products where these are fast, two thirds where not.
        most = most >> 5 if fast(q.dtype) else most << 5
    return q[0].numel() * mask.n_keys <= most


def _narrow(q: Tensor, mask: Mask, widths: dict[torch.dtype, int]) -> bool:
    return mask.plain and mask.n_queries == mask.n_keys and q.shape[-1] <= widths.get(q.dtype, 0)


def _short(q: Tensor, mask: Mask) -> dict[str, Any]:
    """The mask of a short call, as the flash kernel takes it."""
    if mask.plain and mask.n_queries in (1, mask.n_keys):
        return {"is_causal": mask.n_queries > 1, "scale": 1.0}
    bias = _bias(mask, slice(mask.n_keys - mask.n_queries, mask.n_keys), slice(0, mask.n_keys))
    return {"is_causal": False, "attn_mask": bias[:, None].to(q.dtype), "scale": 1.0}


def _by_head(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _meet(q: Tensor, key: Tensor, values: Tensor) -> list[Tensor]:
    """What the columns of q meet, in order: the values too, in the K = V form."""
    return [key] if q.shape[-1] == key.shape[-1] else [key, values]


def _normalised(scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place, the weights of each row before they are divided by their sum; that sum; and the lse.

    A row without edges has weights of 0, a sum of 1 and an lse of -inf.
    """
    top = scored.amax(-1, keepdim=True).clamp_min_(torch.finfo(scored.dtype).min)
    weights = exp_(scored.sub_(top))
    total = weights.sum(-1, keepdim=True)
    normaliser = top.add_(total.log())
    return weights, total.clamp_min_(1), normaliser  # the largest weight is 1, where there is an edge


def attention_backward(
    dz: Tensor, dlse: Tensor, z: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, of an attention without head_gain.

    P = exp(s - lse) and dP = dz v^T give dS = P * (dP - delta), delta = sum(dz * z) - dlse; an edge cut without
    renormalising has dP = 0, and sends no value.
    """
    short = q.numel() * mask.n_keys <= SHORT_BACKWARD.get(q.dtype, 0)
    if (short or _narrow(q, mask, NARROW_BACKWARD)) and _flash_takes(q, k, v, mask) and not dlse.any():
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return tuple(_by_head(*backward(*_by_head(dz, q, k, v, z), lse, 0.0, **_short(q, mask))))
    dq = torch.empty_like(q)
    dk, dv = zeros_by_head(k), zeros_by_head(v)
    for tile in tiles(q, k, mask):
        queries, dmix, key, values = operands(tile.of_queries(q), tile.of_queries(dz), tile.of_keys(k), tile.of_keys(v))
        met = _meet(q, key, values)
        weights = pattern(queries, met, tile.of_rows(lse), tile, mask.renormalize)
        delta = (wide(dmix) * wide(tile.of_queries(z))).sum(-1, keepdim=True) - tile.of_rows(dlse)
        slope = product_less(dmix, values.transpose(1, 2), delta)
        if not mask.renormalize:
            tile.cut(slope, -delta)
        slope = slope.mul_(weights).to(values.dtype)
        if not mask.renormalize:
            tile.cut(weights, 0)
        accumulate(dv[tile.flat, tile.keys], weights.to(values.dtype).transpose(1, 2), dmix)
        stop = 0
        for part, total in zip(met, (dk, dv), strict=False):
            start, stop = stop, stop + part.shape[-1]
            dq_part = tile.by_head(product(slope, part)).transpose(1, 2)
            dq[tile.batch, tile.rows, tile.heads, start:stop] = dq_part
            accumulate(total[tile.flat, tile.keys], slope.transpose(1, 2), queries[..., start:stop])
    return dq, as_keys(dk, k), as_keys(dv, v)


def zeros_by_head(x: Tensor) -> Tensor:
    """Zeros to add gradients of x [b, s, K, d] to, flat: [b * K, s, d], float32 at least."""
    return wide(x[:0]).new_zeros(x.shape[0] * x.shape[2], x.shape[1], x.shape[3])


def as_keys(total: Tensor, x: Tensor) -> Tensor:
    """What was added up flat, in the shape and dtype of x."""
    return total.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2).to(x.dtype)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b in place."""
    if total.dtype == a.dtype:
        add_product(total, a, b)
    else:
        total += product(a, b)
