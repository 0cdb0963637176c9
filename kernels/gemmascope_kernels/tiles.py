"""Tile shapes are data: `tiles.json` says how each Triton kernel cuts its work, by width, dtype, GPU and size.

`kernels/benchmarks/tune.py` writes the table. Nothing is tuned while a program runs.
"""

import json
from functools import cache, lru_cache
from importlib.resources import files

import torch

KEYS = ("kernel", "width", "dtype", "arch", "size", "from")
"""What says where a row holds; all else in it is the tile. `width` and `size` hold up to that number, null beyond every
other; `from` says how the row was chosen."""

_LIKE = {torch.float16: torch.bfloat16, torch.float64: torch.float32}
"""dtypes that take another's tiles."""


@cache
def rows() -> list[dict]:
    """The table."""
    return json.loads(files(__package__).joinpath("tiles.json").read_text())


@lru_cache(maxsize=4096)
def tile(kernel: str, *, width: int, dtype: torch.dtype, size: int) -> dict[str, int]:
    """The constants, num_warps and num_stages of one launch.

    Args:
        kernel: the kernel function's name.
        width: of a head or of the stream, whichever the kernel holds whole.
        dtype: of the inputs.
        size: how many queries, keys or tokens there are.

    Raises:
        ValueError: where the table has no row for the kernel and dtype.
    """
    name = str(_LIKE.get(dtype, dtype)).removeprefix("torch.")
    known = [row for row in rows() if row["kernel"] == kernel and row["dtype"] == name]
    if not known:
        raise ValueError(
            f"tiles.json has no row for {kernel} in {name}; kernels/benchmarks/tune.py writes one for every kernel "
            f"that it lists."
        )
    arch = min((row["arch"] for row in known), key=_distance)
    known = [row for row in known if row["arch"] == arch]
    for key, asked in (("width", width), ("size", size)):
        limit = min((row[key] for row in known), key=lambda limit: _reach(limit, asked))
        known = [row for row in known if row[key] == limit]
    return {key: value for key, value in known[0].items() if key not in KEYS}


def _distance(arch: str) -> tuple[bool, int]:
    """How far a row's GPU is from the one at hand: the newest that is no newer comes first."""
    away = _arch() - int(arch.removeprefix("sm_"))
    return away < 0, abs(away)


def _reach(limit: int | None, asked: int) -> tuple[bool, float]:
    """The smallest limit that holds what is asked comes first; where none does, the largest."""
    limit = float("inf") if limit is None else limit
    return (False, limit) if limit >= asked else (True, -limit)


@cache
def _arch() -> int:
    """The GPU at hand, as in sm_90; Hopper where there is none, which is what kernels are compiled for there."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return 10 * major + minor
