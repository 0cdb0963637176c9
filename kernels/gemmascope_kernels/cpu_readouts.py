"""What can be read from an attention's (q, k, lse), tile by tile: exact patterns, and never an S x S buffer.

Scores are formed in float32, of bfloat16 inputs too. `readout_backward` has the gradients of all six: each gives the
slope dP of its output at the pattern P = exp(s - lse), and from there dS = P * dP, dQ = dS K, dK = dS^T Q and
dlse = -rowsum(dS) are the same for all.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gemmascope_kernels import cpu
from gemmascope_kernels.cpu import Tile, accumulate, as_keys, zeros_by_head
from gemmascope_kernels.cpu_products import operands, product
from gemmascope_kernels.mask import Mask
from gemmascope_kernels.reference import wide


def patterns(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Iterator[tuple[Tile, Tensor]]:
    """Each tile, and its pattern [batch, head, row, key]."""
    for tile in cpu.tiles(q, k, mask):
        queries, keys = wide(tile.of_queries(q)), wide(tile.of_keys(k))
        pattern = cpu.pattern(queries, [keys], tile.of_rows(lse), tile, mask.renormalize)
        if not mask.renormalize:
            tile.cut(pattern, 0)
        yield tile, tile.by_head(pattern)


# Chosen heads, rows and keys


def attention_tiles(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask,
    heads: Tensor | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    sizes = (q.shape[2], q.shape[1], k.shape[1])
    chosen = [n if some is None else len(some) for n, some in zip(sizes, (heads, rows, keys), strict=True)]
    out = lse.new_zeros(q.shape[0], *chosen)
    for slot, part, columns, _, pattern in _chosen(q, k, lse, mask, heads, rows, keys):
        out[:, slot, part, columns] = pattern
    return out


def _chosen(
    q: Tensor, k: Tensor, lse: Tensor, mask: Mask, heads: Tensor | None, rows: Tensor | None, keys: Tensor | None
) -> Iterator[tuple[int, slice, slice, tuple[int, Tensor, Tensor], Tensor]]:
    """Some rows of one chosen head at a time: where they stand in the output (head, rows, keys), which they are in the
    input (head, rows, keys), and their pattern [b, row, key]."""
    group, every = q.shape[2] // k.shape[2], torch.arange(k.shape[1], device=q.device)
    rows = every[: q.shape[1]] if rows is None else rows
    n_columns = k.shape[1] if keys is None else len(keys)
    step = max(1, cpu.MOST // max(1, q.shape[0] * n_columns))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        some = rows[part]
        columns = slice(0, n_columns)
        if keys is None and mask.image_blocks is None:
            first, last = (int(x) + k.shape[1] - q.shape[1] for x in some.aminmax())
            columns = slice(0 if mask.window is None else max(0, first - mask.window + 1), last + 1)
        of = (every if keys is None else keys)[columns]
        hidden = cpu.bias_of(mask.rows(some, of))
        for slot, head in enumerate(range(q.shape[2]) if heads is None else heads.tolist()):
            queries, met = wide(q[:, :, head][:, some]), wide(k[:, :, head // group][:, of])
            scores = torch.bmm(queries, met.transpose(1, 2)).add_(hidden)
            cut = _knocked(mask, head, q.shape[0], some, of)
            if cut is not None and mask.renormalize:
                scores.masked_fill_(cut, float("-inf"))
            pattern = cpu.exp_(scores.sub_(cpu.guarded(lse[:, head, some, None])))
            if cut is not None and not mask.renormalize:
                pattern.masked_fill_(cut, 0)
            yield slot, part, columns, (head, some, of), pattern


def _knocked(mask: Mask, head: int, batch: int, rows: Tensor, keys: Tensor) -> Tensor | None:
    """The edges of one head that are knocked out, [b, row, key]."""
    if mask.knockouts is None:
        return None
    start, stop = mask.knockouts[:, 1].unbind(-1)
    boxes = mask.knockouts[(start <= head) & (head < stop)]
    boxes[:, 1] = boxes.new_tensor([0, 1])
    return replace(mask, knockouts=boxes).knocked(batch, 1, rows, keys)[:, 0]


# All heads, rows and keys, reduced


def attention_pool(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, block: int, reduce: str = "mean") -> Tensor:
    tiled = patterns(q, k, lse, mask)
    pooled = _pool(tiled, lse.new_zeros(_pooled_shape(q, k, block)), block, reduce)
    return pooled if reduce == "max" else pooled.div_(_block_sizes(q, k, block))


def _pooled_shape(q: Tensor, k: Tensor, block: int) -> tuple[int, ...]:
    return (q.shape[0], q.shape[2], -(-q.shape[1] // block), -(-k.shape[1] // block))


def _block_sizes(q: Tensor, k: Tensor, block: int) -> Tensor:
    """How many edges each block has: [query block, key block]."""
    rows, columns = (
        torch.tensor([min(block, n - start) for start in range(0, n, block)], device=q.device, dtype=wide(q[:0]).dtype)
        for n in (q.shape[1], k.shape[1])
    )
    return rows[:, None] * columns


def _pool(tiled: Iterator[tuple[Tile, Tensor]], out: Tensor, block: int, reduce: str) -> Tensor:
    """Sums, or takes the largest, of tiles by blocks, into `out`."""
    for tile, x in tiled:
        x = _by_block(x, tile.rows, block, -2)
        x = x.amax(-2) if reduce == "max" else x.sum(-2)
        x = _by_block(x, tile.keys, block, -1)
        x = x.amax(-1) if reduce == "max" else x.sum(-1)
        rows, keys = (slice(s.start // block, -(-s.stop // block)) for s in (tile.rows, tile.keys))
        into = out[tile.batch, tile.heads, rows, keys]
        into.copy_(torch.maximum(into, x)) if reduce == "max" else into.add_(x)
    return out


def _by_block(x: Tensor, span: slice, block: int, axis: int) -> Tensor:
    """Splits an axis that covers `span` where blocks begin: [block, within], zeros around the span."""
    before, after = span.start % block, -span.stop % block
    if before or after:
        x = F.pad(x, (0, 0) * (-1 - axis) + (before, after))
    return x.unflatten(axis, (-1, block))


def attention_colsum(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    out = lse.new_zeros(q.shape[0], q.shape[2], k.shape[1])
    for tile, pattern in patterns(q, k, lse, mask):
        out[tile.batch, tile.heads, tile.keys] += pattern.sum(-2)
    return out


def attention_topk(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, n: int) -> tuple[Tensor, Tensor]:
    values = lse.new_zeros(*lse.shape, n)
    indices = torch.full(values.shape, -1, device=q.device)
    for tile, pattern in patterns(q, k, lse, mask):
        found = pattern.topk(min(n, pattern.shape[-1]), dim=-1)
        place = (tile.batch, tile.heads, tile.rows, slice(0, found.values.shape[-1]))
        values[place] = found.values
        indices[place] = (found.indices + tile.keys.start).masked_fill_(found.values == 0, -1)
    return values, indices


def attention_entropy(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    out = torch.empty_like(lse)
    for tile, pattern in patterns(q, k, lse, mask):
        out[tile.batch, tile.heads, tile.rows] = torch.special.entr(pattern).sum(-1)
    return out


def attention_by_source(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Mask, source: Tensor, n_sources: int
) -> Tensor:
    out = v.new_zeros(*q.shape[:3], n_sources, v.shape[-1])
    for tile, pattern in patterns(q, k, lse, mask):
        (values,) = operands(tile.of_keys(v))
        flat = pattern.view(len(values), -1, pattern.shape[-1]).to(values.dtype)
        for entries, pairs, number, columns in _sources(tile, source):
            mix = product(flat[pairs][..., columns], values[pairs][:, columns])
            mix = mix.view(-1, *pattern.shape[1:3], v.shape[-1]).transpose(1, 2)
            out[tile.batch, tile.rows, tile.heads, number][entries] = mix.to(v.dtype)
    return out


def _sources(tile: Tile, source: Tensor) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """The sources in a tile: the batch entries where their keys stand in the same columns, counted from the tile's
    first; the same, as (batch, kv head) pairs; the source; and its columns."""
    n_entries, n_heads = tile.batch.stop - tile.batch.start, tile.kv_heads.stop - tile.kv_heads.start
    alike = n_entries if len(source) == 1 else 1
    for entry in range(0, n_entries, alike):
        row = source[0 if len(source) == 1 else tile.batch.start + entry, tile.keys]
        entries, pairs = slice(entry, entry + alike), slice(entry * n_heads, (entry + alike) * n_heads)
        for number in row.unique().tolist():
            yield entries, pairs, number, (row == number).nonzero()[:, 0]


# Backward


def readout_backward(
    name: str, grads: list[Tensor], q: Tensor, k: Tensor, lse: Tensor, mask: Mask, **rest: Any
) -> tuple[Tensor, ...]:
    """dq, dk, dv (of attention_by_source only) and dlse of the read-out of this name; `rest` are its other arguments,
    `grads` the gradients of its outputs, indices left out."""
    grad = wide(grads[0])
    if name == "attention_tiles":
        return _tiles_backward(grad, q, k, lse, mask, **rest)
    dv = zeros_by_head(rest["v"]) if name == "attention_by_source" else None
    slope_at = {
        "attention_pool": _pool_slope,
        "attention_colsum": _colsum_slope,
        "attention_topk": _topk_slope,
        "attention_entropy": _entropy_slope,
        "attention_by_source": _by_source_slope,
    }[name](grad, q, k, lse, mask, **rest, **({} if dv is None else {"dv": dv}))
    dq, dk, dlse = torch.empty_like(q), zeros_by_head(k), torch.empty_like(lse)
    for tile, pattern in patterns(q, k, lse, mask):
        slope = slope_at(tile, pattern) * pattern
        dlse[tile.batch, tile.heads, tile.rows] = -slope.sum(-1)
        queries, keys = wide(tile.of_queries(q)), wide(tile.of_keys(k))
        slope = slope.view(len(keys), -1, slope.shape[-1])
        dq[tile.batch, tile.rows, tile.heads] = tile.by_head(product(slope, keys)).transpose(1, 2).to(q.dtype)
        accumulate(dk[tile.flat, tile.keys], slope.transpose(1, 2), queries)
    return (dq, as_keys(dk, k), *(() if dv is None else (as_keys(dv, rest["v"]),)), dlse)


Slope = Callable[[Tile, Tensor], Tensor]
"""dP of a tile's pattern, both [batch, head, row, key]."""


