"""The ops as PyTorch sees them: schemas, fakes, gradients, the compiler, the fallback, and what they refuse."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from gemmascope_kernels import checked, library, reference
from gemmascope_kernels.cases import CASES
from gemmascope_kernels.mask import Mask, box

FIRST = {case.op: case for case in reversed(CASES)}
MASKED = {case.op: case for case in CASES if any(kind in case.name for kind in ("cut", "biased", "gain", "scaled"))}


def flat(case, dtype: torch.dtype = torch.float32) -> tuple:
    """A case's arguments as its schema has them."""
    given = case.make(torch.empty(0, dtype=dtype))
    gain = given.pop("slot_gain", None)
    if gain is not None:
        given["weights"] = given["weights"] * gain
    mask = given.pop("mask", None)
    if mask is not None:
        given |= {part: getattr(mask, part) for part in library._MASK_PARTS}
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and name != "head_gain":
            given[name] = x.requires_grad_()
    return *(given.get(name) for name in getattr(library, case.op).arguments), "cpu"


@pytest.mark.parametrize("case", [*FIRST.values(), *MASKED.values()], ids=str)
def test_opcheck(case) -> None:
    torch.library.opcheck(getattr(library, case.op).op, flat(case))


@pytest.mark.parametrize("case", [*FIRST.values(), *MASKED.values()], ids=str)
def test_second_derivatives_are_those_of_the_definition(case) -> None:
    """Not of a backward whose own derivative PyTorch would take for zero."""
    given = case.make(torch.empty(0, dtype=torch.float64))
    gain = given.pop("slot_gain", None)
    if gain is not None:
        given["weights"] = given["weights"] * gain
    given.pop("head_gain", None)
    differentiable = getattr(library, case.op).differentiable
    leaves = [given[name].requires_grad_() for name in differentiable if given.get(name) is not None]
    found = []
    for run in (partial(getattr(checked, case.op), by="cpu"), getattr(reference, case.op)):
        torch.manual_seed(0)
        outputs = run(**given)
        outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.is_floating_point()]
        total = sum((out.masked_fill(out.isinf(), 0) * torch.randn_like(out)).sin().sum() for out in outputs)
        first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        slope = sum((grad * torch.randn_like(grad)).sum() for grad in first)
        found.append(torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True))
    for ours, definition in zip(*found, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-6, atol=1e-8)
    assert any((x != 0).any() for x in found[1])


COMPILED = """
import torch
from gemmascope.testing import tiny_model

for architecture in ("26B-A4B", "E2B"):
    model, tokens = tiny_model(architecture), torch.randint(3, 101, (2, 19))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # a graph break raises
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), model(tokens))
    gradients = []
    for run in (compiled, model):
        model.zero_grad()
        run(tokens, return_type="loss").backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
"""


