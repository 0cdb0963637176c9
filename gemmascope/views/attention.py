"""Attention of every head of a prompt, made when somebody looks.

Up to LONG tokens a head's whole pattern is computed for its map. Above, nothing of the size of a pattern is ever held:
a layer is read once, in strips of queries, into each row's normaliser and the largest weight of every block; tiles
finer than these blocks are computed from queries, keys and normalisers.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from gemmascope import ops
from gemmascope.readout.heads import PATTERNS
from gemmascope.views.run import Run, array, run_of
from gemmascope.widgets.attention_view import LONG, THUMB, TILE, AttentionView, codes
from gemmascope.widgets.base import Selection

MAX_SCORED = 2048
"""Tokens up to which heads are scored, from their whole patterns."""
KEPT = 1 << 27
"""Codes of pooled maps that are kept for a long prompt, of all heads together, in bytes."""
STRIP = 1 << 26
"""Attention scores that one answer of a long prompt's thumbnails goes through."""
EXPORTED = 1 << 21
"""Codes of maps up to which an exported page carries those of every head."""
SCORES = {name: "mean attention" for name in PATTERNS} | {"first token": "mean attention", "mean distance": "tokens"}


def attention_view(
    model,
    prompt,
    *,
    compare=None,
    selection: Selection | None = None,
    state: Mapping[str, Any] | None = None,
) -> AttentionView:
    """What each head reads: heads as thumbnails, one map, the numbers of one query and one key.

        gs.attention_view(model, "The capital of France is", compare="The capital of Italy is")

    Args:
        prompt: text, token ids, or a cache of one prompt. For a very long one, a cache of every layer's hook_rot_q and
            hook_rot_k, run with return_type=None, holds all that is needed.
        compare: another prompt of as many tokens, whose attention can be taken away from this one's.
        selection: the Selection to follow, to link it with other views.
        state: see AttentionView.

    Raises:
        ValueError: where the prompts differ in length.
        KeyError: where a cache does not hold what attention is made from, with what to name in `names_filter`.
    """
    run = run_of(model, prompt)
    of = [_Attention(run)]
    other, other_setup = None, ""
    if compare is not None:
        second = run_of(model, compare)
        if second.n != run.n:
            raise ValueError(f"The prompts have {run.n} and {second.n} tokens: compare two of the same number.")
        of.append(_Attention(second))
        other, other_setup = second.texts, _renamed(second.setup)
    chosen = (selection.layer, selection.head) if selection is not None else (None, None)
    start, strongest = of[0].first_look(*chosen)
    answers = {name: functools.partial(_answer, of, name) for name in _Attention.QUESTIONS}
    return AttentionView(
        run.texts,
        [layer | {"parts": len(of[0].strips(i))} for i, layer in enumerate(run.layers())],
        run.model.cfg.n_heads,
        answers,
        thumb_block=of[0].thumb_block,
        other=other,
        start=start,
        scores=SCORES if run.n <= MAX_SCORED else {},
        strongest=strongest,
        setup=run.setup,
        other_setup=other_setup,
        exported=_exported,
        selection=selection,
        state=state,
    )


def _answer(prompts: "list[_Attention]", name: str, *, of: int = 0, **arguments: int) -> dict[str, Any]:
    attention = prompts[of]
    with attention.run.using():
        return getattr(attention, name)(**arguments)


def _renamed(setup: str) -> str:
    """What makes `prompt`, making `other_prompt`."""
    *before, last = setup.splitlines()
    imports = [line for line in before if line == "import torch"]
    return "\n".join([*imports, f"other_{last}"])


