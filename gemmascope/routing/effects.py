"""How a change of the routing is measured: texts, what their predictions cost, and what becomes of that."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from gemmascope.config import PRESETS
from gemmascope.experiments.sweep import ROWS, Baseline, unit_of
from gemmascope.metrics import measured
from gemmascope.progress import bar, interruptible
from gemmascope.readout.activations import Batch, Prompts, Rows
from gemmascope.results import Result
from gemmascope.routing.trace import plain

Texts = str | Sequence[str] | Tensor | Prompts
Labels = Sequence
"""One for each text; or for each text a sequence of one for each of its tokens."""


def routed_layers(model, layers: Sequence[int] | None = None) -> list[int]:
    """Layers counted from 0, checked; all by default.

    Raises:
        ValueError: for a model without experts, or a layer out of range.
    """
    if model.cfg.n_experts is None:
        routing = ", ".join([*(name for name, cfg in PRESETS.items() if cfg.n_experts), "nano-moe"])
        raise ValueError(f"{model.cfg.model_name} is dense and has no router to analyse; models that route: {routing}.")
    every = range(model.cfg.n_layers)
    for layer in layers or ():
        model.layer(layer)  # raises where there is none
    return list(every) if layers is None else [every[layer] for layer in layers]


def checked_experts(model, experts: Sequence[int] | None = None) -> list[int]:
    """Numbers of experts, checked; all by default.

    Raises:
        ValueError: for a number out of range.
    """
    n = model.cfg.n_experts
    wrong = next((expert for expert in experts or () if not 0 <= expert < n), None)
    if wrong is not None:
        raise ValueError(f"Expert {wrong} does not exist: a layer of {model.cfg.model_name} has experts 0 to {n - 1}.")
    return list(range(n)) if experts is None else list(experts)


# What comes back


@dataclass(frozen=True)
class RoutingEffect:
    """What each change of the routing did to the prediction of texts."""

    loss: Result
    """Change of the loss: a sample is the mean over a text's predictions. Baseline "full": the loss as it was."""
    kl: Result
    """KL(full || changed), likewise."""
    by_token: Result
    """Change of the loss: a sample is one prediction, a row of `tokens`."""
    kl_by_token: Result
    tokens: pandas.DataFrame
    """text (its number in those given), pos (padding left out), token (the one read, not the one predicted) and label
    of each prediction."""
    controls: dict[str, Result]
    """The change of the loss in the controls of each cell."""
    load: Float[Tensor, " cell"] | None = None
    """The share of tokens that the expert of each cell is chosen for; rows of a layer sum to k."""
    metric: Result | None = None
    """Change of the metric that was asked for, by text."""

    @property
    def n_texts(self) -> int:
        """Texts that were measured. After an interrupt (Ctrl-C) not all: `tokens` says which, in this order."""
        return self.loss.values.shape[1]

    @property
    def table(self) -> pandas.DataFrame:
        """A row a cell: its axes, load, the change of the loss with its interval over texts, KL, metric, controls."""
        table = self.loss.table.rename(columns={"value": "loss"})
        if self.load is not None:
            table.insert(len(self.loss.axes), "load", self.load.tolist())
        table = table.assign(kl=self.kl.mean.tolist())
        if self.metric is not None:
            table[self.metric.unit] = self.metric.mean.tolist()
        return table.assign(**{name: control.mean.tolist() for name, control in self.controls.items()})

    @property
    def by_label(self) -> pandas.DataFrame:
        """A row for each cell and label: the change of the loss and KL, the means over n predictions of that label.

        Raises:
            ValueError: where no labels were given.
        """
        if "label" not in self.tokens:
            raise ValueError("There are no labels to go by: give labels=, one a text or one a token.")
        parts = []
        for label, rows in self.tokens.groupby("label").groups.items():
            loss, kl = (of.values[:, torch.tensor(rows)].mean(-1) for of in (self.by_token, self.kl_by_token))
            parts.append(self.loss.cells.assign(label=label, loss=loss.tolist(), kl=kl.tolist(), n=len(rows)))
        return pandas.concat(parts, ignore_index=True)

    def plot(self):
        """The change of the loss as a plotly figure."""
        return self.loss.plot()

    def view(self, *, selection=None):
        """The change of the loss as a grid: see `Result.view`."""
        return self.loss.view(selection=selection)

    def _repr_html_(self) -> str:
        return self.table.to_html(max_rows=12, escape=True)


# Running