def _tiles_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask,
    heads: Tensor | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dlse = wide(torch.zeros_like(q)), wide(torch.zeros_like(k)), torch.zeros_like(lse)
    group = q.shape[2] // k.shape[2]
    for slot, part, columns, (head, some, of), pattern in _chosen(q, k, lse, mask, heads, rows, keys):
        slope = grad[:, slot, part, columns] * pattern
        queries, met = wide(q[:, :, head][:, some]), wide(k[:, :, head // group][:, of])
        # An index may be chosen twice.
        dlse[:, head].index_add_(1, some, slope.sum(-1), alpha=-1)
        dq[:, :, head].index_add_(1, some, torch.bmm(slope, met))
        dk[:, :, head // group].index_add_(1, of, torch.bmm(slope.transpose(1, 2), queries))
    return dq.to(q.dtype), dk.to(k.dtype), dlse


def _pool_slope(grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, mask: Mask, block: int, reduce: str = "mean") -> Slope:
    def spread(blocks: Tensor, tile: Tile) -> Tensor:
        """Each edge's block."""
        rows, keys = (torch.arange(s.start, s.stop, device=blocks.device) // block for s in (tile.rows, tile.keys))
        return blocks[tile.batch, tile.heads][:, :, rows[:, None], keys]

    if reduce == "mean":
        grad = grad / _block_sizes(q, k, block)
        return lambda tile, pattern: spread(grad, tile)
    largest = attention_pool(q, k, lse, mask, block, "max")

    def is_largest(tile: Tile, pattern: Tensor) -> Tensor:
        return (pattern == spread(largest, tile)).type_as(pattern)

    # Equal largest ones share the gradient.
    ties = ((tile, is_largest(tile, pattern)) for tile, pattern in patterns(q, k, lse, mask))
    grad = grad / _pool(ties, torch.zeros_like(grad), block, "mean").clamp_min_(1)
    return lambda tile, pattern: spread(grad, tile) * is_largest(tile, pattern)


def _colsum_slope(grad: Tensor, *_: Any) -> Slope:
    return lambda tile, pattern: grad[tile.batch, tile.heads, None, tile.keys]


def _topk_slope(grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, mask: Mask, n: int) -> Slope:
    def slope_at(tile: Tile, pattern: Tensor) -> Tensor:
        indices = pattern.topk(min(n, pattern.shape[-1]), dim=-1).indices
        return torch.zeros_like(pattern).scatter_(-1, indices, grad[tile.batch, tile.heads, tile.rows])

    return slope_at


def _entropy_slope(grad: Tensor, *_: Any) -> Slope:
    tiny = torch.finfo(grad.dtype).tiny  # where P is 0, anything finite will do
    return lambda tile, pattern: grad[tile.batch, tile.heads, tile.rows, None] * -(pattern.clamp_min(tiny).log() + 1)


def _by_source_slope(
    grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, mask: Mask, v: Tensor, source: Tensor, n_sources: int, dv: Tensor
) -> Slope:
    def slope_at(tile: Tile, pattern: Tensor) -> Tensor:
        """Adds to dv on its way."""
        values = wide(tile.of_keys(v))
        slope, flat = torch.empty_like(pattern), pattern.view(len(values), -1, pattern.shape[-1])
        for _, pairs, number, columns in _sources(tile, source):
            dmix = tile.of_queries(grad[:, :, :, number])[pairs]
            slope.view_as(flat)[pairs, :, columns] = product(dmix, values[pairs][:, columns].transpose(1, 2))
            dv[tile.flat][pairs, tile.keys.start + columns] += product(flat[pairs][..., columns].transpose(1, 2), dmix)
        return slope

    return slope_at
