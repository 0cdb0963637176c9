"""What is particular to the Triton router, experts and norms; test_ops.py has their values and gradients."""

import pytest
import torch
from gemmascope_kernels import experts, norms, reference, router
from gemmascope_kernels.cases import EPS, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter truncates to bfloat16


def mixture(n: int, d: int, m: int, n_experts: int, k: int, dtype: torch.dtype = torch.float32) -> dict:
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    return {
        "x": draw(like, n, d),
        "indices": torch.randn(n, n_experts, device=DEVICE).topk(k).indices,
        "weights": torch.rand(n, k, device=DEVICE),
        "gate_up": draw(like, n_experts, 2 * m, d, scale=d**-0.5),
        "down": draw(like, n_experts, d, m, scale=m**-0.5),
    }


def routing(n: int, d: int, n_experts: int, dtype: torch.dtype = HALF) -> dict:
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    return {
        "x": draw(like, n, d),
        "scale": 1 + draw(like, d, scale=0.2),
        "proj": draw(like, n_experts, d, scale=2.0),
        "per_expert_scale": 1 + draw(like, n_experts, scale=0.2),
        "eps": EPS,
    }


def test_the_same_experts_are_chosen_in_half_precision() -> None:
    """Sums taken in another order can round a logit to the next number, so that neighbours may change places, and do
    so rarely."""
    given, k = routing(400, 96, 24), 4
    _, indices, _ = router.route(k=k, **given)
    probs, wanted, _ = reference.route(k=k, **given)
    differ = (indices.sort(-1).values != wanted.sort(-1).values).any(-1)
    logits = probs.log().sort(-1, descending=True).values  # but for a constant of each token
    largest = (reference.rms_norm(given["x"], None, EPS) * given["scale"] * 96**-0.5 @ given["proj"].T).abs().amax(-1)
    near = logits[:, k - 1] - logits[:, k] <= 2 * torch.finfo(HALF).eps * largest
    print(f"{int(near.sum())} of {len(near)} tokens have a near-tie, {int(differ.sum())} of them other experts")
    assert near.sum() >= 5, "nothing was put to the test"
    assert not (differ & ~near).any()
    assert differ.sum() <= near.sum() / 4


@pytest.mark.parametrize(("n_experts", "k"), [(8, 3), (11, 11), (128, 8)])
def test_the_lower_index_wins_a_tie(n_experts: int, k: int) -> None:
    given = routing(5, 40, n_experts)
    given["proj"] = given["proj"][:1].repeat(n_experts, 1)
    _, indices, _ = router.route(k=k, **given)
    assert indices.tolist() == [list(range(k))] * 5


def test_a_token_of_which_all_chosen_probabilities_underflow_weighs_nothing() -> None:
    given = routing(5, 40, 8)
    bias = torch.tensor([1000.0] + [0.0] * 7, device=DEVICE)
    forced = torch.tensor([[3, 5]] * 5, device=DEVICE)
    probs, _, weights = router.route(k=2, logit_bias=bias, indices=forced, **given)
    assert probs[:, 0].eq(1).all()
    assert weights.eq(0).all()


@pytest.mark.parametrize("function", [experts.experts, experts.expert_slots])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_few_tokens_give_what_sorting_gives(function, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = mixture(n, 33, 17, 5, 3)
    few = function(**given)
    monkeypatch.setattr(experts, "FEW", 0)
    torch.testing.assert_close(few, function(**given), rtol=1e-5, atol=1e-5)


def test_experts_sums_the_slots() -> None:
    for n in (2, 9):  # few, and sorted
        given = mixture(n, 33, 17, 5, 3, dtype=HALF)
        torch.testing.assert_close(experts.experts(**given), experts.expert_slots(**given).sum(1), rtol=0, atol=0)


def test_every_run_gives_the_same_bits() -> None:
    given = mixture(40, 24, 16, 4, 2)
    dout = torch.randn_like(given["x"])
    runs = [(experts.experts(**given), *experts.experts_backward(dout, **given)) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert first.equal(second)


def test_weights_may_have_any_strides() -> None:
    given = mixture(9, 24, 16, 4, 2)
    dout = torch.randn_like(given["x"])
    strided = given | {name: given[name].mT.contiguous().mT for name in ("gate_up", "down", "x", "weights", "indices")}
    torch.testing.assert_close(experts.experts(**strided), experts.experts(**given))
    few = {name: strided[name][:3] for name in ("x", "weights", "indices")}
    torch.testing.assert_close(experts.experts(**strided | few), experts.experts(**given)[:3])
    expanded = dout[:1].mT.expand(24, 9).mT
    for got, want in zip(
        experts.experts_backward(expanded, **strided),
        experts.experts_backward(expanded.contiguous(), **given),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_slots_stand_by_expert_in_the_order_of_tokens() -> None:
    indices = torch.tensor([[2, 0], [3, 2], [2, 3]], device=DEVICE)
    slots = experts.by_expert(indices, 5)
    assert slots.order.tolist() == [1, 0, 3, 4, 2, 5]
    assert slots.starts.tolist() == [0, 1, 1, 4, 6, 6]


def test_extreme_gates_stay_finite() -> None:
    given = mixture(7, 24, 16, 4, 2)
    given["x"] = given["x"] * 1e15
    dout = torch.randn_like(given["x"])
    for out in (experts.experts(**given), *experts.experts_backward(dout, **given)):
        assert out.isfinite().all()


def test_float64_is_left_to_plain_pytorch() -> None:
    x = torch.ones(2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="float64"):
        norms.rms_norm(x, None, EPS)
