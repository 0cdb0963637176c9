"""Experts in plain PyTorch, fast on a CPU: what `reference.py` means, in fewer passes over memory.

An expert's work is reading its weights when its rows are few, and its products when they are many. So weights are read
where they lie, once: rows are sorted by expert and taken through, all of them or one expert's at a time. A run with
hooks calls the pieces instead, `grouped_linear`, `geglu` and `grouped_linear`, and has the same bits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gemmascope_kernels import cpu_products
from gemmascope_kernels.cpu_mlp import geglu
from gemmascope_kernels.reference import wide

GATHERED = {torch.bfloat16: 2**18, torch.float32: 2**17}
"""Bytes of weights up to which copying every row's matrix costs less than sorting the rows."""
GROUPED = 2**20
"""Bytes of one matrix up to which a call costs more than its product: torch's own loop over experts is better there."""
FEW = {torch.bfloat16: 32, torch.float32: 4}
"""Rows an expert, on average, up to which torch's loop is the better one whatever the matrix."""
SPARSE = 0.25
"""The same, up to which it is not: it goes to every expert, those without a row too."""
COMPANY = 15
"""Spare rows after the last: a product of 5 to 15 rows is faster as one of 16, whatever the others hold."""


def grouped_linear(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """See `reference.grouped_linear`."""
    way = _way(len(x), weight)
    if way == "gather":
        return torch.bmm(weight[expert], x[..., None]).squeeze(-1)
    order = expert.argsort(stable=True)
    out = _through(_taken(x, order, way), _counts(expert, len(weight), way), weight, way)
    return x.new_empty(len(x), weight.shape[1]).index_copy_(0, order, out[: len(x)])


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, slot_gain: Tensor | None = None
) -> Tensor:
    """See `reference.experts`."""
    (n, k), d = indices.shape, down.shape[1]
    weights = weights if slot_gain is None else weights * slot_gain
    if _loops(n * k, gate_up, down):
        return _one_by_one(x, indices, weights, gate_up, down, cpu_products.scratch("slots", n, k, d, like=x)).sum(1)
    said, place = _said(x, indices, gate_up, down)
    out, step = x.new_empty(n, d), max(1, min(n, 2**20 // (k * d)))  # as many tokens as stay in the cache
    slots = said.new_empty(step * k, d)
    for start in range(0, n, step):
        here = slice(start, min(n, start + step))
        rows = slice(0, (here.stop - start) * k)
        torch.index_select(said, 0, place[here].reshape(-1), out=slots[rows])
        # Converted by themselves: a product of two dtypes converts number by number.
        weighted = wide(slots[rows]).mul_(weights[here].reshape(-1, 1)).type_as(said)
        torch.sum(weighted.view(-1, k, d), 1, out=out[here])
    return out


def expert_slots(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, slot_gain: Tensor | None = None
) -> Tensor:
    """See `reference.expert_slots`."""
    weights = weights if slot_gain is None else weights * slot_gain
    if _loops(indices.numel(), gate_up, down):
        return _one_by_one(x, indices, weights, gate_up, down, x.new_empty(*indices.shape, down.shape[1]))
    said, place = _said(x, indices, gate_up, down)
    out = x.new_empty(place.numel(), down.shape[1])
    torch.index_select(said, 0, place.reshape(-1), out=out)
    return out.view(*place.shape, -1).mul_(weights[..., None])


def experts_backward(
    dout: Tensor, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, learned: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weights and, where these are learned, gate_up and down, from that of `experts`, [n, d]."""
    return expert_slots_backward(dout[:, None].expand(*indices.shape, -1), x, indices, weights, gate_up, down, learned)


def expert_slots_backward(
    dslots: Tensor, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, learned: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weights and, where these are learned, gate_up and down, from that of `expert_slots`, [n, k, d].

    For a slot of weight w, with post = gelu(gate) * up, out = down post and dpost = down^T dslot:
    dw = dout . out = dpost . post, so that `out` is not needed again; all else has its gradient times w.
    """
    k, expert = indices.shape[1], indices.reshape(-1)
    counts = expert.bincount(minlength=len(down)).tolist()
    dx, dweights = wide(x).new_zeros(x.shape), weights.new_empty(weights.shape)
    dgate_up, ddown = (torch.empty_like(each) if learned else None for each in (gate_up, down))
    for number, slots in enumerate(expert.argsort(stable=True).split(counts)):
        if not len(slots):
            if learned:
                dgate_up[number], ddown[number] = 0, 0
            continue
        token, slot = slots // k, slots % k
        rows, dout, weight = x[token], dslots[token, slot], weights[token, slot, None]
        gate, up = rows.mm(gate_up[number].T).chunk(2, dim=-1)
        gelu = F.gelu(gate, approximate="tanh")
        post, dpost = gelu * up, dout.mm(down[number])
        dweights[token, slot] = (wide(dpost) * post).sum(-1).to(weights.dtype)
        if learned:
            torch.mm((dout * weight).type_as(x).T, post, out=ddown[number])
        dpost = (dpost * weight).type_as(x)
        dgate = torch.ops.aten.gelu_backward(dpost * up, gate, approximate="tanh")
        dboth = torch.cat((dgate, dpost * gelu), dim=-1)
        if learned:
            torch.mm(dboth.T, rows, out=dgate_up[number])
        dx.index_add_(0, token, wide(dboth.mm(gate_up[number])))
    return dx.type_as(x), dweights, dgate_up, ddown


def _said(x: Tensor, indices: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """What the experts of all slots say, before its weight, in some order; and the place of each slot's: [n, k]."""
    (n, k), expert = indices.shape, indices.reshape(-1)
    every, way = torch.arange(n * k, device=x.device), _way(n * k, gate_up)
    if way == "gather" or way != _way(n * k, down):
        gate, up = grouped_linear(x.repeat_interleave(k, 0), expert, gate_up).chunk(2, dim=-1)
        return grouped_linear(geglu(gate, up), expert, down), every.view(n, k)
    order, counts = expert.argsort(stable=True), _counts(expert, len(down), way)
    rows, place = _taken(x, order // k, way), torch.empty_like(order).index_copy_(0, order, every).view(n, k)
    gate, up = _through(rows, counts, gate_up, way)[: n * k].chunk(2, dim=-1)
    post = geglu(gate, up)
    if way == "loop":
        post = torch.cat((post, post.new_zeros(COMPANY, post.shape[1])))
    return _through(post, counts, down, way), place


def _one_by_one(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, out: Tensor) -> Tensor:
    """`expert_slots`, an expert at a time: taken, through both matrices, weighted and put where they belong, in `out`
    [n, k, d], its rows stay in the cache."""
    k, expert = indices.shape[1], indices.reshape(-1)
    order, counts = expert.argsort(stable=True), _counts(expert, len(down), "loop")
    token, weights = order // k, weights.reshape(-1, 1)[order]
    slots, most, start = out.flatten(0, 1), max(counts) + COMPANY, 0
    rows, room = x.new_zeros(most, x.shape[1]), x.new_zeros(most, down.shape[2])
    for number, n_rows in enumerate(counts):
        if n_rows:
            here = slice(start, start + n_rows)
            torch.index_select(x, 0, token[here], out=rows[:n_rows])
            both, said = x.new_empty(n_rows, gate_up.shape[1]), x.new_empty(n_rows, down.shape[1])
            gate, up = _product(rows, n_rows, gate_up[number], both).chunk(2, dim=-1)
            room[:n_rows] = geglu(gate, up)
            _product(room, n_rows, down[number], said)
            # Converted by itself: a product of two dtypes converts number by number.
            slots.index_copy_(0, order[here], wide(said).mul_(weights[here]).type_as(x))
            start += n_rows
    return out


def _loops(n_rows: int, gate_up: Tensor, down: Tensor) -> bool:
    return _way(n_rows, gate_up) == _way(n_rows, down) == "loop" and n_rows > SPARSE * len(down)


def _way(n_rows: int, weight: Tensor) -> str:
    """How rows meet their matrices: "gather" those, let torch "group" the rows, or "loop" over experts here."""
    n_bytes = weight[0].nbytes
    if n_rows * n_bytes <= GATHERED.get(weight.dtype, 0):
        return "gather"
    # What grouped_mm takes, and where it is the faster one.
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    taken = weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and not weight.is_cuda)
    few = SPARSE * len(weight) < n_rows <= FEW.get(weight.dtype, 0) * len(weight)
    return "group" if aligned and taken and (weight.is_cuda or n_bytes <= GROUPED or few) else "loop"


def _counts(expert: Tensor, n_experts: int, way: str) -> list[int] | Tensor:
    """How many rows each expert has, for a loop; where they stop, for grouped_mm."""
    counts = expert.bincount(minlength=n_experts)
    return counts.tolist() if way == "loop" else counts.cumsum(0, dtype=torch.int32)


def _taken(x: Tensor, order: Tensor, way: str) -> Tensor:
    """The rows of x in this order, and company for a loop, in scratch memory."""
    order = F.pad(order, (0, COMPANY)) if way == "loop" else order
    out = cpu_products.scratch("rows", len(order), x.shape[1], like=x)
    return torch.index_select(x, 0, order, out=out)


def _through(rows: Tensor, counts: list[int] | Tensor, weight: Tensor, way: str) -> Tensor:
    """Sorted rows, each times its expert's matrix, in scratch memory. Company stays company, or is dropped."""
    if way == "group":
        if rows.is_cpu and not cpu_products.natively(rows.dtype, len(rows) // len(weight)):
            return _grouped_in_float32(rows, counts, weight)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=counts)
    out, start = cpu_products.scratch("through", len(rows), weight.shape[1], like=rows), 0
    for number, n in enumerate(counts):
        if n:
            _product(rows[start:], n, weight[number], out[start : start + n])
        start += n
    return out


def _grouped_in_float32(rows: Tensor, stops: Tensor, weight: Tensor) -> Tensor:
    """grouped_mm, some experts at a time, rounded once."""
    out, start = cpu_products.scratch("through", len(rows), weight.shape[1], like=rows), 0
    for some in cpu_products.parts(len(weight), cpu_products.BLOCK // weight[0].numel()):
        here = slice(start, int(stops[some.stop - 1]))
        offsets = stops[some] - start
        out[here] = F.grouped_mm(wide(rows[here]), wide(weight[some]).transpose(1, 2), offs=offsets)
        start = here.stop
    return out


def _product(rows: Tensor, n: int, matrix: Tensor, out: Tensor) -> Tensor:
    """The first n of some rows, which have company after them, times a matrix, in the form that reads it fastest.

    As measured with 2 threads of an EPYC (Zen 4) and of a Xeon (Emerald Rapids): one row is better as the column of the
    second factor; so are, in float32, 4 rows and some more, on the EPYC if these are full vectors.
    """
    if rows.is_cpu and not cpu_products.natively(rows.dtype, n):
        return out.copy_(cpu_products.linear(rows[:n], matrix))
    if n == 1:
        return torch.mm(matrix, rows[:1].T, out=out.T).T
    if matrix.dtype == torch.bfloat16 or not 4 <= n <= 32:
        return torch.mm(rows[:n], matrix.T, out=out)
    return out.copy_(matrix.mm(rows[: max(n, 16)].T)[:, :n].T)
