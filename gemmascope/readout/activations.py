"""Activations of many prompts: which position of which prompt, read in batches, or changed there.

A position counts a prompt's own tokens, padding left out: 0 is the first, -1 the last, whichever side the padding is.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from gemmascope import ops
from gemmascope.hooks import Reader
from gemmascope.interventions import Site
from gemmascope.metrics import measured
from gemmascope.sites import SiteInfo

Positions = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None
"""One position for all prompts, one for each, several for each, or None for every token."""
Change = Callable[[Float[Tensor, "row d"], Int[Tensor, " row"]], Float[Tensor, "row d"]]
"""What is at some rows, and the rows' numbers, to what shall be there."""


class Rows(NamedTuple):
    """Positions in padded tokens, prompt by prompt."""

    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]


class Batch(NamedTuple):
    """Some prompts, and where in them the rows lie that belong to them."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"] | None
    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]
    row: Int[Tensor, " row"]
    """The numbers of these rows among all."""


class Prompts(NamedTuple):
    """Token ids and which of them are real; None where all are."""

    tokens: Int[Tensor, "prompt pos"]
    mask: Bool[Tensor, "prompt pos"] | None = None

    @classmethod
    def of(cls, model, prompts: "str | Sequence[str] | Tensor | Prompts") -> "Prompts":
        """Texts (padded as the tokenizer pads), token ids [pos] or [prompt, pos], or Prompts as they are.

        Raises:
            ValueError: for a mask of another shape, or a prompt that is all padding.
        """
        if isinstance(prompts, Tensor):
            return cls(prompts[None] if prompts.ndim == 1 else prompts)
        if not isinstance(prompts, Prompts):
            ids, mask = model._need_tokenizer().batch([prompts] if isinstance(prompts, str) else list(prompts))
            return cls(ids, mask.bool())
        if prompts.mask is None:
            return prompts
        if prompts.mask.shape != prompts.tokens.shape:
            came, wanted = list(prompts.mask.shape), list(prompts.tokens.shape)
            raise ValueError(f"The mask has shape {came} and the tokens {wanted}: give one of the same shape.")
        mask = prompts.mask.bool()
        if not mask.any(-1).all():
            raise ValueError(f"Prompt {int((~mask.any(-1)).nonzero()[0])} is all padding: leave it out.")
        return cls(prompts.tokens, mask)

    @property
    def n(self) -> int:
        return len(self.tokens)

    def rows(self, positions: Positions) -> Rows:
        """Where positions lie in the padded tokens.

        Raises:
            ValueError: for a list of another length than the prompts, or a position that a prompt does not have.
        """
        real = torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask
        if positions is None:
            return Rows(*real.nonzero().cpu().unbind(1))
        positions = positions.tolist() if isinstance(positions, Tensor) else positions
        each = [positions] * self.n if isinstance(positions, int) else list(positions)
        if len(each) != self.n:
            raise ValueError(
                f"There are positions for {len(each)} prompts and {self.n} prompts: "
                "give one position for all, or a position (or a list of them) for each."
            )
        prompt, pos = [], []
        for number, (wanted, row) in enumerate(zip(each, real.cpu(), strict=True)):
            places = row.nonzero()[:, 0].tolist()
            for one in [wanted] if isinstance(wanted, int) else wanted:
                if not -len(places) <= one < len(places):
                    raise ValueError(f"Prompt {number} has {len(places)} tokens and no position {one}.")
                prompt.append(number)
                pos.append(places[one])
        return Rows(torch.tensor(prompt, dtype=torch.long), torch.tensor(pos, dtype=torch.long))

    def batch(self, prompts: Int[Tensor, " prompt"], rows: Rows, trim: bool = True) -> Batch:
        """Some of the prompts; `trim` leaves out the columns in which all of these are padding."""
        tokens, mask, first = self.tokens[prompts], None, 0
        if self.mask is not None:
            mask = self.mask[prompts]
            used = mask.any(0).nonzero()[:, 0]
            first, last = (int(used[0]), int(used[-1])) if trim else (0, mask.shape[1] - 1)
            tokens, mask = tokens[:, first : last + 1], mask[:, first : last + 1]
        number = torch.full((self.n,), -1)
        number[prompts] = torch.arange(len(prompts))
        here = (number[rows.prompt] >= 0).nonzero()[:, 0]
        return Batch(tokens, mask, number[rows.prompt[here]], rows.pos[here] - first, here)

    def batches(
        self, size: int, rows: Rows, progress: bool = False, what: str = "runs", trim: bool = True
    ) -> Iterator[Batch]:
        """All prompts, `size` at a time."""
        starts = range(0, self.n, size)
        for start in tqdm(starts, what, delay=1, leave=False, disable=not progress):
            yield self.batch(torch.arange(start, min(start + size, self.n)), rows, trim)


def find_site(model, site: Site, *, write: bool = False) -> SiteInfo:
    """The hook point that `site` means, checked: it has positions, and figures that can be read, or changed.

    Raises:
        KeyError: for a name that is no hook point; the nearest are given.
        ValueError: for a layer out of range, a site without positions, or one of integers; with `write`, one of slots.
    """
    if isinstance(site, tuple):
        model.layer(site[1])  # raises, saying which layers there are
    name = model.full_name(site)
    model._check_name(name)
    info = model.sites[name]
    axes = info.axes.split()
    if axes[:2] != ["batch", "pos"]:
        raise ValueError(
            f"{name} has axes ({info.axes}) and no positions: take one that has, such as ('z', {_layer(name) or 0})."
        )
    if name.endswith("hook_indices"):
        raise ValueError(f"{name} holds the numbers of experts, which are no quantities: take hook_weights.")
    if write and "slot" in axes:
        raise ValueError(f"{name} is by slot, and a slot is another expert at every token: change hook_moe_out.")
    return SiteInfo(name, *info[1:])


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def _stop_after(model, names: list[str]) -> int | None:
    """The first layer that need not run to read these sites, None when the head must."""
    layers = [_layer(name) for name in names if not name.startswith(("hook_embed", "hook_ple_inputs"))]
    if None in layers:
        return None
    stop = max((layer + 1 for layer in layers), default=0)
    return stop


@torch.no_grad()
def collect(
    model,
    prompts: str | Sequence[str] | Tensor | Prompts,
    sites: Site | Sequence[Site],
    *,
    positions: Positions = -1,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[Site, Float[Tensor, "example d"]]:
    """Activations at chosen positions of many prompts, on the CPU, in the model's dtype.

    A run ends after the last layer that is asked for, and nothing but the chosen positions is kept. What a site has
    beside batch and position is laid out in one axis d. A site by slot (moe.hook_expert_post, say) is given by expert,
    0 where a token was not routed: expert e's feature j is column e * d_expert + j.

    Args:
        prompts: texts, token ids [prompt, pos], or `Prompts(tokens, mask)` for padded ids.
        sites: hook points, each by its name or as (short name, layer).
        positions: counted in a prompt's own tokens: one for all, one for each, a list for each, or None for every
            token. The examples follow one another prompt by prompt.

    Raises:
        KeyError, ValueError: for sites or positions that are not there, or a site without positions.
    """
    sites = [sites] if isinstance(sites, str | tuple) else list(sites)
    infos = {site: find_site(model, site) for site in sites}
    given = Prompts.of(model, prompts)
    rows = given.rows(positions)
    routing = {info.name: _routing_of(info) for info in infos.values() if "slot" in info.axes.split()}
    names = list({info.name for info in infos.values()} | set(routing.values()))
    stop = _stop_after(model, names)
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for batch in given.batches(batch_size, rows, progress, "collecting"):
        if not len(batch.row):
            continue
        seen: dict[str, Tensor] = {}

        def store(name: str, tensor: Tensor, seen=seen, batch=batch) -> None:
            seen[name] = tensor[batch.prompt.to(tensor.device), batch.pos.to(tensor.device)]

        with model.hooks([(name, Reader(store)) for name in names]):
            model(batch.tokens, attention_mask=batch.mask, return_type=None, stop_at_layer=stop)
        for site, info in infos.items():
            values = seen[info.name]
            if info.name in routing:
                values = _by_expert(values, seen[routing[info.name]], model.cfg.n_experts)
            kept[site].append(values.flatten(1).cpu())
    if not len(rows.prompt):
        raise ValueError("No position of any prompt was asked for: positions are empty.")
    return {site: torch.cat(parts) for site, parts in kept.items()}


def _routing_of(info: SiteInfo) -> str:
    return f"{info.name.partition('.moe.')[0]}.moe.router.hook_indices"


def _by_expert(
    values: Float[Tensor, "row slot *feature"], experts: Int[Tensor, "row slot"], n_experts: int
) -> Float[Tensor, "row expert *feature"]:
    out = values.new_zeros(len(values), n_experts, *values.shape[2:])
    out[torch.arange(len(values), device=values.device)[:, None], experts] = values
    return out


def changing(name: str, batch: Batch, change: Change) -> list[tuple[str, Callable]]:
    """The forward hooks that put `change` of what is at a batch's rows in its place; reckoned in float32 at least."""

    def write(tensor: Tensor, hook: Any) -> Tensor:
        where = batch.prompt.to(tensor.device), batch.pos.to(tensor.device)
        values = tensor[where]
        new = change(ops.wide(values.flatten(1)), batch.row.to(tensor.device))
        return tensor.index_put(where, new.view_as(values).type_as(tensor))

    return [(name, write)]


