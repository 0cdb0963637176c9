"""Every operation as an op of torch.library: a fake for the compiler, gradients, and three implementations.

`by` names the implementation: "triton", "cpu" (fast plain PyTorch, on any device) or "reference". Where Triton fails to
compile or to launch, or leaves something to plain PyTorch, the next one answers; a failure warns once. `checked.py` has
the functions to call, `gemmascope.ops` chooses.
"""

import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gemmascope_kernels import reference
from gemmascope_kernels.mask import Mask
from gemmascope_kernels.reference import wide

MODULES = {
    "triton": ("attention", "readouts", "router", "experts", "norms"),
    "cpu": ("cpu", "cpu_readouts", "cpu_moe", "cpu_mlp", "cpu_norms", "cpu_products"),
    "reference": ("reference",),
}
"""Where the functions of each implementation stand, in the order in which one falls back to the next."""

_LIBRARY = torch.library.Library("gemmascope", "DEF")
_failed: set[tuple] = set()


def implementation(name: str, by: str) -> Callable | None:
    """The function that implements an op, or None where this implementation leaves it to the next."""
    modules = (importlib.import_module(f"gemmascope_kernels.{module}") for module in MODULES[by])
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


def run(name: str, by: str, *args: Any, **named: Any) -> Any:
    """Calls an op's implementation: the one asked for, or the next that has the function and does not fail."""
    kind = (name, *((x.dtype, x.shape[-1]) for x in (*args, *named.values()) if isinstance(x, Tensor) and x.ndim))
    for choice in list(MODULES)[list(MODULES).index(by) :]:
        if choice == "triton" and kind in _failed:
            continue
        try:
            function = implementation(name, choice)
            if function is not None:
                return function(*args, **named)
        except NotImplementedError:  # a case that this implementation leaves to the next
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # from Triton: whatever its compiler, its driver or a missing install raises
            if choice != "triton":
                raise
            _failed.add(kind)
            why = (str(problem).strip().splitlines() or [""])[0][:300]
            warnings.warn(
                f"{name}: the Triton kernel failed ({type(problem).__name__}: {why}); plain PyTorch runs instead.",
                RuntimeWarning,
                stacklevel=2,
            )
    raise NotImplementedError(f"{name} has no implementation.")


