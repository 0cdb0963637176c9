"""Sums over the tokens of a corpus, from which every statistic follows; the corpus itself is never held.

Memory depends on the number of labels, layers, experts and different tokens, not on the length of the corpus. Sums are
kept by label (domain) and add up: shards that were counted apart merge into what one count of all would have given.

Intervals over prompts need resampling, which would need the prompts. So each prompt draws, when it is counted, how
often it occurs in each of 200 resamples, from a Poisson distribution of mean 1 (the Poisson bootstrap: Chamandy et al.,
"Estimating uncertainty for massive data streams", 2012). The draws follow from the prompt's own token ids, so that they
do not depend on order or shards; prompts that are equal are drawn together.
"""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Float, Int
from scipy.stats import poisson
from torch import Tensor
from tqdm.auto import tqdm

from gemmascope.progress import all_or_nothing
from gemmascope.results import about
from gemmascope.routing.trace import (
    Label,
    RoutingTrace,
    entropy_of,
    margins_of,
    numbered,
    plain,
    read_files,
    refuse_dense,
    refuse_other_model,
    run_traced,
    write_files,
)

Chosen = Int[Tensor, "layer token slot"]
DRAWS = 200
"""Resamples of the bootstrap over prompts."""
_POISSON = poisson.cdf(range(20), 1.0)
MARGIN_EDGES = torch.logspace(-6, 0, 25, dtype=torch.float64)
"""Of the histogram of margins, four bins a decade. What is below the first falls into the first bin."""
ALL = "all"
"""The label of a corpus without labels."""
VOCABULARY = ("input", "next", "predicted")
"""What a token's experts are counted by: its own id, the id that follows it in the text, the model's likeliest next."""