class Given(NamedTuple):
    """Texts, and where in them a next token is predicted."""

    model: object
    prompts: Prompts
    real: Bool[Tensor, "text pos"]
    rows: Rows
    labels: list | None
    """Of each row."""
    numbers: Int[Tensor, " text"]
    """Which of the texts that came these are."""

    @classmethod
    def of(cls, model, texts: Texts, labels: Labels | None = None) -> "Given":
        prompts = Prompts.of(model, texts)
        real = (torch.ones_like(prompts.tokens, dtype=torch.bool) if prompts.mask is None else prompts.mask).cpu()
        short = (real.sum(-1) < 2).nonzero()
        if len(short):
            raise ValueError(f"Text {int(short[0])} has one token: a loss needs a token and the next.")
        rows = Rows(*(real[:, :-1] & real[:, 1:]).nonzero().unbind(1))
        each = None if labels is None else _labels_of(labels, real, rows)
        return cls(model, prompts, real, rows, each, torch.arange(prompts.n))

    def only(self, texts: Int[Tensor, " text"]) -> tuple["Given", Int[Tensor, " row"]]:
        """Some of the texts, and which rows are theirs."""
        here = torch.isin(self.rows.prompt, texts).nonzero()[:, 0]
        mask, labels = self.prompts.mask, self.labels
        prompts = Prompts(self.prompts.tokens[texts], None if mask is None else mask[texts])
        rows = Rows(torch.searchsorted(texts, self.rows.prompt[here]), self.rows.pos[here])
        labels = None if labels is None else [labels[row] for row in here.tolist()]
        return Given(self.model, prompts, self.real[texts], rows, labels, self.numbers[texts]), here

    @property
    def n_tokens(self) -> int:
        return int(self.real.sum())

    def batches(self, size: int) -> Iterator[tuple[Int[Tensor, " text"], Batch]]:
        """Texts of a length together, which wastes little on padding; in their own order where one batch takes all.

        The batches come in random order, so that those done when Ctrl-C comes are not the short texts.
        """
        lengths = self.real.sum(-1)
        order = torch.arange(len(lengths)) if size >= len(lengths) else lengths.argsort(stable=True)
        parts = list(order.split(size))
        random.Random(0).shuffle(parts)
        for part in parts:
            yield part, self.prompts.batch(part, self.rows)

    def by_text(self, figures: Float[Tensor, "cell row"]) -> Float[Tensor, "cell text"]:
        """The mean over each text's predictions."""
        total = figures.new_zeros(len(figures), self.prompts.n).index_add_(1, self.rows.prompt, figures)
        return total / self.rows.prompt.bincount(minlength=self.prompts.n)

    def frame(self) -> pandas.DataFrame:
        """A row for each prediction."""
        ids = self.prompts.tokens.cpu()[self.rows.prompt, self.rows.pos]
        tokenizer = self.model.tokenizer
        tokens = ids.tolist() if tokenizer is None else tokenizer.to_str_tokens(ids.tolist())
        pos = (self.real.cumsum(-1) - 1)[self.rows.prompt, self.rows.pos]
        texts = self.numbers[self.rows.prompt]
        table = pandas.DataFrame({"text": texts.tolist(), "pos": pos.tolist(), "token": tokens})
        return table if self.labels is None else table.assign(label=self.labels)

    def effect(self, name: str, cells, found: "Found", controls, what, load, metric) -> RoutingEffect:
        nats, full = "change of loss (nats/token)", {"full": self.by_text(found.full[None])[0]}
        changed = found.metric

        def result(figures: Tensor, unit: str = nats, baselines: dict | None = None, of: str = name) -> Result:
            return Result(of, cells, figures, unit, baselines or {}, what)

        return RoutingEffect(
            result(self.by_text(found.loss), baselines=full),
            result(self.by_text(found.kl), "KL (nats/token)"),
            result(found.loss, baselines={"full": found.full}),
            result(found.kl, "KL (nats/token)"),
            self.frame(),
            {control: result(self.by_text(x), of=f"{name}: {control}") for control, x in controls.items()},
            load,
            None if changed is None else result(changed, f"change of {unit_of(metric)}"),
        )


def _labels_of(labels: Labels, real: Bool[Tensor, "text pos"], rows: Rows) -> list:
    """The label of each row."""
    labels = [labels] if isinstance(labels, str) else labels
    if len(labels) != len(real):
        raise ValueError(f"There are labels for {len(labels)} texts and {len(real)} texts: give one for each.")
    each = [plain(label) for label in labels]
    for text, (given, n) in enumerate(zip(each, real.sum(-1).tolist(), strict=True)):
        if isinstance(given, list) and len(given) != n:
            raise ValueError(f"Text {text} has {n} tokens (BOS is one) and labels for {len(given)}: give one for each.")
    pos = (real.cumsum(-1) - 1)[rows.prompt, rows.pos]
    places = zip(rows.prompt.tolist(), pos.tolist(), strict=True)
    return [each[text][place] if isinstance(each[text], list) else each[text] for text, place in places]