def test_model_without_hooks_compiles_into_one_graph() -> None:
    """In a Python of its own: here, every function is wrapped to check shapes, which the compiler cannot follow."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernel_that_fails_warns_once_and_plain_pytorch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    find = library.implementation

    def broken(name: str, by: str):
        def fail(*args, **named):
            raise RuntimeError("no kernel image\nis available")

        return fail if by == "triton" else find(name, by)

    monkeypatch.setattr(library, "implementation", broken)
    monkeypatch.setattr(library, "_failed", set())
    x = torch.randn(3, 8)
    with pytest.warns(RuntimeWarning, match="rms_norm: the Triton .* .RuntimeError: no kernel image.; plain"):
        first = checked.rms_norm(x, None, 1e-6, by="triton")
    second = checked.rms_norm(x, None, 1e-6, by="triton")  # a second warning would be an error
    torch.testing.assert_close(first, reference.rms_norm(x, None, 1e-6))
    assert torch.equal(first, second)


def test_head_that_is_off_has_a_gradient_towards_being_on() -> None:
    q, k, v = (torch.randn(1, 7, 2, 8) for _ in range(3))
    gain = torch.zeros(1, 2, requires_grad=True)
    z, _ = checked.attention(q, k, v, Mask(7, 7, q.device), gain, by="cpu")
    z.sum().backward()
    full, _ = reference.attention(q, k, v, Mask(7, 7, q.device))
    assert (z == 0).all()
    torch.testing.assert_close(gain.grad, full.sum((1, 3)))


def test_boxes() -> None:
    sizes = (2, 4, 7, 9)
    assert box(1, slice(None), -1, slice(2, 5), sizes).tolist() == [[1, 2], [0, 4], [6, 7], [2, 5]]
    with pytest.raises(ValueError, match="head 4 does not exist; there are 4"):
        box(0, 4, 0, 0, sizes)
    with pytest.raises(ValueError, match="key takes an index or a slice of step 1"):
        box(0, 0, 0, slice(0, 9, 2), sizes)


def attend(q=(1, 5, 4, 8), k=(1, 5, 2, 8), v=(1, 5, 2, 8), mask=None, **rest):
    q, k, v = (torch.zeros(shape) for shape in (q, k, v))
    return checked.attention(q, k, v, mask or Mask(q.shape[1], k.shape[1], q.device), by="cpu", **rest)


def spread(n=3, d=8, n_experts=4, indices=None, **rest):
    indices = torch.zeros(n, 2, dtype=torch.long) if indices is None else indices
    given = {"x": torch.zeros(n, d), "gate_up": torch.zeros(n_experts, 12, d), "down": torch.zeros(n_experts, d, 6)}
    return checked.experts(indices=indices, weights=torch.zeros(n, 2), by="cpu", **given | rest)


def choose(d=8, k=2, **rest):
    given = {"x": torch.zeros(3, d), "scale": torch.zeros(d), "proj": torch.zeros(4, d)}
    return checked.route(k=k, eps=1e-6, by="cpu", **{"per_expert_scale": torch.zeros(4)} | given | rest)


def read(op: str, **rest):
    q, k, lse = torch.zeros(1, 5, 4, 8), torch.zeros(1, 5, 2, 8), torch.zeros(1, 4, 5)
    return getattr(checked, op)(q, k, rest.pop("lse", lse), Mask(5, 5, q.device), by="cpu", **rest)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: attend(q=(5, 4, 8)), r"attention: q is \[5, 4, 8\]; it takes \[batch, position, head, width\]"),
        (lambda: attend(q=(1, 5, 3, 8)), "attention: q is 3 heads; it takes a multiple of the 2 heads of k"),
        (lambda: attend(k=(2, 5, 2, 8)), r"attention: k is \[2, 5, 2, 8\]; it takes shape \[1, any, any, any\]"),
        (lambda: attend(v=(1, 4, 2, 8)), r"attention: v is \[1, 4, 2, 8\]; it takes shape \[1, 5, 2, any\]"),
        (lambda: attend(q=(1, 5, 4, 7)), "attention: q is 7 wide; it takes 8 as k, or 16 as k and v together"),
        (lambda: attend(q=(1, 6, 4, 8)), "mask is of 6 queries and 5 keys; it takes one of 6 queries"),
        (lambda: attend(mask=Mask(5, 5, torch.device("cpu"), window=0)), "mask.window is 0; it takes at least 1"),
        (lambda: attend(head_gain=torch.ones(1, 3)), r"head_gain is \[1, 3\]; it takes shape \[1, 4\]"),
        (
            lambda: checked.attention(
                torch.zeros(1, 2, 1, 4),
                torch.zeros(1, 2, 1, 4).half(),
                torch.zeros(1, 2, 1, 4),
                Mask(2, 2, torch.device("cpu")),
                by="cpu",
            ),
            "attention: k is torch.float16; it takes torch.float32, as q has",
        ),
        (lambda: attend(mask=Mask(5, 5, torch.device("cpu"), key_mask=torch.ones(1, 5))), "key_mask is torch.float32"),
        (lambda: read("attention_pool", block=0), "attention_pool: block is 0; it takes at least 1"),
        (lambda: read("attention_pool", block=2, reduce="sum"), "reduce is 'sum'; it takes 'mean' or 'max'"),
        (lambda: read("attention_topk", n=6), "attention_topk: n is 6; it takes 1 to 5, the number of keys"),
        (
            lambda: read("attention_entropy", lse=torch.zeros(1, 5, 4)),
            r"lse is \[1, 5, 4\]; it takes shape \[1, 4",
        ),
        (lambda: read("attention_tiles", heads=torch.tensor([4])), "heads is 4; it takes indices 0 to 3"),
        (lambda: choose(k=5), "route: k is 5; it takes 1 to 4, the number of experts"),
        (
            lambda: choose(allowed=torch.tensor([True, False, False, False])),
            "allowed is True for 1 experts; it",
        ),
        (lambda: choose(indices=torch.full((3, 2), 4)), "route: indices is 4; it takes indices 0 to 3"),
        (lambda: choose(scale=torch.zeros(7)), r"route: scale is \[7\]; it takes shape \[8\]"),
        (lambda: spread(indices=torch.full((3, 2), -1)), "experts: indices is -1; it takes indices 0 to 3"),
        (lambda: spread(indices=torch.zeros(3, 2)), "experts: indices is torch.float32; it takes int64"),
        (lambda: spread(down=torch.zeros(4, 8, 5)), r"experts: down is \[4, 8, 5\]; it takes shape \[4, 8, 6\]"),
    ],
)
def test_bad_input_names_the_op_the_argument_what_came_and_what_is_taken(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == {
        name for name, value in vars(library).items() if isinstance(value, library.Op)
    }