class RoutingCounts:
    """What a router did over a corpus. Make one with `count_routing`, or add traces to it.

    `tables[name]` has the label as its first axis, in the order of `labels`. All are plain sums:

        tokens, prompts [label]  a prompt counts for every label that one of its tokens has
        chosen [label, layer, rank, expert]  tokens whose choice of that rank is the expert
        weight [label, layer, rank, expert]  their final weights
        prob [label, layer, expert]  the router's softmax
        entropy, margin, top1 [label, layer]  of the softmax (nats), of `RoutingTrace.margins`, its largest entry
        margin_bins [label, layer, bin]  margins in the bins of MARGIN_EDGES
        pairs [label, layer, expert, expert]  tokens that chose both, the first at the better rank
        moves [label, layer - 1, expert, expert]  first choice in a layer, and in the next
        steps [label], repeats [label, layer, 2]  pairs of neighbouring tokens (of the later one's label); those with
            the same first choice, and those with any expert in common
        buckets [label, bucket], positions [label, bucket, layer, expert]  by the token's place p in its prompt: bucket
            floor(log2(p + 1))
        draw_tokens [label, draw], draws [label, draw, layer, expert]  tokens, and choices of any rank, in each resample

    `vocabulary[kind]` counts, without labels, the tokens that went to an expert by id: [id, layer, expert].
    """

    def __init__(self, model, vocabulary: bool = True):
        """Empty counts for one model.

        Raises:
            ValueError: for a dense model.
        """
        refuse_dense(model)
        cfg = model.cfg
        shape = {"layers": list(range(cfg.n_layers)), "n_experts": cfg.n_experts, "k": cfg.experts_per_token}
        shape |= {"n_buckets": cfg.n_ctx.bit_length(), "d_vocab": cfg.d_vocab}
        scales = [block.moe.router.per_expert_scale for block in model.blocks]
        self._start(about(model), shape, torch.stack(scales).detach().double().cpu(), vocabulary)
        self._tokenizer = model.tokenizer

    def _start(self, said: dict[str, Any], shape: dict[str, Any], scale: Tensor, vocabulary: bool) -> None:
        self.about, self.shape = said, shape
        self.scale: Float[Tensor, "layer expert"] = scale
        """Of each expert: what its renormalised probability is multiplied by to give its weight."""
        self.layers: list[int] = shape["layers"]
        self.n_experts: int = shape["n_experts"]
        self.k: int = shape["k"]
        self._n_cells = len(self.layers) * self.n_experts
        self.labels: list[str] = []
        n_layers, n_bins = len(self.layers), len(MARGIN_EDGES) - 1
        layer, ranked = (n_layers, self.n_experts), (n_layers, self.k, self.n_experts)
        square = (self.n_experts, self.n_experts)
        counted = {
            "tokens": (), "prompts": (), "steps": (), "chosen": ranked, "pairs": (n_layers, *square),
            "moves": (n_layers - 1, *square), "repeats": (n_layers, 2), "margin_bins": (n_layers, n_bins),
            "buckets": (shape["n_buckets"],), "positions": (shape["n_buckets"], *layer),
            "draws": (DRAWS, *layer), "draw_tokens": (DRAWS,),
        }  # fmt: skip
        summed = {"weight": ranked, "prob": layer}
        summed |= dict.fromkeys(("entropy", "margin", "top1"), (n_layers,))
        self.tables = {name: torch.zeros(0, *size, dtype=torch.long) for name, size in counted.items()}
        self.tables |= {name: torch.zeros(0, *size, dtype=torch.float64) for name, size in summed.items()}
        self.vocabulary: dict[str, Tensor] = {}
        if vocabulary:
            # numpy's zeros take no memory until they are written to: ids that never occur cost nothing.
            empty = (shape["d_vocab"], n_layers, self.n_experts)
            self.vocabulary = {kind: torch.from_numpy(numpy.zeros(empty, dtype=numpy.int32)) for kind in VOCABULARY}
        self.seen = {kind: torch.zeros(shape["d_vocab"], dtype=torch.long) for kind in self.vocabulary}
        """How many tokens of each id were counted: [id] by kind."""
        self._texts: dict[int, str] = {}
        self._tokenizer = None

    @property
    def n_tokens(self) -> int:
        return int(self.tables["tokens"].sum())

    def total(self, name: str, label: str | None = None) -> Tensor:
        """A table of one label, or summed over all.

        Raises:
            ValueError: for a label that was not counted, or nothing counted yet.
        """
        if not self.n_tokens:
            raise ValueError("Nothing was counted yet: add traces, or count_routing(model, texts).")
        if label is None:
            return self.tables[name].sum(0)
        return self.tables[name][self.label_number(label)]

    def label_number(self, label: str) -> int:
        """Its place in `labels`. Raises ValueError for a label that was not counted."""
        if label not in self.labels:
            near = difflib.get_close_matches(str(label), self.labels, n=3, cutoff=0.0)
            raise ValueError(f"No label {label!r} was counted; the nearest are {', '.join(near)}.")
        return self.labels.index(label)

    def __repr__(self) -> str:
        return (
            f"RoutingCounts({self.n_tokens} tokens, labels {', '.join(self.labels) or 'none'}, "
            f"{len(self.layers)} layers, {self.k} of {self.n_experts} experts)"
        )

    # Counting

    def _grow(self, labels: Iterable[str]) -> None:
        new = [label for label in labels if label not in self.labels]
        self.labels += new
        for name, table in self.tables.items() if new else ():
            self.tables[name] = torch.cat((table, table.new_zeros(len(new), *table.shape[1:])))

    def _add(self, name: str, place: Tensor, values: Tensor | None = None) -> None:
        """Adds to a table, `place` counting its entries as they lie in memory: one index is much faster than several.

        One more axis of the values than of the places is the table's last.
        """
        table = self.tables[name].view(-1)
        if values is None:
            values = table.new_ones(()).expand(place.numel())
        elif values.ndim > place.ndim:
            table.view(-1, values.shape[-1]).index_add_(0, place.flatten(), values.flatten(0, -2).to(table.dtype))
            return
        table.scatter_add_(0, place.flatten(), values.flatten().to(table.dtype))

    @torch.no_grad()
    @all_or_nothing()
    def add(self, trace: RoutingTrace) -> None:
        """Counts every token of a trace, which Ctrl-C does not cut short; padding is left out.

        Raises:
            ValueError: for a trace of another model, of some layers, or without tokens (as `cache.routing`).
        """
        refuse_other_model(self.about, trace.about)
        if list(trace.layers) != self.layers:
            came = ", ".join(map(str, trace.layers))
            raise ValueError(
                f"This trace is of layers {came}; counts are of all {len(self.layers)}: take trace_routing."
            )
        if trace.tokens is None or trace.predicted is None:
            raise ValueError("This trace does not know its tokens, as cache.routing does not: take trace_routing.")
        trace = trace.batched().to("cpu")
        names = trace.label_names if trace.labels is not None else (ALL,)
        numbers = torch.zeros_like(trace.tokens) if trace.labels is None else trace.labels
        self._grow(names[number] for number in numbers[trace.real].bincount().nonzero()[:, 0].tolist())
        mine = torch.tensor([self.labels.index(name) if name in self.labels else -1 for name in names])
        labels, real = mine[numbers], trace.real.flatten().nonzero()[:, 0]
        chosen, weights, probs = (
            x.flatten(1, 2).index_select(1, real) for x in (trace.indices, trace.weights, trace.probs)
        )
        label = labels.flatten()[real]
        cell = torch.arange(len(chosen))[:, None, None] * self.n_experts + chosen  # (layer, expert) as one number
        self._add_tokens(label, chosen, weights, probs)
        self._add_places(label, trace.positions.flatten()[real], cell)
        self._add_steps(trace, labels)
        self._add_prompts(trace, label, real // trace.real.shape[1], cell)
        if self.vocabulary:
            self._add_vocabulary(trace, real, cell)

    def _add_tokens(self, label: Int[Tensor, " token"], chosen: Chosen, weights: Tensor, probs: Tensor) -> None:
        """Everything that is a sum over single tokens."""
        layer, n = torch.arange(len(chosen))[:, None], self.n_experts
        by_layer = label * len(chosen) + layer
        self._add("tokens", label)
        by_rank = (by_layer[..., None] * self.k + torch.arange(self.k)) * n + chosen
        self._add("chosen", by_rank)
        self._add("weight", by_rank, weights)
        self._add("prob", by_layer, probs)
        self._add("top1", by_layer, probs.amax(-1))
        self._add("entropy", by_layer, entropy_of(probs))
        margins = margins_of(probs, self.k)
        self._add("margin", by_layer, margins)
        bins = torch.bucketize(margins.double(), MARGIN_EDGES[1:-1], right=True)
        self._add("margin_bins", by_layer * (len(MARGIN_EDGES) - 1) + bins)
        first, second = torch.triu_indices(self.k, self.k, 1)
        self._add("pairs", (by_layer[..., None] * n + chosen[..., first]) * n + chosen[..., second])
        move = label * (len(chosen) - 1) + layer[:-1]
        self._add("moves", (move * n + chosen[:-1, :, 0]) * n + chosen[1:, :, 0])

    def _add_places(self, label: Int[Tensor, " token"], place: Int[Tensor, " token"], cell: Chosen) -> None:
        """By the place of a token in its prompt."""
        bucket = label * self.shape["n_buckets"] + (place + 1).log2().long()
        self._add("buckets", bucket)
        self._add("positions", bucket[:, None] * self._n_cells + cell)

    def _add_steps(self, trace: RoutingTrace, labels: Int[Tensor, "prompt pos"]) -> None:
        """Neighbouring tokens of a prompt."""
        both = (trace.real[:, 1:] & trace.real[:, :-1]).flatten().nonzero()[:, 0]
        label = labels[:, 1:].flatten()[both]
        slots = trace.indices.movedim(-1, 0).contiguous()
        before, after = slots[..., :-1], slots[..., 1:]
        same = before[0] == after[0]
        common = reduce(torch.logical_or, (one == other for one, other in product(before, after)))
        repeated = torch.stack((same, common), dim=-1).flatten(1, 2).index_select(1, both)
        self._add("steps", label)
        self._add("repeats", label * len(repeated) + torch.arange(len(repeated))[:, None], repeated)

    def _add_prompts(self, trace: RoutingTrace, label: Tensor, prompt: Tensor, cell: Chosen) -> None:
        """Each prompt's choices, as often as it occurs in each resample."""
        drawn = _draws([row[here] for row, here in zip(trace.tokens, trace.real, strict=True)])
        groups, group = (label * len(drawn) + prompt).unique(return_inverse=True)
        place = (group[:, None] * self._n_cells + cell).flatten()
        counts = torch.zeros(len(groups) * self._n_cells).scatter_add_(0, place, torch.ones(()).expand(len(place)))
        counts = counts.view(len(groups), *self.tables["prob"].shape[1:])
        drawn, sizes = drawn[groups % len(drawn)], group.bincount()
        whose = groups // len(trace.real)
        self._add("prompts", whose)
        for label in whose.unique().tolist():
            mine = whose == label
            self.tables["draws"][label] += (
                (drawn[mine].T.float() @ counts[mine].flatten(1)).long().unflatten(1, counts.shape[1:])
            )
            self.tables["draw_tokens"][label] += sizes[mine] @ drawn[mine]

    def _add_vocabulary(self, trace: RoutingTrace, real: Int[Tensor, " token"], cell: Chosen) -> None:
        followed = trace.real.roll(-1, 1)
        followed[:, -1] = False
        followed = followed.flatten()[real].nonzero()[:, 0]
        tokens, following, predicted = (
            x.flatten()[real] for x in (trace.tokens, trace.tokens.roll(-1, 1), trace.predicted)
        )
        kinds = {"input": (tokens, cell), "next": (following[followed], cell.index_select(1, followed))}
        kinds["predicted"] = (predicted, cell)
        one = torch.ones((), dtype=torch.int32)
        for kind, (ids, cells) in kinds.items():
            self.seen[kind] += ids.bincount(minlength=len(self.seen[kind]))
            place = (ids[:, None] * self._n_cells + cells).flatten()
            self.vocabulary[kind].view(-1).scatter_add_(0, place, one.expand(len(place)))

    @property
    def texts(self) -> dict[int, str]:
        """The text of every id that was seen, where the model has a tokenizer."""
        if self._tokenizer is not None and self.seen:
            met = torch.stack([*self.seen.values()]).any(0).nonzero()[:, 0].tolist()
            new = [token for token in met if token not in self._texts]
            self._texts |= dict(zip(new, self._tokenizer.to_str_tokens(new), strict=True)) if new else {}
        return self._texts

    def merge(self, *others: "RoutingCounts") -> "RoutingCounts":
        """What one count of all would have given: new counts; these stay as they are.

        Raises:
            ValueError: for counts of different models, or some with and some without a vocabulary.
        """
        refuse_other_model(self.about, *(other.about for other in others))
        if any(other.vocabulary.keys() != self.vocabulary.keys() for other in others):
            raise ValueError("Some counts have a vocabulary and some have none: count all of them alike.")
        new = RoutingCounts.__new__(RoutingCounts)
        new._start(self.about, self.shape, self.scale, bool(self.vocabulary))
        for part in (self, *others):
            new._grow(part.labels)
            rows = torch.tensor([new.labels.index(label) for label in part.labels], dtype=torch.long)
            for name, table in part.tables.items():
                new.tables[name].index_add_(0, rows, table)
            for kind, seen in part.seen.items():
                ids = seen.nonzero()[:, 0]
                new.vocabulary[kind][ids] += part.vocabulary[kind][ids]
                new.seen[kind] += seen
            new._texts |= part.texts
            new._tokenizer = new._tokenizer or part._tokenizer
        return new

    # Files

    def save(self, folder: str | Path) -> None:
        """Writes counts.safetensors and manifest.json into a folder, which is made if it is not there."""
        tensors = self.tables | {"scale": self.scale}
        for kind, seen in self.seen.items():
            ids = seen.nonzero()[:, 0]
            tensors |= {f"{kind}.ids": ids, f"{kind}.seen": seen[ids], f"{kind}.experts": self.vocabulary[kind][ids]}
        said = {"about": self.about, "shape": self.shape, "labels": self.labels, "texts": self.texts}
        write_files(folder, "counts", tensors, said)

    @classmethod
    def read(cls, folder: str | Path) -> "RoutingCounts":
        """Reads what `save` wrote."""
        tensors, manifest = read_files(folder, "counts")
        new = cls.__new__(cls)
        new._start(manifest["about"], manifest["shape"], tensors["scale"], "input.ids" in tensors)
        new.labels = manifest["labels"]
        new._texts = {int(token): text for token, text in manifest["texts"].items()}
        new.tables = {name: tensors[name] for name in new.tables}
        for kind in new.vocabulary:
            ids = tensors[f"{kind}.ids"]
            new.seen[kind][ids], new.vocabulary[kind][ids] = tensors[f"{kind}.seen"], tensors[f"{kind}.experts"]
        return new


def _draws(prompts: list[Tensor]) -> Int[Tensor, "prompt draw"]:
    """How often each prompt occurs in each resample: splitmix64 (Steele et al. 2014), seeded by its ids, as Poisson."""
    digests = [hashlib.blake2b(ids.numpy().tobytes(), digest_size=8).digest() for ids in prompts]
    seeds = numpy.array([int.from_bytes(digest) for digest in digests], dtype=numpy.uint64)
    x = seeds[:, None] + numpy.uint64(0x9E3779B97F4A7C15) * numpy.arange(1, DRAWS + 1, dtype=numpy.uint64)
    x = (x ^ (x >> 30)) * numpy.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * numpy.uint64(0x94D049BB133111EB)
    uniform = (x ^ (x >> 31)) / 2.0**64
    return torch.from_numpy(numpy.searchsorted(_POISSON, uniform, side="right"))


@torch.no_grad()
def count_routing(
    model,
    texts: Iterable[str | Tensor],
    labels: Iterable[Label] | None = None,
    *,
    batch_size: int = 32,
    window: int | None = None,
    leave_out: Sequence[int] = (),
    vocabulary: bool = True,
    into: RoutingCounts | None = None,
    progress: bool = True,
) -> RoutingCounts:
    """Counts the routing of a stream of texts, which is read once and not kept.

    Args:
        texts: any iterable of texts, or of token ids [pos]; a tensor [prompt, pos].
        labels: one for each text (its domain, say), or for each a list of labels, one for each token.
        window: how many tokens are read at once, by default the model's context. Longer texts are cut into windows,
            each of which counts as a prompt.
        leave_out: token ids that are read and not counted, such as that of <bos>. Places in the prompt then count the
            other tokens only; a token beside one that is left out has no neighbour there.
        vocabulary: also count by token id, which takes layers * experts * 12 bytes for each different id.
        into: counts to go on with, in place; what was counted stays, also when a text raises.

    Raises:
        ValueError: for a dense model, no texts, a text that is empty or none, another number of labels than texts, or
            `into` of another model.
    """
    refuse_dense(model)
    counts = RoutingCounts(model, vocabulary) if into is None else into
    said = counts.about if into is None else about(model)
    refuse_other_model(counts.about, said)
    counts._tokenizer = model.tokenizer  # counts that were read from a folder have none
    window = model.cfg.n_ctx if window is None else window
    if not 0 < window <= model.cfg.n_ctx:
        raise ValueError(f"window is {window}: {model.cfg.model_name} reads 1 to {model.cfg.n_ctx} tokens at once.")
    texts = [texts] if isinstance(texts, str) else texts
    labels = [labels] if isinstance(labels, str) else labels
    sizes = [len(given) if hasattr(given, "__len__") else None for given in (texts, labels)]
    if labels is not None and None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(f"There are {sizes[1]} labels for {sizes[0]} texts: give one for each.")
    done, batch = 0, []
    for piece in windows(model, tqdm(texts, "routing", delay=1, leave=False, disable=not progress), labels, window):
        batch.append(piece)
        if len(batch) == batch_size:
            counts.add(_traced(model, batch, said, leave_out))
            done, batch = done + len(batch), []
    if batch:
        counts.add(_traced(model, batch, said, leave_out))
    elif not done:
        raise ValueError("There are no texts to count: the corpus is empty.")
    return counts


def windows(model, texts, labels, window: int) -> Iterator[tuple[Tensor, Label]]:
    """Token ids with what they are of, cut to size."""
    whose = None if labels is None else iter(labels)
    for number, text in enumerate(texts):
        label = ALL if whose is None else next(whose, None)
        if label is None:
            raise ValueError(f"There are labels for {number} texts, and more texts: give one for each.")
        if not isinstance(text, str | Tensor) or (isinstance(text, Tensor) and text.ndim != 1):
            came = f"a tensor of shape {list(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
            raise ValueError(f"Text {number} is {came}: give text, or a tensor of token ids [pos].")
        empty, label = not len(text), plain(label)
        ids = text if isinstance(text, Tensor) or empty else torch.tensor(model._need_tokenizer().encode(text))
        if empty:
            raise ValueError(f"Text {number} is empty: leave it out.")
        each = isinstance(label, list)
        if each and len(label) != len(ids):
            raise ValueError(f"Text {number} has {len(ids)} tokens and {len(label)} labels: give one for each.")
        for start in range(0, len(ids), window):
            yield ids[start : start + window], label[start : start + window] if each else label
    if whose is not None and next(whose, None) is not None:
        raise ValueError(f"There are more labels than texts, of which there were {number + 1}: give one for each.")


def _traced(model, batch: list[tuple[Tensor, Label]], said: dict[str, Any], leave_out: Sequence[int]) -> RoutingTrace:
    rows, labels = zip(*batch, strict=True)
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=model.cfg.pad_token_id)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    names: list[str] = []
    numbers = numbered(labels, mask, names)
    mask = None if mask.all() else mask.to(model.cfg.device)
    trace = run_traced(model, tokens.to(model.cfg.device), mask, said, numbers, names)
    left_out = torch.isin(trace.tokens, torch.tensor(list(leave_out), dtype=torch.long, device=trace.tokens.device))
    return replace(trace, real=trace.real & ~left_out)
