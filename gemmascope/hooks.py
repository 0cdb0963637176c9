"""Hook points: the point itself, hooks of a special kind, and the module that manages them. `sites.py` is their table.

The points are TransformerLens's (`HookPoint`, `HookedRootModule`), with three additions that keep the promise
"every write has its stated effect or raises":

1. a point hands a writing hook a tensor of its own, so that editing in place equals returning, whoever else holds it;
2. what a hook returns is checked (shape, device, dtype), and an unknown name raises with the nearest ones;
3. a block learns when one of its points gets a hook, so that blocks nobody watches never touch their points.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint, LensHandle
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities import Slice, get_act_name

from gemmascope.config import Gemma4Config
from gemmascope.sites import SITES, SiteInfo, sites_of


class Reader:
    """A hook that only looks: it stores what it sees, and a fused path may stay on while it is attached."""

    def __init__(self, store: Callable[[str, Tensor], None], suffix: str = ""):
        self.store, self.suffix = store, suffix

    def __call__(self, tensor: Tensor, hook: HookPoint) -> None:
        # A later hook of the same point may still edit the tensor in place.
        self.store(hook.name + self.suffix, tensor.detach().clone() if written(hook) else tensor.detach())


class OnHeads:
    """A hook on some heads: `hook` gets, and may change, their part of any tensor that has heads, in the order given.

    On hook_attn_scores and hook_pattern, only these heads then leave the fused path: a hook without it needs all.
    """

    def __init__(self, heads: int | Sequence[int], hook: Callable):
        self.heads = [heads] if isinstance(heads, int) else list(heads)
        self.hook = hook
        if not self.heads or min(self.heads) < 0 or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"OnHeads takes different heads counted from 0, at least one, and {heads} came.")

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        template = re.sub(r"\.\d+\.", ".{l}.", hook.name, count=1)
        axes = next((site.axes.split() for site in SITES if site.name == template), [])
        axis = next((axes.index(name) for name in ("head", "kv_head") if name in axes), None)
        if axis is None:
            raise ValueError(f"{hook.name} has no heads: give the hook itself, without OnHeads.")
        there = list(range(tensor.shape[axis])) if hook.heads is None else hook.heads
        missing = [head for head in self.heads if head not in there]
        if missing:
            raise ValueError(f"{hook.name} has no head {missing[0]}; it has heads 0 to {tensor.shape[axis] - 1}.")
        index = torch.tensor([there.index(head) for head in self.heads], device=tensor.device)
        part = tensor.index_select(axis, index)
        new = self.hook(part, hook=hook)
        return tensor.index_copy(axis, index, part if new is None else new)


def entries(part, size: int, name: str, of: str, offset: int = 0, growing: bool = False) -> list[int]:
    """The entries of an axis of `size` that an int, a list or a slice names; None names all.

    They count from `offset` entries before the first at hand and may be negative; they are returned counted from that
    first, without those not at hand. `growing` allows for entries past the end, which are still to come.

    Raises:
        ValueError: for an entry that does not exist.
    """
    total = offset + size
    if part is None or isinstance(part, slice):
        named = range(total)[part or slice(None)]
    else:
        named = [part] if isinstance(part, int) else list(part)
        wrong = next((i for i in named if i < -total or (i >= total and not growing)), None)
        if wrong is not None:
            raise ValueError(f"{of}: {name} {wrong} does not exist; there are {total}, counted from 0.")
    return sorted({i - offset for i in (i + total if i < 0 else i for i in named) if offset <= i < total})


@dataclass(eq=False)
class Progress:
    """Where in its sequence a running model stands."""

    offset: int = 0
    """Positions that came before those of this pass."""
    growing: bool = False
    """Whether later positions are still to come."""

    def begin(self, past: Any) -> None:
        """Called at the start of a pass, with its KV cache."""
        self.offset, self.growing = (0, False) if past is None else (past.length, True)


class CutEdges:
    """A hook that cuts attention edges: on hook_attn_scores it hides them, on hook_pattern it zeroes them.

    A layer whose scores or pattern have such hooks only (on one of the two) stays on the fused path.
    """

    def __init__(self, where: dict, now: Progress):
        self.where, self.now = where, now

    def __call__(self, x: Tensor, hook: HookPoint) -> Tensor:
        for box in self.boxes(x.shape, hook.name).tolist():
            x[tuple(slice(start, stop) for start, stop in box)] = (
                0.0 if hook.name.endswith("pattern") else float("-inf")
            )
        return x

    def boxes(self, shape: Sequence[int], of: str) -> Int[Tensor, "box 4 2"]:
        """The edges of scores [batch, head, query, key at hand], as half-open boxes: queries count from
        the first of them, keys from the oldest at hand."""
        batch, n_heads, n_queries, n_keys = shape
        axes = []
        for name, size in (("batch", batch), ("heads", n_heads), ("queries", n_queries), ("keys", n_keys)):
            before = {"queries": self.now.offset, "keys": self.now.offset + n_queries - n_keys}.get(name, 0)
            axes.append(_runs(entries(self.where.get(name), size, name, of, before, self.now.growing and before >= 0)))
        return torch.tensor(list(itertools.product(*axes)), dtype=torch.long).view(-1, 4, 2)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Sorted numbers as half-open ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1])
    return [tuple(run) for run in runs]


def cuts_alone(*points: nn.Module) -> list[CutEdges] | None:
    """The hooks of these points, when all of them cut edges."""
    found = []
    for point in points:
        if not isinstance(point, Site) or point._backward_hooks or len(point.fwd_hooks) < len(point._forward_hooks):
            return None
        found += [handle.user_hook for handle in point.fwd_hooks]
    return found if found and all(isinstance(hook, CutEdges) for hook in found) else None


class Site(HookPoint):
    """A TransformerLens HookPoint whose writes are safe and checked."""

    def __init__(self):
        super().__init__()
        self.on_watch: Callable[[], None] | None = None
        self.heads: list[int] | None = None
        """The heads that the tensor at hand is of, where only those are computed; None for all."""

    def forward(self, x: Tensor) -> Tensor:
        # A write must not reach another holder of the memory (a cache, the skip path), nor a tensor autograd needs.
        return x.clone() if written(self) else x

    def add_hook(self, hook: Callable, dir: str = "fwd", **kwargs) -> LensHandle:
        if isinstance(hook, OnHeads):
            hook = OnHeads(hook.heads, _checked(hook.hook, self, dir))
        elif not isinstance(hook, Reader | CutEdges):
            hook = _checked(hook, self, dir)
        return super().add_hook(hook, dir=dir, **kwargs)

    def remove_hooks(self, *args, **kwargs) -> None:
        if self.fwd_hooks or self.bwd_hooks:  # every point is asked at the end of every run with hooks
            super().remove_hooks(*args, **kwargs)

    # Plain torch hooks are hooks too: the block must hear of them.
    def register_forward_hook(self, *args, **kwargs):
        self._wake()
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args, **kwargs):
        self._wake()
        return super().register_full_backward_hook(*args, **kwargs)

    def _wake(self) -> None:
        if self.on_watch is not None:
            self.on_watch()

    def _refused(self, *args, **kwargs):
        raise ValueError(
            f"{self.name}: a hook point takes add_hook(fn) and add_hook(fn, dir='bwd'), no other kind of hook."
        )

    # They would act before the point's own copy is made, or never.
    register_forward_pre_hook = register_full_backward_pre_hook = register_backward_hook = _refused


def watched(point: nn.Module) -> bool:
    """Whether a hook point has any hook. A module that was put in a point's place counts as one."""
    return not isinstance(point, Site) or bool(point._forward_hooks or point._backward_hooks)


