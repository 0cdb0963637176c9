"""How much memory a load takes at its worst, measured in a process of its own: python peak_memory.py FOLDER DTYPE."""

import json
import resource
import sys
import tempfile
from pathlib import Path

from gemmascope.testing import tiny_model
from gemmascope.weights import load, save_pretrained

folder, dtype = sys.argv[1:]
with tempfile.TemporaryDirectory() as tiny:  # once before, so that the libraries' own pages are not counted
    save_pretrained(tiny_model("E2B"), tiny)
    load(tiny)

before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
model = load(folder, dtype=dtype)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
held = sum(tensor.nbytes for tensor in model.state_dict().values())
print(json.dumps({"taken": peak - before, "held": held}))
