"""What every Triton kernel becomes on a Hopper GPU, seen without one: `python -m gemmascope_kernels.compiled`.

1. `CASES` drives the operations at Gemma 4's own shapes, with tensors that have no memory (`meta`), so that each launch
   is written down and not run.
2. Each launch's arguments become the signature Triton would make of them on a GPU: pointer types, integer widths, what
   is divisible by 16, constants.
3. Each distinct kernel is compiled for sm_90a. ptxas tells its registers and spills, Triton its shared memory, and the
   PTX which matrix instructions it has.
"""

import argparse
import io
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from gemmascope_kernels.launch import INTERPRETED, recorded
from gemmascope_kernels.mask import Mask

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 232_448
"""Bytes of shared memory that one program may have on an H100 or H200."""


# 1 What is driven

OPERATIONS = {
    "attention": ("attention", "q k v mask"),
    "attention_backward": ("attention", "dz dlse z lse q k v mask"),
    "attention_tiles": ("readouts", "q k lse mask"),
    "attention_pool": ("readouts", "q k lse mask block"),
    "attention_colsum": ("readouts", "q k lse mask"),
    "attention_topk": ("readouts", "q k lse mask n"),
    "attention_entropy": ("readouts", "q k lse mask"),
    "attention_by_source": ("readouts", "q k v lse mask source n_sources"),
    "experts": ("experts", "x indices weights gate_up down"),
    "expert_slots": ("experts", "x indices weights gate_up down"),
    "experts_backward": ("experts", "dx x indices weights gate_up down"),
    "expert_slots_backward": ("experts", "dslots x indices weights gate_up down"),
    "route": ("router", "x scale proj per_expert_scale k eps"),
    "route_backward": ("router", "probs weights probs indices x scale proj per_expert_scale eps"),
    "rms_norm": ("norms", "x weight eps"),
    "rms_norm_backward": ("norms", "x x weight eps"),
    "norm_add": ("norms", "x x weight eps scalar"),
    "norm_add_backward": ("norms", "x x x weight eps scalar"),
    "norm_rope": ("norms", "heads head_weight cos sin eps"),
    "norm_rope_backward": ("norms", "heads heads head_weight cos sin eps"),
}
"""The module of each operation, and what it is called with."""

# query heads, kv heads, width of a head, window, columns of the key beside the value (the K = V form)
LAYERS = {
    "26b-local": (16, 8, 256, 1024, None),
    "26b-global": (16, 2, 512, None, None),
    "26b-global-k=v": (16, 2, 512, None, 128),
    "e2b-local": (8, 1, 256, 512, None),
    "e2b-global": (8, 1, 512, None, None),
    "nano": (4, 2, 32, 64, None),
}
LENGTHS = {"8k": (8192, 8192), "512": (512, 512), "decode": (1, 8192)}
"""Queries and keys."""
MASKS = {
    "padded": lambda: {"key_mask": _empty(torch.bool, 1, 8192)},
    "images": lambda: {"image_blocks": _empty(torch.int64, 1, 8192)},
    "cut": lambda: {"knockouts": _empty(torch.int64, 3, 4, 2)},
    "zeroed": lambda: {"knockouts": _empty(torch.int64, 3, 4, 2), "renormalize": False},
}
"""Driven on top of 26b-local at 8k."""

# width of the stream, experts, width of an expert, experts a token
MODELS = {"26b": (2816, 128, 704, 8), "e2b": (1536, 0, 0, 0), "nano": (128, 8, 64, 2)}
TOKENS = (1, 16, 256, 2048)
DTYPES = (torch.bfloat16, torch.float32)


