"""Matrix products on a CPU, in the dtype that this machine multiplies fastest, and memory for what lies between them.

bfloat16 has two cases. Where the machine multiplies it at up to 4 times the speed of float32, products come out rounded
to bfloat16, 0.25 off for a score of 100: `product_in_full` asks twice, for the product and then for what the rounding
left. Where it is slower than float32, by 2 on a Xeon without its matrix unit and by 10 where oneDNN has no product of
it, as without AVX-512, products of many rows are made in float32, weights some at a time, and rounded once.
"""

import math
import threading
from functools import cache

import torch
from torch import Tensor

from gemmascope_kernels.reference import wide

BLOCK = 1 << 20
"""Weights that are held in float32 at a time."""
ROWS = 2048
"""Rows that are held in float32 at a time: enough to pay for the weights, which each of these parts converts again."""
MANY = 64
"""Rows from which the arithmetic is the work, and not reading the other factor."""
KEPT = 1 << 28
"""Bytes of scratch memory, of each name, up to which it is kept from call to call."""
_rooms = threading.local()


@cache
def has(dtype: torch.dtype) -> bool:
    """Whether PyTorch has a product of this dtype for this CPU, or goes from number to number."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


@cache
def fast(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are no slower than those of float32.

    Intel's AVX-512 multiplies bfloat16 at half the speed of float32, where it does at all, and leaves it to a matrix
    unit, AMX; AMD's multiplies it at twice that speed and more.
    """
    machine = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 does not have it
    slow = dtype == torch.bfloat16 and "Intel" in machine.get("cpu_name", "") and not machine.get("amx_bf16")
    return has(dtype) and not slow


def natively(dtype: torch.dtype, n_rows: int) -> bool:
    """Whether a product of so many rows is best made in this dtype; of few, reading the other factor is the work."""
    return fast(dtype) or n_rows < (MANY if has(dtype) else 4)


# One matrix, of weights


def in_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., in] meets weight [out, in] faster in float32."""
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    n_rows = math.prod(x.shape[:-1])
    return half and x.is_cpu and not natively(x.dtype, n_rows)


def linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x [row, in] weight^T, in float32, rounded once: [row, out]."""
    out = x.new_empty(len(x), len(weight)) if out is None else out
    for rows in parts(len(x), ROWS):
        exact = wide(x[rows])
        for columns in parts(len(weight), BLOCK // weight.shape[1]):
            out[rows, columns] = exact.mm(wide(weight[columns]).T)
    return out


def linear_backward(dout: Tensor, x: Tensor, weight: Tensor, learned: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, where it is learned, of the weight, from that of `linear`."""
    dx, dweight = torch.empty_like(x), torch.empty_like(weight) if learned else None
    for rows in parts(len(x), ROWS):
        exact, total = wide(dout[rows]), wide(x[:0]).new_zeros(x[rows].shape)
        for columns in parts(len(weight), BLOCK // weight.shape[1]):
            total.addmm_(exact[:, columns], wide(weight[columns]))
        dx[rows] = total
    if learned:
        exact = wide(x)
        for columns in parts(len(weight), BLOCK // weight.shape[1]):
            dweight[columns] = wide(dout[:, columns]).T.mm(exact)
    return dx, dweight


def written(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x [row, in] weight^T, in the faster dtype, in the memory of `out` [row, out]."""
    return linear(x, weight, out) if in_float32(x, weight) else torch.mm(x, weight.T, out=out)


def scratch(name: str, *shape: int, like: Tensor) -> Tensor:
    """Memory for what a call needs and does not return: on a CPU the same for each name, in each thread, as pages that
    are new to the process cost more than what is written there. Nothing holds it between two calls."""
    n_bytes = like.element_size() * math.prod(shape)
    if not like.is_cpu or n_bytes > KEPT:
        return like.new_empty(shape)
    room = getattr(_rooms, name, None)
    if room is None or len(room) < n_bytes:
        with torch.inference_mode(False):  # or only that mode could write there
            room = torch.empty(n_bytes, dtype=torch.uint8)
        setattr(_rooms, name, room)
    return room[:n_bytes].view(like.dtype).view(shape)


def parts(n: int, most: int) -> list[slice]:
    """0 to n, in slices of at most this many, or of one."""
    most = max(1, most)
    return [slice(start, min(n, start + most)) for start in range(0, n, most)]


# Batched, of attention


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The factors [n, row, d] as they are where they are best multiplied so, in float32 otherwise."""
    dtype, n_rows = tensors[0].dtype, tensors[0].shape[1]
    as_they_are = dtype == torch.bfloat16 and (not tensors[0].is_cpu or (has(dtype) and natively(dtype, n_rows)))
    return tensors if as_they_are else tuple(map(wide, tensors))


def grain(n: int) -> int:
    """Numbers of keys come in multiples of about their eighth: oneDNN compiles a bfloat16 product for every new shape,
    which takes 1 ms, and keeps it, in up to 0.7 MB."""
    return max(64, 1 << max(0, n.bit_length() - 4))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, i, j] times b [n, j, k]. With one matrix and few rows, oneDNN's bmm is 10 times slower than its mm."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def add_product(out: Tensor, a: Tensor, b: Tensor, beta: float = 1) -> Tensor:
    """out = beta * out + a b in place, rounded once."""
    if len(a) == 1:
        out[0].addmm_(a[0], b[0], beta=beta)
        return out
    return out.baddbmm_(a, b, beta=beta)


def product_in_full(a: Tensor, b: Tensor) -> Tensor:
    """a b, b [n, d, key], in float32, of bfloat16 factors too: what is rounded off is asked for in a second product."""
    if a.dtype != torch.bfloat16:
        return product(a, b)
    whole, rest = _whole(a.shape[1], b.shape[-1])
    parts = []
    if whole.stop:
        rounded = product(a, b[..., whole])
        parts.append(rounded.float())
        parts[0] += add_product(rounded, a, b[..., whole], beta=-1)
    if rest.start < rest.stop:
        parts.append(product(a.float(), b[..., rest].float()))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def mix(weights: Tensor, total: Tensor, values: Tensor) -> Tensor:
    """weights [n, i, key], float32 at least, by their total [n, i, 1], times values [n, key, d], in the precision of
    the values. The few numbers that come out are divided; in bfloat16, the weights before they are rounded."""
    if values.dtype != torch.bfloat16:
        return product(weights, values).div_(total)
    weights, (whole, rest) = weights.div_(total), _whole(*weights.shape[1:])
    if rest.start == rest.stop:
        return product(weights.to(values.dtype), values)
    out = product(weights[..., rest], values[:, rest].float())
    return out + product(weights[..., whole].to(values.dtype), values[:, whole]) if whole.stop else out


def _whole(n_rows: int, n_keys: int) -> tuple[slice, slice]:
    """All keys, for many rows; for few, as while generating, a round number of them, and the rest, which grows with
    each token: its products are done in float32, where a new shape costs nothing."""
    rest = n_keys % grain(n_keys) if n_rows < 64 else 0
    return slice(0, n_keys - rest), slice(n_keys - rest, n_keys)


def product_less(a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
    """a b - shift [n, i, 1] in float32. Of bfloat16 factors, it is the small difference that is rounded."""
    rough = shift.to(a.dtype)
    difference = rough.neg().expand(-1, -1, b.shape[-1]).contiguous()
    add_product(difference, a, b)
    return difference if a.dtype == shift.dtype else difference.to(shift.dtype).add_(rough - shift)
