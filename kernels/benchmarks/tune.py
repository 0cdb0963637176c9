"""Regenerates gemmascope_kernels/tiles.json, the table of tile shapes.

    python kernels/benchmarks/tune.py                  every row
    python kernels/benchmarks/tune.py geglu_kernel     the rows of some kernels

Each row is driven by a call of `compiled.CASES` that uses it, and walks, one step of one number at a time, to the best
row that it can reach. On a GPU, best is fastest. Without one, a row that fits shared memory and spills nothing stays as
it is, and another moves until it does: nothing is known of speed then, and the row says so ("from": "compiled").
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from math import inf
from typing import Any

import torch
from gemmascope_kernels import tiles
from gemmascope_kernels.compiled import CASES, Case, compiled
from gemmascope_kernels.launch import recorded
from gemmascope_kernels.mask import Mask

Row = dict[str, Any]

STEPS = {"num_warps": (1, 2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5), "PARTS": (1, 2, 4)}
"""What a number may be. All others are sizes of blocks: powers of two."""
GAIN = 0.97
"""A step is taken only where it leaves less than this share of the time, which is more than noise."""


def put(table: list[Row]) -> None:
    """Makes this the table that kernels are launched by."""
    tiles.rows()[:] = table
    tiles.tile.cache_clear()


def drivers(table: list[Row]) -> dict[int, Case]:
    """Row number -> the first case that uses it. Each row is told apart by an impossible number of stages."""
    put([row | {"num_stages": 1000 + number} for number, row in enumerate(table)])
    used: dict[int, Case] = {}
    for case in CASES:
        try:
            with recorded() as launches:
                case.call()
        except NotImplementedError:  # left to plain PyTorch
            continue
        for _, _, arguments in launches:
            if arguments.get("num_stages", 0) >= 1000:
                used.setdefault(arguments["num_stages"] - 1000, case)
    put(table)
    return used


def neighbours(row: Row) -> Iterator[Row]:
    """The rows one step away."""
    for name, value in row.items():
        if name in tiles.KEYS:
            continue
        steps = STEPS.get(name) or [2**power for power in range(2, 11)]
        here = steps.index(value)
        yield from (row | {name: other} for other in (*steps[max(0, here - 1) : here], *steps[here + 1 : here + 2]))


def cost(table: list[Row], number: int, row: Row, case: Case) -> float:
    """What the row costs in this case: milliseconds on a GPU, bytes spilled without one; inf where it does not work."""
    put([*table[:number], row, *table[number + 1 :]])
    try:
        if torch.cuda.is_available():
            return _time(case)
        return max((found.spills if found.fits else inf for found in compiled([case], only=row["kernel"])), default=inf)
    finally:
        put(table)


def _time(case: Case) -> float:
    import triton

    module, names = case.where()
    values = _real(case.arguments())
    try:
        return triton.testing.do_bench(lambda: module(*(values[name] for name in names)), return_mode="median")
    except (triton.CompilationError, triton.OutOfResources):  # a shape that this kernel or this GPU cannot have
        return inf


def _real(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors on the GPU in place of those on meta: normal numbers, each token's experts chosen at random."""
    made: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mask):
            made[name] = replace(
                value,
                device=torch.device("cuda"),
                key_mask=None if value.key_mask is None else torch.ones_like(value.key_mask, device="cuda"),
                image_blocks=None
                if value.image_blocks is None
                else torch.full_like(value.image_blocks, -1, device="cuda"),
                knockouts=None if value.knockouts is None else torch.zeros_like(value.knockouts, device="cuda"),
            )
        elif not isinstance(value, torch.Tensor):
            made[name] = value
        elif value.is_floating_point():
            made[name] = torch.randn(value.shape, dtype=value.dtype, device="cuda") * value.shape[-1] ** -0.5
        else:
            below = len(arguments["down"]) if name == "indices" else arguments["n_sources"]
            choice = torch.rand(*value.shape[:-1], below, device="cuda").argsort(-1)
            made[name] = choice[..., : value.shape[-1]] if name == "indices" else choice.new_zeros(value.shape)
    return made


def best(table: list[Row], number: int, case: Case) -> tuple[Row, float]:
    """Walks from a row to the cheapest that single steps lead to."""
    row, price = table[number], cost(table, number, table[number], case)
    while price > 0:
        prices = [(cost(table, number, other, case), other) for other in neighbours(row)]
        cheapest, other = min(prices, key=lambda pair: pair[0])
        if not cheapest < GAIN * price:
            break
        row, price = other, cheapest
    return row, price


def for_this_gpu() -> list[Row]:
    """The table, with rows for the GPU at hand: where it has none, those of the nearest one to start from."""
    here, table = f"sm_{tiles.arch()}", tiles.rows()
    if any(row["arch"] == here for row in table):
        return list(table)
    nearest = min((row["arch"] for row in table), key=tiles.distance)
    return [*table, *(row | {"arch": here} for row in table if row["arch"] == nearest)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="*", help="names of kernels; all of them without any")
    asked = parser.parse_args().kernels
    table, here = for_this_gpu(), f"sm_{tiles.arch()}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    print(f"Timing on {gpu}." if gpu else "No GPU: rows that fit and do not spill are kept, and none is timed.")
    unit, chosen, wrong = "ms" if gpu else "B spilled", list(table), False
    for number, case in drivers(table).items():
        row = table[number]
        if row["arch"] != here or (asked and row["kernel"] not in asked):
            continue
        new, price = best(table, number, case)
        chosen[number] = new | {"from": gpu or "compiled"}
        wrong |= price == inf
        kept = "kept" if new == row else "now " + json.dumps({key: new[key] for key in new if new[key] != row[key]})
        print(f"{row['kernel']} width {row['width']} {row['dtype']} size {row['size']}: {price:.4g} {unit}, {kept}")
    order = [*tiles.KEYS, *(key for row in chosen for key in row)]
    lines = [json.dumps({key: row[key] for key in dict.fromkeys(order) if key in row}) for row in chosen]
    files("gemmascope_kernels").joinpath("tiles.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
