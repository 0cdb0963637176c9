"""The norms of Gemma 4: without "+1", in float32, the weight applied before rounding."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gemmascope import ops
from gemmascope.hooks import Part, Site, untouched

Stream = Float[Tensor, "batch pos d_model"]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32, the weight applied before casting back."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class SiteNorm(RMSNorm, Part):
    """An RMSNorm of the stream whose scale and normalized value are hook points, in float32 whatever the dtype."""

    def __init__(self, d: int, eps: float):
        super().__init__(d, eps)
        self.hook_scale, self.hook_normalized = Site(), Site()

    def forward(self, x: Tensor, sites: bool = False) -> Tensor:
        if not (sites and self.shown):
            return super().forward(x)
        normalized = self.hook_normalized(ops.wide(x) / self.hook_scale(ops.rms(x, self.eps)))
        return (normalized * ops.wide(self.weight)).type_as(x)


def added(x: Stream, out: Stream, norm: SiteNorm, scalar: Tensor | None = None) -> Stream:
    """(x + norm(out)) * scalar: a sub-layer's output joins the stream."""
    if untouched(norm, SiteNorm):
        return ops.norm_add(x, out, norm.weight, norm.eps, scalar)
    x = x + norm(out)
    return x if scalar is None else x * scalar
