"""Two programs compiled into a Gemma 4 by hand, in the way of Tracr (Lindner et al. 2023, arXiv 2301.05062).

Every variable of a program has dimensions of its own in the stream, norms are linear (see `by_hand`), and variables are
flat: an MLP's output does not change with small changes of its input. What is not part of the program (other heads,
other neurons, whole layers) is not 0 but noise: it reads everything and writes to dimensions that the program never
reads. An edge is part of the program when its reader reads what its sender writes there, and that depends on the
prompt.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gemmascope.experiments.edges import Edge
from gemmascope.metrics import logit, logit_difference
from gemmascope.model.text import HookedGemma4
from tests.ground_truth import by_hand

STEEP = 1e4
"""gelu(STEEP * z) / STEEP is relu(z) to the last bit, a thousandth away from 0."""
SURE = 30.0
"""The score of a key that a head selects: the others share e^-30."""
N_HEADS = 3
FIRST = 3
"""The id of the first token: lower ones are padding, end and beginning of text."""


class Program(NamedTuple):
    model: HookedGemma4
    truth: frozenset[Edge]
    clean: Tensor
    corrupted: Tensor
    metric: object
    """Of the last position."""
    answers: Tensor
    """What the program gives at the clean prompts' last position."""


def _blank(n_program: int, n_tokens: int) -> tuple[HookedGemma4, slice]:
    """Three layers with room for a program of some dimensions, and beside it as many for noise."""
    scratch = slice(n_program, n_program + 12)
    model = by_hand.blank(3, N_HEADS, n_program + 12, FIRST + n_tokens, d_mlp=40, linear=True)
    return model, scratch


def _noise(model: HookedGemma4, scratch: slice, program: dict[int, int], neurons: int) -> None:
    """Noise in all but the first head of some layers, and the first neurons of layer 0."""
    for layer in range(3):
        for head in range(program.get(layer, 0), N_HEADS):
            by_hand.noise_head(model, layer, head, scratch)
        by_hand.noise_mlp(model, layer, slice(neurons if layer == 0 else 0, None), scratch)


def _step(model: HookedGemma4, neuron: int, reads: list[int], one: int, low: float, high: float, out: dict[int, float]):
    """Neurons (two) of layer 0 that add 0 below `low`, `out` above `high`, and a share of it between."""
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        for at, edge, sign in ((neuron, low, 1), (neuron + 1, high, -1)):
            mlp.gate_proj.weight[at, reads] = STEEP
            mlp.gate_proj.weight[at, one] = -STEEP * edge
            mlp.up_proj.weight[at, one] = 1
            for dim, weight in out.items():
                mlp.down_proj.weight[dim, at] += sign * weight / (STEEP * (high - low))


def frac_prevs(n: int = 16, length: int = 9, n_letters: int = 6, counted: tuple[int, ...] = (0, 2)) -> Program:
    """The share of letters so far that are among some: the logit of a token that stands in no prompt.

    Layer 0's MLP says whether a letter is counted; a head of layer 1 that attends to all alike takes the mean."""
    one, is_x, out = n_letters, n_letters + 1, n_letters + 2
    model, scratch = _blank(n_letters + 3, n_letters + 1)
    rows = torch.zeros(model.cfg.d_vocab, model.cfg.d_model, dtype=torch.float64)
    rows[FIRST : FIRST + n_letters, :n_letters] = torch.eye(n_letters, dtype=torch.float64)
    rows[FIRST : FIRST + n_letters, one] = 1
    rows[-1, out] = 1
    by_hand.embed(model, rows)
    _step(model, 0, list(counted), one, 0.3, 0.7, {is_x: 1.0})
    by_hand.head(model, 1, 0, v=[(is_x, 0, 1.0)], o=[(out, 0, 1.0)])
    _noise(model, scratch, {1: 1}, neurons=2)
    clean, corrupted = torch.randint(n_letters, (2, n, length))
    answers = torch.isin(clean, torch.tensor(counted)).double().mean(-1)
    truth = frozenset({("embed", "L0.mlp"), ("L0.mlp", "L1KV0.v"), ("L1H0", "logits")})
    metric = logit(model, model.cfg.d_vocab - 1)
    return Program(model, truth, clean + FIRST, corrupted + FIRST, metric, answers)


