"""What can be read from (q, k, lse), in Triton: the functions of `reference.py`, exact, without an S x S buffer.

Each makes the pattern again, P = exp(q k^T - lse), a tile at a time, with the edges of the forward (`edges.py`), and
keeps what it is asked for. Their gradients are plain PyTorch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemmascope_kernels.edges import (
    LOG2E,
    blocks_for,
    edges_of,
    existing_edges,
    group_of,
    key_tiles,
    load_at,
    load_tile,
    query_tiles,
    row_numbers,
    rows_of,
    tile_edges,
    tiles_of,
)
from gemmascope_kernels.launch import INTERPRETED, launch
from gemmascope_kernels.mask import Mask
from gemmascope_kernels.tiles import tile

LARGEST_N = 256
"""How many keys a row `attention_topk` can hold."""


@triton.jit
def pattern_where(kept, score, b_lse):
    """P and log P, both 0 where an edge is not kept."""
    log_pattern = tl.where(kept, score - b_lse, 0.0)
    return tl.where(kept, tl.exp2(log_pattern * LOG2E), 0.0), log_pattern


@triton.jit
def query_rows(
    q,
    lse_ptr,
    edges,
    i_batch,
    i_kv,
    i_query,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """What a program that stays with its queries holds of them: q [BLOCK_Q, width], lse, and `row_numbers`."""
    n_heads = tl.num_programs(1) * GROUP
    o_row, m_row = row_numbers(i_batch, i_kv * GROUP, i_query, n_heads, edges.n_queries, GROUP, BLOCK_Q)
    b_q = load_tile(q, i_batch, i_query, i_kv * GROUP, 0, INTERPRETED)
    return b_q, tl.load(lse_ptr + o_row, mask=m_row, other=0.0), o_row, m_row


@triton.jit
def pattern_tile(
    b_q,
    b_lse,
    k,
    edges,
    i_batch,
    i_kv,
    i_query,
    i_key,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`pattern_where` [BLOCK_Q, BLOCK_K] of those queries, and keys from i_key on."""
    b_k = load_tile(k, i_batch, i_key, i_kv, 0, INTERPRETED)  # [BLOCK_K, width]
    seen, kept = tile_edges(edges, i_batch, i_kv * GROUP, i_query, i_key, GROUP, BLOCK_Q, BLOCK_K)
    return pattern_where(kept, tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), b_lse[:, None])


