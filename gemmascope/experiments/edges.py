"""Edges: what one part of a model reads of another's output, and a forward pass in which some carry another run.

The stream is a sum of what was written to it (design: "exact arithmetic"), so every reader's input can be rebuilt with
some terms taken from another run:

1. a sender's contribution is what it adds to the stream, through the post-norms with the scale that its own run had;
2. a reader's input is the stream less, for each of its cut edges, (contribution now - contribution in the corrupted
   run), times the layer scalars in between;
3. readers norm that input as the model does (live; or with the scale of the stream without its cuts, frozen), and what
   they compute is the contribution "now" of later edges.

Queries, keys and values of each head, the dense MLP, the router, the experts (as one, or each), the gate of the
per-layer embedding and its signal, and the logits are separate readers. Keys and values have a reader for each kv head,
which every head and every KV-shared layer that reads it follows.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import pandas
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from gemmascope import ops
from gemmascope.experiments.pairs import Pair, paired
from gemmascope.hooks import watched
from gemmascope.metrics import measured
from gemmascope.model.text import scale_as
from gemmascope.results import Result, about

Edge = tuple[str, str]
"""(sender, reader)"""
Group = tuple[int | None, str]
"""A layer (None outside the layers) and one of its parts."""


@dataclass(frozen=True)
class Wiring:
    """The nodes of a model, in the order of a forward pass, and the edges that can be between them."""

    senders: tuple[str, ...]
    """"embed", "L0H1" (a head), "L0.mlp" (dense), "L0.experts" (the routed branch; or "L0E5", each expert), "L0.ple";
    and "signal", the per-layer embedding that the tokens give."""
    readers: tuple[str, ...]
    """"L0H1.q", "L0KV0.k" and "L0KV0.v" (a kv head), "L0.mlp", "L0.router", "L0.experts" (or "L0E5"), "L0.ple" (the
    gate), "L0.signal", "logits"."""
    writes: dict[Group, slice]
    """Which senders a group is."""
    reads: dict[Group, slice]
    """Which readers a group is."""
    exists: Bool[Tensor, "reader sender"]
    owners: dict[str, tuple[str, ...]]
    """Reader -> the senders that compute with it ("logits" for "logits")."""
    each_expert: bool

    @cached_property
    def edges(self) -> list[Edge]:
        """Every edge, reader by reader."""
        return [(self.senders[sender], self.readers[reader]) for reader, sender in self.exists.nonzero().tolist()]

    def cut(self, edges: Iterable[Edge]) -> Float[Tensor, "reader sender"]:
        """1 at the given edges, 0 elsewhere.

        Raises:
            ValueError: for a name that is no node, or an edge that cannot be.
        """
        rows = {name: row for row, name in enumerate(self.readers)}
        columns = {name: column for column, name in enumerate(self.senders)}
        found = torch.zeros(self.exists.shape)
        for sender, reader in edges:
            if sender not in columns or reader not in rows:
                what, name, known = ("sender", sender, columns) if sender not in columns else ("reader", reader, rows)
                near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.0))
                raise ValueError(f"This model has no {what} {name!r}; the nearest are {near}.")
            if not self.exists[rows[reader], columns[sender]]:
                raise ValueError(
                    f"There is no edge from {sender} to {reader}: {reader} is computed before it, or apart."
                )
            found[rows[reader], columns[sender]] = 1
        return found


def wiring(model, experts: bool = False) -> Wiring:
    """The nodes and edges of a model. `experts` makes each routed expert a node, in place of each layer's branch."""
    cfg = model.cfg
    senders, readers, writes, reads, before, owners = [], [], {}, {}, [], {}

    def write(group: Group, names: list[str]) -> None:
        writes[group] = slice(len(senders), len(senders) + len(names))
        senders.extend(names)

    def read(group: Group, owned: dict[str, tuple[str, ...]]) -> None:
        reads[group] = slice(len(readers), len(readers) + len(owned))
        readers.extend(owned)
        before.extend([len(senders)] * len(owned))
        owners.update(owned)

    def of_kv(layer: int, kv_head: int) -> tuple[str, ...]:
        group = cfg.n_heads // cfg.layers[layer].n_kv_heads
        reading = [other for other, shape in enumerate(cfg.layers) if other == layer or shape.kv_source == layer]
        return tuple(f"L{l}H{h}" for l in reading for h in range(kv_head * group, (kv_head + 1) * group))

    write((None, "embed"), ["embed"])
    for l, shape in enumerate(cfg.layers):
        heads = [f"L{l}H{head}" for head in range(cfg.n_heads)]
        read((l, "q"), {f"{head}.q": (head,) for head in heads})
        if shape.kv_source is None:
            for what in "kv":
                read((l, what), {f"L{l}KV{kv}.{what}": of_kv(l, kv) for kv in range(shape.n_kv_heads)})
        write((l, "attn"), heads)
        read((l, "mlp"), {f"L{l}.mlp": (f"L{l}.mlp",)})
        if cfg.n_experts:
            branch = [f"L{l}E{e}" for e in range(cfg.n_experts)] if experts else [f"L{l}.experts"]
            read((l, "router"), {f"L{l}.router": tuple(branch)})
            read((l, "experts"), {name: (name,) for name in branch})
        write((l, "mlp"), [f"L{l}.mlp"])
        if cfg.n_experts:
            write((l, "experts"), branch)
        if cfg.d_ple:
            read((l, "ple"), {f"L{l}.ple": (f"L{l}.ple",)})
            read((l, "signal"), {f"L{l}.signal": (f"L{l}.ple",)})
            write((l, "ple"), [f"L{l}.ple"])
    read((None, "logits"), {"logits": ("logits",)})
    if cfg.d_ple:
        write((None, "signal"), ["signal"])  # last, and read by its own readers only
    exists = torch.arange(len(senders))[None] < torch.tensor(before)[:, None]
    if cfg.d_ple:
        rows = [row for row, name in enumerate(readers) if name.endswith(".signal")]
        exists[rows] = False
        exists[rows, -1] = True
    return Wiring(tuple(senders), tuple(readers), writes, reads, exists, owners, experts)