def written(point: nn.Module) -> bool:
    """Whether a hook may change the tensor, or needs its gradient."""
    if not isinstance(point, Site):
        return True
    readers = {handle.hook.id for handle in point.fwd_hooks if isinstance(handle.user_hook, Reader)}
    return bool(point._backward_hooks) or any(hook not in readers for hook in point._forward_hooks)


def heads_touched(*points: nn.Module) -> list[int] | None:
    """The heads to which all hooks of these points are confined, or None when one of them takes every head."""
    heads = set()
    for point in points:
        if not isinstance(point, Site):
            return None
        handles = (*point.fwd_hooks, *point.bwd_hooks)
        if len(handles) < len(point._forward_hooks) + len(point._backward_hooks):
            return None  # a plain torch hook
        for handle in handles:
            if not isinstance(handle.user_hook, OnHeads):
                return None
            heads.update(handle.user_hook.heads)
    return sorted(heads)


def _checked(hook: Callable, site: Site, dir: str) -> Callable:
    """The user's hook, its answer checked against the tensor it was given."""
    name = getattr(hook, "__name__", None) or type(hook).__name__

    @functools.wraps(hook, assigned=(), updated=())
    def run(tensor: Tensor, hook: HookPoint):
        # Autograd hands one gradient to every branch of a sum: an edit in place must stay in this one.
        tensor = tensor.clone() if dir == "bwd" else tensor
        new = run.__wrapped__(tensor, hook=hook)
        new = new[0] if isinstance(new, tuple) and len(new) == 1 else new
        if new is None:
            return tensor if dir == "bwd" else None
        if not isinstance(new, Tensor):
            raise TypeError(
                f"Hook {name!r} at {site.name} returned a {type(new).__name__}; "
                f"return a tensor of shape {list(tensor.shape)}, or None to leave it as it is."
            )
        for what in ("shape", "device", "dtype"):
            got, want = getattr(new, what), getattr(tensor, what)
            if got != want:
                show = (list(got), list(want)) if what == "shape" else (got, want)
                raise ValueError(
                    f"Hook {name!r} at {site.name} returned {what} {show[0]}; this point carries {show[1]}: "
                    "return a tensor like the one the hook was given."
                )
        return new

    return run


