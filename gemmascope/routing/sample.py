"""A stream of texts on its way to be counted: a fair sample of it is kept, and little is padded."""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, tee

import torch
from torch import Tensor

from gemmascope.readout.activations import Prompts
from gemmascope.routing.trace import Label


class Sample:
    """Some of a stream, each as likely as any other (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, seed: int):
        self.kept: list[tuple[Tensor, Label]] = []
        self.n_texts, self.seen, self.size, self.random = 0, 0, size, random.Random(seed)

    def reading(self, texts: Iterable, tick: Callable[[], object]) -> Iterator:
        """Hands texts on, and counts them."""
        for text in texts:
            self.n_texts += 1
            tick()
            yield text

    def passing(self, pieces: Iterable[tuple[Tensor, Label]]) -> Iterator[tuple[Tensor, Label]]:
        """Hands them on, and keeps some of those that predict anything."""
        for piece in pieces:
            if len(piece[0]) > 1:
                self.seen += 1
                place = self.random.randrange(self.seen)
                if len(self.kept) < self.size:
                    self.kept.append(piece)
                elif place < self.size:
                    self.kept[place] = piece
            yield piece

    def prompts(self, model) -> Prompts:
        rows = [ids for ids, _ in self.kept]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.cfg.pad_token_id)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return Prompts(tokens.to(model.cfg.device), None if mask.all() else mask.to(model.cfg.device))

    @property
    def labels(self) -> list[Label]:
        return [list(map(str, one)) if isinstance(one, list) else str(one) for _, one in self.kept]


def by_length(pieces: Iterable[tuple[Tensor, Label]], n: int) -> Iterator[tuple[Tensor, Label]]:
    """Some at a time, the shortest of these first: batches of texts of a length waste little on padding."""
    pieces = iter(pieces)
    while some := list(islice(pieces, n)):
        yield from sorted(some, key=lambda piece: len(piece[0]))


def in_step(pairs: Iterable[tuple]) -> tuple[Iterator, Iterator]:
    """The first and the second of each pair, for a reader that takes one of either in turn: nothing piles up."""
    first, second = tee(pairs)
    return (one for one, _ in first), (other for _, other in second)
