"""RMSNorm alone, with the residual added after it, or with rope after it: each forward and each backward one launch.

A program holds whole rows in registers, so that memory is read once. With n = x / rms(x), y = n * w and g = dy * w:

    dx = (g - n * mean(g * n)) / rms(x),    dw = sum over rows of dy * n

The gradients of weights are summed over each program's rows, then over programs by torch: always in the same order.
After Liger-Kernel's ops/rms_norm.py, https://github.com/linkedin/Liger-Kernel (Gemma 4 has no `1 + w`, unlike
Gemma 1 to 3).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemmascope_kernels.launch import launch

_PROGRAMS = 264
"""A backward has no more than these, two for each multiprocessor of an H200: each writes partial sums of its own."""


@triton.jit
def _inverse_rms(b_x, d, eps):
    """1 / rms of each row: [R, D] -> [R, 1]. Columns past d hold zeros."""
    return 1 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) / d + eps)[:, None]


@triton.jit
def _norm_gradients(b_dy, b_x, b_weight, d, eps):
    """dx and, before its sum over rows, dw: both [R, D]; see the top of this file."""
    b_inverse = _inverse_rms(b_x, d, eps)
    b_normed, b_g = b_x * b_inverse, b_dy * b_weight
    b_mean = (tl.sum(b_g * b_normed, axis=1) / d)[:, None]
    return (b_g - b_normed * b_mean) * b_inverse, b_dy * b_normed


# The norm, alone or at the end of a sub-layer


@triton.jit
def _norm_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    scalar_ptr,
    out_ptr,
    n_rows,
    d,
    stride_x,
    stride_residual,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = (residual + x / rms(x) * weight) * scalar, rounded after each of the three. All but x may be None."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_x = (o_row < n_rows) & (o_d < d)
    b_x = tl.load(x_ptr + o_row * stride_x + o_d, mask=m_x, other=0).to(tl.float32)  # [R, D]
    b_out = b_x * _inverse_rms(b_x, d, eps)
    if weight_ptr is not None:
        b_out *= tl.load(weight_ptr + o_d, mask=o_d < d, other=0).to(tl.float32)  # [1, D]
    b_out = b_out.to(T)
    if residual_ptr is not None:
        b_residual = tl.load(residual_ptr + o_row * stride_residual + o_d, mask=m_x, other=0)  # [R, D]
        b_out = (b_residual.to(tl.float32) + b_out.to(tl.float32)).to(T)
    if scalar_ptr is not None:
        b_out = (b_out.to(tl.float32) * tl.load(scalar_ptr).to(tl.float32)).to(T)
    tl.store(out_ptr + o_row * d + o_d, b_out, mask=m_x)


@triton.jit
def _norm_backward_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    residual_ptr,
    scalar_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dscalar_ptr,
    n_rows,
    d,
    stride_dout,
    stride_x,
    stride_residual,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dy = dresidual = dout * scalar; dscalar = sum of dout * (residual + y). What is None is not there.

    A program takes every num_programs-th block of rows, and writes row i_program of dweight and dscalar.
    """
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_weight = tl.full([1, BLOCK_D], 1, tl.float32)
    if weight_ptr is not None:
        b_weight = tl.load(weight_ptr + o_d, mask=o_d < d, other=0).to(tl.float32)  # [1, D]
    b_dweight = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_dscalar = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_row in range(i_program * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R):
        o_row = i_row + tl.arange(0, BLOCK_R).to(tl.int64)[:, None]
        m_x = (o_row < n_rows) & (o_d < d)
        b_x = tl.load(x_ptr + o_row * stride_x + o_d, mask=m_x, other=0).to(tl.float32)  # [R, D]
        b_dy = tl.load(dout_ptr + o_row * stride_dout + o_d, mask=m_x, other=0).to(tl.float32)  # [R, D]
        if scalar_ptr is not None:
            b_residual = tl.load(residual_ptr + o_row * stride_residual + o_d, mask=m_x, other=0)  # [R, D]
            b_dscalar += b_dy * (b_residual.to(tl.float32) + b_x * _inverse_rms(b_x, d, eps) * b_weight)
            b_dy *= tl.load(scalar_ptr).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + o_row * d + o_d, b_dy.to(dresidual_ptr.dtype.element_ty), mask=m_x)
        b_dx, b_dw = _norm_gradients(b_dy, b_x, b_weight, d, eps)
        b_dweight += b_dw
        tl.store(dx_ptr + o_row * d + o_d, b_dx.to(dx_ptr.dtype.element_ty), mask=m_x)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + i_program * d + o_d, tl.sum(b_dweight, axis=0)[None, :], mask=o_d < d)
    if dscalar_ptr is not None:
        tl.store(dscalar_ptr + i_program, tl.sum(b_dscalar))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _norm(x, weight, eps)


def norm_add(residual: Tensor, x: Tensor, weight: Tensor, eps: float, scalar: Tensor | None = None) -> Tensor:
    return _norm(x, weight, eps, residual, scalar)


