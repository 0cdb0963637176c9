"""The one way a Triton kernel is started: on a GPU, in the interpreter, or written down to be compiled elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU. It multiplies bfloat16 bit patterns in
tl.dot (triton-lang/triton#11584), so that kernels there take INTERPRETED as a constexpr and widen operands first."""

_record: Callable[[Any, tuple, dict], None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Runs `kernel` on `grid`; num_warps and num_stages go among the arguments."""
    if _record is not None:
        _record(kernel, grid, arguments)
    else:
        kernel[grid](**arguments)


@contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple, dict]]]:
    """Collects (kernel, grid, arguments) in place of running them; the tensors may then be on `meta`."""
    global _record
    launches: list[tuple[Any, tuple, dict]] = []
    _record = lambda *one: launches.append(one)  # noqa: E731
    try:
        yield launches
    finally:
        _record = None