def _exported(view: AttentionView) -> Iterator[tuple[str, dict[str, int]]]:
    """Every thumbnail and score; every map of a short prompt, else that of the head that is selected."""
    layers, n_heads, n = view.data["layers"], view.data["heads"], len(view.data["tokens"])
    prompts = [0] if view.data["other"] is None else [0, 1]
    heads = [(layer, head) for layer in range(len(layers)) for head in range(n_heads)]
    if n > 256 or len(heads) * n * n > EXPORTED:
        first, pinned = view.data["start"], view.state["pinned"]
        layer, head = _place(view.selection.layer, len(layers)), _place(view.selection.head, n_heads)
        heads = [(first[0] if layer is None else layer, first[1] if head is None else head)]
        heads += [] if pinned is None else [tuple(pinned)]
    for of in prompts:
        for layer, shape in enumerate(layers):
            yield from (("thumbs", {"of": of, "layer": layer, "part": part}) for part in range(shape["parts"]))
        for layer, head in heads:
            if n <= LONG:
                yield "map", {"of": of, "layer": layer, "head": head}
                continue
            z = _page_level(n)
            side = -(-n // (TILE << z))
            yield from (
                ("tile", {"of": of, "layer": layer, "head": head, "z": z, "x": x, "y": y})
                for y in range(side)
                for x in range(y + 1)
            )
    if view.data["scores"]:
        yield from (("scores", {"of": 0, "layer": layer}) for layer in range(len(layers)))


def _page_level(n: int) -> int:
    """The level of tiles that an exported page of a long prompt holds: at most LONG cells along a side."""
    return (-(-n // LONG) - 1).bit_length()


class _Attention:
    """The attention of one run, and the answers to what a view asks of it. Positions are counted from 0."""

    QUESTIONS = ("thumbs", "map", "tile", "band", "row", "column", "scores")

    def __init__(self, run: Run):
        self.run, self.n, cfg = run, run.n, run.model.cfg
        self.n_heads = cfg.n_heads
        self.windows = [layer["window"] for layer in run.layers()]
        self.long = self.n > LONG
        self.thumb_block = _power_of_two(self.n / THUMB) if self.long else -(-self.n // THUMB)
        self.block = _power_of_two((cfg.n_layers * cfg.n_heads * self.n**2 / KEPT) ** 0.5)
        """Positions along each side of a block whose largest weight is kept, of a long prompt."""
        self._streams: dict[int, _Stream] = {}

    # Weights

    def pattern(self, layer: int, head: int | None = None) -> Float[Tensor, "*head query key"]:
        found = self.run.cache.pattern(layer, heads=head)
        return found[0] if self.run.cache.has_batch_dim else found

    def rows(self, layer: int, rows: list[int]) -> Float[Tensor, "head row key"]:
        found = self.run.cache.pattern(layer, rows=rows)
        return found[0] if self.run.cache.has_batch_dim else found

    def first_look(self, layer: int | None, head: int | None) -> tuple[tuple[int, int], list[tuple[int, int, float]]]:
        """(layer, head) that look hardest at one key other than the first token, themselves and the token before, where
        heads rest that have nothing to say; and the head's strongest such edges. What is given is kept."""
        count = min(self.n, max(16, (1 << 20) // self.n), 256)
        queries = sorted({round(q) for q in np.linspace(0, self.n - 1, count)})
        query, key = torch.tensor(queries)[:, None], torch.arange(self.n)
        structured = (key < query - 1) & (key > 0)
        layer, head, best = _place(layer, len(self.windows)), _place(head, self.n_heads), None
        with self.run.using():
            for l in range(len(self.windows)) if layer is None else [layer]:
                elsewhere = torch.where(structured, self.rows(l, queries).float().cpu().nan_to_num(0), 0)
                scores = elsewhere.amax(-1).mean(-1)
                h = int(scores.argmax()) if head is None else head
                if best is None or scores[h] > best[0]:
                    best = scores[h], (l, h), elsewhere[h]
        _, start, weights = best
        top = weights.flatten().topk(min(12, weights.numel()))
        edges = [(queries[i // self.n], i % self.n, value) for value, i in zip(*map(Tensor.tolist, top), strict=True)]
        return start, [edge for edge in edges if edge[2] > 0]

    # Answers: `codes` are uint8, `weights` exact

    def map(self, layer: int, head: int) -> dict[str, Any]:
        """A head's whole map [query, key], of a prompt up to LONG tokens."""
        return {"codes": codes(array(self.pattern(layer, head)))}

    def thumbs(self, layer: int, part: int) -> dict[str, Any]:
        """One part of the thumbnails of a layer's heads, [head, row, column]: the largest weight of each block."""
        if not self.long:
            small = [_pooled(self.pattern(layer, head), self.thumb_block) for head in range(self.n_heads)]
            return {"codes": codes(array(torch.stack(small)))}
        rows = self.strips(layer)[part]
        stream = self._stream(layer)
        stream.read(rows)
        strip = stream.codes[:, rows.start // self.block : -(-rows.stop // self.block)]
        return {"codes": _pooled_codes(strip, self.thumb_block // self.block)}

    def tile(self, layer: int, head: int, z: int, x: int, y: int) -> dict[str, Any]:
        """Tile (x, y) of a map of blocks of 2**z positions, of a long prompt: [row, column], at most TILE of each."""
        side = TILE << z
        rows, keys = (slice(i * side, min((i + 1) * side, self.n)) for i in (y, x))
        stream = self._stream(layer)
        if 1 << z >= self.block:
            stream.read(rows)
            found = stream.codes[head, _blocks(rows, self.block), _blocks(keys, self.block)]
            return {"codes": _pooled_codes(found[None], (1 << z) // self.block)[0]}
        return {"codes": codes(array(_pooled(stream.weights(head, rows, keys), 1 << z)))}

    def band(self, layer: int, head: int, window: int) -> dict[str, Any]:
        """A head's map by distance up to `window`, [query, query - key], of a long prompt; a cell is the largest weight
        of `rows` queries and `columns` distances."""
        rows, columns = (_power_of_two(size / LONG) for size in (self.n, window))
        stream, step = self._stream(layer), rows * max(1, TILE // rows)
        parts = []
        for start in range(0, self.n, step):
            stop, first = min(start + step, self.n), max(0, start - window + 1)
            weights = stream.weights(head, slice(start, stop), slice(first, stop))
            key = torch.arange(start, stop, device=weights.device)[:, None] - torch.arange(
                window, device=weights.device
            )
            near = weights.gather(1, (key - first).clamp_min(0)).masked_fill(key < 0, 0)
            parts.append(F.max_pool2d(near[None], (rows, columns), ceil_mode=True)[0])
        return {"codes": codes(array(torch.cat(parts))), "rows": rows, "columns": columns}

    def row(self, layer: int, head: int, pos: int) -> dict[str, Any]:
        """What a query reads: [key]."""
        # As a copied line computes it, to the bit.
        row = self._stream(layer).row(head, pos) if self.long else self.pattern(layer, head)[pos]
        return {"weights": array(row)}

    def column(self, layer: int, head: int, key: int) -> dict[str, Any]:
        """How much each query reads of a key: [query]."""
        if not self.long:
            return {"weights": array(self.pattern(layer, head)[:, key])}
        return {"weights": array(self._stream(layer).weights(head, slice(0, self.n), slice(key, key + 1))[:, 0])}

    def scores(self, layer: int) -> dict[str, Any]:
        """A number of each of SCORES for each head of a layer, [head, score]; NaN where no query is counted."""
        return {"scores": np.array([self._scored(self.pattern(layer, head)) for head in range(self.n_heads)])}

    def _scored(self, pattern: Float[Tensor, "query key"]) -> list[float]:
        places = torch.arange(self.n, device=pattern.device)
        found = [
            float(pattern[marked].sum() / marked.any(-1).sum()) if marked.any() else float("nan")
            for marked in (marks.to(pattern.device) for marks in self._marks)
        ]
        distance = (pattern * (places[:, None] - places)).sum(-1).mean()
        return [*found, float(pattern[1:, 0].mean()), float(distance)]

    @functools.cached_property
    def _marks(self) -> list[Tensor]:
        return [mark(self.run.tokens[None])[0] for mark in PATTERNS.values()]

    # A long prompt

    def strips(self, layer: int) -> list[slice]:
        """The rows that each part of a layer's thumbnails covers, whole blocks of the thumbnails."""
        if not self.long:
            return [slice(0, self.n)]
        seen = self.n if self.windows[layer] is None else min(self.n, self.windows[layer] + self.thumb_block)
        most = min(STRIP // (seen * self.n_heads), (STRIP * self.block**2 // 4) // (self.n * self.n_heads))
        step = max(1, most // self.thumb_block) * self.thumb_block
        return [slice(start, min(start + step, self.n)) for start in range(0, self.n, step)]

    def _stream(self, layer: int) -> "_Stream":
        """A layer of a long prompt, ready to be read. Queries and keys are kept of the last two layers only."""
        stream = self._streams.pop(layer, None) or _Stream(self, layer)
        self._streams[layer] = stream  # the last to be used stands last
        for older in list(self._streams)[:-2]:
            self._streams[older].forget()
        return stream


class _Stream:
    """One layer of a long prompt: each row's normaliser and the largest weight of each block, read in strips."""

    def __init__(self, attention: _Attention, layer: int):
        self.cache, self.layer, self.block, self.n = attention.run.cache, layer, attention.block, attention.n
        side = -(-attention.n // attention.block)
        self.codes: UInt8[np.ndarray, "head row column"] = np.zeros((attention.n_heads, side, side), np.uint8)
        self.lse = None
        self._read = np.zeros(side, bool)
        self._qk = None
        self._step = attention.strips(layer)[0].stop

    def forget(self) -> None:
        self._qk = None

    @property
    def qk(self) -> tuple[Tensor, Tensor, ops.Mask]:
        """Queries and keys, and which see which."""
        if self._qk is None:
            name = f"blocks.{self.layer}.attn.hook_pattern"
            self.cache._refuse_if_changed(name)
            q, k = self.cache._qk(self.layer, name)
            mask = self.cache._masks[self.cache.model.layer(self.layer).kind]
            if mask.image_blocks is not None:
                raise ValueError(
                    f"Positions of an image see each other both ways, which maps of over {LONG} tokens leave out: "
                    "give a shorter prompt."
                )
            self._qk = q.to(mask.device), k.to(mask.device), mask
        return self._qk

    def read(self, rows: slice) -> None:
        """Goes through the strips that hold some rows, unless it did before."""
        for start in range(rows.start // self._step * self._step, rows.stop, self._step):
            strip = slice(start, min(start + self._step, self.n))
            blocks = _blocks(strip, self.block)
            if not self._read[blocks].all():
                self._go_through(strip)
                self._read[blocks] = True

    def _go_through(self, rows: slice) -> None:
        q, k, mask = self.qk
        if self.lse is None:
            self.lse = torch.zeros(
                1, q.shape[2], self.n, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32)
            )
        q, k = q[:, rows], k[:, : rows.stop]  # the queries are the last of these positions
        known = None if mask.key_mask is None else mask.key_mask[:, : rows.stop]
        mask = replace(mask, n_queries=q.shape[1], n_keys=k.shape[1], key_mask=known)
        lse = ops.attention(q, k, k[..., :16], mask)[1]  # values that nobody reads, and few of them
        self.lse[..., rows] = lse
        largest = codes(array(ops.attention_pool(q, k, lse, mask, self.block, "max")[0]))
        self.codes[:, _blocks(rows, self.block), : largest.shape[-1]] = largest

    def weights(self, head: int, rows: slice, keys: slice) -> Float[Tensor, "row key"]:
        """The pattern of some rows and keys of a head, at the cost of these, once the rows were read."""
        self.read(rows)
        q, k, mask = self.qk
        found = torch.zeros(rows.stop - rows.start, keys.stop - keys.start, dtype=self.lse.dtype, device=q.device)
        one = torch.tensor([head], device=q.device)
        window = self.n if mask.window is None else mask.window
        for start in range(rows.start, rows.stop, TILE):  # what a few rows see is a part of the keys only
            stop = min(start + TILE, rows.stop)
            first, end = max(keys.start, start - window + 1), min(keys.stop, stop)
            if first < end:
                some, seen = (torch.arange(a, b, device=q.device) for a, b in ((start, stop), (first, end)))
                weights = ops.attention_tiles(q, k, self.lse, mask, one, some, seen)[0, 0]
                found[start - rows.start : stop - rows.start, first - keys.start : end - keys.start] = weights
        return found

    def row(self, head: int, pos: int) -> Float[Tensor, " key"]:
        q, k, mask = self.qk
        own = head // (q.shape[2] // k.shape[2])
        scores = ops.masked_scores(q[:, [pos], head : head + 1], k[:, :, own : own + 1], mask.rows([pos]))
        return scores.softmax(-1)[0, 0, 0]


def _place(i: int | None, n: int) -> int | None:
    """A place among n that somebody selected, as the page takes it: counted from the end where negative."""
    return None if i is None else min(max(i + n if i < 0 else i, 0), n - 1)


def _power_of_two(size: float) -> int:
    """The smallest power of two that is as large."""
    return 1 << max(0, int(np.ceil(np.log2(max(size, 1)))))


def _blocks(rows: slice, block: int) -> slice:
    return slice(rows.start // block, -(-rows.stop // block))


def _pooled(pattern: Float[Tensor, "row key"], block: int) -> Float[Tensor, "row_block key_block"]:
    """The largest of each block; NaN where there is one."""
    return F.max_pool2d(pattern[None], block, ceil_mode=True)[0] if block > 1 else pattern


def _pooled_codes(x: UInt8[np.ndarray, "head row column"], factor: int) -> UInt8[np.ndarray, "head rows columns"]:
    pad = [(0, 0), (0, -x.shape[1] % factor), (0, -x.shape[2] % factor)]
    blocks = np.pad(x, pad).reshape(len(x), -(-x.shape[1] // factor), factor, -(-x.shape[2] // factor), factor)
    return blocks.max((2, 4))