@triton.jit
def gathered_pattern(
    q,
    k,
    lse_ptr,
    edges,
    i_batch,
    i_head,
    n_heads,
    b_query,
    b_key,
    queries,
    keys,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """P of one head at any queries and keys; n_queries or n_keys stands for none.

    queries and keys are the first and last, queries counted as keys are.
    """
    b_q = load_at(q, i_batch, b_query, i_head, INTERPRETED)  # [query, width]
    b_k = load_at(k, i_batch, b_key, i_head // GROUP, INTERPRETED)  # [key, width]
    o_lse = (tl.cast(i_batch, tl.int64) * n_heads + i_head) * edges.n_queries + b_query
    b_lse = tl.load(lse_ptr + o_lse, mask=b_query < edges.n_queries, other=0.0)
    o_query = (edges.n_keys - edges.n_queries + b_query)[:, None]
    seen, kept = existing_edges(edges, i_batch, i_head, o_query, b_key[None, :], (i_head, i_head), queries, keys)
    pattern, log_pattern = pattern_where(kept, tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), b_lse[:, None])
    return pattern


# Some of the pattern itself


@triton.jit
def chosen(indices_ptr, o, n, n_all):
    """The o-th of n chosen indices, or o itself where all are; n_all, which is none, beyond the last."""
    if indices_ptr is None:
        return tl.where(o < n, o, n_all)
    else:
        return tl.load(indices_ptr + o, mask=o < n, other=n_all).to(tl.int32)


@triton.jit
def _attention_tiles_kernel(
    q,
    k,
    lse_ptr,
    out_ptr,
    heads_ptr,
    rows_ptr,
    keys_ptr,
    edges,
    n_heads,
    n_chosen_rows,
    n_chosen_keys,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """P[b, heads, rows, keys], gathered as it is made."""
    n_across = tl.cdiv(n_chosen_keys, BLOCK_K)
    i_row, i_key = tl.program_id(0) // n_across * BLOCK_Q, tl.program_id(0) % n_across * BLOCK_K
    i_chosen, i_batch = tl.program_id(1), tl.program_id(2)
    i_head = chosen(heads_ptr, i_chosen, tl.num_programs(1), 0)
    o_row, o_key = i_row + tl.arange(0, BLOCK_Q), i_key + tl.arange(0, BLOCK_K)
    b_query = chosen(rows_ptr, o_row, n_chosen_rows, edges.n_queries)
    b_key = chosen(keys_ptr, o_key, n_chosen_keys, edges.n_keys)
    before = edges.n_keys - edges.n_queries
    queries = before + tl.min(b_query), before + tl.max(b_query)
    keys = tl.min(b_key), tl.max(b_key)
    pattern = gathered_pattern(
        q, k, lse_ptr, edges, i_batch, i_head, n_heads, b_query, b_key, queries, keys, GROUP, INTERPRETED
    )
    o_out = (tl.cast(i_batch, tl.int64) * tl.num_programs(1) + i_chosen) * n_chosen_rows + o_row
    m_out = (o_row < n_chosen_rows)[:, None] & (o_key < n_chosen_keys)[None, :]
    tl.store(out_ptr + o_out[:, None] * n_chosen_keys + o_key[None, :], pattern, mask=m_out)


def attention_tiles(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Mask,
    heads: Tensor | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """See `reference.attention_tiles`."""
    group = group_of("attention_tiles", q, k)
    b, n_queries, n_heads, width = q.shape
    whole = (n_heads, n_queries, k.shape[1])
    sizes = [n if some is None else len(some) for n, some in zip(whole, (heads, rows, keys), strict=True)]
    out = lse.new_empty(b, *sizes)
    if not out.numel():
        return out
    blocks = tile("_attention_tiles_kernel", width=width, dtype=q.dtype, size=sizes[1])
    n_tiles = triton.cdiv(sizes[1], blocks["BLOCK_Q"]) * triton.cdiv(sizes[2], blocks["BLOCK_K"])
    heads, rows, keys = (None if some is None else some.contiguous() for some in (heads, rows, keys))
    launch(
        _attention_tiles_kernel,
        (n_tiles, sizes[0], b),
        q=rows_of(q, 1),
        k=rows_of(k, 1),
        lse_ptr=lse.contiguous(),
        out_ptr=out,
        heads_ptr=heads,
        rows_ptr=rows,
        keys_ptr=keys,
        edges=edges_of(mask),
        n_heads=n_heads,
        n_chosen_rows=sizes[1],
        n_chosen_keys=sizes[2],
        GROUP=group,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    return out


# By blocks


@triton.jit
def _attention_pool_kernel(
    q,
    k,
    lse_ptr,
    out_ptr,
    edges,
    n_across,
    GROUP: tl.constexpr,
    CELL: tl.constexpr,
    STEP: tl.constexpr,
    MAX: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The mean or max of P over cells of CELL queries and CELL keys, for one row of cells, or some.

    A product is BLOCK x BLOCK: BLOCK // STEP cells both ways, of each the next STEP (CELL, padded to a power of two, or
    BLOCK) queries and keys; it takes as many squared as there are steps in a cell.
    """
    CELLS: tl.constexpr = BLOCK // STEP
    STEPS: tl.constexpr = (CELL + STEP - 1) // STEP
    i_cell, i_head, i_batch = tl.program_id(0) * CELLS, tl.program_id(1), tl.program_id(2)
    n_heads = tl.num_programs(1)
    o = tl.arange(0, BLOCK)
    before = edges.n_keys - edges.n_queries
    queries = before + i_cell * CELL, tl.minimum(before + (i_cell + CELLS) * CELL, edges.n_keys) - 1
    start, stop = 0, queries[1] + 1  # the keys that may be seen
    if edges.image_blocks is not None:
        stop = edges.n_keys
    if edges.window is not None:
        start = tl.maximum(queries[0] - edges.window + 1, 0)
        stop = tl.minimum(stop, queries[1] + edges.window)
    for i in range(start // (CELLS * CELL), tl.cdiv(stop, CELLS * CELL)):
        keys = i * CELLS * CELL, (i + 1) * CELLS * CELL - 1
        acc = tl.zeros([CELLS, CELLS], tl.float32)
        for i_step in range(STEPS * STEPS):
            inside_q, inside_k = i_step // STEPS * STEP + o % STEP, i_step % STEPS * STEP + o % STEP
            o_query = (i_cell + o // STEP) * CELL + inside_q
            o_query = tl.where((inside_q < CELL) & (o_query < edges.n_queries), o_query, edges.n_queries)
            o_key = (i * CELLS + o // STEP) * CELL + inside_k
            o_key = tl.where((inside_k < CELL) & (o_key < edges.n_keys), o_key, edges.n_keys)
            pattern = gathered_pattern(
                q, k, lse_ptr, edges, i_batch, i_head, n_heads, o_query, o_key, queries, keys, GROUP, INTERPRETED
            )
            cells = tl.reshape(pattern, [CELLS, STEP, CELLS, STEP])
            if MAX:
                acc = tl.maximum(acc, tl.max(tl.max(cells, 3), 1))
            else:
                acc += tl.sum(tl.sum(cells, 3), 1)
        o_down, o_across = i_cell + tl.arange(0, CELLS), i * CELLS + tl.arange(0, CELLS)
        if not MAX:
            n_rows = tl.minimum(edges.n_queries - o_down * CELL, CELL)
            n_columns = tl.minimum(edges.n_keys - o_across * CELL, CELL)
            acc /= tl.maximum(n_rows[:, None] * n_columns[None, :], 1).to(tl.float32)
        n_cells = tl.cdiv(edges.n_queries, CELL)
        o_out = (tl.cast(i_batch, tl.int64) * n_heads + i_head) * n_cells + o_down
        m_out = (o_down < n_cells)[:, None] & (o_across < n_across)[None, :]
        tl.store(out_ptr + o_out[:, None] * n_across + o_across[None, :], acc, mask=m_out)


def attention_pool(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, block: int, reduce: str = "mean") -> Tensor:
    """See `reference.attention_pool`."""
    group = group_of("attention_pool", q, k)
    b, n_queries, n_heads, width = q.shape
    n_down, n_across = triton.cdiv(n_queries, block), triton.cdiv(k.shape[1], block)
    out = lse.new_zeros(b, n_heads, n_down, n_across)  # only what can be seen is visited
    blocks = tile("_attention_pool_kernel", width=width, dtype=q.dtype, size=n_queries)
    step = min(triton.next_power_of_2(block), blocks["BLOCK"])
    launch(
        _attention_pool_kernel,
        (triton.cdiv(n_down, blocks["BLOCK"] // step), n_heads, b),
        q=rows_of(q, 1),
        k=rows_of(k, 1),
        lse_ptr=lse.contiguous(),
        out_ptr=out,
        edges=edges_of(mask),
        n_across=n_across,
        GROUP=group,
        CELL=block,
        STEP=step,
        MAX=reduce == "max",
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    return out


# By key


@triton.jit
def _attention_colsum_kernel(
    q,
    k,
    lse_ptr,
    out_ptr,
    edges,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """sum_i P_ij of one tile of keys and one head; keys as rows."""
    i_key, i_head, i_batch = tl.program_id(0) * BLOCK_K, tl.program_id(1), tl.program_id(2)
    n_heads = tl.num_programs(1)
    b_k = load_tile(k, i_batch, i_key, i_head // GROUP, 0, INTERPRETED)  # [BLOCK_K, width]
    acc = tl.zeros([BLOCK_K], tl.float32)
    start, full, full_stop, stop = query_tiles(edges, i_batch, i_head, i_key, 1, BLOCK_Q, BLOCK_K)
    for i in range(start, stop):
        i_query = i * BLOCK_Q
        b_q = load_tile(q, i_batch, i_query, i_head, 0, INTERPRETED)  # [BLOCK_Q, width]
        o_row, m_row = row_numbers(i_batch, i_head, i_query, n_heads, edges.n_queries, 1, BLOCK_Q)
        b_lse = tl.load(lse_ptr + o_row, mask=m_row, other=0.0)
        seen, kept = tile_edges(edges, i_batch, i_head, i_query, i_key, 1, BLOCK_Q, BLOCK_K, True)
        score = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_K, BLOCK_Q]
        pattern, log_pattern = pattern_where(kept, score, b_lse[None, :])
        acc += tl.sum(pattern, 1)
    o_key = i_key + tl.arange(0, BLOCK_K)
    o_out = (tl.cast(i_batch, tl.int64) * n_heads + i_head) * edges.n_keys + o_key
    tl.store(out_ptr + o_out, acc, mask=o_key < edges.n_keys)


def attention_colsum(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    """See `reference.attention_colsum`."""
    group = group_of("attention_colsum", q, k)
    b, n_queries, n_heads, width = q.shape
    out = lse.new_empty(b, n_heads, k.shape[1])
    blocks = blocks_for(_attention_colsum_kernel, width, q.dtype, n_queries, 1)
    launch(
        _attention_colsum_kernel,
        (triton.cdiv(k.shape[1], blocks["BLOCK_K"]), n_heads, b),
        q=tiles_of(q, blocks["BLOCK_Q"]),
        k=rows_of(k, blocks["BLOCK_K"]),
        lse_ptr=lse.contiguous(),
        out_ptr=out,
        edges=edges_of(mask),
        GROUP=group,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    return out


# By query


@triton.jit
def _attention_topk_kernel(
    q,
    k,
    lse_ptr,
    out_ptr,
    edges,
    n,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The n largest of each row of P with their keys, in no order, each as value bits * 2^32 + 2^32 - 1 - key.

    Packed so, positive numbers sort by value and then by key, the lower first. The largest of each key tile takes the
    place of the smallest held, as long as it is larger; a place left over holds a number below 0.
    """
    i_query, i_kv, i_batch = tl.program_id(0) * (BLOCK_Q // GROUP), tl.program_id(1), tl.program_id(2)
    b_q, b_lse, o_row, m_row = query_rows(q, lse_ptr, edges, i_batch, i_kv, i_query, GROUP, BLOCK_Q, INTERPRETED)
    o_slot = tl.arange(0, SLOTS).to(tl.int64)
    held = tl.where(o_slot < n, -1 - o_slot, 0x7FFFFFFFFFFFFFFF)[None, :] + tl.zeros([BLOCK_Q, SLOTS], tl.int64)
    start, full, full_stop, stop = key_tiles(edges, i_batch, i_kv * GROUP, i_query, GROUP, BLOCK_Q, BLOCK_K)
    for i in range(start, stop):
        pattern, log_pattern = pattern_tile(
            b_q, b_lse, k, edges, i_batch, i_kv, i_query, i * BLOCK_K, GROUP, BLOCK_Q, BLOCK_K, INTERPRETED
        )
        low_bits = 0xFFFFFFFF - (i * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        packed = (pattern.to(tl.int32, bitcast=True).to(tl.int64) << 32) + low_bits[None, :]
        packed = tl.where(pattern > 0, packed, -0x7FFFFFFFFFFFFFFF)
        largest, smallest = tl.max(packed, 1), tl.min(held, 1)
        while tl.max((largest > smallest).to(tl.int32), 0) > 0:
            replaced = (largest > smallest)[:, None] & (held == smallest[:, None])
            held = tl.where(replaced, largest[:, None], held)
            packed = tl.where(packed == largest[:, None], -0x7FFFFFFFFFFFFFFF, packed)
            largest, smallest = tl.max(packed, 1), tl.min(held, 1)
    tl.store(out_ptr + o_row[:, None] * n + o_slot[None, :], held, mask=m_row[:, None] & (o_slot < n)[None, :])


@triton.jit
def _attention_entropy_kernel(
    q,
    k,
    lse_ptr,
    out_ptr,
    edges,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """-sum_j P_ij log P_ij of one tile of queries and one group of heads."""
    i_query, i_kv, i_batch = tl.program_id(0) * (BLOCK_Q // GROUP), tl.program_id(1), tl.program_id(2)
    b_q, b_lse, o_row, m_row = query_rows(q, lse_ptr, edges, i_batch, i_kv, i_query, GROUP, BLOCK_Q, INTERPRETED)
    acc = tl.zeros([BLOCK_Q], tl.float32)
    start, full, full_stop, stop = key_tiles(edges, i_batch, i_kv * GROUP, i_query, GROUP, BLOCK_Q, BLOCK_K)
    for i in range(start, stop):
        pattern, log_pattern = pattern_tile(
            b_q, b_lse, k, edges, i_batch, i_kv, i_query, i * BLOCK_K, GROUP, BLOCK_Q, BLOCK_K, INTERPRETED
        )
        acc -= tl.sum(pattern * log_pattern, 1)
    tl.store(out_ptr + o_row, acc, mask=m_row)


@triton.jit
def _attention_by_source_kernel(
    q,
    k,
    v,
    lse_ptr,
    out_ptr,
    source_ptr,
    source_stride,
    edges,
    n_sources,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """sum_j P_ij v_j over the keys of one source, of one tile of queries and one group of heads.

    A key tile without a key of the source is passed over, so that sources which are stretches of text cost one pass.
    """
    i_source, i_query = tl.program_id(0) % n_sources, tl.program_id(0) // n_sources * (BLOCK_Q // GROUP)
    i_kv, i_batch = tl.program_id(1), tl.program_id(2)
    b_q, b_lse, o_row, m_row = query_rows(q, lse_ptr, edges, i_batch, i_kv, i_query, GROUP, BLOCK_Q, INTERPRETED)
    acc = tl.zeros([BLOCK_Q, v.block_shape[3]], tl.float32)
    start, full, full_stop, stop = key_tiles(edges, i_batch, i_kv * GROUP, i_query, GROUP, BLOCK_Q, BLOCK_K)
    for i in range(start, stop):
        i_key = i * BLOCK_K
        o_key = i_key + tl.arange(0, BLOCK_K)
        p_source = source_ptr + tl.cast(i_batch, tl.int64) * source_stride + o_key
        ours = tl.load(p_source, mask=o_key < edges.n_keys, other=-1) == i_source
        if tl.max(ours.to(tl.int32), 0) > 0:
            pattern, log_pattern = pattern_tile(
                b_q, b_lse, k, edges, i_batch, i_kv, i_query, i_key, GROUP, BLOCK_Q, BLOCK_K, INTERPRETED
            )
            b_v = load_tile(v, i_batch, i_key, i_kv, 0, INTERPRETED)  # [BLOCK_K, width]
            acc = tl.dot(tl.where(ours[None, :], pattern, 0.0).to(b_v.dtype), b_v, acc, input_precision="ieee")
    r, o_d = tl.arange(0, BLOCK_Q), tl.arange(0, v.block_shape[3])
    o_z = (tl.cast(i_batch, tl.int64) * edges.n_queries + i_query + r // GROUP) * tl.num_programs(1) + i_kv
    o_out = ((o_z * GROUP + r % GROUP) * n_sources + i_source) * WIDTH
    m_out = m_row[:, None] & (o_d < WIDTH)[None, :]
    tl.store(out_ptr + o_out[:, None] + o_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=m_out)


def _by_query(kernel: Any, q: Tensor, k: Tensor, lse: Tensor, mask: Mask, out: Tensor, **rest: Any) -> Tensor:
    """Launches one of these kernels, which fills `out`."""
    group = group_of(kernel.__name__.removeprefix("_").removesuffix("_kernel"), q, k)
    size = rest.get("SLOTS", q.shape[1] * group)  # a row's places are what fills registers
    blocks = blocks_for(kernel, q.shape[-1], q.dtype, size, group)
    queries = blocks["BLOCK_Q"] // group
    if "v" in rest:
        rest |= {"v": tiles_of(rest["v"], blocks["BLOCK_K"]), "WIDTH": rest["v"].shape[-1]}
    launch(
        kernel,
        (triton.cdiv(q.shape[1], queries) * rest.get("n_sources", 1), k.shape[2], q.shape[0]),
        q=rows_of(q, queries, group),
        k=tiles_of(k, blocks["BLOCK_K"]),
        lse_ptr=lse.contiguous(),
        out_ptr=out,
        edges=edges_of(mask),
        GROUP=group,
        INTERPRETED=INTERPRETED,
        **rest,
        **blocks,
    )
    return out


def attention_topk(q: Tensor, k: Tensor, lse: Tensor, mask: Mask, n: int) -> tuple[Tensor, Tensor]:
    """See `reference.attention_topk`."""
    if n > LARGEST_N:
        raise NotImplementedError(f"attention_topk: n is {n}; the kernel takes at most {LARGEST_N}.")
    held = lse.new_empty(*lse.shape, n, dtype=torch.int64)
    held = _by_query(_attention_topk_kernel, q, k, lse, mask, held, n=n, SLOTS=triton.next_power_of_2(n))
    packed = held.sort(-1, descending=True).values
    values, keys = (packed >> 32).int().view(torch.float32), 0xFFFFFFFF - (packed & 0xFFFFFFFF)
    return values.masked_fill(packed < 0, 0), keys.masked_fill(packed < 0, -1)


def attention_entropy(q: Tensor, k: Tensor, lse: Tensor, mask: Mask) -> Tensor:
    """See `reference.attention_entropy`."""
    return _by_query(_attention_entropy_kernel, q, k, lse, mask, lse.new_empty(lse.shape))


def attention_by_source(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Mask, source: Tensor, n_sources: int
) -> Tensor:
    """See `reference.attention_by_source`."""
    out = v.new_empty(*q.shape[:3], n_sources, v.shape[-1])
    by = {"source_ptr": source.contiguous(), "source_stride": 0 if len(source) == 1 else source.shape[1]}
    return _by_query(_attention_by_source_kernel, q, k, lse, mask, out, v=v, n_sources=n_sources, **by)