def last_logits(model, batch: Batch, hooks: list[tuple[str, Callable]] = ()) -> Float[Tensor, "prompt d_vocab"]:
    """Logits after each prompt's last token."""
    run = model._begin(batch.tokens, batch.mask)
    n_prompts, width = batch.tokens.shape
    if batch.mask is None:
        from_end = torch.ones(n_prompts, dtype=torch.long)
    else:
        from_end = batch.mask.flip(1).long().argmax(1).cpu() + 1
    run.last_only = bool((from_end == 1).all())
    with model.hooks(list(hooks)):
        logits = model(run)
    return logits[torch.arange(n_prompts), logits.shape[1] - from_end]


@torch.no_grad()
def measure(
    model,
    prompts: Prompts,
    metric: Callable[[Tensor], Tensor],
    site: SiteInfo | None = None,
    rows: Rows | None = None,
    change: Change | None = None,
    batch_size: int = 32,
) -> Float[Tensor, " prompt"]:
    """A metric's figure for each prompt, on the CPU, with `change` at rows of a site.

    A metric of the last position gets the logits after each prompt's last token, wherever the padding is; another one
    all logits of all prompts, which are then held at once.

    Raises:
        ValueError: when the metric gives another shape, or NaN.
    """
    last_only = getattr(metric, "last_only", False)
    none = torch.zeros(0, dtype=torch.long)
    logits = []
    for batch in prompts.batches(batch_size, rows or Rows(none, none), trim=last_only):
        hooks = changing(site.name, batch, change) if change is not None and len(batch.row) else []
        if last_only:
            logits.append(last_logits(model, batch, hooks)[:, None])
        else:
            with model.hooks(hooks):
                logits.append(model(batch.tokens, attention_mask=batch.mask))
    return measured(metric, torch.cat(logits)).cpu()
