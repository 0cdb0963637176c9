"""bfloat16 on a CPU: in its own products, or in float32 where those are slow, some weights at a time."""

import pytest
import torch
from gemmascope_kernels import checked, cpu, cpu_products, library, reference
from gemmascope_kernels.cases import CASES, TOLERANCE, Case
from torch.nn import functional as F

import gemmascope as gs
from gemmascope import ops
from gemmascope.model.linear import Linear

OPS = ("attention", "experts", "expert_slots", "grouped_linear", "linear")


@pytest.fixture(params=[True, False], ids=["as it is", "in float32"])
def machine(request, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the machine is one that multiplies bfloat16 fast. Parts are small, so that a case has several."""
    monkeypatch.setattr(cpu_products, "has", lambda dtype: True)
    monkeypatch.setattr(cpu_products, "fast", lambda dtype: request.param)
    monkeypatch.setattr(cpu_products, "MANY", 3)
    monkeypatch.setattr(cpu_products, "BLOCK", 700)
    monkeypatch.setattr(cpu_products, "ROWS", 5)
    monkeypatch.setattr(cpu, "SHORT", -1)
    monkeypatch.setattr(cpu, "NARROW", {})
    return request.param


@pytest.mark.parametrize("case", [case for case in CASES if case.op in OPS], ids=str)
def test_equals_the_definition_on_either_machine(case: Case, machine: bool) -> None:
    given = case.make(torch.empty(0, dtype=torch.bfloat16))
    exact = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in given.items()
    }
    learned = [name for name in getattr(library, case.op).differentiable if name in given]
    for name in learned:
        given[name].requires_grad_(), exact[name].requires_grad_()
    got, truth = getattr(checked, case.op)(**given, by="cpu"), getattr(reference, case.op)(**exact)
    got, truth = (out[0] if case.op == "attention" else out for out in (got, truth))
    pull = torch.randn_like(got)
    got.backward(pull), truth.backward(pull.double())
    pairs = [(got.detach(), truth.detach())] + [(given[name].grad, exact[name].grad) for name in learned]
    for ours, definition in pairs:
        limit = 2 * TOLERANCE[torch.bfloat16] * max(1.0, float(definition.abs().max()))
        assert (ours.double() - definition).abs().max() <= limit


@pytest.mark.parametrize("columns", [1, 33, 64])
def test_float32_products_are_rounded_once(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_products, "BLOCK", 33 * columns)
    monkeypatch.setattr(cpu_products, "ROWS", 4)
    x, weight = torch.randn(11, 33).bfloat16(), torch.randn(64, 33).bfloat16()
    exact = x.double() @ weight.double().T
    error = (cpu_products.linear(x, weight).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 1e-4).all()  # half of the last of 8 bits, and what float32 adds


def test_who_multiplies_in_float32(machine: bool) -> None:
    few, many, weight = torch.randn(2, 1, 8).bfloat16(), torch.randn(2, 2, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    assert cpu_products.in_float32(many, weight) is not machine
    assert not cpu_products.in_float32(few, weight)  # reading the weight is the work
    assert not cpu_products.in_float32(many.float(), weight.float())
    assert not cpu_products.in_float32(many.to("meta"), weight.to("meta"))


def test_no_product_at_all_is_slower_from_a_few_rows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("has", "fast"):
        monkeypatch.setattr(cpu_products, name, lambda dtype: False)
    weight = torch.randn(5, 8).bfloat16()
    found = [cpu_products.in_float32(torch.randn(n, 8).bfloat16(), weight) for n in (1, 3, 4, 400)]
    assert found == [False, False, True, True]
    assert cpu_products.natively(torch.bfloat16, 1) and not cpu_products.natively(torch.bfloat16, 4)


def test_linear_takes_what_pytorch_takes(machine: bool) -> None:
    layer = Linear(8, 5).bfloat16()
    for shape in ((8,), (2, 8), (0, 8), (2, 3, 8), (2, 1, 3, 8)):
        x = torch.randn(shape).bfloat16()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=2e-2, atol=2e-2)
        assert layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        layer(torch.randn(4, 8))


@torch.no_grad()
def test_a_model_is_the_same_on_either_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that is watched has the bits of one that is not."""
    model = gs.load("nano-edge", dtype="bfloat16")
    tokens, logits = torch.randint(3, 1000, (2, 70)), []
    exact = gs.load("nano-edge")(tokens)
    calls, linear = [], cpu_products.linear
    monkeypatch.setattr(cpu_products, "linear", lambda x, weight, *out: calls.append(len(x)) or linear(x, weight, *out))
    for fast in (True, False):
        monkeypatch.setattr(cpu_products, "has", lambda dtype: True)
        monkeypatch.setattr(cpu_products, "fast", lambda dtype, fast=fast: fast)
        assert not calls
        logits.append(model(tokens))
        assert torch.equal(model.run_with_cache(tokens, names_filter=lambda name: True)[0], logits[-1])
    assert calls and set(calls) == {140}
    off = [(got - exact).square().mean().sqrt() for got in logits]
    assert off[1] <= 1.1 * off[0]


def test_only_wanted_gradients_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen model's weights cost nothing."""
    case = next(case for case in CASES if case.op == "experts" and case.name == "many")
    given = case.make(torch.empty(0))
    gain = given.pop("slot_gain")
    given["weights"] = given["weights"] * gain
    given["x"].requires_grad_()
    learned = {name: x.clone().requires_grad_() if name in ("gate_up", "down") else x for name, x in given.items()}
    learned["x"] = given["x"].detach().clone().requires_grad_()
    asked = []
    find = library.implementation

    def spied(name: str, by: str):
        found = find(name, by)
        if name != "experts_backward":
            return found
        return lambda *args, **named: asked.append(named["learned"]) or found(*args, **named)

    monkeypatch.setattr(library, "implementation", spied)
    for inputs in (given, learned):
        checked.experts(**inputs, by="cpu").square().sum().backward()
    assert asked == [False, True]
    assert torch.equal(given["x"].grad, learned["x"].grad)
    assert learned["gate_up"].grad.abs().sum() > 0 and given["gate_up"].grad is None


def test_ops_hands_over(machine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 9, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    seen, asked = checked.linear, []
    monkeypatch.setattr(checked, "linear", lambda *args, by: asked.append(by) or seen(*args, by=by))
    assert ops.linear(x, weight).shape == (2, 9, 5)
    assert asked == ([] if machine else ["cpu"])
    monkeypatch.setenv("GEMMASCOPE_OPS", "reference")
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