class Op:
    """One op, and its backward: `<name>_backward(grads, outputs, wanted, <its arguments>) -> Tensor[]`.

    `differentiable` names the arguments that have gradients, `wanted` those whose gradients are asked for.
    `backward` calls an implementation's own backward and returns a gradient, or None where that is not wanted, for each
    of `differentiable`; where there is none, the definition runs again under autograd, as it does for derivatives
    beyond the first.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        returns: str,
        differentiable: str,
        fake: Callable[..., Any],
        backward: Callable[..., tuple],
    ):
        self.name, self.differentiable, self.fake, self.own_backward = name, differentiable.split(), fake, backward
        self.arguments = [part.split()[-1] for part in schema.split(",")]
        full = f"gemmascope::{name}"
        _LIBRARY.define(f"{name}({schema}, str by) -> {returns}")
        _LIBRARY.define(
            f"{name}_backward(Tensor[] grads, Tensor[] outputs, str[] wanted, {schema}, str by) -> Tensor[]"
        )
        _LIBRARY.impl(name, self.forward, "CompositeExplicitAutograd")
        _LIBRARY.impl(f"{name}_backward", self.backward, "CompositeExplicitAutograd")
        torch.library.register_fake(full, lambda *args: fake(SimpleNamespace(**self.named(args))), lib=_LIBRARY)
        torch.library.register_fake(f"{full}_backward", self.fake_backward, lib=_LIBRARY)
        torch.library.register_autograd(full, self.autograd, setup_context=self.save, lib=_LIBRARY)
        self.op = getattr(torch.ops.gemmascope, name).default
        self.backward_op = getattr(torch.ops.gemmascope, f"{name}_backward").default

    def __call__(self, by: str, mask: Mask | None = None, **given: Any) -> Any:
        """The op, called with the arguments of the Python function."""
        if mask is not None:
            given |= {part: getattr(mask, part) for part in _MASK_PARTS}
        return self.op(*(given[name] for name in self.arguments), by)

    def named(self, args: tuple) -> dict[str, Any]:
        return dict(zip([*self.arguments, "by"], args, strict=True))

    def python(self, given: dict[str, Any]) -> dict[str, Any]:
        """The schema's arguments as those of the Python function: the parts of a mask become one."""
        given = {name: value for name, value in given.items() if name != "by"}
        if "renormalize" in given:
            parts = {part: given.pop(part) for part in _MASK_PARTS}
            q, k = given["q"], given["k"]
            given["mask"] = Mask(n_queries=q.shape[1], n_keys=k.shape[1], device=q.device, **parts)
        return given

    def forward(self, *args: Any) -> Any:
        given = self.named(args)
        outputs = run(self.name, given["by"], **self.python(given))
        # As the fakes say: a mix of strides would be a promise to keep in every implementation.
        return tuple(out.contiguous() for out in outputs) if isinstance(outputs, tuple) else outputs.contiguous()

    def save(self, ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.given = {name: None if isinstance(arg, Tensor) else arg for name, arg in self.named(inputs).items()}
        ctx.tensors = [name for name, arg in self.named(inputs).items() if isinstance(arg, Tensor)]
        ctx.save_for_backward(*(arg for arg in inputs if isinstance(arg, Tensor)), *_several(output))

    def autograd(self, ctx: Any, *grads: Tensor) -> tuple:
        given = ctx.given | dict(zip(ctx.tensors, ctx.saved_tensors, strict=False))
        outputs = ctx.saved_tensors[len(ctx.tensors) :]
        grads = [grad for grad, out in zip(grads, outputs, strict=True) if out.is_floating_point()]
        needed = dict(zip(given, ctx.needs_input_grad, strict=True))
        wanted = [name for name in self.differentiable if needed[name]]
        if torch.is_grad_enabled():  # create_graph: a backward op has no derivative, but the definition has
            found = self.recomputed(self.python(given), wanted, grads, create_graph=True)
        else:
            found = self.backward_op(grads, list(outputs), wanted, *given.values())
        found = dict(zip(wanted, found, strict=True))
        return tuple(found.get(name) for name in given)

    def backward(self, grads: list[Tensor], outputs: list[Tensor], wanted: list[str], *args: Any) -> list[Tensor]:
        given = self.named(args)
        by, given = given["by"], self.python(given)
        try:
            own = self.own_backward(by, grads, outputs, wanted, SimpleNamespace(**given))
            found = dict(zip(self.differentiable, own, strict=True))
        except NotImplementedError:
            found = dict(zip(wanted, self.recomputed(given, wanted, grads), strict=True))
        return [found[name].to(given[name].dtype).contiguous() for name in wanted]

    def recomputed(
        self, given: dict[str, Any], wanted: list[str], grads: list[Tensor], create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        leaves = {name: given[name] if create_graph else given[name].detach().requires_grad_() for name in wanted}
        with torch.enable_grad():
            leaves = {name: leaf.view_as(leaf) for name, leaf in leaves.items()}  # one tensor may be two arguments
            outputs = getattr(reference, self.name)(**given | leaves)
            outputs = [out for out in _several(outputs) if out.is_floating_point()]
        return torch.autograd.grad(
            outputs,
            tuple(leaves.values()),
            grads,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    def fake_backward(self, grads: list[Tensor], outputs: list[Tensor], wanted: list[str], *args: Any) -> list[Tensor]:
        given = self.named(args)
        return [given[name].new_empty(given[name].shape) for name in wanted]


def _several(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


_MASK_PARTS = ("key_mask", "image_blocks", "knockouts", "window", "renormalize")
_MASK = "Tensor? key_mask, Tensor? image_blocks, Tensor? knockouts, int? window, bool renormalize"
_QK = f"Tensor q, Tensor k, Tensor lse, {_MASK}"


def _rows(a: SimpleNamespace, *after: int) -> Tensor:
    """Something a head and a query, in the dtype of the softmax."""
    b, q, n_heads, _ = a.q.shape
    return wide(a.q.new_empty(0)).new_empty(b, n_heads, q, *after)


def _tiles(a: SimpleNamespace) -> Tensor:
    whole = (a.q.shape[2], a.q.shape[1], a.k.shape[1])
    sizes = [n if chosen is None else len(chosen) for n, chosen in zip(whole, (a.heads, a.rows, a.keys), strict=True)]
    return _rows(a).new_empty(a.q.shape[0], *sizes)


def _route(a: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    n, n_experts = a.x.shape[0], a.proj.shape[0]
    exact = wide(a.x.new_empty(0))
    chosen = a.x.new_empty(n, a.k, dtype=torch.long)
    return exact.new_empty(n, n_experts), chosen, (exact * a.per_expert_scale.new_empty(0)).new_empty(n, a.k)


attention = Op(
    "attention",
    f"Tensor q, Tensor k, Tensor v, {_MASK}, Tensor? head_gain",
    "(Tensor, Tensor)",
    "q k v",  # checked.attention multiplies head_gain outside when there are gradients
    fake=lambda a: (a.q.new_empty(*a.q.shape[:3], a.v.shape[-1]), _rows(a)),
    backward=lambda by, grads, outputs, _, a: run("attention_backward", by, *grads, *outputs, a.q, a.k, a.v, a.mask),
)


def _readout(name: str, schema: str, fake: Callable[..., Any], returns: str = "Tensor") -> Op:
    differentiable = "q k v lse" if "Tensor v" in schema else "q k lse"

    def backward(by: str, grads: list[Tensor], outputs: list[Tensor], _: list[str], a: SimpleNamespace) -> tuple:
        if by == "reference":
            raise NotImplementedError
        return run("readout_backward", "cpu", name, grads, **vars(a))

    return Op(name, schema, returns, differentiable, fake, backward)


attention_tiles = _readout("attention_tiles", f"{_QK}, Tensor? heads, Tensor? rows, Tensor? keys", _tiles)
attention_pool = _readout(
    "attention_pool",
    f"{_QK}, int block, str reduce",
    lambda a: _rows(a).new_empty(*a.lse.shape[:2], -(-a.q.shape[1] // a.block), -(-a.k.shape[1] // a.block)),
)
attention_colsum = _readout("attention_colsum", _QK, lambda a: _rows(a).new_empty(*a.lse.shape[:2], a.k.shape[1]))
attention_topk = _readout(
    "attention_topk",
    f"{_QK}, int n",
    lambda a: (_rows(a, a.n), a.q.new_empty(*a.lse.shape, a.n, dtype=torch.long)),
    "(Tensor, Tensor)",
)
attention_entropy = _readout("attention_entropy", _QK, _rows)
attention_by_source = _readout(
    "attention_by_source",
    f"Tensor q, Tensor k, Tensor v, Tensor lse, {_MASK}, Tensor source, int n_sources",
    lambda a: a.v.new_empty(*a.q.shape[:3], a.n_sources, a.v.shape[-1]),
)

route = Op(
    "route",
    "Tensor x, Tensor scale, Tensor proj, Tensor per_expert_scale, int k, float eps, Tensor? logit_bias, "
    "Tensor? allowed, Tensor? indices",
    "(Tensor, Tensor, Tensor)",
    "x scale proj per_expert_scale logit_bias",
    _route,
    backward=lambda by, grads, outputs, _, a: run(
        "route_backward", by, *grads, *outputs[:2], a.x, a.scale, a.proj, a.per_expert_scale, a.eps
    ),
)


def _own(name: str, learns: bool = False) -> Callable[..., tuple]:
    """Calls `<name>_backward` with the gradients of what the op gave and its arguments. One that `learns` is told
    whether anybody asks for those of its weights, which can be most of the work and memory."""

    def backward(by: str, grads: list[Tensor], outputs: list[Tensor], wanted: list[str], a: SimpleNamespace) -> tuple:
        told = {"learned": not {"weight", "gate_up", "down"}.isdisjoint(wanted)} if learns else {}
        return run(f"{name}_backward", by, *grads, **vars(a), **told)

    return backward


_EXPERTS = "Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down"
experts = Op(
    "experts",
    _EXPERTS,
    "Tensor",
    "x weights gate_up down",
    lambda a: a.x.new_empty(a.x.shape),
    backward=_own("experts", learns=True),
)
expert_slots = Op(
    "expert_slots",
    _EXPERTS,
    "Tensor",
    "x weights gate_up down",
    lambda a: a.x.new_empty(*a.indices.shape, a.x.shape[-1]),
    backward=_own("expert_slots", learns=True),
)

grouped_linear = Op(
    "grouped_linear",
    "Tensor x, Tensor expert, Tensor weight",
    "Tensor",
    "x weight",
    lambda a: a.x.new_empty(len(a.x), a.weight.shape[1]),
    backward=_own("grouped_linear"),
)

linear = Op(
    "linear",
    "Tensor x, Tensor weight",
    "Tensor",
    "x weight",
    lambda a: a.x.new_empty(len(a.x), len(a.weight)),
    backward=_own("linear", learns=True),
)

geglu = Op(
    "geglu",
    "Tensor gate, Tensor up",
    "Tensor",
    "gate up",
    lambda a: a.gate.new_empty(a.gate.shape),
    backward=_own("geglu"),
)

rms_norm = Op(
    "rms_norm",
    "Tensor x, Tensor? weight, float eps",
    "Tensor",
    "x weight",
    lambda a: a.x.new_empty(a.x.shape),
    backward=_own("rms_norm"),
)
norm_add = Op(
    "norm_add",
    "Tensor residual, Tensor x, Tensor weight, float eps, Tensor? scalar",
    "Tensor",
    "residual x weight scalar",
    lambda a: a.x.new_empty(a.x.shape),
    backward=_own("norm_add"),
)
norm_rope = Op(
    "norm_rope",
    "Tensor x, Tensor weight, Tensor cos, Tensor sin, float eps",
    "Tensor",
    "x weight",
    lambda a: a.x.new_empty(a.x.shape),
    backward=_own("norm_rope"),
)
