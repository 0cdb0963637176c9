"""Which keys each query sees: one description that every implementation of attention reads."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """The edges of one attention call. The queries are the last `n_queries` of the positions so far."""

    n_queries: int
    n_keys: int
    """Keys at hand: the most recent ones, when a sliding layer's cache has dropped older ones."""
    device: torch.device
    window: int | None = None
    """A query sees itself and the `window - 1` keys before it; None for all before it."""
    key_mask: Tensor | None = None
    """bool [batch, key], False on padding. A padding query sees itself, so that no row is empty."""
    image_blocks: Tensor | None = None
    """int [batch, key], image number of each position, -1 on text: positions of one image see each other, both ways,
    within the window."""
    knockouts: Tensor | None = None
    """int64 [box, 4, 2]: edges to cut, as half-open boxes over batch, head, query and key (see `box`). Queries and keys
    are counted from the oldest key at hand."""
    renormalize: bool = True
    """Whether what is left of a row sums to 1 again (the edges are masked), or not (the pattern is zeroed there)."""

    @property
    def plain(self) -> bool:
        """Causal and nothing else."""
        return (
            self.key_mask is None
            and self.image_blocks is None
            and self.knockouts is None
            and (self.window is None or self.n_keys <= self.window)
        )

    @cached_property
    def visible(self) -> Tensor:
        """What every query sees, knock-outs apart: bool [batch | 1, query, key]."""
        return self.rows(slice(None))

    def rows(self, rows: slice | list[int] | Tensor, keys: slice | Tensor = slice(None)) -> Tensor:
        """What some of the queries see of some of the keys, knock-outs apart, at the cost of those rows and keys:
        bool [batch | 1, row, key]."""
        every = torch.arange(self.n_keys, device=self.device)
        of_query, key = every[self.n_keys - self.n_queries :][rows], every[keys]
        query = of_query[:, None]
        seen = key <= query
        if self.image_blocks is not None:
            block = self.image_blocks[:, None, keys]
            seen = seen | ((self.image_blocks[:, of_query, None] == block) & (block >= 0))
        if self.window is not None:
            seen = seen & (key > query - self.window) & (key < query + self.window)
        if self.key_mask is not None:
            seen = (seen & self.key_mask[:, None, keys]) | (key == query)
        return seen if seen.ndim == 3 else seen[None]

    def knocked(
        self, batch: int, n_heads: int, rows: slice | list[int] | Tensor, keys: slice | Tensor = slice(None)
    ) -> Tensor:
        """Which edges the knock-outs cut, of some rows and keys: bool [batch, head, row, key]."""
        every = torch.arange(self.n_keys, device=self.device)
        at = (
            torch.arange(batch, device=self.device),
            torch.arange(n_heads, device=self.device),
            every[self.n_keys - self.n_queries :][rows],
            every[keys],
        )
        cut = torch.zeros([len(axis) for axis in at], dtype=torch.bool, device=self.device)
        for box in self.knockouts.to(self.device):
            b, h, q, k = ((axis >= start) & (axis < stop) for axis, (start, stop) in zip(at, box, strict=True))
            cut |= b[:, None, None, None] & h[:, None, None] & q[:, None] & k
        return cut

    def with_knockouts(self, knockouts: Tensor, renormalize: bool = True) -> "Mask":
        """The same mask, with these boxes cut."""
        return replace(self, knockouts=knockouts, renormalize=renormalize)


def box(
    batch: slice | int, head: slice | int, query: slice | int, key: slice | int, sizes: tuple[int, int, int, int]
) -> Tensor:
    """One knock-out, int64 [4, 2]: an index or a slice of step 1 for each axis of length `sizes`; may be negative."""
    ranges = []
    for name, what, size in zip(("batch", "head", "query", "key"), (batch, head, query, key), sizes, strict=True):
        if isinstance(what, int) and not -size <= what < size:
            raise ValueError(f"knockouts: {name} {what} does not exist; there are {size}.")
        indices = range(size)[what] if isinstance(what, slice) else range(what % size, what % size + 1)
        if indices.step != 1:
            raise ValueError(f"knockouts: {name} takes an index or a slice of step 1, not {what}.")
        ranges.append([indices.start, max(indices.start, indices.stop)])
    return torch.tensor(ranges)