def untouched(module: nn.Module, kind: type) -> bool:
    """Whether a module is what the model put there, without plain torch hooks and with the `forward` of its class
    (offloading libraries put another on the instance): then a fused line may pass it by."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


class Part(nn.Module):
    """A part of a block that has hook points."""

    @property
    def shown(self) -> bool:
        """Whether one of its own points has a hook."""
        return any(watched(module) for name, module in self._modules.items() if name.startswith("hook_"))


class WatchedBlock(nn.Module):
    """A block that knows whether any of its hook points has a hook, at no cost while none has.

    The router's points are apart: its choice can be seen, and changed, while all else runs fused.
    """

    def __init__(self):
        super().__init__()
        self._maybe_watched = False
        self.router_watched = False
        """Whether a point of the router has a hook, as `watched` last found where no other point has."""
        self.points: tuple[nn.Module, ...] = ()

    def find_points(self) -> None:
        """Called once the model is built, and again when a module was put in the place of a point (an SAE, say)."""
        named = [(name, module) for name, module in self.named_modules() if name.rpartition(".")[2].startswith("hook_")]
        self.points = tuple(module for _, module in named)
        self._router_points = tuple(module for name, module in named if name.startswith("moe.router."))
        self._other_points = tuple(module for name, module in named if not name.startswith("moe.router."))
        for point in self.points:
            if isinstance(point, Site):
                point.on_watch = self._note_watch
        self._maybe_watched = True

    def _note_watch(self) -> None:
        self._maybe_watched = True

    @property
    def watched(self) -> bool:
        """Whether a point has a hook that only a pass step by step can call: any but the router's."""
        # A registration raises the flag; only the block itself lowers it, after looking.
        if not self._maybe_watched:
            return False
        if any(watched(point) for point in self._other_points):
            return True
        self._maybe_watched = self.router_watched = any(watched(point) for point in self._router_points)
        return False


