"""What every test shares. The variables are set first because libraries read them when they are imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns at every GPU compile while it is unset
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small, threads only wait for one another
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the network
# Commands and notebook kernels that tests start import this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[1] / place) for place in (".", "kernels"))

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run on the CPU, slowly, for their arithmetic


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def modules_after() -> Callable[[str], set[str]]:
    """Top-level modules that a fresh Python has loaded once it has run some code."""

    def run(code: str) -> set[str]:
        show = "import json, sys; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
        done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
        return set(json.loads(done.stdout.splitlines()[-1]))

    return run