def kept(model, batch: Batch, also: Sequence[str] = ()) -> Baseline:
    """A run of a batch that can be taken up again, its logits and what `also` names in `stored`."""
    run = model._begin(batch.tokens, batch.mask)
    return Baseline(model, run, lambda logits: logits[:, -1, 0], ["hook_logits", *also])


class Found(NamedTuple):
    """Changes, by cell."""

    full: Float[Tensor, " row"]
    """The loss of the model as it is."""
    loss: Float[Tensor, "cell row"]
    kl: Float[Tensor, "cell row"]
    metric: Float[Tensor, "cell text"] | None
    given: Given
    """The texts that were run: all, but for an interrupt."""
    n_batches: int

    def first(self, n: int) -> "Found":
        metric = None if self.metric is None else self.metric[:n]
        return self._replace(loss=self.loss[:n], kl=self.kl[:n], metric=metric)

    def only(self, texts: Int[Tensor, " text"]) -> "Found":
        """Of some of the texts."""
        given, rows = self.given.only(texts)
        metric = None if self.metric is None else self.metric[:, texts]
        return Found(self.full[rows], self.loss[:, rows], self.kl[:, rows], metric, given, self.n_batches)


@torch.no_grad()
def run_texts(
    model, given: Given, what: str, plan: Callable, n_cells: int, also, metric, batch_size: int, progress: bool
) -> Found:
    """Loss and KL of every prediction under the interventions of every cell.

    An interrupt (Ctrl-C) leaves the texts that are done in every cell; where there are none, it goes on to the caller.

    Args:
        plan: what `also` holds in a batch [text, pos, ...], and which of its tokens are real, to a list of
            interventions for each cell. A cell without any is as the model is.
    """
    n_rows, n_texts = len(given.rows.prompt), given.prompts.n
    by_text = None if metric is None else torch.zeros(n_cells, n_texts)
    found = Found(torch.zeros(n_rows), torch.zeros(n_cells, n_rows), torch.zeros(n_cells, n_rows), by_text, given, 0)
    size = batch_size if metric is None else n_texts
    done: list[Tensor] = []

    def n_done() -> int:
        return sum(map(len, done))

    with bar(n_texts * n_cells, what, "text", progress) as shown:
        with interruptible(lambda: f"{what} stopped, with {n_done()} of {n_texts} texts done."):
            for numbers, batch in given.batches(size):
                for count in _run_batch(model, batch, plan, also, metric, found):
                    shown.update(count * len(numbers))
                done.append(numbers)
    if not done:
        raise KeyboardInterrupt
    found = found._replace(n_batches=len(done))
    return found if n_done() == n_texts else found.only(torch.cat(done).sort().values)


def _run_batch(model, batch: Batch, plan: Callable, also, metric, found: Found) -> Iterator[int]:
    """Writes what becomes of a batch into `found`; yields how many cells are done, time and again."""
    n = len(batch.tokens)
    base = kept(model, batch, also)
    full, tokens = base.stored["hook_logits"], base.run.tokens
    real = torch.ones_like(tokens, dtype=torch.bool) if batch.mask is None else batch.mask
    at, targets = (batch.prompt, batch.pos), tokens[batch.prompt, batch.pos + 1][:, None]
    before = full[at].float().log_softmax(-1)
    found.full[batch.row] = -before.gather(-1, targets)[:, 0].cpu()
    cells = plan(base.stored, real)
    moved = sorted((base.first(cell)[0], number) for number, cell in enumerate(cells) if cell)
    yield len(cells) - len(moved)
    for layer, group in groupby(moved, key=lambda pair: pair[0]):
        numbers = torch.tensor([number for _, number in group])
        for part in numbers.split(max(1, ROWS // n)):
            for number, logits in zip(part, base.logits([cells[i] for i in part], layer), strict=True):
                after = logits[at].float().log_softmax(-1)
                change = (before - after).gather(-1, targets)[:, 0]
                found.loss[number, batch.row] = change.cpu()
                kl = F.kl_div(after, before, log_target=True, reduction="none").sum(-1)
                found.kl[number, batch.row] = kl.cpu()
                if metric is not None:
                    found.metric[number] = (measured(metric, logits) - measured(metric, full)).cpu()
            yield len(part)
