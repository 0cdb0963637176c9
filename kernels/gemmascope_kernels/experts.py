"""The experts of a mixture: grouped matrix products that gather and scatter by themselves.

1. The slots (n tokens with k choices each) are sorted by expert on the device, and nobody waits for it.
2. A launch covers the most tiles there can be. Each program finds its expert, and its slots, from where each expert's
   slots start in that order, and ends at once where there are fewer tiles.
3. Gate's and up's rows alternate in one product, so that one thread holds both of a pair and GeGLU needs no exchange.
4. Slots are rounded as the definition rounds them, and a last kernel sums a token's in order. Summing them inside the
   second product would take atomics, since they lie in different tiles, and give other bits each time.

For few tokens, sorting costs more than the products do: there, two launches read each slot's expert themselves.

The backward computes gate and up again. With dz = down^T dout, a slot's gradient before its weight, and
post = gelu(gate) * up:

    dweight = sum dz * post,    dgate = weight * dz * up * gelu'(gate),    dup = weight * dz * gelu(gate)

so that the second product is not needed again; after SonicMoE, https://arxiv.org/abs/2512.14080, and Liger-Kernel's
ops/fused_moe.py, https://github.com/linkedin/Liger-Kernel.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from gemmascope_kernels import expert_kernels as kernels
from gemmascope_kernels.launch import INTERPRETED, launch
from gemmascope_kernels.norms import leave_float64, line
from gemmascope_kernels.tiles import tile

FEW = 4
"""Up to so many tokens, nothing is sorted."""


class Slots(NamedTuple):
    """The slots, by expert, as kernels take them."""

    order: Tensor
    """Slot numbers, those of expert 0 first: int64 [n k]."""
    starts: Tensor
    """Where in that order each expert's begin, and the end: int32 [E + 1]."""
    n_experts: int


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, slot_gain: Tensor | None = None
) -> Tensor:
    if len(x) <= FEW:
        return _few(x, indices, _gained(weights, slot_gain), gate_up, down, summed=True)
    return _sum(expert_slots(x, indices, weights, gate_up, down, slot_gain))


def expert_slots(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, slot_gain: Tensor | None = None
) -> Tensor:
    weights = _gained(weights, slot_gain)
    if len(x) <= FEW:
        return _few(x, indices, weights, gate_up, down, summed=False)
    leave_float64(x)
    x, slots = line(x), by_expert(indices, len(down))
    (n, d), k, m = x.shape, indices.shape[1], down.shape[2]
    post = x.new_empty(n * k, m)
    how = tile("geglu_kernel", width=d, dtype=x.dtype, size=n)
    launch(
        kernels.geglu_kernel,
        (_tiles(slots, how), triton.cdiv(m, how["BLOCK_N"])),
        x_ptr=x,
        gate_up_ptr=gate_up,
        slots=slots,
        post_ptr=post,
        k=k,
        d=d,
        m=m,
        stride_x=x.stride(0),
        gate_up_stride=gate_up.stride(),
        BLOCK_E=triton.next_power_of_2(slots.n_experts),
        INTERPRETED=INTERPRETED,
        **how,
    )
    return _through(post, down, slots, n, weights).view(n, k, d)


def _gained(weights: Tensor, slot_gain: Tensor | None) -> Tensor:
    return (weights if slot_gain is None else weights * slot_gain).contiguous()


def by_expert(indices: Tensor, n_experts: int) -> Slots:
    """Sorts the slots [n, k]. bincount would wait for the device; int16 takes a quarter of a radix sort's passes."""
    expert, order = indices.flatten().to(torch.int16).sort(stable=True)
    bounds = torch.arange(n_experts + 1, dtype=torch.int16, device=indices.device)
    return Slots(order, torch.searchsorted(expert, bounds, out_int32=True), n_experts)


def _tiles(slots: Slots, how: dict[str, int]) -> int:
    """The most tiles there can be: each expert's last one may be nearly empty."""
    n_slots = len(slots.order)
    return triton.cdiv(n_slots, how["BLOCK_M"]) + min(n_slots, slots.n_experts)


def _through(a: Tensor, matrices: Tensor, slots: Slots, n: int, weights: Tensor | None = None) -> Tensor:
    """Each slot's a [n k, inner] through its expert's matrix, of [E, width, inner], times its weight: [n k, width]."""
    width, inner = matrices.shape[1:]
    out = a.new_empty(len(a), width)
    how = tile("through_kernel", width=width, dtype=a.dtype, size=n)
    launch(
        kernels.through_kernel,
        (_tiles(slots, how), triton.cdiv(width, how["BLOCK_N"])),
        a_ptr=a,
        matrix_ptr=matrices,
        weights_ptr=weights,
        slots=slots,
        out_ptr=out,
        width=width,
        inner=inner,
        matrix_stride=matrices.stride(),
        BLOCK_E=triton.next_power_of_2(slots.n_experts),
        INTERPRETED=INTERPRETED,
        **how,
    )
    return out


