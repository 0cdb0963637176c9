"""Many small changes to one run, each measured: the engine of patching, knock-outs and ablations.

1. The prompts run once; the stream before every layer is kept.
2. Cells are sorted by the first layer and position that they touch, and some go through the rest of the model together,
   from that layer and position on: row (cell, prompt) carries the interventions of its cell.
3. The metric is asked cell by cell.

Memory depends on the rows of a forward pass, not on the number of cells.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import pandas
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from gemmascope.hooks import CutEdges, Progress, entries
from gemmascope.interventions import Intervention, by_slot, check_part, flat
from gemmascope.metrics import measured
from gemmascope.model.inputs import Pass
from gemmascope.model.resume import KV, taken_up
from gemmascope.progress import interruptible
from gemmascope.results import Result, about

ROWS = 16
"""Rows of one forward pass, where nothing else is asked."""


class _Streams:
    """Keeps the stream that enters each block, and the head."""

    def __init__(self):
        self.kept: list[Tensor] = []

    @contextmanager
    def entering(self, stage: int, x: Tensor) -> Iterator[None]:
        self.kept.append(x)
        yield


class Baseline:
    """A run of some prompts, kept so that it can be taken up again at any layer and position."""

    @torch.no_grad()
    def __init__(self, model, prompts, metric: Callable[[Tensor], Tensor], also: Sequence[str] = ()):
        """`also` names sites to keep in `stored`."""
        self.model, self.metric = model, metric
        self.run = prompts if isinstance(prompts, Pass) else model._begin(prompts)
        self.run.last_only = getattr(metric, "last_only", False)
        self.run.record = streams = _Streams()
        self.stored = self._read(also)
        self.streams, self.run.record = streams.kept, None
        # Positions of an image see later ones, in the K = V form keys are kept in another shape, and a hook of somebody
        # else may count positions from the first that it is given.
        images = any(mask.image_blocks is not None for mask in self.run.masks.values())
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        self._from_any_position = not (images or model.shared_kv or hooked)

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        stored, hooks, _ = self.model.get_caching_hooks(list(names))
        with self.model.hooks(fwd_hooks=hooks):
            self.figures = measured(self.metric, self.model(self.run)).cpu()
        return stored

    @cached_property
    def kv(self) -> KV:
        """Keys and values of every layer that has its own: what a pass that starts at a later position reads."""
        own = [layer for layer, shape in enumerate(self.model.cfg.layers) if shape.kv_source is None]
        names = {layer: [f"blocks.{layer}.attn.{site}" for site in ("hook_rot_k", "hook_v_normed")] for layer in own}
        stored = self._read([name for pair in names.values() for name in pair])
        return {layer: tuple(stored[name] for name in pair) for layer, pair in names.items()}

    @property
    def n_prompts(self) -> int:
        return len(self.run.tokens)

    def first(self, cell: Sequence[Intervention]) -> tuple[int, int]:
        """The first layer (-1 for the embedding) and position that a cell touches."""
        n_layers, n_pos = self.model.cfg.n_layers, self.run.tokens.shape[1]
        layer, pos = n_layers, n_pos - 1
        for one in cell:
            name = self.model.full_name(one.site)
            self.model._check_name(name)
            layer = min(layer, _layer(name, n_layers))
            part = one.where.get("queries" if one.action == "cut" else "positions")
            pos = min([pos, *entries(part, n_pos, "positions", name)])
        return layer, pos if self._from_any_position else 0

    def logits(
        self, cells: list[list[Intervention]], layer: int, pos: int = 0
    ) -> Float[Tensor, "cell prompt pos d_vocab"]:
        """The logits of each cell from position `pos` on, run together from a layer on."""
        stream = self.streams[max(layer, 0)]
        kv = self.kv if pos else self.run.kv
        run = taken_up(self.run, self.model.cfg.layers, stream, kv, max(layer, 0), pos, len(cells))
        run.start = run.start if layer >= 0 else None
        with self.model.hooks(fwd_hooks=self._hooks(cells, pos)):
            return self.model(run).unflatten(0, (len(cells), self.n_prompts))

    def values(self, cells: list[list[Intervention]], layer: int, pos: int) -> Float[Tensor, "cell prompt"]:
        """The metric of each cell, run together from a layer and a position on."""
        pos = pos if layer >= 0 and self.run.last_only else 0  # a metric may read positions that would not run
        return torch.stack([measured(self.metric, part) for part in self.logits(cells, layer, pos)]).cpu()

    def _hooks(self, cells: list[list[Intervention]], pos: int) -> list[tuple[str, Callable]]:
        """One hook a site: it edits the rows of each cell. Cuts of edges are hooks of their own, for the kernel."""
        n, hooks, edits = self.n_prompts, [], defaultdict(list)
        for number, cell in enumerate(cells):
            for one in cell:
                name = self.model.full_name(one.site)
                check_part(one, self.model.sites[name]._replace(name=name))
                if one.action == "cut":
                    batch = entries(one.where.get("batch"), n, "batch", name)
                    where = {**one.where, "batch": [number * n + row for row in batch]}
                    hooks.append((name, CutEdges(where, Progress(offset=pos))))
                else:
                    edits[name].append((slice(number * n, (number + 1) * n), one))
        for name, given in edits.items():
            site, memory = self.model.sites[name]._replace(name=name), []
            if any(by_slot(one, site) for _, one in given):
                indices = f"{name.partition('.moe.')[0]}.moe.router.hook_indices"
                hooks.append((indices, lambda x, hook, memory=memory: memory.append(x.clone())))

            def edit(x: Tensor, hook, site=site, memory=memory, given=given) -> Tensor:
                for rows, one in given:
                    one.edit(x[rows], site, offset=pos, chosen=memory[0][rows] if by_slot(one, site) else None)
                return x

            hooks.append((name, edit))
        return hooks


def _layer(name: str, n_layers: int) -> int:
    parts = name.split(".")
    if parts[0] == "blocks":
        return int(parts[1])
    return -1 if name in ("hook_embed", "hook_ple_inputs") else n_layers


class Queue:
    """Cells that wait to be run. Those that start at the same layer and near the same position share a pass."""

    def __init__(
        self,
        base: Baseline,
        cells: Sequence,
        rows: int = ROWS,
        done: Float[Tensor, "cell prompt"] | None = None,
    ):
        """See `run_cells`."""
        self.base, self.cells = base, cells
        self.size = max(1, rows // base.n_prompts)
        self.values = torch.full((len(cells), base.n_prompts), float("nan")) if done is None else done.clone()
        """The figures so far; NaN in cells that wait."""
        self.waiting = sorted(
            (*base.first(self.given(i)), i) for i in self.values.isnan().any(-1).nonzero()[:, 0].tolist()
        )

    def given(self, number: int) -> list[Intervention]:
        """The interventions of a cell."""
        cell = self.cells[number]
        return flat(cell() if callable(cell) else cell)

    @torch.no_grad()
    def step(self) -> list[int]:
        """Runs the next pass; the numbers of its cells."""
        layer, pos, _ = self.waiting[0]
        numbers = [number for first, _, number in self.waiting[: self.size] if first == layer]
        self.values[numbers] = self.base.values([self.given(number) for number in numbers], layer, pos)
        self.waiting = self.waiting[len(numbers) :]
        return numbers


def run_cells(
    base: Baseline,
    cells: Sequence,
    *,
    rows: int = ROWS,
    done: Float[Tensor, "cell prompt"] | None = None,
    then: str = "pass this result as resume= to go on",
    progress: bool = True,
) -> Float[Tensor, "cell prompt"]:
    """The metric under the interventions of each cell. An interrupt (Ctrl-C) leaves NaN in the cells not reached.

    Args:
        cells: interventions, nested as one likes, for each cell; or a function that makes them, whose tensors are then
            held only while its cell runs.
        rows: rows of a forward pass; prompts of one cell stay together.
        done: figures of an earlier, interrupted call: only its NaN cells are run.
        then: what is said to whoever interrupts, after how many cells are left.
    """
    queue = Queue(base, cells, rows, done)
    n = len(cells)
    with tqdm(total=n, initial=n - len(queue.waiting), unit="cell", delay=1, disable=not progress) as bar:
        with interruptible(lambda: f"{len(queue.waiting)} of {n} cells to go; {then}."):
            while queue.waiting:
                bar.update(len(queue.step()))
    return queue.values


def sweep(
    model,
    prompts,
    metric: Callable[[Tensor], Tensor],
    cells: pandas.DataFrame,
    interventions: Sequence,
    *,
    rows: int = ROWS,
    resume: Result | None = None,
    progress: bool = True,
) -> Result:
    """Measures any interventions, cell by cell: `interventions[i]` are those of row i of `cells`.

    Args:
        prompts: text, texts or token ids; each prompt is a sample.
        metric: logits [prompt, pos, d_vocab] -> one figure a prompt (see `gemmascope.metrics`).
        resume: the result of an interrupted sweep of the same cells.

    Raises:
        ValueError: for cells and interventions that do not match, or a metric that gives NaN or another shape.
    """
    if len(cells) != len(interventions):
        raise ValueError(f"There are {len(cells)} cells and {len(interventions)} interventions: give one for each.")
    base = Baseline(model, prompts, metric)
    values = run_cells(base, interventions, rows=rows, done=resumed(resume, cells), progress=progress)
    return Result("sweep", cells, values, unit_of(metric), {"clean": base.figures}, about(model), "clean")


def resumed(resume: Result | None, cells: pandas.DataFrame) -> Tensor | None:
    """The figures of an interrupted result, once its cells are found to be the same."""
    if resume is None:
        return None
    if not resume.cells.equals(cells):
        raise ValueError(
            f"resume holds {len(resume.cells)} cells by {', '.join(resume.axes)}, not the {len(cells)} of this call: "
            "give the arguments of the interrupted one."
        )
    return resume.values


def unit_of(metric: Callable) -> str:
    return getattr(metric, "name", None) or getattr(metric, "__name__", "metric")