BLANK, START, SLOT = 0, 1, 2


def reverse(n: int = 16, length: int = 4, n_letters: int = 5) -> Program:
    """`length` letters after a start sign, and slots that say them from the last to the first.

    A prompt is blanks, start, letters, slots. A head of layer 0 that sees no blanks gives a position's 1 / (1 +
    distance from the start); layer 0's MLP turns this into one of 2 * length + 1 places; a head of layer 1 attends from
    a slot's place to the place opposite and copies its letter.
    """
    n_tokens, n_places = 3 + n_letters, 2 * length + 1
    one, share, places = n_tokens, n_tokens + 1, n_tokens + 2
    model, scratch = _blank(n_tokens + 2 + n_places, n_tokens)
    d_model = model.cfg.d_model
    rows = torch.zeros(model.cfg.d_vocab, d_model, dtype=torch.float64)
    rows[FIRST:, :n_tokens] = torch.eye(n_tokens, dtype=torch.float64)
    rows[FIRST:, one] = 1
    by_hand.embed(model, rows, read=(torch.arange(d_model) < n_tokens).double())
    by_hand.head(model, 0, 0, q=[(one, 0, SURE)], k=[(BLANK, 0, -1.0)], v=[(START, 0, 1.0)], o=[(share, 0, 1.0)])
    for place in range(n_places):  # a step for "no further than this place", whose difference to the next is the place
        near, far = 1 / (place + 1), 1 / (place + 2)
        low, high = far + 0.2 * (near - far), far + 0.8 * (near - far)
        out = {places + place: 1.0} | ({places + place + 1: -1.0} if place + 1 < n_places else {})
        _step(model, 2 * place, [share], one, low, high, out)
    opposite = {place: 2 * length + 1 - place for place in range(length + 1, n_places)}
    letters = range(3, n_tokens)
    by_hand.head(
        model,
        1,
        0,
        q=[(places + place, there, SURE) for place, there in opposite.items()],
        k=[(places + there, there, 1.0) for there in opposite.values()],
        v=[(letter, letter, 1.0) for letter in letters],
        o=[(letter, letter, 2.0) for letter in letters],
    )
    _noise(model, scratch, {0: 1, 1: 1}, neurons=2 * n_places)

    def prompts(blanks: Tensor, letters: Tensor) -> Tensor:
        tokens = torch.full((n, n_places), SLOT)
        for row, start in enumerate(blanks.tolist()):
            tokens[row, :start] = BLANK
            tokens[row, start] = START
            tokens[row, start + 1 : start + 1 + length] = letters[row]
        return tokens + FIRST

    # Blanks move the start, and so which letter the last position, a slot in both prompts, has to say.
    blanks = torch.stack([torch.randperm(length)[:2] for _ in range(n)]).T
    drawn = torch.stack([torch.rand(n, n_letters).argsort(-1)[:, :length] for _ in range(2)]) + 3
    clean, corrupted = map(prompts, blanks, drawn)
    answers, wrong = (letters[torch.arange(n), first] + FIRST for first, letters in zip(blanks, drawn, strict=True))
    truth = frozenset({
        ("embed", "L0KV0.k"), ("embed", "L0KV0.v"), ("L0H0", "L0.mlp"), ("L0.mlp", "L1H0.q"), ("L0.mlp", "L1KV0.k"),
        ("embed", "L1KV0.v"), ("L1H0", "logits"),
    })  # fmt: skip
    return Program(model, truth, clean, corrupted, logit_difference(model, answers, wrong), answers)
