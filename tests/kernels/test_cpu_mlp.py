"""The MLP on a CPU: some rows at a time, gelu in its other form, and memory that is asked for once."""

import threading

import pytest
import torch
from gemmascope_kernels import cpu, cpu_mlp, cpu_moe, cpu_products, reference
from gemmascope_kernels.cases import CASES, TOLERANCE, draw
from torch.nn import functional as F

from gemmascope import ops


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_mlp, "TOGETHER", 5)
    monkeypatch.setattr(cpu_mlp, "PART", 256)
    monkeypatch.setattr(cpu_products, "_rooms", threading.local())


def weights(like: torch.Tensor, d: int, m: int) -> list[torch.Tensor]:
    return [draw(like, m, d, scale=d**-0.5), draw(like, m, d, scale=d**-0.5), draw(like, d, m, scale=m**-0.5)]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 5, 6, 23])
def test_equals_the_definition(n: int, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    x, matrices = draw(like, 2, n, 33), weights(like, 33, 40)
    got = ops.mlp(x, *matrices)
    truth = reference.mlp(*(part.double() for part in (x.flatten(0, 1), *matrices))).view(x.shape)
    assert got.shape == x.shape and got.dtype == dtype
    limit = TOLERANCE[dtype] * max(1.0, float(truth.abs().amax())) if n else 0
    assert ((got.double() - truth).abs() <= limit).all()


@torch.no_grad()
def test_float32_in_parts_has_the_bits_of_the_pieces() -> None:
    """What a run with hooks computes."""
    x, (gate, up, down) = torch.randn(23, 33), weights(torch.empty(0), 33, 40)
    pieces = [F.linear(ops.geglu(F.linear(row, gate), F.linear(row, up)), down) for row in x.split(5)]
    torch.testing.assert_close(ops.mlp(x, gate, up, down), torch.cat(pieces), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_gelu_has_the_same_bits_wherever_an_element_stands(
    threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes around those from which PyTorch splits the work differently."""
    monkeypatch.setattr(cpu_mlp, "PART", 1 << 17)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gate, up = (torch.randn(100_003, dtype=dtype) for _ in range(2))
        whole = cpu_mlp.geglu(gate, up)
        for n in (1, 63, 33_001, 65_601, 90_001):
            for start in range(8):  # few elements differ where there is a difference
                part = slice(start, start + n)
                assert torch.equal(cpu_mlp.geglu(gate[part], up[part]), whole[part])
    finally:
        torch.set_num_threads(before)


def test_gelu_keeps_what_is_small() -> None:
    """Where x is negative, 1 + tanh rounds away what x sigmoid(2 u) keeps."""
    x = torch.linspace(-5, 5, 10_001)
    exact = F.gelu(x.double(), approximate="tanh")
    error = (cpu_mlp.geglu(x, torch.ones_like(x)) - exact).abs() / exact.abs().clamp_min(1e-30)
    assert error.max() < 3e-6
    ends = cpu_mlp.geglu(torch.tensor([float("inf"), float("nan"), 1e30, -1e30]), torch.ones(4))
    assert ends[0] == float("inf") and ends[1].isnan() and ends[2] == 1e30 and ends[3] == 0


def test_exp_is_exact_at_both_ends() -> None:
    x = torch.tensor([-float("inf"), -200.0, -88.0, -20.0, -1e-4, 0.0, float("nan")])
    got, exact = cpu.exp_(x.clone()), x.double().exp()
    assert got[0] == 0 and got[1] == 0 and got[5] == 1 and got[6].isnan()
    assert ((got - exact).abs() <= exact * 2e-6 + 1e-38)[:6].all()


# Scratch memory


def test_scratch_is_kept_and_grows() -> None:
    like = torch.empty(0)
    first = cpu_products.scratch("a", 3, 4, like=like)
    again = cpu_products.scratch("a", 2, 5, like=like.bfloat16())
    assert first.shape == (3, 4) and again.shape == (2, 5) and again.dtype == torch.bfloat16
    assert again.data_ptr() == first.data_ptr() != cpu_products.scratch("b", 3, 4, like=like).data_ptr()
    larger = cpu_products.scratch("a", 300, like=like)
    assert larger.shape == (300,) and cpu_products.scratch("a", 300, like=like).data_ptr() == larger.data_ptr()


def test_scratch_beyond_what_is_kept_is_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "KEPT", 64)
    one, two = (cpu_products.scratch("a", 17, like=torch.empty(0)) for _ in range(2))
    assert one.data_ptr() != two.data_ptr() and not hasattr(cpu_products._rooms, "a")


def test_scratch_of_inference_mode_serves_outside_it() -> None:
    x, matrices = torch.randn(7, 8), weights(torch.empty(0), 8, 16)
    with torch.inference_mode():
        inside = ops.mlp(x, *matrices)
    with torch.no_grad():
        assert torch.equal(ops.mlp(x, *matrices), inside)


def test_every_thread_has_its_own_scratch() -> None:
    """Calls at the same time do not write into one another."""
    work = [(torch.randn(40, 8), *weights(torch.empty(0), 8, 16)) for _ in range(4)]
    with torch.no_grad():
        expected = [ops.mlp(*given) for given in work]
    wrong = []

    def repeat(given: tuple, right: torch.Tensor) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(ops.mlp(*given), right):
                    wrong.append(given)

    threads = [threading.Thread(target=repeat, args=each) for each in zip(work, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if case.op in ("experts", "expert_slots")], ids=str)
def test_what_is_returned_is_no_scratch(case) -> None:
    """And nothing is read there that this call did not write."""
    given = case.make(torch.empty(0))
    run = getattr(cpu_moe, case.op)
    first = run(**given)
    kept = first.clone()
    for room in vars(cpu_products._rooms).values():
        room.fill_(255)  # NaN in every dtype
    assert torch.equal(run(**given), kept) and torch.equal(first, kept)
