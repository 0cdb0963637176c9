"""What attention kernels share: which edges exist (`Mask`, in Triton), which tiles have any, how tiles are read.

The query heads that share a kv head are folded into rows, head fastest: a tile of BLOCK_Q rows is BLOCK_Q // GROUP
positions of a group of GROUP heads, so that keys and values are read once a group, and one query fills a tensor core.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gemmascope_kernels.mask import Mask
from gemmascope_kernels.tiles import tile

LOG2E = tl.constexpr(1.4426950408889634)


class Edges(NamedTuple):
    """A `Mask` as kernels take it. What is None is compiled away."""

    n_queries: int
    n_keys: int
    window: int | None
    key_mask: Tensor | None
    image_blocks: Tensor | None
    boxes: Tensor | None
    n_boxes: int
    renormalize: tl.constexpr


def edges_of(mask: Mask) -> Edges:
    boxes = mask.knockouts
    return Edges(
        n_queries=mask.n_queries,
        n_keys=mask.n_keys,
        window=None if mask.window is None or mask.window >= mask.n_keys else mask.window,
        key_mask=None if mask.key_mask is None else mask.key_mask.contiguous(),
        image_blocks=None if mask.image_blocks is None else mask.image_blocks.contiguous(),
        boxes=None if boxes is None else boxes.to(mask.device).contiguous(),
        n_boxes=0 if boxes is None else len(boxes),
        renormalize=tl.constexpr(boxes is None or mask.renormalize),
    )


@triton.jit
def image_blocks(edges, i_batch, o_pos):
    """The image number of positions, -1 on text and beyond the last."""
    p_pos = edges.image_blocks + tl.cast(i_batch, tl.int64) * edges.n_keys + o_pos
    return tl.load(p_pos, mask=o_pos < edges.n_keys, other=-1)


@triton.jit
def existing_edges(edges, i_batch, o_head, o_query, o_key, heads, queries, keys):
    """`Mask.rows` and `Mask.knocked` for a tile: the edges in the softmax, and those that reach the values.

    o_query and o_key (counted from the oldest key) and o_head broadcast to the tile; heads, queries and keys are the
    first and last of each, so that a box elsewhere costs no more than finding that out.
    """
    inside = (o_query < edges.n_keys) & (o_key < edges.n_keys)
    seen = o_key <= o_query
    if edges.image_blocks is not None:
        b_image = image_blocks(edges, i_batch, o_key)
        seen |= (image_blocks(edges, i_batch, o_query) == b_image) & (b_image >= 0)
    if edges.window is not None:
        seen &= (o_key > o_query - edges.window) & (o_key < o_query + edges.window)
    if edges.key_mask is not None:
        p_key = edges.key_mask + tl.cast(i_batch, tl.int64) * edges.n_keys + o_key
        b_real = tl.load(p_key, mask=o_key < edges.n_keys, other=0)
        seen = (seen & (b_real != 0)) | (o_key == o_query)
    seen &= inside
    kept = seen
    if edges.boxes is not None:
        for i_box in range(edges.n_boxes):
            p_box = edges.boxes + i_box * 8
            head, head_stop = tl.load(p_box + 2), tl.load(p_box + 3)
            query, query_stop = tl.load(p_box + 4), tl.load(p_box + 5)
            key, key_stop = tl.load(p_box + 6), tl.load(p_box + 7)
            near = (tl.load(p_box) <= i_batch) & (i_batch < tl.load(p_box + 1))
            near &= (head <= heads[1]) & (heads[0] < head_stop)
            near &= (query <= queries[1]) & (queries[0] < query_stop)
            if near & (key <= keys[1]) & (keys[0] < key_stop):
                cut = (o_head >= head) & (o_head < head_stop) & (o_query >= query) & (o_query < query_stop)
                kept &= ~(cut & (o_key >= key) & (o_key < key_stop))
        if edges.renormalize:
            seen = kept
    return seen, kept


@triton.jit
def tile_edges(
    edges,
    i_batch,
    i_head,
    i_query,
    i_key,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEYS_FIRST: tl.constexpr = False,
):
    """`existing_edges` of GROUP heads from i_head on, queries from i_query on and keys from i_key on.

    [BLOCK_Q, BLOCK_K], or [BLOCK_K, BLOCK_Q] with KEYS_FIRST.
    """
    r, o_key = tl.arange(0, BLOCK_Q), i_key + tl.arange(0, BLOCK_K)
    r = r[None, :] if KEYS_FIRST else r[:, None]
    first = edges.n_keys - edges.n_queries + i_query
    return existing_edges(
        edges,
        i_batch,
        i_head + r % GROUP,
        first + r // GROUP,
        o_key[:, None] if KEYS_FIRST else o_key[None, :],
        (i_head, i_head + GROUP - 1),
        (first, first + BLOCK_Q // GROUP - 1),
        (i_key, i_key + BLOCK_K - 1),
    )


@triton.jit
def cut_span(edges, i_batch, i_head, GROUP: tl.constexpr, first, last, OF: tl.constexpr, AXIS: tl.constexpr):
    """Where on AXIS (2 queries, 3 keys) the boxes lie that touch some heads, and first to last on the axis OF."""
    start, stop = edges.n_keys, 0
    for i_box in range(edges.n_boxes):
        p_box = edges.boxes + i_box * 8
        near = (tl.load(p_box) <= i_batch) & (i_batch < tl.load(p_box + 1))
        near &= (tl.load(p_box + 2) < i_head + GROUP) & (i_head < tl.load(p_box + 3))
        if near & (tl.load(p_box + 2 * OF) <= last) & (first < tl.load(p_box + 2 * OF + 1)):
            start = tl.minimum(start, tl.load(p_box + 2 * AXIS).to(tl.int32))
            stop = tl.maximum(stop, tl.load(p_box + 2 * AXIS + 1).to(tl.int32))
    return start, stop


@triton.jit
def longer_side(start, stop, cut, cut_stop):
    """The longer of what is left of [start, stop) before and after [cut, cut_stop)."""
    before = tl.maximum(tl.minimum(stop, cut), start)
    after = tl.minimum(tl.maximum(start, cut_stop), stop)
    return tl.where(before - start >= stop - after, start, after), tl.where(
        before - start >= stop - after, before, stop
    )


@triton.jit
def key_tiles(edges, i_batch, i_head, i_query, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Key tiles that some queries of a tile may see, [start, stop), and in it those that all see, [full, full_stop)."""
    first = edges.n_keys - edges.n_queries + i_query
    last = first + BLOCK_Q // GROUP - 1
    start, full, stop = 0, 0, tl.minimum(last + 1, edges.n_keys)
    if edges.window is not None:
        start = tl.maximum(first - edges.window + 1, 0) // BLOCK_K
        full = tl.cdiv(tl.maximum(last - edges.window + 1, 0), BLOCK_K)
    if edges.image_blocks is not None:
        o = first + tl.arange(0, BLOCK_Q // GROUP)
        if tl.max(image_blocks(edges, i_batch, o)) >= 0:  # positions of an image see to their right
            stop = edges.n_keys
            if edges.window is not None:
                stop = tl.minimum(stop, last + edges.window)
    stop = tl.cdiv(stop, BLOCK_K)
    if edges.key_mask is not None:
        return start, stop, stop, stop
    full = tl.minimum(full, stop)
    full_stop = tl.maximum(full, (first + 1) // BLOCK_K)
    if edges.boxes is not None:
        cut, cut_stop = cut_span(edges, i_batch, i_head, GROUP, first, last, 2, 3)
        full, full_stop = longer_side(full, full_stop, cut // BLOCK_K, tl.cdiv(cut_stop, BLOCK_K))
    return start, full, full_stop, stop


@triton.jit
def query_tiles(edges, i_batch, i_head, i_key, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Query tiles of which some see a tile of keys, [start, stop), and those that see it whole, [full, full_stop).

    A tile that reaches beyond the last key is seen whole by none.
    """
    QUERIES: tl.constexpr = BLOCK_Q // GROUP
    before = edges.n_keys - edges.n_queries
    last = i_key + BLOCK_K - 1
    start, stop, full_stop = i_key, edges.n_keys, edges.n_keys
    if edges.window is not None:
        stop = tl.minimum(stop, last + edges.window)
        full_stop = tl.minimum(full_stop, i_key + edges.window)
    if edges.image_blocks is not None:
        if tl.max(image_blocks(edges, i_batch, i_key + tl.arange(0, BLOCK_K))) >= 0:
            start = 0
            if edges.window is not None:
                start = tl.maximum(i_key - edges.window + 1, 0)
    start = tl.maximum(start - before, 0) // QUERIES
    stop = tl.maximum(start, tl.cdiv(tl.maximum(stop - before, 0), QUERIES))
    if edges.key_mask is not None:
        return start, stop, stop, stop
    full = tl.minimum(tl.cdiv(tl.maximum(last - before, 0), QUERIES), stop)
    full_stop = tl.maximum(full, tl.maximum(full_stop - before, 0) // QUERIES)
    if edges.boxes is not None:
        cut, cut_stop = cut_span(edges, i_batch, i_head, GROUP, i_key, last, 3, 2)
        cut, cut_stop = tl.maximum(cut - before, 0), tl.maximum(cut_stop - before, 0)
        full, full_stop = longer_side(full, full_stop, cut // QUERIES, tl.cdiv(cut_stop, QUERIES))
    return start, full, full_stop, stop


@triton.jit
def edge_tile(i, tiles):
    """The i-th of the tiles that need a mask: those before the full ones, then those after."""
    start, full, full_stop, stop = tiles
    return tl.where(i < full - start, start + i, full_stop + i - (full - start))


# Tiles, and memory


def group_of(op: str, q: Tensor, k: Tensor) -> int:
    """The number of query heads that share a kv head, where kernels take these inputs.

    Raises:
        NotImplementedError: where they do not, and plain PyTorch should run.
    """
    group = q.shape[2] // max(1, k.shape[2])
    if q.dtype == torch.float64:
        raise NotImplementedError(f"{op}: q is float64; the kernel takes float32, float16 and bfloat16.")
    if not (q.numel() and k.numel()):
        raise NotImplementedError(
            f"{op}: q is {list(q.shape)} and k {list(k.shape)}; the kernel takes none that is empty."
        )
    if group & (group - 1):
        raise NotImplementedError(f"{op}: {group} query heads share a kv head; the kernel takes powers of two.")
    return group


class Rows(NamedTuple):
    """A tensor [b, position, head, width] whose tiles are read and written by address; its last axis is dense."""

    ptr: Tensor
    strides: tuple[int, ...]
    n_pos: int
    width: tl.constexpr
    block_shape: tuple[tl.constexpr, ...]


def rows_of(x: Tensor, positions: int, heads: int = 1, parts: int = 1) -> Rows:
    """x in tiles [1, positions, heads, columns], with all columns or one of `parts` of them.

    The first operand of a product comes this way: Triton keeps it in shared memory only if it sees it loaded. So do all
    float32 tiles: their products take registers, which run out when the copy engine's buffers must be emptied first.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    block = (1, positions, heads, padded(x.shape[-1]) // parts)
    return Rows(x, x.stride(), x.shape[1], tl.constexpr(x.shape[-1]), tuple(tl.constexpr(size) for size in block))


def tiles_of(x: Tensor, positions: int, heads: int = 1, parts: int = 1) -> Rows | TensorDescriptor:
    """As `rows_of`, for Hopper's copy engine (TMA): what a tile has beyond x is read as 0, and not written.

    Addresses cost no registers, which at width 512 is the difference between no spills and many.
    """
    if x.dtype == torch.float32:
        return rows_of(x, positions, heads, parts)
    steps = [stride * x.itemsize for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(step % 16 or not step for step in steps):
        x = x.contiguous()
    width = x.shape[-1]
    if width * x.itemsize % 16:
        raise NotImplementedError(f"A head is {width} wide in {x.dtype}; the kernel takes multiples of 16 bytes.")
    strides = [stride if size > 1 else width for stride, size in zip(x.stride()[:-1], x.shape, strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, positions, heads, padded(width) // parts])


def padded(width: int) -> int:
    """Columns of a tile that holds a width: a power of two, and enough for a tensor core."""
    return max(16, 1 << (width - 1).bit_length())


def blocks_for(kernel: Any, width: int, dtype: torch.dtype, size: int, group: int) -> dict[str, int]:
    """The kernel's tile, with room for one position's group of heads; `size` is how many rows there are."""
    blocks = tile(kernel.__name__, width=width, dtype=dtype, size=size)
    return blocks | {"BLOCK_Q": max(blocks["BLOCK_Q"], group)}


@triton.jit
def addresses(x, i_batch, o_pos, o_head, i_column):
    """Where the rows of some `Rows` at these positions and heads are, and what of them exists: [row, columns]."""
    o_column = i_column + tl.arange(0, x.block_shape[3])
    p_rows = x.ptr + tl.cast(i_batch, tl.int64) * x.strides[0]
    p_rows += (o_pos.to(tl.int64) * x.strides[1] + tl.cast(o_head, tl.int64) * x.strides[2])[:, None]
    return p_rows + o_column[None, :], (o_pos < x.n_pos)[:, None] & (o_column < x.width)[None, :]


@triton.jit
def tile_rows(x, i_pos, i_head):
    """Position and head of each row of a tile: heads fastest."""
    r = tl.arange(0, x.block_shape[1] * x.block_shape[2])
    return i_pos + r // x.block_shape[2], i_head + r % x.block_shape[2]


@triton.jit
def load_at(x, i_batch, o_pos, o_head, INTERPRETED: tl.constexpr):
    """[row, columns] of some `Rows`, at each row's position and head; 0 beyond the last position."""
    p_x, m_x = addresses(x, i_batch, o_pos, o_head, 0)
    b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x.to(tl.float32) if INTERPRETED else b_x


@triton.jit
def load_tile(x, i_batch, i_pos, i_head, i_column, INTERPRETED: tl.constexpr):
    """[positions * heads, columns]: a tile of `rows_of` or `tiles_of` a tensor, heads fastest."""
    if isinstance(x, tl.tensor_descriptor):
        b_x = x.load([i_batch, i_pos, i_head, i_column])
        b_x = tl.reshape(b_x, [x.block_shape[1] * x.block_shape[2], x.block_shape[3]])
    else:
        o_pos, o_head = tile_rows(x, i_pos, i_head)
        p_x, m_x = addresses(x, i_batch, o_pos, o_head, i_column)
        b_x = tl.load(p_x, mask=m_x, other=0.0)
    return b_x.to(tl.float32) if INTERPRETED else b_x


@triton.jit
def store_tile(x, i_batch, i_pos, i_head, i_column, b_x):
    """`load_tile` the other way round."""
    if isinstance(x, tl.tensor_descriptor):
        x.store([i_batch, i_pos, i_head, i_column], tl.reshape(b_x.to(x.dtype), x.block_shape))
    else:
        o_pos, o_head = tile_rows(x, i_pos, i_head)
        p_x, m_x = addresses(x, i_batch, o_pos, o_head, i_column)
        tl.store(p_x, b_x.to(x.ptr.dtype.element_ty), mask=m_x)


@triton.jit
def row_numbers(i_batch, i_head, i_query, n_heads, n_queries, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Where a tile's rows stand in something [b, head, query], and which of them exist."""
    r = tl.arange(0, BLOCK_Q)
    o_query = i_query + r // GROUP
    return (tl.cast(i_batch, tl.int64) * n_heads + i_head + r % GROUP) * n_queries + o_query, o_query < n_queries