def _sum(slots: Tensor) -> Tensor:
    """[n, k, d] -> [n, d]."""
    n, k, d = slots.shape
    out = slots.new_empty(n, d)
    block = min(1024, triton.next_power_of_2(d))
    launch(
        kernels.sum_kernel,
        (n, triton.cdiv(d, block)),
        slots_ptr=slots,
        out_ptr=out,
        k=k,
        d=d,
        BLOCK_D=block,
    )
    return out


def _few(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, summed: bool) -> Tensor:
    """Slots [n, k, d], or their sum [n, d]."""
    leave_float64(x)
    x, indices = line(x), indices.contiguous()
    (n, d), k, m = x.shape, indices.shape[1], down.shape[2]
    post = x.new_empty(n * k, m)
    how = tile("few_geglu_kernel", width=d, dtype=x.dtype, size=n)
    launch(
        kernels.few_geglu_kernel,
        (triton.cdiv(m, how["BLOCK_N"]), n * k),
        x_ptr=x,
        indices_ptr=indices,
        gate_up_ptr=gate_up,
        post_ptr=post,
        k=k,
        d=d,
        m=m,
        stride_x=x.stride(0),
        gate_up_stride=gate_up.stride(),
        STAGES=how["num_stages"],
        **how,
    )
    out = x.new_empty((n, d) if summed else (n, k, d))
    how = tile("few_down_kernel", width=d, dtype=x.dtype, size=n)
    launch(
        kernels.few_down_kernel,
        (triton.cdiv(d, how["BLOCK_N"]), n),
        post_ptr=post,
        indices_ptr=indices,
        weights_ptr=weights,
        down_ptr=down,
        out_ptr=out,
        k=k,
        d=d,
        down_stride=down.stride(),
        M=m,
        SUM=summed,
        STAGES=how["num_stages"],
        **how,
    )
    return out


Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Of x, weights, gate_up and down; None for the last two where they are not learned."""


def experts_backward(
    dout: Tensor, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, learned: bool = True
) -> Gradients:
    """Every slot of a token gets the same dout [n, d]."""
    return _backward(dout, indices.shape[1], x, indices, weights, gate_up, down, learned)


def expert_slots_backward(
    dslots: Tensor, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, learned: bool = True
) -> Gradients:
    return _backward(dslots.flatten(0, 1), 1, x, indices, weights, gate_up, down, learned)


def _backward(
    dout: Tensor, per: int, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, learned: bool
) -> Gradients:
    """Row i of dout pulls at slots i * per to (i + 1) * per."""
    leave_float64(x)
    dout, x, slots = line(dout), line(x), by_expert(indices, len(down))
    (n, d), k, m = x.shape, indices.shape[1], down.shape[2]
    dpre, post = x.new_empty(n * k, 2 * m), x.new_empty(n * k, m)
    how = tile("geglu_backward_kernel", width=d, dtype=x.dtype, size=n)
    columns = triton.cdiv(m, how["BLOCK_N"])
    dweights = x.new_empty(columns, n, k, dtype=torch.float32)
    launch(
        kernels.geglu_backward_kernel,
        (_tiles(slots, how), columns),
        dout_ptr=dout,
        x_ptr=x,
        weights_ptr=weights.contiguous(),
        gate_up_ptr=gate_up,
        down_ptr=down,
        slots=slots,
        dpre_ptr=dpre,
        post_ptr=post,
        dweights_ptr=dweights,
        n_slots=n * k,
        k=k,
        per=per,
        d=d,
        m=m,
        stride_dout=dout.stride(0),
        stride_x=x.stride(0),
        gate_up_stride=gate_up.stride(),
        down_stride=down.stride(),
        BLOCK_E=triton.next_power_of_2(slots.n_experts),
        INTERPRETED=INTERPRETED,
        **how,
    )
    dx = _sum(_through(dpre, gate_up.mT, slots, n).view(n, k, d))
    dgate_up = _outer(dpre, 1, x, k, slots, n) if learned else None
    ddown = _outer(dout, per, post, 1, slots, n) if learned else None
    return dx, dweights.sum(0).type_as(weights), dgate_up, ddown


def _outer(left: Tensor, left_per: int, right: Tensor, right_per: int, slots: Slots, n: int) -> Tensor:
    """left^T right over each expert's slots: [E, width of left, width of right]. Row i of either holds for slots
    i * per to (i + 1) * per."""
    height, width = left.shape[1], right.shape[1]
    out = left.new_empty(slots.n_experts, height, width)
    how = tile("outer_kernel", width=max(height, width), dtype=left.dtype, size=n)
    launch(
        kernels.outer_kernel,
        (triton.cdiv(height, how["BLOCK_M"]), triton.cdiv(width, how["BLOCK_N"]), slots.n_experts),
        left_ptr=left,
        right_ptr=right,
        slots=slots,
        out_ptr=out,
        left_per=left_per,
        right_per=right_per,
        height=height,
        width=width,
        stride_left=left.stride(0),
        stride_right=right.stride(0),
        INTERPRETED=INTERPRETED,
        **how,
    )
    return out
