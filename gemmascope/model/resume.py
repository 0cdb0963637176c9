"""A run taken up again: for several copies of its prompts, from a layer and a position on.

What an experiment changes at layer l and position p reaches only later layers and, attention being causal, positions
from p on. All else is as it was, so it is not computed again.
"""

from dataclasses import replace

import torch
from torch import Tensor

from gemmascope.config import LayerGeometry
from gemmascope.generate import KVCache
from gemmascope.model.inputs import Pass

KV = dict[int, tuple[Tensor, Tensor]]
"""Keys (after rope) and values (after their norm) of the layers that have their own, [prompt, pos, kv_head, d_head]."""


class Prefix(KVCache):
    """The first positions of a run, for several copies of its prompts. Nothing is added to it."""

    def __init__(self, layers: tuple[LayerGeometry, ...], kv: KV, length: int, copies: int):
        self.layers, self.length, self.copies = layers, length, copies
        self._kv = kv

    @property
    def batch(self) -> int:
        return next(iter(self._kv.values()))[0].shape[0] * self.copies

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kept = slice(self.first_kept(self.layers[layer].window), self.length)
        k, v = (
            torch.cat((_copies(old[:, kept], self.copies), new), dim=1)
            for old, new in zip(self._kv[layer], (k, v), strict=True)
        )
        return k, v

    def advance(self, n_new: int, mask: Tensor | None = None) -> None:
        """Nothing: a pass from a prefix is not continued."""


def _copies(x: Tensor, n: int) -> Tensor:
    """[row, ...] -> [copy * row, ...]"""
    return x.repeat(n, *[1] * (x.ndim - 1))


def taken_up(
    run: Pass, layers: tuple[LayerGeometry, ...], stream: Tensor, kv: KV, layer: int, pos: int, copies: int
) -> Pass:
    """What the model takes to go on with a finished run; rows are [copy, prompt].

    Args:
        stream: what entered `layer` in that run, [prompt, pos, d_model].
        kv: its keys and values, of the layers that later ones read; with `pos`, of all.
        pos: the first position that runs again; 0 where positions see later ones (images), or keys have another form
            (shared_kv).
    """

    def tables(x: Tensor) -> Tensor:
        """Rope of the positions that run; one row stands for all prompts."""
        return x[:, pos:] if len(x) == 1 else _copies(x[:, pos:], copies)

    past = Prefix(layers, kv, pos, copies) if pos else None
    first = {shape.window: 0 if past is None else past.first_kept(shape.window) for shape in layers}

    def keys(x: Tensor | None, window: int | None) -> Tensor | None:
        return None if x is None else _copies(x[:, first[window] :], copies)

    masks = {
        kind: replace(
            mask,
            n_queries=mask.n_queries - pos,
            n_keys=mask.n_keys - first[mask.window],
            key_mask=keys(mask.key_mask, mask.window),
            image_blocks=keys(mask.image_blocks, mask.window),
        )
        for kind, mask in run.masks.items()
    }
    read = {shape.kv_source for shape in layers[layer:] if shape.kv_source is not None and shape.kv_source < layer}
    return replace(
        run,
        tokens=_copies(run.tokens[:, pos:], copies),
        mask=None if run.mask is None else _copies(run.mask, copies),
        rope={kind: (tables(cos), tables(sin)) for kind, (cos, sin) in run.rope.items()},
        masks=masks,
        past=past,
        ple=None if run.ple is None else _copies(run.ple[:, pos:], copies),
        kv={source: tuple(keys(x, layers[source].window) for x in kv[source]) for source in read},
        start=(layer, _copies(stream[:, pos:], copies)),
    )