@dataclass
class Contributions:
    """What every sender added in one run, and the logits that came of it."""

    wiring: Wiring
    written: dict[Group, Float[Tensor, "batch sender pos d_model"]]
    """As written: later layer scalars are not in it."""
    signal: Float[Tensor, "batch pos layer d_ple"] | None
    logits: Float[Tensor, "batch pos_or_one d_vocab"] | None

    def repeated(self, n: int) -> "Contributions":
        """The same for every prompt n times over (prompts 0 to b - 1, then again), without the logits."""
        written = {group: x.repeat(n, 1, 1, 1) for group, x in self.written.items()}
        signal = None if self.signal is None else self.signal.repeat(n, 1, 1, 1)
        return Contributions(self.wiring, written, signal, None)

    def towards(self, other: "Contributions", share: float) -> tuple[Tensor, Tensor | None]:
        """Embedding and signal, this far from this run's to another's."""
        embed = torch.lerp(self.written[None, "embed"], other.written[None, "embed"], share)[:, 0]
        return embed, None if self.signal is None else torch.lerp(self.signal, other.signal, share)


class _Run:
    """One forward pass, block by block, every reader with an input of its own.

    `cut` says how much of each edge comes from `corrupted`: a part of (now - corrupted) is taken from the reader's
    input. `fixed` is taken in place of now, for gradients at a point that is not the clean run (EAP-IG). With `frozen`,
    readers norm with the scale of the whole stream (all but the router, which has a norm of its own inside).
    """

    def __init__(self, model, wires: Wiring, cut=None, corrupted=None, fixed=None, frozen: bool = False):
        self.frozen = frozen
        self.model, self.wires, self.cut, self.corrupted, self.fixed = model, wires, cut, corrupted, fixed
        self.written: dict[Group, Tensor] = {}
        self.differences: dict[Group, Tensor] = {}
        self.scalars: dict[Group, Tensor] = {}
        if cut is not None:
            # Which parts are all 0 is found once: on a GPU every look is a wait.
            self.live = torch.ones_like(wires.exists) if cut.requires_grad else (cut != 0).any(0).cpu()

    def seen(self, group: Group, chosen: Tensor | None = None) -> Float[Tensor, "batch reader pos d_model"]:
        """The input of each reader of a group, or one for all where they have the same.

        With `chosen` [batch, pos, slot], of the readers chosen there: [batch, slot, pos, d_model].
        """
        rows, x = self.wires.reads[group], self.x[:, None]
        for of, difference in self.differences.items():
            columns = self.wires.writes[of]
            if not self.live[rows, columns].any():
                continue
            part = (self.cut[:, rows, columns] * self.scalars[of]).expand(len(x), -1, -1)
            if chosen is None:
                x = x - torch.einsum("brs,bspd->brpd", part, difference)
            else:
                prompts = torch.arange(len(x), device=x.device)[:, None, None]
                x = x - torch.einsum("bpks,bspd->bkpd", part[prompts, chosen], difference)
        return x

    def normed(self, norm, group: Group, chosen: Tensor | None = None) -> Float[Tensor, "batch reader pos d_model"]:
        """The input of each reader of a group, as its norm gives it."""
        x = self.seen(group, chosen)
        return x * _frozen(norm, self.x)[:, None] if self.frozen else norm(x)

    def write(self, group: Group, contribution: Float[Tensor, "batch sender pos d_model"]) -> None:
        self.x = self.x + contribution.sum(1) if group[0] is not None else contribution[:, 0]
        self.written[group] = contribution
        if self.cut is not None and self.live[:, self.wires.writes[group]].any():
            now = contribution if self.fixed is None else self.fixed.written[group]
            self.differences[group] = now - self.corrupted.written[group]
            self.scalars[group] = torch.ones((), dtype=self.x.dtype, device=self.x.device)

    def signal(self, layer: int) -> Float[Tensor, "batch pos d_ple"]:
        signal, row = self.signals[:, :, layer], self.wires.reads[layer, "signal"]
        if self.cut is None or not self.live[row, -1].any():
            return signal
        now = signal if self.fixed is None else self.fixed.signal[:, :, layer]
        return signal - self.cut[:, row, -1:] * (now - self.corrupted.signal[:, :, layer])

    def forward(self, run, embed: Tensor | None = None, signal: Tensor | None = None) -> Contributions:
        model = self.model
        hooked = next((name for name, point in model.hook_dict.items() if watched(point)), None)
        if hooked is not None:
            raise ValueError(f"{hooked} has a hook, and a run with patched edges calls none: take it off first.")
        if embed is None:
            embed = model.embed(run.tokens) * scale_as(model.embed.weight, model.cfg.d_model)
        if model.per_layer is not None:
            signal = model.per_layer(run.tokens, embed) if signal is None else signal
        self.signals = signal
        self.write((None, "embed"), embed[:, None])
        for layer, block in enumerate(model.blocks):
            self._attention(layer, block, run)
            self._feed_forward(layer, block)
            if block.ple is not None:
                out = block.ple(self.seen((layer, "ple"))[:, 0], self.signal(layer))
                self.write((layer, "ple"), block.ple_ln_post(out)[:, None])
            self.x = self.x * block.layer_scalar
            self.scalars = {group: scalar * block.layer_scalar for group, scalar in self.scalars.items()}
        x = self.normed(model.ln_final, (None, "logits"))[:, 0]
        logits = model.softcap(model.unembed(x[:, -1:] if run.last_only else x))
        return Contributions(self.wires, self.written, signal, logits)

    def _attention(self, layer: int, block, run) -> None:
        attn, shape = block.attn, block.geometry

        def project(what: str, weight: Tensor) -> Tensor:
            return torch.einsum("bhpd,hde->bphe", self.normed(block.ln1, (layer, what)), weight)

        q = ops.rotate(attn.q_norm(project("q", attn.W_Q)), *run.rope[shape.kind])
        if shape.kv_source is None:
            k = ops.rotate(attn.k_norm(project("k", attn.W_K)), *run.rope[shape.kind])
            run.kv[layer] = k, ops.rms_norm(project("v", attn.W_V), None, attn.eps)
        k, v = run.kv[layer if shape.kv_source is None else shape.kv_source]
        z = ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), run.masks[shape.kind])[0]
        results = torch.einsum("bphe,hed->bhpd", z, attn.W_O)
        self.write((layer, "attn"), results * _frozen(block.ln1_post, results.sum(1))[:, None])

    def _feed_forward(self, layer: int, block) -> None:
        dense = block.mlp(self.normed(block.ln2, (layer, "mlp"))[:, 0])
        if block.moe is None:
            return self.write((layer, "mlp"), block.ln2_post(dense)[:, None])
        dense = block.dense_ln_post(dense)
        choice = block.moe.router(self.seen((layer, "router"))[:, 0])
        if self.wires.each_expert:
            slots = self._slots(layer, block, choice)
            total = slots.sum(2)
            to = choice[0][..., None].expand_as(slots)
            outs = torch.zeros(*total.shape[:2], self.model.cfg.n_experts, total.shape[-1]).type_as(total)
            outs = outs.scatter_add(2, to, slots).transpose(1, 2)
        else:
            total = block.moe(self.normed(block.moe_ln_pre, (layer, "experts"))[:, 0], choice)
            outs = total[:, None]
        outs = outs * _frozen(block.moe_ln_post, total)[:, None]
        joint = _frozen(block.ln2_post, dense + outs.sum(1))
        self.write((layer, "mlp"), (dense * joint)[:, None])
        self.write((layer, "experts"), outs * joint[:, None])

    def _slots(self, layer: int, block, choice) -> Float[Tensor, "batch pos slot d_model"]:
        """Each slot's weighted output, each expert with an input of its own."""
        indices, moe = choice[0], block.moe
        x = self.normed(block.moe_ln_pre, (layer, "experts"), indices).transpose(1, 2)
        rows = x.expand(*indices.shape, -1).flatten(0, 2)
        both = ops.grouped_linear(rows, indices.flatten(), moe.gate_up_proj).unflatten(0, indices.shape)
        return moe.down(ops.geglu(*both.chunk(2, dim=-1)), choice)


