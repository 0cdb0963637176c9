"""Interventions: one vocabulary for every edit of a run, used by experiments, routing and widgets alike.

    gs.zero("blocks.1.attn.hook_z", heads=2)                    a head silenced
    gs.patch(("resid_post", 3), cache, positions=[4])           an activation from another run
    gs.add(("resid_post", 3), direction, positions=slice(5, None))
    gs.knockout(range(2, 5), queries=[-1], keys=slice(1, 4))    edges cut in a window of layers
    gs.drop_expert(2, expert=5)                                 never chosen; the next best steps in

Each is a value: it prints, compares, and is saved and loaded. `model.with_interventions([...])` puts them into effect,
as does `interventions=` of forward, run_with_cache and generate. Several at one site act in the order given.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemmascope.hooks import CutEdges, Progress, entries
from gemmascope.sites import SiteInfo

Site = str | tuple[str, int]
"""A hook point's name, or a short name and a layer: "blocks.3.attn.hook_z" or ("z", 3)."""
Indices = int | Sequence[int] | slice | None
"""Some entries of an axis, which may be negative; None for all."""

ACTIONS = ("set", "add", "scale", "patch", "cut", "force")
_AXES = {
    "batch": ("batch",),
    "positions": ("pos",),
    "heads": ("head", "kv_head"),
    "slots": ("slot",),
    "experts": ("expert",),
    "neurons": ("d_mlp", "d_expert", "d_ple", "feature"),
    "queries": ("query",),
    "keys": ("key",),
}
"""What `where` may name, and the axes of a site that it means."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit: what is done to which part of the tensor at a site. The functions below make them."""

    site: Site
    action: str
    """"set", "add" or "scale" by a value that broadcasts to the part; "patch": the same part of `value` takes its place
    (axes of size 1 stand for any index); "cut" edges; "force" an expert."""
    where: Mapping[str, tuple[int, ...] | slice] = field(default_factory=dict)
    """Entries of axes, by the names in `_AXES`; an axis that is not named is meant whole."""
    value: int | float | Tensor | None = None
    label: str = ""
    """How it is called in print: "zero", "mean", ..."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action is {self.action!r}; it is one of {', '.join(ACTIONS)}.")
        unknown = next((name for name in self.where if name not in _AXES), None)
        if unknown is not None:
            raise ValueError(f"An intervention has no part {unknown!r}; parts are {', '.join(_AXES)}.")

    def __str__(self) -> str:
        name = self.site if isinstance(self.site, str) else f"{self.site[0]} of layer {self.site[1]}"
        parts = "; ".join(f"{axis} {_shown(entries)}" for axis, entries in self.where.items())
        by = f" by {self.value:g}" if isinstance(self.value, int | float) and self.action in ("scale", "add") else ""
        return f"{self.label or self.action} {name}{by}" + (f" ({parts})" if parts else "")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Intervention):
            return NotImplemented
        ours, theirs = (
            (x.site, x.action, {axis: str(entries) for axis, entries in x.where.items()}) for x in (self, other)
        )
        if ours != theirs or isinstance(self.value, Tensor) != isinstance(other.value, Tensor):
            return False
        return torch.equal(self.value, other.value) if isinstance(self.value, Tensor) else self.value == other.value

    __hash__ = None  # type: ignore[assignment]

    def edit(self, x: Tensor, site: SiteInfo, offset: int = 0, growing: bool = False, chosen: Tensor | None = None):
        """Changes x, the tensor at `site`, in place.

        Args:
            offset: positions that came before x's first.
            growing: whether positions past the end are still to come (a KV cache is being filled), or do not exist.
            chosen: the experts of each slot [batch, pos, slot], where a part is of experts and the site has slots.
        """
        index = self._index(x, site, offset, growing)
        if index is None:
            return
        old = x.clone() if chosen is not None else None
        if self.action == "patch":
            value = self._source(x, site, offset, growing)
            before = [offset if axis in _ALONG else 0 for axis in site.axes.split()]
            x[index] = value[tuple(map(_there, index, before, value.shape, x.shape))]
        elif self.action == "force":
            self._force(x, index)
        else:
            x[index] = self._changed(x[index])
        if chosen is not None:  # slots of other experts stay as they were
            experts = torch.tensor(self.where["experts"], device=x.device)
            others = ~torch.isin(chosen, experts)
            x[others] = old[others]

    def _changed(self, part: Tensor) -> Tensor:
        value = self.value.to(part) if isinstance(self.value, Tensor) else self.value
        match self.action:
            case "set":
                return torch.as_tensor(value, dtype=part.dtype, device=part.device).expand_as(part)
            case "add":
                return part + value
            case _:
                return part * value

    def _source(self, x: Tensor, site: SiteInfo, offset: int, growing: bool) -> Tensor:
        value = self.value.to(x.device, x.dtype)
        for axis, came, size in zip(site.axes.split(), value.shape, x.shape, strict=True):
            along = axis in _ALONG
            there = size + offset if along else size
            if came not in (1, there) and not (along and growing):
                raise ValueError(
                    f"{site.name}: the run to patch from has {came} entries on axis {axis!r} and this one has {there}; "
                    "take both from prompts of one length."
                )
        return value

    def _force(self, indices: Tensor, index: tuple) -> None:
        """Where an expert is not among the chosen, it takes the last (least likely) slot."""
        part = indices[index[:2]]
        missing = ~(part == int(self.value)).any(-1)
        part[..., -1] = torch.where(missing, int(self.value), part[..., -1])
        indices[index[:2]] = part

    def _index(self, x: Tensor, site: SiteInfo, offset: int, growing: bool) -> tuple[Tensor | slice, ...] | None:
        """An index for every axis, as an outer product; None when nothing of the part is in x."""
        axes = site.axes.split()
        taken = {next((a for a in _AXES[name] if a in axes), None): (name, part) for name, part in self.where.items()}
        if "experts" in self.where and "expert" not in axes and "slot" in axes:
            taken.pop(None, None)
        if None in taken:
            name, has = taken[None][0], [name for name, axis in _AXES.items() if set(axis) & set(axes)]
            raise ValueError(f"{site.name} has no {name}; an intervention there takes {', '.join(has)}.")
        lists = []
        for axis, size in zip(axes, x.shape, strict=True):
            name, part = taken.get(axis, (axis, slice(None)))
            along = axis in _ALONG
            before = offset if along else 0
            named = entries(part, size, name, site.name, before, growing and along)
            if along and self.action == "patch" and self.value.shape[len(lists)] > 1:  # no further than the other run
                named = [entry for entry in named if entry + before < self.value.shape[len(lists)]]
            lists.append(named)
        if not all(lists):
            return None
        whole = [len(entry) == size for entry, size in zip(lists, x.shape, strict=True)]
        n = max((axis + 1 for axis, is_whole in enumerate(whole) if not is_whole), default=0)
        arrays = (
            torch.tensor(entry, device=x.device).view([-1 if i == axis else 1 for i in range(n)])
            for axis, entry in enumerate(lists[:n])
        )
        return (*arrays, *[slice(None)] * (len(lists) - n))  # what is whole at the end costs no index

    def to_dict(self) -> dict[str, Any]:
        """All but a tensor value, as JSON takes it."""
        where = {
            axis: {"start": part.start, "stop": part.stop, "step": part.step} if isinstance(part, slice) else list(part)
            for axis, part in self.where.items()
        }
        site = self.site if isinstance(self.site, str) else list(self.site)
        value = None if isinstance(self.value, Tensor) else self.value
        return {"site": site, "action": self.action, "where": where, "value": value, "label": self.label}


_ALONG = ("pos", "query")
"""The axes along which a KV cache grows."""


def _there(index: Tensor | slice, before: int, size: int, n: int) -> Tensor | slice:
    """Where in the run to patch from, with `size` entries, an index into the n at hand is. An axis of size 1 stands for
    every index."""
    if isinstance(index, slice):
        return slice(before, before + n) if size > 1 else index
    return index + before if size > 1 else torch.zeros_like(index)


def _shown(part: tuple[int, ...] | slice) -> str:
    if isinstance(part, slice):
        ends = ["" if end is None else str(end) for end in (part.start, part.stop)]
        return ":".join(ends) + (f":{part.step}" if part.step not in (None, 1) else "")
    return ", ".join(map(str, part))


# The verbs


def _at(site: Site, action: str, value, label: str, where: dict[str, Indices]) -> Intervention:
    parts = {
        axis: part if isinstance(part, slice) else (part,) if isinstance(part, int) else tuple(part)
        for axis, part in where.items()
        if part is not None
    }
    return Intervention(site, action, parts, value, label)


def zero(site: Site, **where: Indices) -> Intervention:
    """Zero ablation. `where`: batch, positions, heads, slots, experts, neurons, queries, keys; all by default."""
    return _at(site, "set", 0.0, "zero", where)


def scale(site: Site, factor: float, **where: Indices) -> Intervention:
    """Multiplies by a factor."""
    return _at(site, "scale", factor, "scale", where)


def add(site: Site, direction: Tensor, strength: float = 1.0, **where: Indices) -> Intervention:
    """Adds strength * direction, [d] or anything that broadcasts to the part (steering)."""
    return _at(site, "add", strength * direction, "add", where)


def replace(site: Site, value: int | float | Tensor, **where: Indices) -> Intervention:
    """Puts a value in place: a number, or a tensor that broadcasts to the part."""
    return _at(site, "set", value, "replace", where)


def _from(reference, site: Site) -> Tensor:
    return reference if isinstance(reference, Tensor) else reference[site]


def patch(site: Site, source, **where: Indices) -> Intervention:
    """Activation patching: the same part of another run, `source`, a cache or the tensor at this site."""
    return _at(site, "patch", _from(source, site).detach(), "patch", where)


def mean(site: Site, reference, **where: Indices) -> Intervention:
    """Mean ablation: the mean over prompts and positions of `reference`, a cache or the tensor at this site."""
    return _at(site, "patch", _from(reference, site).detach().mean((0, 1), keepdim=True), "mean", where)


def resample(site: Site, reference, seed: int = 0, **where: Indices) -> Intervention:
    """Resample ablation: each prompt gets the activation of another prompt of `reference` (never its own).

    Raises:
        ValueError: with fewer than two prompts.
    """
    tensor = _from(reference, site).detach()
    if len(tensor) < 2:
        raise ValueError("resample needs two prompts at least: with one there is no other to draw from.")
    order = torch.randperm(len(tensor), generator=torch.Generator().manual_seed(seed))
    drawn = torch.empty_like(order).index_copy_(0, order, order.roll(1))  # one cycle, so that none keeps its own
    return _at(site, "patch", tensor[drawn.to(tensor.device)], "resample", where)


def knockout(
    layers: int | Iterable[int],
    queries: Indices = None,
    keys: Indices = None,
    heads: Indices = None,
    batch: Indices = None,
    renormalize: bool = True,
) -> list[Intervention]:
    """Cuts attention edges from `queries` to `keys` in some layers and heads (Geva et al. 2023,
    https://arxiv.org/abs/2304.14767).

    With `renormalize` the edges are masked before the softmax, so that what is left of a row sums to 1; without, the
    pattern is zeroed there. A query with no edge left attends to nothing. Alone at their layer, cuts act inside the
    fused kernel.
    """
    what = "attn_scores" if renormalize else "pattern"
    where = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
    return [_at((what, layer), "cut", None, "knock out", where) for layer in _layers(layers)]


def drop_expert(
    layers: int | Iterable[int], experts: int | Sequence[int], reroute: bool = True, positions: Indices = None
) -> list[Intervention]:
    """Switches experts off: the next best steps in, or with `reroute=False` the slot stays and says nothing.

    In Gemma 4 a norm follows the experts' sum, so that dropping with and without renormalising the weights is one and
    the same; rerouting is another intervention.
    """
    where = {"experts": experts, "positions": positions}
    if reroute:
        return [
            _at(("moe.router.hook_logits", layer), "set", float("-inf"), "drop expert", where)
            for layer in _layers(layers)
        ]
    return [_at(("moe.router.hook_weights", layer), "set", 0.0, "silence expert", where) for layer in _layers(layers)]


def force_expert(layers: int | Iterable[int], expert: int, positions: Indices = None) -> list[Intervention]:
    """Puts an expert among the chosen: where it is not, it takes the slot of the least likely of them."""
    where = {"positions": positions}
    return [
        _at(("moe.router.hook_indices", layer), "force", expert, "force expert", where) for layer in _layers(layers)
    ]


def freeze_routing(layers: int | Iterable[int], source) -> list[Intervention]:
    """Holds which experts are chosen, and their weights, at those of another run (a cache)."""
    parts = ("moe.router.hook_indices", "moe.router.hook_weights")
    return [
        _at((part, layer), "patch", source[part, layer], "freeze", {}) for layer in _layers(layers) for part in parts
    ]


def freeze_norms(model, source, layers: Iterable[int] | None = None, final: bool = True) -> list[Intervention]:
    """Holds the scale of every norm of the stream in some layers (all by default), and of the final one, at those of
    another run (a cache), so that the stream becomes linear in what is added to it."""
    chosen = set(range(model.cfg.n_layers) if layers is None else layers)
    names = [name for name in model.sites if name.endswith("hook_scale")]
    kept = [name for name in names if (int(name.split(".")[1]) in chosen if name.startswith("blocks.") else final)]
    return [_at(name, "patch", source[name], "freeze", {}) for name in kept]


def _layers(layers: int | Iterable[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)


# Putting them into effect


def flat(interventions) -> list[Intervention]:
    """Interventions and lists of them, one after another."""
    if isinstance(interventions, Intervention):
        return [interventions]
    if isinstance(interventions, str) or not isinstance(interventions, Iterable):
        raise TypeError(f"Interventions come from gs.zero, gs.patch, ..., and a {type(interventions).__name__} came.")
    return [one for part in interventions for one in flat(part)]


def hooks_of(model, interventions, now: Progress) -> list[tuple[str, Callable]]:
    """Forward hooks (name, function) that carry interventions out; `now` is kept up to date by the caller.

    Raises:
        KeyError: for a site that the model does not have.
        ValueError: for a part that the site does not have.
    """
    found: list[tuple[str, Callable]] = []
    for one in flat(interventions):
        name = model.full_name(one.site)
        model._check_name(name)
        site = model.sites[name]._replace(name=name)  # the table has one row for all layers
        check_part(one, site)
        if one.action == "cut":
            found.append((name, CutEdges(dict(one.where), now)))
            continue
        memory: list[Tensor | None] = [None]
        if by_slot(one, site):
            found.append((f"{name.partition('.moe.')[0]}.moe.router.hook_indices", _remember(memory)))
        found.append((name, _editor(one, site, now, memory)))
    return found


def by_slot(one: Intervention, site: SiteInfo) -> bool:
    """Whether a part is of experts, and the site has them by slot."""
    return "experts" in one.where and "slot" in site.axes.split()


def check_part(one: Intervention, site: SiteInfo) -> None:
    """Raises ValueError for an edit that has no meaning at a site."""
    name = site.name
    if one.action == "cut" and not name.endswith(("hook_attn_scores", "hook_pattern")):
        raise ValueError(f"{name} has no edges to cut: gs.knockout cuts them at the scores or the pattern.")
    if one.action == "patch" and by_slot(one, site):
        raise ValueError(
            f"{name} is by slot, and a slot of another run may hold another expert: "
            "gs.activation_patching(..., 'moe.hook_expert_out', ('layer', 'expert')) patches what an expert adds."
        )


def _remember(memory: list) -> Callable:
    def remember(indices: Tensor, hook) -> None:
        memory[0] = indices.clone()

    return remember


def _editor(one: Intervention, site: SiteInfo, now: Progress, memory: list) -> Callable:
    def edit(x: Tensor, hook) -> Tensor:
        one.edit(x, site, now.offset, now.growing, memory[0])
        return x

    edit.__name__ = str(one)
    return edit


# Files


def save_interventions(path: str | Path, interventions) -> None:
    """Writes interventions into one safetensors file."""
    given = flat(interventions)
    tensors = {str(i): one.value.contiguous() for i, one in enumerate(given) if isinstance(one.value, Tensor)}
    save_file(tensors, path, metadata={"interventions": json.dumps([one.to_dict() for one in given])})


def load_interventions(path: str | Path) -> list[Intervention]:
    """Reads what `save_interventions` wrote."""
    with safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get("interventions")
        if written is None:
            raise ValueError(f"{path} holds no interventions: give a file that save_interventions wrote.")
        found = []
        for number, raw in enumerate(json.loads(written)):
            where = {
                axis: slice(part["start"], part["stop"], part["step"]) if isinstance(part, dict) else tuple(part)
                for axis, part in raw["where"].items()
            }
            site = raw["site"] if isinstance(raw["site"], str) else tuple(raw["site"])
            value = file.get_tensor(str(number)) if str(number) in file.keys() else raw["value"]
            found.append(Intervention(site, raw["action"], where, value, raw["label"]))
    return found
