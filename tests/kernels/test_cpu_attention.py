"""What is particular to attention in plain PyTorch: its tiles, its bfloat16 products, and the memory it takes."""

import pytest
import torch
from gemmascope_kernels import cpu, cpu_readouts, reference
from gemmascope_kernels.cases import CASES, TOLERANCE, Case
from gemmascope_kernels.mask import Mask, box
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION = [case for case in CASES if case.op == "attention"]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few rows and few heads, and never the flash kernel: short inputs then meet what long ones do."""
    monkeypatch.setattr(cpu, "TILE", 1 << 12)
    monkeypatch.setattr(cpu, "MOST", 1 << 11)
    monkeypatch.setattr(cpu, "SHORT", -1)
    monkeypatch.setattr(cpu, "SHORT_BACKWARD", {})
    monkeypatch.setattr(cpu, "NARROW", {})
    monkeypatch.setattr(cpu, "NARROW_BACKWARD", {})


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square of the error, as a share of the truth's."""
    error, truth = got.detach().double() - truth.detach(), truth.detach()
    return float(error.square().mean().sqrt() / truth.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_tiles_add_up_to_the_definition(case: Case, dtype: torch.dtype, small_tiles: None) -> None:
    given = case.make(torch.empty(0, dtype=dtype))
    given.pop("head_gain", None)
    q, k, v, mask = given.values()
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth, true_lse = reference.attention(*exact, mask)
    z, lse = cpu.attention(q, k, v, mask)
    edges = ~true_lse.isinf()
    assert torch.equal(lse.isinf(), ~edges)
    dz, dlse = torch.randn_like(z), torch.randn_like(lse).masked_fill(~edges, 0)
    pulled = (truth * dz.double()).sum() + (true_lse.masked_fill(~edges, 0) * dlse.double()).sum()
    expected = torch.autograd.grad(pulled, exact)
    found = cpu.attention_backward(dz, dlse, z, lse, q, k, v, mask)
    for got, want in zip((z, lse[edges], *found), (truth, true_lse[edges], *expected), strict=True):
        scale = max(1.0, float(want.detach().abs().max()))
        torch.testing.assert_close(got.double(), want.detach(), rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("score", [1, 10, 50])
def test_bfloat16_is_as_exact_as_sdpa_with_large_scores(score: float) -> None:
    n, n_heads, width = 384, 4, 128
    q = (torch.randn(1, n, n_heads, width) * score * width**-0.5).bfloat16()
    k, v = (torch.randn(1, n, 2, width).bfloat16() for _ in range(2))
    dz, mask = torch.randn_like(q), Mask(n_queries=n, n_keys=n, device=q.device, window=200)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth, true_lse = reference.attention(*exact, mask)
    truth = (truth, *torch.autograd.grad(truth, exact, dz.double()))

    z, lse = cpu.attention(q, k, v, mask)
    ours = (z, *cpu.attention_backward(dz, torch.zeros_like(lse), z, lse, q, k, v, mask))

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    by_head = [x.transpose(1, 2) for x in leaves]
    sdpa = F.scaled_dot_product_attention(*by_head, attn_mask=mask.visible[:, None], scale=1.0, enable_gqa=True)
    theirs = (sdpa.transpose(1, 2), *torch.autograd.grad(sdpa.transpose(1, 2), leaves, dz))

    assert (lse - true_lse).abs().max() < 1e-2
    for name, got, other, want in zip(("z", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        assert relative(got, want) < 1.5 * relative(other, want), name


def test_bfloat16_decoding_is_exact_at_every_length() -> None:
    """Lengths come as a round number of keys and a rest."""
    n_heads, width = 4, 128
    for n_keys in (1, 5, 63, 64, 65, 127, 1024, 1100, 3001):
        q = (torch.randn(2, 1, n_heads, width) * 10 * width**-0.5).bfloat16()
        k, v = (torch.randn(2, n_keys, 2, width).bfloat16() for _ in range(2))
        mask = Mask(n_queries=1, n_keys=n_keys, device=q.device)
        truth, true_lse = reference.attention(q.double(), k.double(), v.double(), mask)
        z, lse = cpu.attention(q, k, v, mask)
        torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=2e-3)
        assert relative(z, truth) < 4e-3


class Largest(TorchDispatchMode):
    """Notes the most entries that any tensor had that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("window", [None, 50])
def test_nothing_grows_with_the_square_of_the_length(window: int | None, small_tiles: None) -> None:
    b, n, n_heads, width = 2, 700, 4, 16
    q, k = torch.randn(b, n, n_heads, width), torch.randn(b, n, 2, width)
    blocks = torch.full((b, n), -1)
    blocks[:, 100:130] = 0
    mask = Mask(
        n_queries=n,
        n_keys=n,
        device=q.device,
        window=window,
        key_mask=torch.arange(n).expand(b, n) > 3,
        image_blocks=blocks,
        knockouts=box(0, 0, slice(5, 90), slice(0, 40), (b, n_heads, n, n))[None],
    )
    sources = torch.arange(n)[None] // 100
    with Largest() as largest:
        z, lse = cpu.attention(q, k, k, mask)
        cpu.attention_backward(z, lse, z, lse, q, k, k, mask)
        for name, rest in {
            "attention_pool": {"block": 50, "reduce": "max"},
            "attention_colsum": {},
            "attention_topk": {"n": 4},
            "attention_entropy": {},
            "attention_by_source": {"v": k, "source": sources, "n_sources": 7},
            "attention_tiles": {"heads": torch.tensor([1]), "keys": torch.arange(9)},
        }.items():
            out = getattr(cpu_readouts, name)(q=q, k=k, lse=lse, mask=mask, **rest)
            grad = out[0] if isinstance(out, tuple) else out
            cpu_readouts.readout_backward(name, [grad], q=q, k=k, lse=lse, mask=mask, **rest)
    # The largest is z by source, seven times q; a pattern would have seven hundred entries for sixteen of q.
    assert largest.entries == q.numel() * 7 < b * n_heads * n * n / 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_queries", [1, 9])
def test_a_query_without_a_number_has_no_answer(dtype: torch.dtype, n_queries: int) -> None:
    """PyTorch's flash kernel would answer it with zeros, and the model would go on as if nothing had been there."""
    q, k, v = (torch.randn(1, n, heads, 16, dtype=dtype) for n, heads in ((n_queries, 4), (9, 2), (9, 2)))
    mask = Mask(n_queries, 9, q.device)
    whole = cpu.attention(q, k, v, mask)
    q[0, 0, 1, 3] = torch.nan
    z, lse = cpu.attention(q, k, v, mask)
    assert z[0, 0, 1].isnan().all() and lse[0, 1, 0].isnan()
    others = torch.ones(n_queries, 4, dtype=torch.bool)
    others[0, 1] = False
    torch.testing.assert_close(z[0, others], whole[0][0, others], rtol=0, atol=0)
    torch.testing.assert_close(lse[0].T[others], whole[1][0].T[others], rtol=0, atol=0)
