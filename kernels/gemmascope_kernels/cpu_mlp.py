"""The MLP in plain PyTorch, fast on a CPU: what is wide is never whole, and gelu takes the quicker of its two forms.

gelu(x) = x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). torch's gelu takes three times as
long as the second form does with its sigmoid, and loses what 1 + tanh u rounds off where x is negative.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gemmascope_kernels.cpu_products import ROWS, in_float32, parts, scratch, written

TOGETHER = 1024
"""Rows that go through an MLP together, at most; with under half as many, a product would read its matrix too often."""
PART = 1 << 17
"""Elements a thread that go through gelu together, and stay in the cache."""
GRAIN = 1 << 15
"""Elements from which PyTorch calls another thread."""
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """See `reference.mlp`."""
    n_parts = -(-len(x) // (ROWS if in_float32(x, gate) else TOGETHER))
    most, out = -(-len(x) // max(1, n_parts)), x.new_empty(len(x), len(down))
    rooms = [scratch(name, most * len(gate) + _company(most * len(gate)), like=x) for name in ("gate", "up")]
    for rows in parts(len(x), most):
        n = (rows.stop - rows.start) * len(gate)
        gated, upped = (room[:n].view(-1, len(gate)) for room in rooms)
        written(x[rows], gate, gated), written(x[rows], up, upped)
        _geglu(*(room[: n + _company(n)] for room in rooms), out=rooms[0])
        written(gated, down, out[rows])
    return out


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.geglu`. The bits are the same wherever an element stands."""
    n, company = gate.numel(), _company(gate.numel())
    flat = [F.pad(x.reshape(-1), (0, company)) if company else x.reshape(-1) for x in (gate, up)]
    return _geglu(*flat, out=torch.empty_like(flat[0]))[:n].view(gate.shape)


def geglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dgate = torch.ops.aten.gelu_backward(dout * up, gate, approximate="tanh")
    return dgate, dout * F.gelu(gate, approximate="tanh")


def _geglu(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """Of flat tensors with their company; `out` may be the gate."""
    step = PART * torch.get_num_threads()
    room, slope = scratch("gelu", min(step, len(gate)), like=gate), gate.new_full((), SLOPE)
    for part in parts(len(gate), step):
        x, gelu = gate[part], room[: part.stop - part.start]
        if x.dtype in (torch.float32, torch.float64):
            torch.addcmul(slope, x, x, value=CUBIC, out=gelu).mul_(x).sigmoid_().mul_(x)
        else:
            torch.ops.aten.gelu.out(x, approximate="tanh", out=gelu)
        torch.mul(gelu, up[part], out=out[part])
    return out


def _company(n: int) -> int:
    """Spare elements after the last. PyTorch rounds the few after a thread's last full vector differently; so there
    are none: each thread gets a multiple of 64."""
    threads = torch.get_num_threads()
    last = n % (PART * threads)
    total = last + -last % 64
    while total % (64 * max(1, min(threads, -(-total // GRAIN)))):
        total += 64
    return total - last
