"""What the Triton kernels become on an H100 or H200, compiled here without one: they fit, they do not spill, and they
use the matrix instructions they are meant to.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys

import pytest

CASES = [
    "attention[26b-local-8k-bf",
    "attention[26b-local-8k-cut-bf",
    "attention[26b-global-8k-bf",
    "attention[26b-global-k=v-8k-bf",
    "attention[26b-global-decode-bf",
    "attention_backward[26b-local-8k-bf",
    "attention_backward[26b-global-8k-bf",
    "attention_tiles[26b-local-8k-bf",
    "attention_pool[26b-global-8k-bf",
    "attention_colsum[26b-global-8k-bf",
    "attention_topk[26b-local-8k-bf",
    "attention_entropy[26b-local-8k-bf",
    "attention_by_source[26b-local-8k-bf",
    "experts[26b-1-bf",
    "experts[26b-2048-bf",
    "experts_backward[26b-2048-bf",
    "route[26b-256-bf",
    "route_backward[26b-256-bf",
    "rms_norm_backward[26b-256-bf",
    "norm_add[26b-256-bf",
    "norm_rope[26b-local-256-bf",
]
SPILLED = {"attention[26b-global-k=v-8k": 256, "attention[26b-local-8k-cut": 1024}
"""Bytes a thread may spill, where it is not 0: the K = V form holds both queries, and boxes need registers."""
WGMMA = {
    "attention[26b-local-8k": {"_attention_kernel"},
    "attention[26b-global-8k": {"_attention_kernel"},
    "attention[26b-global-k=v-8k": {"_attention_kernel"},
    "attention_backward": {"_attention_dq_kernel", "_attention_dk_kernel", "_attention_dv_kernel"},
    "experts[26b-2048": {"geglu_kernel", "through_kernel"},
    "experts_backward": {"geglu_backward_kernel", "through_kernel", "outer_kernel"},
}
"""Which kernels of a case use Hopper's own matrix instructions."""

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.machine() != "x86_64",
    reason="Triton, which brings the compiler for NVIDIA GPUs, is not installed here: no kernel was compiled.",
)


@pytest.fixture(scope="module")
def report() -> list[dict]:
    """One entry for each distinct kernel. A Python of its own: in this one, Triton interprets."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gemmascope_kernels.compiled", "--json", *CASES]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def allowed(row: dict) -> int:
    return max((limit for case, limit in SPILLED.items() if row["cases"][0].startswith(case)), default=0)


def test_every_kernel_compiles_fits_shared_memory_and_does_not_spill(report: list[dict]) -> None:
    assert {case.split("[")[0] for row in report for case in row["cases"]} == {case.split("[")[0] for case in CASES}
    for row in report:
        what = f"{row['kernel']} of {row['cases'][0]}"
        assert row["error"] is None, f"{what}: {row['error']}"
        assert row["shared"] <= 232_448, f"{what} wants {row['shared']} B of shared memory"
        assert row["spills"] <= allowed(row), f"{what} spills {row['spills']} B, {allowed(row)} are allowed"


@pytest.mark.parametrize("case", WGMMA)
def test_large_products_use_the_matrix_instructions_of_hopper(report: list[dict], case: str) -> None:
    rows = [row for row in report if row["kernel"] in WGMMA[case] and any(c.startswith(case) for c in row["cases"])]
    assert {row["kernel"] for row in rows} == WGMMA[case]
    for row in rows:
        assert row["mma"].startswith("wgmma"), f"{row['kernel']} of {row['cases'][0]} uses {row['mma']}"