class HookedModel(HookedRootModule):
    """HookedRootModule whose names are checked, and whose caching follows the SITES table."""

    cfg: Gemma4Config

    def setup(self) -> None:
        """Finds the hook points; again after a module took the place of one, and its own points join `sites`."""
        super().setup()
        for module in self.modules():
            if isinstance(module, WatchedBlock):
                module.find_points()
        ours = sites_of(self.cfg)
        added = {
            name: SiteInfo(name, "batch pos feature", "added later") for name in self.hook_dict if name not in ours
        }
        self.sites = {name: site for name, site in ours.items() if name in self.hook_dict} | added

    def full_name(self, key: str | tuple) -> str:
        """The hook point that a key means: its own name, or a short name and a layer, which may be negative."""
        if isinstance(key, str):
            return key if key in self.sites else get_act_name(key)
        short, layer = key[0], key[1] if len(key) > 1 else None
        if layer is None:
            return self.full_name(short)
        if not -self.cfg.n_layers <= layer < self.cfg.n_layers:
            raise KeyError(f"{short} of layer {layer}: this model has layers 0 to {self.cfg.n_layers - 1}.")
        layer = range(self.cfg.n_layers)[layer]
        ours = (f"blocks.{layer}.{short}", f"blocks.{layer}.hook_{short}")
        return next((name for name in ours if name in self.sites), None) or get_act_name(short, layer, *key[2:])

    def _check_name(self, name: str) -> None:
        """Raises KeyError for a name that is not a live hook point of this model."""
        if name in self.sites:
            return
        parts = name.split(".")
        if len(parts) > 2 and parts[0] == "blocks" and parts[1].lstrip("-").isdigit():
            layer = int(parts[1])
            if not 0 <= layer < self.cfg.n_layers:
                raise KeyError(f"{name}: this model has layers 0 to {self.cfg.n_layers - 1}.")
            template = ".".join(["blocks", "{l}", *parts[2:]])
            source = self.cfg.layers[layer].kv_source
            if source is not None and any(site.name == template and site.where == "own kv" for site in SITES):
                raise KeyError(
                    f"{name}: layer {layer} has no keys and values of its own, it reads those of layer {source}; "
                    f"use {template.format(l=source)}, which reaches every layer that shares it."
                )
        same_block = [site for site in self.sites if site.split(".")[:2] == parts[:2]]
        near = difflib.get_close_matches(name, same_block or self.sites, n=3, cutoff=0.0)
        raise KeyError(f"No hook point {name!r}; the nearest are {', '.join(near)}. model.sites lists them all.")

    def _matching(self, name: str | Callable[[str], bool]) -> list[str]:
        if callable(name):
            names = [site for site in self.sites if name(site)]
            if not names:
                raise ValueError(
                    "The hook-name filter matches no hook point of this model; model.sites lists them all."
                )
            return names
        self._check_name(name)
        return [name]

    def _enable_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: str) -> None:
        self.add_hook(name, hook, dir, level=self.context_level)

    def add_hook(self, name: str | Callable[[str], bool], hook: Callable, dir: str = "fwd", **kwargs) -> None:
        """Adds `hook` at a point, or at every point whose name the predicate accepts, until reset_hooks().

        Raises:
            KeyError: for a name that is not a hook point of this model; the three nearest are given.
            ValueError: for a filter that accepts no name, or a backward hook on integers, which have no gradient.
        """
        for match in self._matching(name):
            if dir == "bwd" and match.endswith("hook_indices"):
                raise ValueError(f"{match} holds integers, which have no gradient: use hook_probs or hook_weights.")
            self.hook_dict[match].add_hook(hook, dir=dir, **kwargs)

    def changed_expansions(self) -> frozenset[str]:
        """The expansions that hooks may change now: afterwards, they cannot be recomputed from other sites."""
        changed = {name for name, site in self.sites.items() if site.expansion and written(self.hook_dict[name])}
        # The pattern follows the scores.
        return frozenset(changed | {name.replace("hook_attn_scores", "hook_pattern") for name in changed})

    def names_to_cache(self, names_filter: None | str | Sequence[str] | Callable[[str], bool]) -> list[str]:
        """The hook points a `names_filter` asks for; None means all but the expansions, which a cache recomputes."""
        if names_filter is None:
            changed = self.changed_expansions()
            return [name for name, site in self.sites.items() if not site.expansion or name in changed]
        if isinstance(names_filter, str) or callable(names_filter):
            return self._matching(names_filter)
        return [match for name in names_filter for match in self._matching(name)]

    def get_caching_hooks(
        self,
        names_filter: None | str | Sequence[str] | Callable[[str], bool] = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list, list]:
        """(cache, forward hooks, backward hooks) that store the named activations, as in TransformerLens.

        Nothing is added to the model.
        """
        cache = {} if cache is None else cache
        positions = Slice.unwrap(pos_slice)

        def store(name: str, tensor: Tensor) -> None:
            axes = self.sites[name.removesuffix("_grad")].axes.split()
            if positions.mode != "identity":
                axis = axes.index("pos" if "pos" in axes else "query")
                n_pos = tensor.shape[axis]
                # A copy: a view of a few positions would keep the whole tensor alive.
                tensor = positions.apply(tensor, dim=axis).clone()
                if not tensor.shape[axis]:
                    raise ValueError(f"pos_slice={pos_slice!r} takes none of the {n_pos} positions of {name}.")
            tensor = tensor[0] if remove_batch_dim else tensor
            cache[name] = tensor if device is None else tensor.to(device)

        names = self.names_to_cache(names_filter)
        # Integers have no gradient.
        backward = [name for name in names if not name.endswith("hook_indices")] if incl_bwd else []
        return cache, [(name, Reader(store)) for name in names], [(name, Reader(store, "_grad")) for name in backward]

    def add_caching_hooks(
        self,
        names_filter: None | str | Sequence[str] | Callable[[str], bool] = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Adds hooks that fill the returned dictionary at every run, until reset_hooks(). See run_with_cache."""
        cache, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for hooks, dir in ((fwd, "fwd"), (bwd, "bwd")):
            for name, hook in hooks:
                self.add_hook(name, hook, dir)
        return cache
