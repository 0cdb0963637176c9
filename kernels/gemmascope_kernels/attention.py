"""Attention in Triton, forward and backward: what `reference.attention` means, without an S x S buffer.

1. A program holds a tile of queries, of all heads that share a kv head (see `edges.py`).
2. It visits the key tiles that can be visible. Those on the edge are masked, by `tile_edges`; those that all of
   its queries see whole are not.
3. Where there are too few programs to fill a GPU (decoding), the keys are split over several ("flash-decoding"), and a
   second kernel joins what they found.
4. The backward recomputes the pattern from lse: one kernel stays with its queries and walks over keys (dQ), one stays
   with its keys and walks over queries (dK, dV). Nothing is added atomically, so a run repeats itself exactly.

FlashAttention-2: https://arxiv.org/abs/2307.08691; flash-decoding: https://pytorch.org/blog/flash-decoding.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemmascope_kernels.edges import (
    LOG2E,
    blocks_for,
    edge_tile,
    edges_of,
    group_of,
    key_tiles,
    load_tile,
    query_tiles,
    row_numbers,
    rows_of,
    store_tile,
    tile_edges,
    tiles_of,
)
from gemmascope_kernels.launch import INTERPRETED, launch
from gemmascope_kernels.mask import Mask

LN2 = tl.constexpr(0.6931471805599453)

PROGRAMS = 256
"""Programs that fill a large GPU: keys are split until there are about as many."""
LARGEST_SPLIT = 64
"""Splits that the joining kernel can hold at once."""


# Forward


@triton.jit(do_not_specialize_on_alignment=["n_splits"])
def _attention_kernel(
    q,
    q_turning,
    k,
    v,
    z,
    lse_ptr,
    head_gain_ptr,
    head_gain_strides,
    edges,
    n_splits,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """z = softmax(q k^T) v and lse, of one tile of queries, one group of heads and one split of the keys.

    Running over key tiles (FlashAttention-2, algorithm 1), in powers of two: m' = max(m, max s log2 e);
    acc = acc 2^(m - m') + 2^(s log2 e - m') v; in the end z = acc / total, and lse = ln 2 (m + log2 total).
    q_turning (the K = V form): these columns of the queries meet k, q meets v, which is read once for both its uses.
    """
    i_tile, i_column = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * z.block_shape[3]
    i_query = (tl.num_programs(0) // PARTS - 1 - i_tile) * (BLOCK_Q // GROUP)  # the longest rows start first
    i_kv, i_out = tl.program_id(1), tl.program_id(2)
    i_batch, i_split = i_out // n_splits, i_out % n_splits
    i_head = i_kv * GROUP
    b_q = load_tile(q, i_batch, i_query, i_head, 0, INTERPRETED)  # [BLOCK_Q, width]
    if q_turning is not None:
        b_turning = load_tile(q_turning, i_batch, i_query, i_head, 0, INTERPRETED)

    start, full, full_stop, stop = key_tiles(edges, i_batch, i_head, i_query, GROUP, BLOCK_Q, BLOCK_K)
    if n_splits > 1:
        each = tl.cdiv(stop - start, n_splits)
        start = tl.minimum(start + i_split * each, stop)
        stop = tl.minimum(start + each, stop)
        full = tl.minimum(tl.maximum(full, start), stop)
        full_stop = tl.minimum(tl.maximum(full_stop, start), stop)
    tiles = (start, full, full_stop, stop)

    maximum = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, z.block_shape[3]], tl.float32)
    for WHOLE in tl.static_range(2):  # first the tiles on the edge, then those that all queries see
        for i in range(0, full_stop - full if WHOLE else full - start + stop - full_stop):
            i_key = (full + i if WHOLE else edge_tile(i, tiles)) * BLOCK_K
            b_k = load_tile(k, i_batch, i_key, i_kv, 0, INTERPRETED)  # [BLOCK_K, width of k]
            b_v = load_tile(v, i_batch, i_key, i_kv, i_column, INTERPRETED)  # [BLOCK_K, width / PARTS]
            if q_turning is None:
                score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_Q, BLOCK_K]
            else:
                score = tl.dot(b_turning, tl.trans(b_k), input_precision="ieee")
                score = tl.dot(b_q, tl.trans(b_v), score, input_precision="ieee")
            if not WHOLE:
                seen, kept = tile_edges(edges, i_batch, i_head, i_query, i_key, GROUP, BLOCK_Q, BLOCK_K)
                score = tl.where(seen, score, float("-inf"))
            larger = tl.maximum(maximum, tl.max(score, 1) * LOG2E)
            shift = larger if WHOLE else tl.where(larger == float("-inf"), 0.0, larger)
            weight = tl.exp2(tl.fma(score, LOG2E, -shift[:, None]))
            decay = tl.exp2(maximum - shift)
            total = total * decay + tl.sum(weight, 1)
            if not WHOLE and not edges.renormalize:
                weight = tl.where(kept, weight, 0.0)
            acc = tl.dot(weight.to(b_v.dtype), b_v, acc * decay[:, None], input_precision="ieee")
            maximum = larger

    total = tl.where(total == 0, 1.0, total)  # a row without edges: zeros, and lse -inf
    acc = acc / total[:, None]
    if head_gain_ptr is not None:
        p_gain = head_gain_ptr + i_batch * head_gain_strides[0] + i_head * head_gain_strides[1]
        acc *= tl.load(p_gain + tl.arange(0, BLOCK_Q) % GROUP * head_gain_strides[1]).to(tl.float32)[:, None]
    store_tile(z, i_out, i_query, i_head, i_column, acc)
    n_heads = tl.num_programs(1) * GROUP
    o_row, m_row = row_numbers(i_out, i_head, i_query, n_heads, edges.n_queries, GROUP, BLOCK_Q)
    tl.store(lse_ptr + o_row, (maximum + tl.log2(total)) * LN2, mask=m_row)


@triton.jit
def _attention_join_kernel(
    part_ptr,
    part_lse_ptr,
    z_ptr,
    lse_ptr,
    head_gain_ptr,
    head_gain_strides,
    n_queries,
    n_heads,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """z = sum_i exp(lse_i - lse) z_i and lse = log sum_i exp(lse_i), over the splits of the keys.

    part [b, split, q, H, h], part_lse [b, split, H, q]; one row and BLOCK_D columns a program.
    """
    i_row, i_batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_query, i_head = i_row // n_heads, i_row % n_heads
    o_part = i_batch * SPLITS + tl.arange(0, SPLITS)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_lse = tl.load(part_lse_ptr + (o_part * n_heads + i_head) * n_queries + i_query)  # [SPLITS]
    largest = tl.max(b_lse)
    weight = tl.exp2((b_lse - tl.where(largest == float("-inf"), 0.0, largest)) * LOG2E)
    total = tl.sum(weight)
    total = tl.where(total == 0, 1.0, total)
    o_z = (o_part * tl.num_programs(0) + i_row)[:, None] * WIDTH + o_d[None, :]
    b_z = tl.load(part_ptr + o_z, mask=(o_d < WIDTH)[None, :], other=0.0)  # [SPLITS, BLOCK_D]
    z = tl.sum(b_z * weight[:, None], 0) / total
    if head_gain_ptr is not None:
        z *= tl.load(head_gain_ptr + i_batch * head_gain_strides[0] + i_head * head_gain_strides[1]).to(tl.float32)
    o_z = (i_batch * tl.num_programs(0) + i_row) * WIDTH + o_d
    tl.store(z_ptr + o_z, z.to(z_ptr.dtype.element_ty), mask=o_d < WIDTH)
    tl.store(lse_ptr + (i_batch * n_heads + i_head) * n_queries + i_query, largest + tl.log2(total) * LN2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, head_gain: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `reference.attention`."""
    group = group_of("attention", q, k)
    b, n_queries, n_heads, q_width = q.shape
    n_kv, width = k.shape[2], v.shape[-1]
    turning = q_width - width if q_width != k.shape[-1] else 0
    blocks = blocks_for(_attention_kernel, q_width, q.dtype, n_queries * group, group)
    blocks |= {"PARTS": 1} if turning else {}  # its scores need all columns of v
    queries, parts = blocks["BLOCK_Q"] // group, blocks["PARTS"]
    n_tiles = triton.cdiv(n_queries, queries)
    n_splits = _splits(mask, n_tiles * parts * n_kv * b, blocks["BLOCK_K"])
    z, lse = q.new_empty(b, n_queries, n_heads, width), q.new_empty(b, n_heads, n_queries, dtype=torch.float32)
    part, part_lse = z, lse
    if n_splits > 1:
        part = z.new_empty(b * n_splits, n_queries, n_heads, width, dtype=torch.float32)
        part_lse = lse.new_empty(b * n_splits, n_heads, n_queries)
    gain_strides = (0, 0) if head_gain is None else head_gain.expand(b, n_heads).stride()
    launch(
        _attention_kernel,
        (n_tiles * parts, n_kv, b * n_splits),
        q=rows_of(q[..., turning:], queries, group),
        q_turning=rows_of(q[..., :turning], queries, group) if turning else None,
        k=tiles_of(k, blocks["BLOCK_K"]),
        v=tiles_of(v, blocks["BLOCK_K"], parts=parts),
        z=tiles_of(part, queries, group, parts),
        lse_ptr=part_lse,
        head_gain_ptr=head_gain if n_splits == 1 else None,
        head_gain_strides=gain_strides,
        edges=edges_of(mask),
        n_splits=n_splits,
        GROUP=group,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    if n_splits > 1:
        columns = min(64, triton.next_power_of_2(width))
        launch(
            _attention_join_kernel,
            (n_queries * n_heads, triton.cdiv(width, columns), b),
            part_ptr=part,
            part_lse_ptr=part_lse,
            z_ptr=z,
            lse_ptr=lse,
            head_gain_ptr=head_gain,
            head_gain_strides=gain_strides,
            n_queries=n_queries,
            n_heads=n_heads,
            SPLITS=n_splits,
            WIDTH=width,
            BLOCK_D=columns,
            num_warps=4,
            num_stages=1,
        )
    return z, lse


def _splits(mask: Mask, n_programs: int, block: int) -> int:
    """Into how many parts (a power of two) to split the keys, of four tiles or more each."""
    n_keys = mask.n_keys if mask.window is None else min(mask.n_keys, mask.window + mask.n_queries)
    parts = min(PROGRAMS // n_programs, n_keys // (4 * block), LARGEST_SPLIT)
    return 1 << (max(1, parts).bit_length() - 1)


# Backward


@triton.jit
def _attention_delta_kernel(
    z,
    dz,
    dlse_ptr,
    delta_ptr,
    n_queries,
    BLOCK_Q: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """delta = sum dz z - dlse, of one tile of queries and one head: what every dP of a row has less."""
    i_query, i_head, i_batch = tl.program_id(0) * BLOCK_Q, tl.program_id(1), tl.program_id(2)
    o_row, m_row = row_numbers(i_batch, i_head, i_query, tl.num_programs(1), n_queries, 1, BLOCK_Q)
    b_dz = load_tile(dz, i_batch, i_query, i_head, 0, INTERPRETED)  # [BLOCK_Q, width]
    b_z = load_tile(z, i_batch, i_query, i_head, 0, INTERPRETED)
    delta = tl.sum(b_dz.to(tl.float32) * b_z.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + o_row, mask=m_row, other=0.0).to(tl.float32)
    tl.store(delta_ptr + o_row, delta, mask=m_row)


@triton.jit
def _attention_dq_kernel(
    q,
    k,
    k_part,
    v,
    dz,
    dq,
    lse_ptr,
    delta_ptr,
    edges,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dQ = dS k of one tile of queries, one group of heads and some columns.

    P = exp(s - lse); dS = P (kept dz v^T - delta). FlashAttention-2, algorithm 2.
    """
    i_tile, i_column = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * dq.block_shape[3]
    i_query = (tl.num_programs(0) // PARTS - 1 - i_tile) * (BLOCK_Q // GROUP)
    i_kv, i_batch = tl.program_id(1), tl.program_id(2)
    i_head, n_heads = i_kv * GROUP, tl.num_programs(1) * GROUP
    o_row, m_row = row_numbers(i_batch, i_head, i_query, n_heads, edges.n_queries, GROUP, BLOCK_Q)
    b_lse = tl.load(lse_ptr + o_row, mask=m_row, other=0.0)
    b_delta = tl.load(delta_ptr + o_row, mask=m_row, other=0.0)
    b_q = load_tile(q, i_batch, i_query, i_head, 0, INTERPRETED)  # [BLOCK_Q, width]
    b_dz = load_tile(dz, i_batch, i_query, i_head, 0, INTERPRETED)
    tiles = key_tiles(edges, i_batch, i_head, i_query, GROUP, BLOCK_Q, BLOCK_K)
    start, full, full_stop, stop = tiles
    acc = tl.zeros([BLOCK_Q, dq.block_shape[3]], tl.float32)
    for WHOLE in tl.static_range(2):
        for i in range(0, full_stop - full if WHOLE else full - start + stop - full_stop):
            i_key = (full + i if WHOLE else edge_tile(i, tiles)) * BLOCK_K
            b_k = load_tile(k, i_batch, i_key, i_kv, 0, INTERPRETED)  # [BLOCK_K, width]
            b_v = load_tile(v, i_batch, i_key, i_kv, 0, INTERPRETED)
            b_part = b_k if k_part is None else load_tile(k_part, i_batch, i_key, i_kv, i_column, INTERPRETED)
            log_pattern = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") - b_lse[:, None]  # [BLOCK_Q, BLOCK_K]
            dpattern = tl.dot(b_dz, tl.trans(b_v), input_precision="ieee")
            if not WHOLE:
                seen, kept = tile_edges(edges, i_batch, i_head, i_query, i_key, GROUP, BLOCK_Q, BLOCK_K)
                log_pattern = tl.where(seen, log_pattern, float("-inf"))
                if not edges.renormalize:
                    dpattern = tl.where(kept, dpattern, 0.0)
            dscore = tl.exp2(log_pattern * LOG2E) * (dpattern - b_delta[:, None])
            acc = tl.dot(dscore.to(b_part.dtype), b_part, acc, input_precision="ieee")
    store_tile(dq, i_batch, i_query, i_head, i_column, acc)


@triton.jit
def _attention_dk_kernel(
    q,
    q_part,
    k,
    v,
    dz,
    dk,
    lse_ptr,
    delta_ptr,
    edges,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dK = dS^T q of one tile of keys, summed over the heads that share it. See `_attention_dq_kernel` for dS.

    Tiles stand with keys as rows, so that dS^T goes from registers into the next product.
    """
    i_key, i_column = tl.program_id(0) // PARTS * BLOCK_K, tl.program_id(0) % PARTS * dk.block_shape[3]
    i_kv, i_batch = tl.program_id(1), tl.program_id(2)
    i_head, n_heads = i_kv * GROUP, tl.num_programs(1) * GROUP
    b_k = load_tile(k, i_batch, i_key, i_kv, 0, INTERPRETED)  # [BLOCK_K, width]
    b_v = load_tile(v, i_batch, i_key, i_kv, 0, INTERPRETED)
    tiles = query_tiles(edges, i_batch, i_head, i_key, GROUP, BLOCK_Q, BLOCK_K)
    start, full, full_stop, stop = tiles
    acc = tl.zeros([BLOCK_K, dk.block_shape[3]], tl.float32)
    for WHOLE in tl.static_range(2):
        for i in range(0, full_stop - full if WHOLE else full - start + stop - full_stop):
            i_query = (full + i if WHOLE else edge_tile(i, tiles)) * (BLOCK_Q // GROUP)
            o_row, m_row = row_numbers(i_batch, i_head, i_query, n_heads, edges.n_queries, GROUP, BLOCK_Q)
            b_lse = tl.load(lse_ptr + o_row, mask=m_row, other=0.0)
            b_delta = tl.load(delta_ptr + o_row, mask=m_row, other=0.0)
            b_q = load_tile(q, i_batch, i_query, i_head, 0, INTERPRETED)  # [BLOCK_Q, width]
            b_dz = load_tile(dz, i_batch, i_query, i_head, 0, INTERPRETED)
            b_part = b_q if q_part is None else load_tile(q_part, i_batch, i_query, i_head, i_column, INTERPRETED)
            log_pattern = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") - b_lse[None, :]  # [BLOCK_K, BLOCK_Q]
            dpattern = tl.dot(b_v, tl.trans(b_dz), input_precision="ieee")
            if not WHOLE:
                seen, kept = tile_edges(edges, i_batch, i_head, i_query, i_key, GROUP, BLOCK_Q, BLOCK_K, True)
                log_pattern = tl.where(seen, log_pattern, float("-inf"))
                if not edges.renormalize:
                    dpattern = tl.where(kept, dpattern, 0.0)
            dscore = tl.exp2(log_pattern * LOG2E) * (dpattern - b_delta[None, :])
            acc = tl.dot(dscore.to(b_part.dtype), b_part, acc, input_precision="ieee")
    store_tile(dk, i_batch, i_key, i_kv, i_column, acc)


@triton.jit
def _attention_dv_kernel(
    q,
    k,
    dz,
    dv,
    lse_ptr,
    edges,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dV = (kept P)^T dz of one tile of keys, summed over the heads that share it; keys as rows, as for dK."""
    i_key, i_column = tl.program_id(0) // PARTS * BLOCK_K, tl.program_id(0) % PARTS * dv.block_shape[3]
    i_kv, i_batch = tl.program_id(1), tl.program_id(2)
    i_head, n_heads = i_kv * GROUP, tl.num_programs(1) * GROUP
    b_k = load_tile(k, i_batch, i_key, i_kv, 0, INTERPRETED)  # [BLOCK_K, width]
    tiles = query_tiles(edges, i_batch, i_head, i_key, GROUP, BLOCK_Q, BLOCK_K)
    start, full, full_stop, stop = tiles
    acc = tl.zeros([BLOCK_K, dv.block_shape[3]], tl.float32)
    for WHOLE in tl.static_range(2):
        for i in range(0, full_stop - full if WHOLE else full - start + stop - full_stop):
            i_query = (full + i if WHOLE else edge_tile(i, tiles)) * (BLOCK_Q // GROUP)
            o_row, m_row = row_numbers(i_batch, i_head, i_query, n_heads, edges.n_queries, GROUP, BLOCK_Q)
            b_lse = tl.load(lse_ptr + o_row, mask=m_row, other=0.0)
            b_q = load_tile(q, i_batch, i_query, i_head, 0, INTERPRETED)  # [BLOCK_Q, width]
            b_dz = load_tile(dz, i_batch, i_query, i_head, i_column, INTERPRETED)  # [BLOCK_Q, width / PARTS]
            log_pattern = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") - b_lse[None, :]  # [BLOCK_K, BLOCK_Q]
            if not WHOLE:
                seen, kept = tile_edges(edges, i_batch, i_head, i_query, i_key, GROUP, BLOCK_Q, BLOCK_K, True)
                log_pattern = tl.where(kept, log_pattern, float("-inf"))
            pattern = tl.exp2(log_pattern * LOG2E)
            acc = tl.dot(pattern.to(b_dz.dtype), b_dz, acc, input_precision="ieee")
    store_tile(dv, i_batch, i_key, i_kv, i_column, acc)


def attention_backward(
    dz: Tensor, dlse: Tensor | None, z: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, from those of z (without head_gain) and lse."""
    group = group_of("attention_backward", q, k)
    if q.shape[-1] != k.shape[-1]:
        raise NotImplementedError("attention_backward: q is wider than k (the K = V form), which has no kernel yet.")
    b, n_queries, n_heads, width = q.shape
    n_keys, n_kv = k.shape[1:3]
    edges, lse = edges_of(mask), lse.contiguous()
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(lse.shape)

    launch(
        _attention_delta_kernel,
        (triton.cdiv(n_queries, 16), n_heads, b),
        z=rows_of(z, 16),
        dz=rows_of(dz, 16),
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        delta_ptr=delta,
        n_queries=n_queries,
        BLOCK_Q=16,
        INTERPRETED=INTERPRETED,
        num_warps=4,
        num_stages=1,
    )

    def sizes(kernel: Any) -> tuple[dict[str, int], int, int, int]:
        blocks = blocks_for(kernel, width, q.dtype, n_queries * group, group)
        return blocks, blocks["BLOCK_Q"] // group, blocks["BLOCK_K"], blocks["PARTS"]

    blocks, queries, keys, parts = sizes(_attention_dq_kernel)
    launch(
        _attention_dq_kernel,
        (triton.cdiv(n_queries, queries) * parts, n_kv, b),
        q=rows_of(q, queries, group),
        k=tiles_of(k, keys),
        k_part=None if parts == 1 else tiles_of(k, keys, parts=parts),
        v=tiles_of(v, keys),
        dz=rows_of(dz, queries, group),
        dq=tiles_of(dq, queries, group, parts),
        lse_ptr=lse,
        delta_ptr=delta,
        edges=edges,
        GROUP=group,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    blocks, queries, keys, parts = sizes(_attention_dk_kernel)
    launch(
        _attention_dk_kernel,
        (triton.cdiv(n_keys, keys) * parts, n_kv, b),
        q=tiles_of(q, queries, group),
        q_part=None if parts == 1 else tiles_of(q, queries, group, parts),
        k=rows_of(k, keys),
        v=rows_of(v, keys),
        dz=tiles_of(dz, queries, group),
        dk=tiles_of(dk, keys, parts=parts),
        lse_ptr=lse,
        delta_ptr=delta,
        edges=edges,
        GROUP=group,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    blocks, queries, keys, parts = sizes(_attention_dv_kernel)
    launch(
        _attention_dv_kernel,
        (triton.cdiv(n_keys, keys) * parts, n_kv, b),
        q=tiles_of(q, queries, group),
        k=rows_of(k, keys),
        dz=tiles_of(dz, queries, group, parts),
        dv=tiles_of(dv, keys, parts=parts),
        lse_ptr=lse,
        edges=edges,
        GROUP=group,
        INTERPRETED=INTERPRETED,
        **blocks,
    )
    return dq, dk, dv
