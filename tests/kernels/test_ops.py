"""Every implementation of every operation against its definition in float64: values, gradients, fakes, strides.

Triton runs in its interpreter where there is no GPU. Scratch memory is poisoned with NaN, so that an entry nobody
wrote cannot pass.
"""

import importlib.util

import pytest
import torch
from gemmascope_kernels import checked, library, reference
from gemmascope_kernels.cases import CASES, TOLERANCE, Case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BY = ["reference", "cpu"] + (["triton"] if importlib.util.find_spec("triton") else [])
DTYPES = {
    "reference": [torch.float64],
    "cpu": [torch.float64, torch.float32, torch.bfloat16],
    # The interpreter multiplies bfloat16 bit patterns.
    "triton": [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16],
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """torch.empty and its kin give NaN."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(deterministic)


def floats(given: dict) -> dict[str, torch.Tensor]:
    return {name: x for name, x in given.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


def leaves(case: Case, given: dict) -> list[str]:
    """The arguments that have gradients: the op's own, and the gains that its caller applies."""
    if given.get("reduce") == "max":
        return []  # rows that see one key tie at 1, and rounding says which of them is the largest
    known = {*getattr(library, case.op).differentiable, "head_gain", "slot_gain"}
    return [name for name in floats(given) if name in known]


def several(output) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def assert_close(got: torch.Tensor, truth: torch.Tensor, tolerance: float, what: str) -> None:
    assert not got.isnan().any(), f"{what} has NaN"
    infinite = truth.isinf()
    torch.testing.assert_close(got.isinf(), infinite, msg=f"{what}: infinite elsewhere than the definition")
    error = (got.double() - truth).masked_fill(infinite, 0).abs().max()
    limit = tolerance * max(1.0, float(truth.masked_fill(infinite, 0).abs().max()))
    assert error <= limit, f"{what}: {float(error):.2e} off, at most {limit:.2e} is allowed"


def runs(case: Case):
    return [pytest.param(case, by, dtype, id=f"{case}-{by}-{str(dtype)[6:]}") for by in BY for dtype in DTYPES[by]]


def in_float64(case: Case, given: dict) -> tuple[dict, tuple[torch.Tensor, ...]]:
    exact = {name: x.double() if name in floats(given) else x for name, x in given.items()}
    exact = {name: x.requires_grad_() if name in leaves(case, exact) else x for name, x in exact.items()}
    if case.op == "route" and "indices" not in exact:
        # Rounded logits choose: which experts those are is compared exactly, what they give in float64.
        exact["indices"] = reference.route(**given)[1]
    return exact, several(getattr(reference, case.op)(**exact))


def pointed_to(case: Case, exact: dict, truth: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What an op's indices are indices of: a route's probabilities, or a row of the pattern."""
    if case.op == "route":
        return truth[0].detach()
    return reference.attention_tiles(*(exact[name].detach() for name in ("q", "k", "lse")), exact["mask"])


@pytest.mark.parametrize(("case", "by", "dtype"), [run for case in CASES for run in runs(case)])
def test_equals_the_definition_in_float64(case: Case, by: str, dtype: torch.dtype) -> None:
    given = case.make(torch.empty(0, dtype=dtype, device=DEVICE))
    exact, truth = in_float64(case, given)
    given = {name: x.requires_grad_() if name in leaves(case, given) else x for name, x in given.items()}
    outputs = several(getattr(checked, case.op)(**given, by=by))
    tolerance = TOLERANCE[dtype]
    for number, (got, want) in enumerate(zip(outputs, truth, strict=True)):
        if got.is_floating_point():
            assert_close(got, want.detach(), tolerance, f"output {number}")
        else:  # equal values may stand in either order, so it is the values they point to that are compared
            values = pointed_to(case, exact, truth)
            chosen = [values.gather(-1, index.clamp(min=0)) * (index >= 0) for index in (got, want)]
            assert_close(*chosen, tolerance, "what was chosen")
    if not leaves(case, given):
        return
    real = [out for out in outputs if out.is_floating_point()]
    pulls = [torch.randn_like(out, dtype=torch.float32).to(dtype) for out in real]
    finite = [out.masked_fill(out.isinf(), 0) for out in real]
    sum((out.double() * pull.double()).sum() for out, pull in zip(finite, pulls, strict=True)).backward()
    exact_real = [out.masked_fill(out.isinf(), 0) for out in truth if out.is_floating_point()]
    sum((out * pull.double()).sum() for out, pull in zip(exact_real, pulls, strict=True)).backward()
    for name in leaves(case, given):
        assert_close(given[name].grad, exact[name].grad, 2 * tolerance, f"gradient of {name}")
