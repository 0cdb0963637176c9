"""What is particular to the Triton attention; test_ops.py has its values and gradients at the tiles of the table."""

import pytest
import torch
from gemmascope_kernels import edges, reference
from gemmascope_kernels.attention import attention, attention_backward
from gemmascope_kernels.cases import draw
from gemmascope_kernels.mask import Mask, box
from gemmascope_kernels.readouts import attention_colsum, attention_entropy, attention_pool, attention_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32 tiles are read by address, those of half precision by the copy engine.
DTYPES = {torch.float32: 4e-5, torch.bfloat16 if DEVICE == "cuda" else torch.float16: 8e-3}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """16 x 16 tiles, so that a few dozen positions have edges and whole tiles; `parts` of the columns a program."""

    def cut(parts: int = 1) -> None:
        def tile(kernel: str, **_: object) -> dict[str, int]:
            one = {"BLOCK_Q": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
            summing = kernel in ("_attention_kernel", *(f"_attention_{d}_kernel" for d in ("dq", "dk", "dv")))
            return one | {"PARTS": parts} if summing else one

        monkeypatch.setattr(edges, "tile", tile)

    return cut


def inputs(dtype: torch.dtype, n_queries: int, n_keys: int, heads: tuple[int, int] = (2, 1), width: int = 32) -> list:
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    sizes = ((n_queries, heads[0]), (n_keys, heads[1]), (n_keys, heads[1]))
    return [
        draw(like, 2, *size, width, scale=0.5 if first else 1) for first, size in zip((1, 0, 0), sizes, strict=True)
    ]


def boxes(n_heads: int, n_keys: int, *cuts: tuple) -> torch.Tensor:
    return torch.stack([box(*cut, (2, n_heads, n_keys, n_keys)) for cut in cuts]).to(DEVICE)


def check(dtype: torch.dtype, given: list, mask: Mask) -> None:
    """z, lse and their gradients against the definition in float64."""
    exact = [x.double().requires_grad_() for x in given]
    z, lse = reference.attention(*exact, mask)
    pulls = [draw(given[0], *z.shape), draw(given[0], *lse.shape).float()]
    wanted = torch.autograd.grad((z, lse), exact, [pull.double() for pull in pulls])
    got_z, got_lse = attention(*given, mask)
    got = attention_backward(*pulls, got_z, got_lse, *given, mask)
    truth = (z.detach(), lse.detach(), *wanted)
    for name, x, y in zip(("z", "lse", "dq", "dk", "dv"), (got_z, got_lse, *got), truth, strict=True):
        limit = DTYPES[dtype] * max(1.0, float(y.abs().max()))
        error = float((x.double() - y).abs().max())
        assert error <= limit, f"{name} is {error:.1e} off, at most {limit:.1e} is allowed"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_whole_tiles_are_not_masked_and_edges_are(small_tiles, dtype: torch.dtype, parts: int) -> None:
    small_tiles(parts)
    for window in (None, 40):
        check(dtype, inputs(dtype, 29, 59), Mask(29, 59, torch.device(DEVICE), window))


@pytest.mark.parametrize("cut", ["early", "late", "middle", "other head"])
def test_tiles_that_no_box_touches_are_whole(small_tiles, cut: str) -> None:
    """Each leaves another side of a row, or of a column, whole."""
    small_tiles()
    every = slice(0, 2), slice(0, 2), slice(0, 59)
    knockouts = {
        "early": boxes(2, 59, (*every, slice(0, 5)), (1, 1, slice(40, 59), slice(9, 20))),
        "late": boxes(2, 59, (*every, slice(50, 59))),
        "middle": boxes(2, 59, (*every, slice(33, 40)), (*every[:2], 57, slice(0, 59))),
        "other head": boxes(2, 59, (slice(0, 2), 1, slice(0, 59), slice(0, 59))),
    }[cut]
    for renormalize in (True, False):
        mask = Mask(45, 59, torch.device(DEVICE), knockouts=knockouts, renormalize=renormalize)
        given = inputs(torch.float32, 45, 59)
        z, lse = attention(*given, mask)
        truth, true_lse = reference.attention(*(x.double() for x in given), mask)
        torch.testing.assert_close(z.double(), truth, rtol=0, atol=4e-5)
        torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=4e-5)
    if cut != "other head":
        check(torch.float32, given, Mask(45, 59, torch.device(DEVICE), 50, knockouts=knockouts[:1], renormalize=False))