class Case(NamedTuple):
    """One call of one operation: `arguments` gives the values of every name its line in OPERATIONS has."""

    op: str
    shape: str
    dtype: torch.dtype
    arguments: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return f"{self.op}[{self.shape}-{str(self.dtype).removeprefix('torch.')}]"

    def call(self) -> None:
        module, names = OPERATIONS[self.op]
        values = self.arguments()
        getattr(import_module(f"gemmascope_kernels.{module}"), self.op)(*(values[name] for name in names.split()))


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(dtype: torch.dtype, layer: str, length: str, marks: Callable[[], dict] = dict) -> dict[str, Any]:
    heads, kv_heads, width, window, turning = LAYERS[layer]
    n_queries, n_keys = LENGTHS[length]
    z, lse = _empty(dtype, 1, n_queries, heads, width), _empty(torch.float32, 1, heads, n_queries)
    return {
        "q": _empty(dtype, 1, n_queries, heads, width + (turning or 0)),
        "k": _empty(dtype, 1, n_keys, kv_heads, turning or width),
        "v": _empty(dtype, 1, n_keys, kv_heads, width),
        "z": z,
        "dz": z,
        "lse": lse,
        "dlse": lse,
        "mask": Mask(n_queries, n_keys, torch.device("meta"), window, **marks()),
        "block": 64,
        "n": 8,
        "source": _empty(torch.int64, 1, n_keys),
        "n_sources": 4,
    }


def _layer(dtype: torch.dtype, model: str, n: int) -> dict[str, Any]:
    d, n_experts, width, k = MODELS[model]
    return {
        "x": _empty(dtype, n, d),
        "dx": _empty(dtype, n, d),
        "dslots": _empty(dtype, n, k, d),
        "indices": _empty(torch.int64, n, k),
        "weights": _empty(torch.float32, n, k),
        "gate_up": _empty(dtype, n_experts, 2 * width, d),
        "down": _empty(dtype, n_experts, d, width),
        "probs": _empty(torch.float32, n, n_experts),
        "scale": _empty(dtype, d),
        "proj": _empty(dtype, n_experts, d),
        "per_expert_scale": _empty(dtype, n_experts),
        "weight": _empty(dtype, d),
        "scalar": _empty(dtype, 1),
        "k": k,
        "eps": 1e-6,
    }


def _heads(dtype: torch.dtype, layer: str, n: int) -> dict[str, Any]:
    heads, _, width, _, _ = LAYERS[layer]
    table = _empty(dtype, 1, n, width)
    x = _empty(dtype, 1, n, heads, width)
    return {"heads": x, "head_weight": _empty(dtype, width), "cos": table, "sin": table, "eps": 1e-6}


def _cases() -> Iterator[Case]:
    for (op, (module, _)), dtype in itertools.product(OPERATIONS.items(), DTYPES):
        if module in ("attention", "readouts"):
            for layer, length in itertools.product(LAYERS, LENGTHS):
                if op == "attention" or (length != "decode" and (module == "attention" or not layer.endswith("k=v"))):
                    yield Case(op, f"{layer}-{length}", dtype, partial(_attention, dtype, layer, length))
            for name, marks in MASKS.items():
                yield Case(op, f"26b-local-8k-{name}", dtype, partial(_attention, dtype, "26b-local", "8k", marks))
        elif op.startswith("norm_rope"):
            for layer, n in itertools.product(LAYERS, TOKENS):
                yield Case(op, f"{layer}-{n}", dtype, partial(_heads, dtype, layer, n))
        else:
            for (model, (_, n_experts, _, _)), n in itertools.product(MODELS.items(), TOKENS):
                if n_experts or module == "norms":
                    yield Case(op, f"{model}-{n}", dtype, partial(_layer, dtype, model, n))


CASES = tuple(_cases())


# 2 From a launch to a signature, and 3 to machine code


@dataclass
class Compiled:
    """One kernel, for one signature and one set of constants."""

    kernel: str
    cases: list[str]
    """Every case that launches it."""
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    shared: int = 0
    registers: int = 0
    spills: int = 0
    """Bytes stored and loaded back, per thread, because registers ran out."""
    mma: str = "none"
    """"wgmma", "mma.sync" or "none", and the shapes it has."""
    seconds: float = 0.0
    error: str | None = None

    @property
    def fits(self) -> bool:
        return self.error is None and self.shared <= SHARED_LIMIT