def _norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, scalar: Tensor | None = None
) -> Tensor:
    leave_float64(x)
    rows, added = _rows(x), None if residual is None else _rows(residual)
    out = rows.new_empty(rows.shape)
    n_rows, d = rows.shape
    blocks = _blocks(d)
    launch(
        _norm_kernel,
        (triton.cdiv(n_rows, blocks["BLOCK_R"]),),
        x_ptr=rows,
        weight_ptr=line(weight),
        residual_ptr=added,
        scalar_ptr=scalar,
        out_ptr=out,
        n_rows=n_rows,
        d=d,
        stride_x=rows.stride(0),
        stride_residual=0 if added is None else added.stride(0),
        eps=eps,
        BLOCK_D=triton.next_power_of_2(d),
        **blocks,
    )
    return out.view(x.shape)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    _, dx, dweight, _ = _norm_backward(dy, x, weight, eps)
    return dx, dweight


def norm_add_backward(
    dy: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float, scalar: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return _norm_backward(dy, x, weight, eps, residual, scalar)


def _norm_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    scalar: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of residual, x, weight and scalar; None for what is None."""
    leave_float64(x)
    rows, pull, added = _rows(x), _rows(dout), None if residual is None else _rows(residual)
    n_rows, d = rows.shape
    blocks = _blocks(d)
    programs = min(_PROGRAMS, triton.cdiv(n_rows, blocks["BLOCK_R"]))
    dx = rows.new_empty(rows.shape)
    dresidual = None if residual is None else rows.new_empty(rows.shape)
    dweight = None if weight is None else rows.new_empty(programs, d, dtype=torch.float32)
    dscalar = None if scalar is None else rows.new_empty(programs, dtype=torch.float32)
    launch(
        _norm_backward_kernel,
        (programs,),
        dout_ptr=pull,
        x_ptr=rows,
        weight_ptr=line(weight),
        residual_ptr=added,
        scalar_ptr=scalar,
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        dweight_ptr=dweight,
        dscalar_ptr=dscalar,
        n_rows=n_rows,
        d=d,
        stride_dout=pull.stride(0),
        stride_x=rows.stride(0),
        stride_residual=0 if added is None else added.stride(0),
        eps=eps,
        BLOCK_D=triton.next_power_of_2(d),
        **blocks,
    )
    return (
        None if residual is None else dresidual.view(x.shape),
        dx.view(x.shape),
        None if weight is None else dweight.sum(0).type_as(weight),
        None if scalar is None else dscalar.sum(0, keepdim=True).type_as(scalar),
    )


# The norm of queries and keys, with rope


@triton.jit
def _head(o_row, q, heads, stride):
    """Where a row, one head of one position, starts in a tensor [b, q, heads, h]: int64, but divided in int32, where
    that is far cheaper."""
    o_b, o_q, o_head = o_row // (q * heads), o_row // heads % q, o_row % heads
    return o_b.to(tl.int64) * stride[0] + o_q.to(tl.int64) * stride[1] + o_head.to(tl.int64) * stride[2]


@triton.jit
def _norm_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    n_rows,
    q,
    heads,
    h,
    x_stride,
    cos_stride,
    sin_stride,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """y = x / rms(x) * weight, rounded; out_i = y_i cos_i -+ y_j sin_i, where j is i's partner in the other half; minus
    in the first half. Both products are rounded, as is the sum."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    o_row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    o_h = tl.arange(0, BLOCK_H)[None, :]
    o_partner = tl.where(o_h < h // 2, o_h + h // 2, o_h - h // 2)
    m_h = o_h < h
    m_x = (o_row < n_rows) & m_h
    p_x = x_ptr + _head(o_row, q, heads, x_stride)
    # The partner's values are read again, from the cache.
    b_x = tl.load(p_x + o_h, mask=m_x, other=0).to(tl.float32)  # [R, H]
    b_x_partner = tl.load(p_x + o_partner, mask=m_x, other=0).to(tl.float32)  # [R, H]
    b_weight = tl.load(weight_ptr + o_h, mask=m_h, other=0).to(tl.float32)  # [1, H]
    b_weight_partner = tl.load(weight_ptr + o_partner, mask=m_h, other=0).to(tl.float32)  # [1, H]
    b_cos = tl.load(cos_ptr + _head(o_row, q, heads, cos_stride) + o_h, mask=m_x, other=0)  # [R, H]
    b_sin = tl.load(sin_ptr + _head(o_row, q, heads, sin_stride) + o_h, mask=m_x, other=0)  # [R, H]
    b_inverse = _inverse_rms(b_x, h, eps)
    b_y = (b_x * b_inverse * b_weight).to(T).to(tl.float32)
    b_y_partner = (b_x_partner * b_inverse * b_weight_partner).to(T).to(tl.float32)
    b_straight = (b_y * b_cos.to(tl.float32)).to(T).to(tl.float32)
    b_across = (b_y_partner * b_sin.to(tl.float32)).to(T).to(tl.float32)
    b_out = tl.where(o_h < h // 2, b_straight - b_across, b_straight + b_across)
    tl.store(out_ptr + o_row.to(tl.int64) * h + o_h, b_out.to(T), mask=m_x)


@triton.jit
def _norm_rope_backward_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    dweight_ptr,
    n_rows,
    q,
    heads,
    h,
    dout_stride,
    x_stride,
    cos_stride,
    sin_stride,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dy_i = dout_i cos_i +- dout_j sin_j, where j is i's partner in the other half; plus in the first half.

    A program takes every num_programs-th block of rows, and writes row i_program of dweight.
    """
    i_program = tl.program_id(0)
    o_h = tl.arange(0, BLOCK_H)[None, :]
    o_partner = tl.where(o_h < h // 2, o_h + h // 2, o_h - h // 2)
    m_h = o_h < h
    b_weight = tl.load(weight_ptr + o_h, mask=m_h, other=0).to(tl.float32)  # [1, H]
    b_dweight = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for i_row in range(i_program * BLOCK_R, n_rows, tl.num_programs(0) * BLOCK_R):
        o_row = i_row + tl.arange(0, BLOCK_R)[:, None]
        m_x = (o_row < n_rows) & m_h
        p_dout = dout_ptr + _head(o_row, q, heads, dout_stride)
        p_x = x_ptr + _head(o_row, q, heads, x_stride)
        p_cos = cos_ptr + _head(o_row, q, heads, cos_stride)
        p_sin = sin_ptr + _head(o_row, q, heads, sin_stride)
        b_x = tl.load(p_x + o_h, mask=m_x, other=0).to(tl.float32)  # [R, H]
        b_dout = tl.load(p_dout + o_h, mask=m_x, other=0).to(tl.float32)  # [R, H]
        b_dout_partner = tl.load(p_dout + o_partner, mask=m_x, other=0).to(tl.float32)  # [R, H]
        b_straight = b_dout * tl.load(p_cos + o_h, mask=m_x, other=0).to(tl.float32)  # [R, H]
        b_across = b_dout_partner * tl.load(p_sin + o_partner, mask=m_x, other=0).to(tl.float32)  # [R, H]
        b_dy = tl.where(o_h < h // 2, b_straight + b_across, b_straight - b_across)
        b_dx, b_dw = _norm_gradients(b_dy, b_x, b_weight, h, eps)
        b_dweight += b_dw
        tl.store(dx_ptr + o_row.to(tl.int64) * h + o_h, b_dx.to(dx_ptr.dtype.element_ty), mask=m_x)
    tl.store(dweight_ptr + i_program * h + o_h, tl.sum(b_dweight, axis=0)[None, :], mask=m_h)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    leave_float64(x)
    out = x.new_empty(x.shape)
    given, n_rows, blocks = _heads(x, weight, cos, sin, eps)
    launch(
        _norm_rope_kernel,
        (triton.cdiv(n_rows, blocks["BLOCK_R"]),),
        out_ptr=out,
        **given,
        **blocks,
    )
    return out


def norm_rope_backward(
    dy: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    leave_float64(x)
    given, n_rows, blocks = _heads(x, weight, cos, sin, eps)
    programs = min(_PROGRAMS, triton.cdiv(n_rows, blocks["BLOCK_R"]))
    pull = line(dy)
    dx = x.new_empty(x.shape)
    dweight = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    launch(
        _norm_rope_backward_kernel,
        (programs,),
        dout_ptr=pull,
        dx_ptr=dx,
        dweight_ptr=dweight,
        dout_stride=pull.stride(),
        **given,
        **blocks,
    )
    return dx, dweight.sum(0).type_as(weight)


def _heads(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[dict, int, dict]:
    """The arguments that the kernels with rope share, how many rows there are, and how they are cut."""
    b, q, heads, h = x.shape
    x, cos, sin = line(x), *(line(table)[:, :, None].expand(x.shape) for table in (cos, sin))
    given = dict(
        x_ptr=x,
        weight_ptr=line(weight),
        cos_ptr=cos,
        sin_ptr=sin,
        n_rows=b * q * heads,
        q=q,
        heads=heads,
        h=h,
        x_stride=x.stride(),
        cos_stride=cos.stride(),
        sin_stride=sin.stride(),
        eps=eps,
        BLOCK_H=triton.next_power_of_2(h),
    )
    return given, b * q * heads, _blocks(h)


# What they share


def leave_float64(x: Tensor) -> None:
    """Leaves float64 to plain PyTorch: these kernels compute in float32."""
    if x.dtype == torch.float64:
        raise NotImplementedError("Triton kernels compute in float32; x is float64, which plain PyTorch takes.")


def _blocks(d: int) -> dict[str, int]:
    """About 2048 numbers a program, or one row: 16 a thread, so that loads are on their way and no register spills."""
    wide = triton.next_power_of_2(d)
    return {"BLOCK_R": max(1, 2048 // wide), "num_warps": min(16, max(4, wide // 512))}


def line(x: Tensor | None) -> Tensor | None:
    """The same, with its last axis contiguous: the kernels take strides for all others."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """The same as [rows, d], a view where the strides allow it."""
    return line(x.reshape(-1, x.shape[-1]))
