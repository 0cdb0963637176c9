"""Times the operations and the model beside their peers, and appends what it saw to results.csv.

    python kernels/benchmarks/run.py             every row that this machine can run
    python kernels/benchmarks/run.py --list      the rows, and what each needs
    python kernels/benchmarks/run.py attention   the rows whose name contains "attention"

The kernels' tests run first: on a red one nothing is reported. Variants take turns, round by round, so that a busy
machine slows all of them, in an order drawn anew, so that none always finds what the same other left in the caches; a
ratio is the median over rounds of peer / ours, so above 1 we are faster.
"""

import argparse
import csv
import gc
import importlib.metadata
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from experiment_rows import experiment_rows
from rows import ROWS, Row
from view_rows import view_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
COLUMNS = (
    "row impl mode shape dtype unit p20 p50 p80 ratio device threads torch triton transformers transformer_lens date"
).split()
SECONDS = 10.0
"""Time a row may take in all, but for its first four rounds, which it always gets."""


def tests_pass() -> bool:
    """Whether the kernels' tests are green."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels"]
    return subprocess.run(command, cwd=HERE.parents[1]).returncode == 0


def timed(run: Callable[[], object], cuda: bool) -> float:
    """Milliseconds of one call."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure(row: Row) -> dict[str, list[float]]:
    """Every variant's figures, one a round: milliseconds, or what the row's own function returns."""
    variants = row.build()
    if row.unit != "ms":
        return {name: [run()] for name, run in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    started, order = time.perf_counter(), random.Random(0)
    for number in range(30):
        for name, run in order.sample(list(variants.items()), len(variants)):
            took = timed(run, row.needs == "cuda")
            if number:  # the first round warms up
                samples[name].append(took)
        if number >= 3 and time.perf_counter() - started > SECONDS:
            break
    return samples


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def report(row: Row, samples: dict[str, list[float]]) -> list[dict[str, object]]:
    """One line of the table a variant."""
    ours = samples["gemmascope"]
    lines = []
    for name, values in samples.items():
        ratio = median(peer / own for peer, own in zip(values, ours, strict=True))
        lines.append(
            {
                "row": row.name,
                "impl": name,
                "mode": row.mode,
                "shape": row.shape,
                "dtype": row.dtype,
                "unit": row.unit,
                "p20": f"{quantile(values, 0.2):.4g}",
                "p50": f"{quantile(values, 0.5):.4g}",
                "p80": f"{quantile(values, 0.8):.4g}",
                "ratio": "" if name == "gemmascope" else f"{ratio:.3g}",
                "device": device_name(),
                "threads": torch.get_num_threads(),
                **{
                    column: version(column.replace("_", "-"))
                    for column in ("torch", "triton", "transformers", "transformer_lens")
                },
                "date": date.today().isoformat(),
            }
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wanted", nargs="*", help="parts of row names; all rows without any")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--dry", action="store_true", help="print figures, leave results.csv and the tests alone")
    options = parser.parse_args()
    rows = [
        row
        for row in (*ROWS, *experiment_rows(), *view_rows())
        if not options.wanted or any(word in row.name for word in options.wanted)
    ]
    if not rows:
        parser.error(f"no row is called {' or '.join(options.wanted)}; --list shows them.")
    if options.list:
        for row in rows:
            print(f"{row.name:44} {row.needs:5} {row.dtype:9} {row.shape}\n{'':44} wanted: {row.wanted}")
        return 0
    if not options.dry and not tests_pass():
        print("A kernel test is red, so nothing is measured.", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    for row in rows:
        if row.needs == "cuda" and not torch.cuda.is_available():
            print(f"{row.name}: not measured, it needs a GPU")
            continue
        lines = report(row, measure(row))
        gc.collect()
        for line in lines:
            ratio = f"  {line['ratio']:>6}x" if line["ratio"] else ""
            print(f"{row.name:44} {line['impl']:34} {line['p50']:>8} {row.unit}{ratio}", flush=True)
        if not options.dry:
            new = not RESULTS.is_file()
            with RESULTS.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerows(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