def _frozen(norm, x: Tensor) -> Tensor:
    """The gain of a norm over the scale that x has: with it, parts of x are normed so that they add up."""
    return (ops.wide(norm.weight) / ops.rms(x, norm.eps)).type_as(x)


def contributions(
    model, tokens, attention_mask: Tensor | None = None, experts: bool = False, last_only: bool = False
) -> Contributions:
    """Runs prompts and keeps what every sender contributed: batch x senders x pos x d_model numbers.

    `experts` makes each routed expert a sender; their contributions are stored also where they are 0. `last_only`
    unembeds the last position only.
    """
    run = model._begin(tokens, attention_mask)
    run.last_only = last_only
    return _Run(model, wiring(model, experts)).forward(run)


def run_with_edges_patched(
    model,
    tokens,
    corrupted: Contributions,
    edges: Iterable[Edge] | list[set[Edge]] | Float[Tensor, "cut reader sender"],
    attention_mask: Tensor | None = None,
    *,
    last_only: bool = False,
    frozen: bool = False,
    fixed: Contributions | None = None,
    embed: Float[Tensor, "batch pos d_model"] | None = None,
    signal: Float[Tensor, "batch pos layer d_ple"] | None = None,
) -> Float[Tensor, "batch pos_or_one d_vocab"]:
    """The logits of a run in which some edges carry what the sender contributed to another run.

    Only the edge itself is patched: the sender's other readers get what it computes now. Everything after a patched
    reader is computed anew, norms included.

    Args:
        tokens: the prompts, as forward takes them.
        corrupted: `contributions(model, other tokens)` of as many prompts, or of one.
        edges: (sender, reader) pairs for all prompts; a list with a set for each prompt; or a tensor that says how much
            of each edge is patched (`Wiring.cut` stacked: one for each prompt, or one for all). Its gradient at 0 is
            edge attribution.
        last_only: give the logits of the last position only: [batch, 1, d_vocab].
        frozen: readers norm their input with the scale of the stream as it is without their cuts.
        fixed: what senders are taken to contribute now, in place of what they do.
        embed, signal: in place of the tokens' own.

    Raises:
        ValueError: for a node or an edge that is not there, runs of different shapes, or a model with hooks, which this
            pass does not call.
    """
    wires, run = corrupted.wiring, model._begin(tokens, attention_mask)
    run.last_only = last_only
    if isinstance(edges, Tensor):
        cut = edges
    else:
        edges = list(edges)
        each = bool(edges) and not isinstance(edges[0], tuple)
        cut = torch.stack([wires.cut(some) for some in (edges if each else [edges])])
    there = corrupted.written[None, "embed"]
    if there.shape[2] != run.tokens.shape[1] or len(there) not in (1, len(run.tokens)):
        raise ValueError(
            f"The corrupted run has {len(there)} prompts of {there.shape[2]} tokens and this one has "
            f"{len(run.tokens)} of {run.tokens.shape[1]}: give prompts of one shape."
        )
    if len(cut) not in (1, len(run.tokens)):
        raise ValueError(
            f"There are {len(cut)} sets of edges for {len(run.tokens)} prompts: give one, or one for each."
        )
    cut = cut.to(device=model.cfg.device, dtype=model.cfg.dtype)
    return _Run(model, wires, cut, corrupted, fixed, frozen).forward(run, embed, signal).logits


