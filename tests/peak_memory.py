"""How much memory a load takes at its worst, measured in a process of its own: python peak_memory.py FOLDER DTYPE."""

import json
import re
import sys
import tempfile
from pathlib import Path

from gemmascope.testing import tiny_model
from gemmascope.weights import load, save_pretrained

folder, dtype = sys.argv[1:]
with tempfile.TemporaryDirectory() as tiny:  # once before, so that the libraries' own pages are not counted
    save_pretrained(tiny_model("E2B"), tiny)
    load(tiny)


def memory(what: str) -> int:
    """Bytes, as Linux counts them for this process alone (getrusage counts the one that started it, too)."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


before = memory("VmRSS")
model = load(folder, dtype=dtype)
peak = memory("VmHWM")
held = sum(tensor.nbytes for tensor in model.state_dict().values())
print(json.dumps({"taken": peak - before, "held": held}))
