"""Every operation in plain PyTorch: the meaning that faster implementations are tested against.

Legend: b batch, q queries, s keys, H query heads, K kv heads, h head width, n rows, E experts.
Arithmetic that decides (norms, scores, softmax) is done in float32 at least, float64 when the input is.
"""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The dtype in which Gemma 4's norms and softmaxes are computed: float32, or float64 for a float64 model."""
    return x if x.dtype == torch.float64 else x.float()


def rms(x: Tensor, eps: float) -> Tensor:
    """Root mean square over the last axis, eps included, that axis kept: [..., d] -> [..., 1], float32 at least."""
    return (wide(x).square().mean(-1, keepdim=True) + eps).sqrt()


def rope_tables(
    positions: Tensor, d_head: int, theta: float, fraction: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary positions, each [b, q, h].

    Dimension i turns with dimension i + h/2. Only the first `fraction` of those pairs turn at all, at the frequencies
    they would have if all of them did ("proportional" rope): theta^(-2i/h), and 0 for the rest.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    turning = int(fraction * d_head // 2)
    frequency = torch.zeros(d_head // 2, dtype=exact, device=positions.device)
    frequency[:turning] = 1.0 / theta ** (
        torch.arange(0, 2 * turning, 2, dtype=exact, device=positions.device) / d_head
    )
    angle = (positions[..., None].to(exact) * frequency).repeat(1, 1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rope to x [b, q, heads, h], with tables from `rope_tables`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def attention_scores(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """Scores [b, H, q, s] of q [b, q, H, h] and k [b, s, K, h]: scale 1, -inf where `visible` [b|1, q, s] is False."""
    grouped = wide(q).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bqkgh,bskh->bkgqs", grouped, wide(k)).flatten(1, 2)
    return scores if visible is None else scores.masked_fill(~visible[:, None], float("-inf"))


def mix_values(pattern: Tensor, v: Tensor) -> Tensor:
    """z [b, q, H, h] from a pattern [b, H, q, s] and v [b, s, K, h]."""
    grouped = pattern.to(v.dtype).unflatten(1, (v.shape[2], -1))
    return torch.einsum("bkgqs,bskh->bqkgh", grouped, v).flatten(2, 3)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """z [b, q, H, h]: softmax of the masked scores, times the values."""
    return mix_values(attention_scores(q, k, visible).softmax(-1), v)


def grouped_linear(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """Row n of x [n, in] times the matrix of its expert, weight [E, out, in]: [n, out]. Rows need not be sorted."""
    order = expert.argsort(stable=True)
    rows = x[order].split(expert.bincount(minlength=weight.shape[0]).tolist())
    parts = [part @ matrix.T for part, matrix in zip(rows, weight, strict=True) if len(part)]
    return torch.cat(parts)[order.argsort()]