def edge_patching(
    model,
    clean,
    corrupted,
    metric,
    edges: Iterable[Edge | Iterable[Edge]] | None = None,
    *,
    experts: bool = False,
    norms: str = "live",
    attention_mask: Tensor | None = None,
    cells_per_forward: int = 32,
) -> Result:
    """The exact effect of every edge alone: the metric when only this edge carries the corrupted run.

    Args:
        clean, corrupted: prompts and their corrupted versions, of one length.
        metric: a function of logits [prompt, pos, d_vocab] that gives a figure a prompt.
        edges: which; all by default. A set of edges is one cell, its edges patched together.
        experts: each routed expert a node.
        norms: "live", as the model norms what a reader gets; or "frozen", with the scale it would have unpatched.
        cells_per_forward: how many edges share one forward pass; memory grows with it.

    Returns:
        a Result with a cell for each edge (of a set: its first), axes "sender" and "receiver", the metric after the
        patch by prompt, and the baselines "clean" and "corrupted".
    """
    pair: Pair = paired(model, clean, corrupted, attention_mask)
    if norms not in ("live", "frozen"):
        raise ValueError(f"norms is {norms!r}; it is 'live' or 'frozen'.")
    edges = wiring(model, experts).edges if edges is None else list(edges)
    cells = [[edge] if isinstance(edge[0], str) else list(edge) for edge in edges]
    b, values, last_only = len(pair.clean), [], getattr(metric, "last_only", False)
    with torch.no_grad():
        other = contributions(model, pair.corrupted, pair.mask, experts, last_only)
        clean_logits = run_with_edges_patched(model, pair.clean, other, [], pair.mask, last_only=last_only)
        baselines = {"clean": measured(metric, clean_logits), "corrupted": measured(metric, other.logits)}
        for start in tqdm(range(0, len(cells), cells_per_forward), desc="edges", delay=1, leave=False):
            some = cells[start : start + cells_per_forward]
            n = len(some)
            logits = run_with_edges_patched(
                model,
                pair.clean.repeat(n, 1),
                other.repeated(n),
                [set(cell) for cell in some for _ in range(b)],
                None if pair.mask is None else pair.mask.repeat(n, 1),
                last_only=last_only,
                frozen=norms == "frozen",
            )
            values += [measured(metric, part) for part in logits.split(b)]
    return Result(
        "edge patching",
        pandas.DataFrame([cell[0] for cell in cells], columns=["sender", "receiver"]),
        torch.stack(values).cpu(),
        getattr(metric, "name", None) or getattr(metric, "__name__", "metric"),
        {name: x.cpu() for name, x in baselines.items()},
        about(model, prompts=b, norms=norms),
        base="clean",
    )