def compiled(cases: Iterable[Case] = CASES, only: str | None = None) -> Iterator[Compiled]:
    """Compiles every distinct kernel that the cases launch, or the one kernel named. What fails has `error` set."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, which replaces the compiler: unset it to compile kernels.")
    found: dict[str, tuple[Compiled, Any, Any]] = {}
    for case in cases:
        try:
            with recorded() as launches:
                case.call()
        except (
            Exception
        ) as error:  # a case that cannot even launch is a row of the report, like one that cannot compile
            yield Compiled("-", [case.name], {}, 0, 0, error=f"{type(error).__name__}: {error}")
            continue
        for kernel, _, arguments in launches:
            if only not in (None, kernel.__name__):
                continue
            source, options = _source(kernel, arguments)
            known = found.setdefault(
                source.hash() + options.hash(),
                (
                    Compiled(kernel.__name__, [], _constants(source), options.num_warps, options.num_stages),
                    source,
                    options,
                ),
            )[0]
            if case.name not in known.cases:
                known.cases.append(case.name)
    for row, source, options in found.values():
        yield _compile(row, source, options)


def _source(kernel: Any, arguments: dict[str, Any]) -> tuple[ASTSource, Any]:
    """What Triton would compile for this launch on a Hopper GPU, by its own code."""
    backend = make_backend(HOPPER)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments, enable_fp_fusion=True)  # Triton 3.9's default; 3.10 flips it
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options


def _constants(source: ASTSource) -> dict[str, str]:
    """By name; what is inside a tuple by its number, as in strides.2."""
    names = source.fn.arg_names
    return {".".join((names[at[0]], *map(str, at[1:]))): str(value) for at, value in source.constants.items()}


def _compile(row: Compiled, source: ASTSource, options: Any) -> Compiled:
    knobs, log, start = triton.knobs, io.StringIO(), time.perf_counter()
    try:
        with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
            knobs.compilation.always_compile = True  # a cached kernel has no ptxas log
            knobs.nvidia.dump_ptxas_log = True
            kernel = triton.compile(source, target=HOPPER, options=options.__dict__)
    except Exception as error:  # as above
        row.error = f"{type(error).__name__}: {error}"
        return row
    row.seconds = time.perf_counter() - start
    row.shared = kernel.metadata.shared
    row.registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
    row.spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue()))
    row.mma = _mma(kernel.asm["ptx"])
    return row


def _mma(ptx: str) -> str:
    for name, pattern in (
        ("wgmma", r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)"),
        ("mma.sync", r"mma\.sync\.aligned\.(m\d+n\d+k\d+)"),
    ):
        shapes = sorted(set(re.findall(pattern, ptx)))
        if shapes:
            return f"{name} {' '.join(shapes)}"
    return "none"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="only cases whose name contains one of these, e.g. attention[26b")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, everything known about a kernel")
    parser.add_argument("--list", action="store_true", help="the cases' names, and nothing compiled")
    asked = parser.parse_args(argv)
    cases = [case for case in CASES if not asked.cases or any(part in case.name for part in asked.cases)]
    if asked.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    failed = False
    for row in compiled(cases):
        failed |= not row.fits
        print(json.dumps(asdict(row)) if asked.json else _line(row), flush=True)
    return int(failed)


def _line(row: Compiled) -> str:
    if row.error is not None:
        return f"{row.kernel}  {row.cases[0]}  FAILED  {row.error.splitlines()[0][:200]}"
    verdict = "" if row.fits else "  DOES NOT FIT"
    sizes = " ".join(f"{name}={value}" for name, value in row.constants.items() if value.isdigit())
    others = f" and {len(row.cases) - 1} more" if len(row.cases) > 1 else ""
    return (
        f"{row.kernel}  {row.cases[0]}{others}\n"
        f"    {row.shared:>7} B shared  {row.registers:>3} registers  {row.spills:>5} B spilled  {row.mma}{verdict}\n"
        f"    {row.num_warps} warps, {row.num_stages} stages, {sizes}  ({row.seconds:.1f} s)"
    )


if __name__ == "__main__":
    raise SystemExit(main())
