"""The kernels of the experts; experts.py says how they fit together, and starts them.

A slot is one choice of one token, slot = token * k + choice, and what belongs to it stands in memory at that number.
`slots.order` lists slots by expert, `slots.starts` says where in that list each expert's begin: a tile is BLOCK_M of
one expert's. d is the width of the stream, m that of an expert; gate_up is [E, 2 m, d], gate's rows first, and down
[E, d, m].
"""

import triton
import triton.language as tl

# Parts of kernels


@triton.jit
def _passed(x):
    """The part of x that gelu lets through: (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
    Beyond 10 it is 0 or 1 in float32, and exp would overflow."""
    x = tl.minimum(tl.maximum(x, -10.0), 10.0)
    return tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))


@triton.jit
def _gelu(x):
    """gelu with tanh, in float32."""
    return x * _passed(x)


@triton.jit
def _gelu_slope(x):
    """d gelu / dx."""
    b_passed = _passed(x)
    x = tl.minimum(tl.maximum(x, -10.0), 10.0)
    return b_passed + x * b_passed * (1 - b_passed) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@triton.jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _my_tile(slots, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """The expert of this program's tile (n_experts or more past the last), where its slots stand in the order [M], and
    which of those are the expert's."""
    i_tile = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    b_start = tl.load(slots.starts + o_e, mask=o_e < slots.n_experts, other=0)  # [E]
    b_stop = tl.load(slots.starts + o_e + 1, mask=o_e < slots.n_experts, other=0)  # [E]
    b_tiles = (b_stop - b_start + BLOCK_M - 1) // BLOCK_M
    b_past = tl.cumsum(b_tiles)  # the first tile that is no longer this expert's
    i_e = tl.sum((b_past <= i_tile).to(tl.int32))
    first = tl.sum(tl.where(o_e == i_e, b_start + (i_tile - b_past + b_tiles) * BLOCK_M, 0))
    o_m = first + tl.arange(0, BLOCK_M)
    return i_e.to(tl.int64), o_m, o_m < tl.sum(tl.where(o_e == i_e, b_stop, 0))


@triton.jit
def _pairs(i_n, m, BLOCK_N: tl.constexpr):
    """Rows of gate_up that give BLOCK_N columns, gate and up in turn: [2 N], and which exist."""
    o_pair = tl.arange(0, 2 * BLOCK_N)
    o_n = i_n * BLOCK_N + o_pair // 2
    return o_n + o_pair % 2 * m, o_n < m


@triton.jit
def _of(b_slot, per):
    """Each slot's row in what has one row for `per` slots: int64, but divided in int32, where that is far cheaper."""
    return (b_slot.to(tl.int32) // per).to(tl.int64)


@triton.jit
def _at(ptr, stride, i_e, o_row, o_column):
    """Where these entries of one expert's matrix stand, of matrices [E, row, column] with any strides."""
    return ptr + i_e * stride[0] + o_row.to(tl.int64) * stride[1] + o_column.to(tl.int64) * stride[2]


# Many tokens


@triton.jit
def geglu_kernel(
    x_ptr,
    gate_up_ptr,
    slots,
    post_ptr,
    k,
    d,
    m,
    stride_x,
    gate_up_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """post[slot] = gelu(gate[e] x[slot // k]) * (up[e] x[slot // k]); gate, up, gelu and post rounded."""
    T: tl.constexpr = post_ptr.dtype.element_ty
    i_e, o_m, m_m = _my_tile(slots, BLOCK_M, BLOCK_E)
    if i_e >= slots.n_experts:
        return
    o_k = tl.arange(0, BLOCK_K)
    o_pair, m_pair = _pairs(tl.program_id(1), m, BLOCK_N)
    b_slot = tl.load(slots.order + o_m, mask=m_m, other=0)  # [M]
    p_x = x_ptr + _of(b_slot, k)[:, None] * stride_x + o_k[None, :]
    p_w = _at(gate_up_ptr, gate_up_stride, i_e, o_pair[None, :], o_k[:, None])
    b_acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for i_k in range(0, d, BLOCK_K):
        m_k = i_k + o_k < d
        b_x = tl.load(p_x + i_k, mask=m_m[:, None] & m_k[None, :], other=0)  # [M, K]
        b_w = tl.load(p_w + i_k * gate_up_stride[2], mask=m_k[:, None] & m_pair[None, :], other=0)  # [K, 2 N]
        b_acc = _dot(b_x, b_w, b_acc, INTERPRETED)
    b_gate, b_up = tl.split(tl.reshape(b_acc.to(T), [BLOCK_M, BLOCK_N, 2]))
    b_post = _gelu(b_gate.to(tl.float32)).to(T).to(tl.float32) * b_up.to(tl.float32)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(post_ptr + b_slot[:, None] * m + o_n[None, :], b_post.to(T), mask=m_m[:, None] & (o_n < m)[None, :])


@triton.jit
def through_kernel(
    a_ptr,
    matrix_ptr,
    weights_ptr,
    slots,
    out_ptr,
    width,
    inner,
    matrix_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[slot] = weight[slot] * matrix[e] a[slot], matrices being [width, inner]; rounded before and after weight."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    i_e, o_m, m_m = _my_tile(slots, BLOCK_M, BLOCK_E)
    if i_e >= slots.n_experts:
        return
    o_n, o_k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n = o_n < width
    b_slot = tl.load(slots.order + o_m, mask=m_m, other=0)  # [M]
    p_a = a_ptr + b_slot[:, None] * inner + o_k[None, :]
    p_matrix = _at(matrix_ptr, matrix_stride, i_e, o_n[None, :], o_k[:, None])
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, inner, BLOCK_K):
        m_k = i_k + o_k < inner
        b_a = tl.load(p_a + i_k, mask=m_m[:, None] & m_k[None, :], other=0)  # [M, K]
        b_matrix = tl.load(p_matrix + i_k * matrix_stride[2], mask=m_k[:, None] & m_n[None, :], other=0)  # [K, N]
        b_acc = _dot(b_a, b_matrix, b_acc, INTERPRETED)
    b_out = b_acc.to(T)
    if weights_ptr is not None:
        b_weight = tl.load(weights_ptr + b_slot, mask=m_m, other=0).to(tl.float32)  # [M]
        b_out = (b_out.to(tl.float32) * b_weight[:, None]).to(T)
    tl.store(out_ptr + b_slot[:, None] * width + o_n[None, :], b_out, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def sum_kernel(slots_ptr, out_ptr, k, d, BLOCK_D: tl.constexpr):
    """out[token] = sum over its slots, in order and in float32."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_out = tl.zeros([BLOCK_D], tl.float32)
    for i_k in range(k):
        b_out += tl.load(slots_ptr + (i_t * k + i_k) * d + o_d, mask=o_d < d, other=0).to(tl.float32)  # [D]
    tl.store(out_ptr + i_t * d + o_d, b_out.to(out_ptr.dtype.element_ty), mask=o_d < d)


# Few tokens


@triton.jit
def few_geglu_kernel(
    x_ptr,
    indices_ptr,
    gate_up_ptr,
    post_ptr,
    k,
    d,
    m,
    stride_x,
    gate_up_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What geglu_kernel computes, a slot and BLOCK_N of its columns a program."""
    T: tl.constexpr = post_ptr.dtype.element_ty
    i_slot = tl.program_id(1)
    i_e = tl.load(indices_ptr + i_slot)
    o_k = tl.arange(0, BLOCK_K)
    o_pair, m_pair = _pairs(tl.program_id(0), m, BLOCK_N)
    p_x = x_ptr + i_slot // k * stride_x + o_k
    p_w = _at(gate_up_ptr, gate_up_stride, i_e, o_pair[:, None], o_k[None, :])
    b_acc = tl.zeros([2 * BLOCK_N, BLOCK_K], tl.float32)
    for i_k in tl.range(0, d, BLOCK_K, num_stages=STAGES):
        m_k = i_k + o_k < d
        b_x = tl.load(p_x + i_k, mask=m_k, other=0).to(tl.float32)  # [K]
        b_w = tl.load(p_w + i_k * gate_up_stride[2], mask=m_pair[:, None] & m_k[None, :], other=0)  # [2 N, K]
        b_acc += b_w.to(tl.float32) * b_x[None, :]
    b_gate, b_up = tl.split(tl.reshape(tl.sum(b_acc, axis=1).to(T), [BLOCK_N, 2]))
    b_post = _gelu(b_gate.to(tl.float32)).to(T).to(tl.float32) * b_up.to(tl.float32)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(post_ptr + i_slot * m + o_n, b_post.to(T), mask=o_n < m)


@triton.jit
def few_down_kernel(
    post_ptr,
    indices_ptr,
    weights_ptr,
    down_ptr,
    out_ptr,
    k,
    d,
    down_stride,
    M: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[slot] = weight[slot] * down[e] post[slot], or their SUM: a token and BLOCK_N of its columns a program."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    i_t = tl.program_id(1)
    o_n, o_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n = o_n < d
    b_total = tl.zeros([BLOCK_N], tl.float32)
    for i_slot in tl.range(i_t * k, i_t * k + k, num_stages=STAGES):
        i_e = tl.load(indices_ptr + i_slot)
        p_w = _at(down_ptr, down_stride, i_e, o_n[:, None], o_k[None, :])
        b_acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for i_k in tl.static_range(0, M, BLOCK_K):
            m_k = i_k + o_k < M
            b_post = tl.load(post_ptr + i_slot * M + i_k + o_k, mask=m_k, other=0).to(tl.float32)  # [K]
            b_w = tl.load(p_w + i_k * down_stride[2], mask=m_n[:, None] & m_k[None, :], other=0)  # [N, K]
            b_acc += b_w.to(tl.float32) * b_post[None, :]
        b_out = tl.sum(b_acc, axis=1).to(T).to(tl.float32) * tl.load(weights_ptr + i_slot).to(tl.float32)
        if SUM:
            b_total += b_out.to(T).to(tl.float32)
        else:
            tl.store(out_ptr + i_slot * d + o_n, b_out.to(T), mask=m_n)
    if SUM:
        tl.store(out_ptr + i_t * d + o_n, b_total.to(T), mask=m_n)


# Gradients


@triton.jit
def geglu_backward_kernel(
    dout_ptr,
    x_ptr,
    weights_ptr,
    gate_up_ptr,
    down_ptr,
    slots,
    dpre_ptr,
    post_ptr,
    dweights_ptr,
    n_slots,
    k,
    per,
    d,
    m,
    stride_dout,
    stride_x,
    gate_up_stride,
    down_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """With w a slot's weight and dz = down[e]^T dout[slot // per], what reaches it before that weight:

        dpre[slot] = (dgate, dup) = w * dz * (up * gelu'(gate), gelu(gate)),    post[slot] = w * gelu(gate) * up,
        dweights[i_n, slot] = sum of dz * gelu(gate) * up over the columns of tile i_n

    gate and up are computed again. Three products of one shape, so that all that meets below has one layout.
    """
    T: tl.constexpr = post_ptr.dtype.element_ty
    i_e, o_m, m_m = _my_tile(slots, BLOCK_M, BLOCK_E)
    if i_e >= slots.n_experts:
        return
    i_n = tl.program_id(1)
    o_n, o_k = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_n = o_n < m
    b_slot = tl.load(slots.order + o_m, mask=m_m, other=0)  # [M]
    p_x = x_ptr + _of(b_slot, k)[:, None] * stride_x + o_k[None, :]
    p_dout = dout_ptr + _of(b_slot, per)[:, None] * stride_dout + o_k[None, :]
    p_gate = _at(gate_up_ptr, gate_up_stride, i_e, o_n[None, :], o_k[:, None])
    p_up = _at(gate_up_ptr, gate_up_stride, i_e, m + o_n[None, :], o_k[:, None])
    p_down = _at(down_ptr, down_stride, i_e, o_k[:, None], o_n[None, :])
    b_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_dz = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(0, d, BLOCK_K):
        m_k = i_k + o_k < d
        m_rows, m_columns = m_m[:, None] & m_k[None, :], m_k[:, None] & m_n[None, :]
        b_x = tl.load(p_x + i_k, mask=m_rows, other=0)  # [M, K]
        b_dout = tl.load(p_dout + i_k, mask=m_rows, other=0)  # [M, K]
        b_w_gate = tl.load(p_gate + i_k * gate_up_stride[2], mask=m_columns, other=0)  # [K, N]
        b_w_up = tl.load(p_up + i_k * gate_up_stride[2], mask=m_columns, other=0)  # [K, N]
        b_down = tl.load(p_down + i_k * down_stride[1], mask=m_columns, other=0)  # [K, N]
        b_gate = _dot(b_x, b_w_gate, b_gate, INTERPRETED)
        b_up = _dot(b_x, b_w_up, b_up, INTERPRETED)
        b_dz = _dot(b_dout, b_down, b_dz, INTERPRETED)
    b_gate, b_up = b_gate.to(T).to(tl.float32), b_up.to(T).to(tl.float32)
    b_weight = tl.load(weights_ptr + b_slot, mask=m_m, other=0).to(tl.float32)[:, None]  # [M, 1]
    b_gelu = _gelu(b_gate)
    b_post, b_dpost = b_gelu * b_up, b_dz * b_weight
    tl.store(dweights_ptr + i_n * n_slots + b_slot, tl.sum(b_dz * b_post, axis=1), mask=m_m)
    m_out = m_m[:, None] & m_n[None, :]
    tl.store(post_ptr + b_slot[:, None] * m + o_n[None, :], (b_post * b_weight).to(T), mask=m_out)
    p_dpre = dpre_ptr + b_slot[:, None] * (2 * m) + o_n[None, :]
    tl.store(p_dpre, (b_dpost * b_up * _gelu_slope(b_gate)).to(T), mask=m_out)
    tl.store(p_dpre + m, (b_dpost * b_gelu).to(T), mask=m_out)


@triton.jit
def outer_kernel(
    left_ptr,
    right_ptr,
    slots,
    out_ptr,
    left_per,
    right_per,
    height,
    width,
    stride_left,
    stride_right,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[e] = sum over e's slots s of left[s // left_per] right[s // right_per]^T: [height, width]."""
    i_e = tl.program_id(2)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < height, o_n < width
    start, stop = tl.load(slots.starts + i_e), tl.load(slots.starts + i_e + 1)
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_k in range(start, stop, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < stop
        b_slot = tl.load(slots.order + o_k, mask=m_k, other=0)  # [K]
        p_left = left_ptr + _of(b_slot, left_per)[None, :] * stride_left + o_m[:, None]
        p_right = right_ptr + _of(b_slot, right_per)[:, None] * stride_right + o_n[None, :]
        b_left = tl.load(p_left, mask=m_m[:, None] & m_k[None, :], other=0)  # [M, K]
        b_right = tl.load(p_right, mask=m_k[:, None] & m_n[None, :], other=0)  # [K, N]
        b_acc = _dot(b_left, b_right, b_acc, INTERPRETED)
    p_out = out_ptr + (i_e.to(tl.int64) * height + o_m[:, None]) * width + o_n[None, :]
    tl.store(p_out, b_acc.to(out_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])