def test_an_image_across_tiles_is_seen_to_its_end(small_tiles) -> None:
    small_tiles()
    image_blocks = torch.full((2, 50), -1, device=DEVICE)
    image_blocks[0, 5:40], image_blocks[1, 10:20], image_blocks[1, 21:50] = 0, 0, 1
    for window in (None, 24):
        check(
            torch.float32, inputs(torch.float32, 50, 50), Mask(50, 50, torch.device(DEVICE), window, None, image_blocks)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_the_keys_gives_the_same(small_tiles, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles()
    given = inputs(dtype, 2, 300, heads=(8, 1))
    knockouts = boxes(8, 300, (0, slice(0, 8), 299, slice(0, 300)), (1, 3, 298, slice(64, 128)))
    mask = Mask(2, 300, torch.device(DEVICE), knockouts=knockouts)
    head_gain = torch.linspace(-1, 2, 8, device=DEVICE)[None]
    split = attention(*given, mask, head_gain)
    monkeypatch.setattr("gemmascope_kernels.attention.PROGRAMS", 1)
    whole = attention(*given, mask, head_gain)
    assert split[0][0, 1].eq(0).all() and split[1][0, :, 1].eq(float("-inf")).all(), "a row without edges"
    for one, other in zip(split, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=DTYPES[dtype], atol=DTYPES[dtype])


def test_strides_that_the_copy_engine_refuses_are_copied(small_tiles) -> None:
    small_tiles()
    q, k, v = inputs(torch.float16, 20, 20, width=16)
    odd = torch.zeros(2, 20, 1, 17, dtype=k.dtype, device=DEVICE)  # positions 34 bytes apart
    odd[..., 1:] = v
    mask = Mask(20, 20, torch.device(DEVICE))
    expected = attention(q, k, v, mask)
    for views in ((q, k, odd[..., 1:]), (q, k[:1].expand(2, -1, -1, -1), v), (q.mT.contiguous().mT, k, v)):
        wanted = expected if views[1] is k else attention(q, k[:1].repeat(2, 1, 1, 1), v, mask)
        for one, other in zip(attention(*views, mask), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_lower_key_wins_a_tie(small_tiles) -> None:
    small_tiles()
    q, k, _ = inputs(torch.float32, 40, 40)
    k = k[:, :1].expand(-1, 40, -1, -1)
    mask = Mask(40, 40, torch.device(DEVICE))
    lse = reference.attention(q, k, k, mask)[1]
    values, keys = attention_topk(q, k, lse, mask, 5)
    assert keys[0, 0, 20].tolist() == [0, 1, 2, 3, 4]
    assert keys[0, 0, 2].tolist() == [0, 1, 2, -1, -1]
    torch.testing.assert_close(values[0, 0, 2], torch.tensor([1, 1, 1, 0, 0], device=DEVICE) / 3)


@pytest.mark.parametrize("block", [1, 7, 16, 33])
def test_blocks_smaller_and_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    blocks = {"BLOCK": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr("gemmascope_kernels.readouts.tile", lambda *_, **__: blocks)
    q, k, v = inputs(torch.float32, 41, 50, heads=(2, 1), width=16)
    mask = Mask(41, 50, torch.device(DEVICE), 30)
    lse = reference.attention(q, k, v, mask)[1]
    for reduce in ("mean", "max"):
        got = attention_pool(q, k, lse, mask, block, reduce)
        torch.testing.assert_close(got, reference.attention_pool(q, k, lse, mask, block, reduce), rtol=0, atol=2e-5)


def test_a_pattern_of_one_key_has_no_entropy(small_tiles) -> None:
    small_tiles()
    q, k, v = inputs(torch.float32, 33, 33)
    mask = Mask(33, 33, torch.device(DEVICE), window=1)
    lse = reference.attention(q, k, v, mask)[1]
    torch.testing.assert_close(attention_entropy(q, k, lse, mask), torch.zeros_like(lse), rtol=0, atol=1e-5)
    torch.testing.assert_close(attention_colsum(q, k, lse, mask), torch.ones_like(lse), rtol=0, atol=1e-5)


def test_what_the_kernels_do_not_take_is_left_to_plain_pytorch() -> None:
    def left(dtype: torch.dtype, heads: tuple[int, int], width: int, words: str) -> None:
        mask = Mask(4, 4, torch.device(DEVICE))
        with pytest.raises(NotImplementedError, match=words):
            attention(*inputs(dtype, 4, 4, heads, width), mask)

    left(torch.float64, (2, 1), 16, "float64")
    left(torch.float32, (3, 1), 16, "3 query heads share a kv head")
    left(torch.float16, (2, 1), 12, "12 wide")
    q, k, v = inputs(torch.float32, 4, 4)
    with pytest.raises(NotImplementedError, match="at most 256"):
        attention_topk(q, k, q[..., 0].mT, Mask(4, 4, torch.device(DEVICE)), 300)
