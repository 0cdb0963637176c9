"""Norms, rope and the router on a CPU: what `reference.py` means, in fewer passes over memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gemmascope_kernels.reference import choose, wide


def rms(x: Tensor, eps: float) -> Tensor:
    """See `reference.rms`. The sum of squares is taken in one pass, without the squares."""
    return (torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True).square() / x.shape[-1] + eps).sqrt()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    normalized = wide(x) / rms(x, eps)
    return (normalized if weight is None else _in_place(torch.mul, normalized, wide(weight))).type_as(x)


def norm_add(residual: Tensor, x: Tensor, weight: Tensor, eps: float, scalar: Tensor | None = None) -> Tensor:
    """See `reference.norm_add`."""
    out = _in_place(torch.add, rms_norm(x, weight, eps), residual)
    return out if scalar is None else _in_place(torch.mul, out, scalar)


def _in_place(operation, out: Tensor, other: Tensor) -> Tensor:
    """operation(out, other), in the memory of `out`, which nobody else holds, unless autograd may need it."""
    return operation(out, other, out=None if torch.is_grad_enabled() else out)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`. The two halves are turned where they lie."""
    half, cos, sin = x.shape[-1] // 2, cos[:, :, None], sin[:, :, None]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """See `reference.norm_rope`."""
    return rotate(rms_norm(x, weight, eps), cos, sin)


def route(
    x: Tensor,
    scale: Tensor,
    proj: Tensor,
    per_expert_scale: Tensor,
    k: int,
    eps: float,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.route`."""
    entered = _in_place(torch.mul, rms_norm(x, None, eps), scale) * x.shape[-1] ** -0.5
    return choose(F.linear(entered, proj), per_expert_scale, k, logit_bias, allowed, indices)
