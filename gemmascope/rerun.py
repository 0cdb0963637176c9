"""A cache that keeps what entered each block, and runs a block again once somebody looks inside it.

Activation checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174), for looking. What comes out is what the
run had, to the bit where the straight line and the line with sites agree to the bit, as they do on a CPU. Blocks that
anybody's hook touched are not run again: their sites are stored while the run is on.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gemmascope.hooks import Reader, Site, untouched

View = Callable[[str, Tensor], Tensor | None]
_HEAD = ("ln_final", "unembed", "hook_unembed", "hook_logits")


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple]:
    """What tells whether a tensor was put elsewhere or edited since. An edit through `.data` is not seen."""
    return {
        # Not the address, which memory that was freed may get again.
        name: (StorageWeakRef(x.untyped_storage()), None if x.is_inference() else x._version)
        for name, x in tensors
    }


def refuse_if_edited(wanted: str, before: dict[str, tuple], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raises ValueError, with the first name, when a tensor is not what its fingerprint says."""
    now = fingerprint(tensors)
    changed = next((name for name in before if now.get(name) != before[name]), None)
    if changed is not None:
        raise ValueError(
            f"{changed} was edited or moved since the run, so that {wanted} cannot be recomputed: "
            "name it in names_filter, or run again."
        )


def modules_of(model: nn.Module, stage: int) -> dict[str, nn.Module]:
    """The modules of one stage by name: a block, or the head as stage n_layers."""
    if stage < len(model.blocks):
        return dict(model.blocks[stage].named_modules(prefix=f"blocks.{stage}"))
    return {path: module for name in _HEAD for path, module in model._modules[name].named_modules(prefix=name)}


def kinds_of(modules: dict[str, nn.Module]) -> tuple[type, ...]:
    """What tells whether somebody put another module in the place of one."""
    return tuple(map(type, modules.values()))


def _weights_of(modules: dict[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name, the tied weight of the unembedding included."""
    weights = [("embed.weight", modules["unembed"].W_U)] if "unembed" in modules else []
    for path, module in modules.items():
        own = (*module._parameters.items(), *module._buffers.items())
        weights += [(f"{path}.{name}", x) for name, x in own if x is not None]
    return weights


def bare(module: nn.Module) -> nn.Module:
    """The same module on the same weights, without any hook."""
    if type(module) is Site:
        site = Site()
        site.name = module.name
        return site
    copied = copy.copy(module)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(copied, hooks, OrderedDict())
    copied._modules = {name: None if child is None else bare(child) for name, child in module._modules.items()}
    return copied


class Rerun:
    """One run: the stream before each block and before the head (the stages), and all that is needed besides."""

    def __init__(self, model: Any, readers: list[tuple[str, Reader]], device: torch.device | str | None):
        """`readers` store every site that the cache is to show; `device` keeps the streams (None: where they are)."""
        self.model, self.device = model, device
        self.streams: dict[int, Tensor] = {}
        self.weights: dict[int, dict[str, tuple]] = {}
        """Fingerprints, by stage, of those that can be run again."""
        self.readers: dict[int, list[tuple[str, Reader]]] = {stage: [] for stage in range(-1, len(model.blocks) + 1)}
        """By stage; -1 for the points before the first block."""
        for name, reader in readers:
            self.readers[self._stage(name)].append((name, reader))
        self.sites = {stage: [name for name, _ in pairs] for stage, pairs in self.readers.items()}
        self._seen: tuple[int | None, dict[str, Tensor]] = None, {}

    def _stage(self, name: str) -> int:
        first, *rest = name.split(".")
        return int(rest[0]) if first == "blocks" else len(self.model.blocks) if first in _HEAD else -1

    # While the run is on

    @contextmanager
    def entering(self, stage: int, x: Tensor):
        """Around a stage: keeps the stream that enters it, and stores its sites where it could not be run again."""
        modules, x = modules_of(self.model, stage), x.detach()
        if self._as_built(stage, modules) and all(map(untouched, modules.values(), self.model.built[stage])):
            self.streams[stage] = x if self.device is None else x.to(self.device)
            self.weights[stage] = fingerprint(_weights_of(modules))
            yield
        else:
            if stage - 1 in self.weights:  # a copy of what that one gave: a plain torch hook may edit it in place
                self.streams[stage] = x.clone() if self.device is None else x.to(self.device, copy=True)
            with self.model.hooks(fwd_hooks=self.readers[stage]):
                yield

    def _as_built(self, stage: int, modules: dict[str, nn.Module]) -> bool:
        """Whether nobody put another module, or another or a compiled `forward`, in the place of one."""
        own = any(vars(module).keys() & {"forward", "_compiled_call_impl"} for module in modules.values())
        return not own and kinds_of(modules) == self.model.built[stage]

    def close(self, run: Any) -> None:
        """After the run: keeps of its Pass what blocks read besides the stream."""
        masks = {kind: replace(mask) for kind, mask in run.masks.items()}  # without the S x S form it may have made
        self.run = replace(run, record=None, masks=masks)
        self.readers.clear()  # they hold what they stored
        self._hold(self.device)

    def to(self, device: torch.device | str) -> "Rerun":
        """The same run, kept on another device."""
        moved = copy.copy(self)
        moved._seen = None, {}
        moved._hold(device)
        return moved

    def _hold(self, device: torch.device | str | None) -> None:
        def held(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach() if device is None else x.detach().to(device)

        kv = {layer: (held(k), held(v)) for layer, (k, v) in self.run.kv.items()}
        self.run = replace(self.run, kv=kv, ple=held(self.run.ple))
        self.streams = {stage: held(x) for stage, x in self.streams.items()}
        self.inputs = {stage: fingerprint(self._inputs(stage)) for stage in self.weights}

    # Afterwards

    def names(self) -> list[str]:
        """The sites that can be had from it, in the order of the run."""
        return [name for stage in self.weights for name in self.sites[stage]]

    def tensors(self) -> list[Tensor]:
        """All that it keeps alive, the stage last looked at included."""
        kv = [x for pair in self.run.kv.values() for x in pair]
        rope = [x for pair in self.run.rope.values() for x in pair]
        ple = [] if self.run.ple is None else [self.run.ple]
        return [*self.streams.values(), *kv, *rope, *ple, *self._seen[1].values()]

    def site(self, name: str) -> Tensor:
        """What a site saw. The stage that it belongs to is remembered whole, until another is asked for."""
        stage = self._stage(name)
        kept = self._kept(name, stage)
        if kept is not None:
            return kept
        if self._seen[0] != stage:
            self._seen = None, {}  # gone before the next one comes
            self._seen = stage, self._again(stage, name)
        return self._seen[1][name]

    def _kept(self, name: str, stage: int) -> Tensor | None:
        match name.removeprefix(f"blocks.{stage}."):
            case "hook_resid_pre":
                return self.streams[stage]
            case "hook_resid_post":
                return self.streams.get(stage + 1)
            case "attn.hook_rot_k":
                return self.run.kv.get(stage, (None, None))[0]
            case "attn.hook_v_normed":
                return self.run.kv.get(stage, (None, None))[1]

    def _inputs(self, stage: int) -> list[tuple[str, Tensor]]:
        """What was kept for a stage, by the site that shows it: somebody may edit the tensor that a cache gave."""
        last = stage == len(self.model.blocks)
        inputs = [(f"blocks.{stage - last}.{'hook_resid_post' if last else 'hook_resid_pre'}", self.streams[stage])]
        source = None if last else self.model.cfg.layers[stage].kv_source
        if source is not None:
            names = (f"blocks.{source}.attn.{what}" for what in ("hook_rot_k", "hook_v_normed"))
            inputs += zip(names, self.run.kv[source], strict=True)
        return inputs if self.run.ple is None else [*inputs, ("hook_ple_inputs", self.run.ple)]

    # Numbers that others may put into a graph: neither part of one, nor bound to inference mode.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _again(self, stage: int, wanted: str) -> dict[str, Tensor]:
        """Every site of one stage, from the stream that entered it."""
        model, run, device = self.model, self.run, self.model.cfg.device
        modules = modules_of(model, stage)
        if not self._as_built(stage, modules):
            raise ValueError(
                f"A module was replaced since the run, so that {wanted} cannot be recomputed: "
                "name it in names_filter, or run again."
            )
        refuse_if_edited(wanted, self.weights[stage], _weights_of(modules))
        refuse_if_edited(wanted, self.inputs[stage], self._inputs(stage))
        seen: dict[str, Tensor] = {}
        last = stage == len(model.blocks)
        x = self.streams[stage].to(device)
        again = copy.copy(model) if last else bare(model.blocks[stage])
        if last:
            again._modules = {name: bare(model._modules[name]) for name in _HEAD}
        for point in again.modules():
            if isinstance(point, Site) and point.name in self.sites[stage]:
                point.add_hook(Reader(seen.__setitem__))
        if last:
            again._logits(x)
        else:
            # Its own dictionaries: a block leaves keys there for later ones, and a mask its S x S form if asked for it.
            run = replace(
                run,
                kv={layer: (k.to(device), v.to(device)) for layer, (k, v) in run.kv.items()},
                ple=None if run.ple is None else run.ple.to(device),
                masks={kind: replace(mask) for kind, mask in run.masks.items()},
            )
            self._refuse_if_other(again.with_sites(x, run), stage, wanted)
        found = dict(seen)
        seen.clear()  # a point and its hook hold each other, and would hold the tensors until the next collection
        return found

    def _refuse_if_other(self, after: Tensor, stage: int, wanted: str) -> None:
        """Looks at the block's end: an edit through `.data`, or autocast, leaves no other trace, if it leaves this."""
        before = self.streams.get(stage + 1)
        if before is None:
            return
        before = before.to(after.device)
        rounding = 1e-4 if after.dtype in (torch.float32, torch.float64) else 0.05
        # The median over positions: on a GPU rounding may send a token to another expert.
        if (after - before).abs().amax(-1).median() > rounding * before.abs().max():
            raise ValueError(
                f"Block {stage} does not give again the stream that it gave in the run, so that {wanted} cannot be "
                "recomputed: its weights were edited, or it runs under other settings; name it in names_filter, or "
                "run again."
            )


class Activations(MutableMapping):
    """Tensors by name: those at hand, and those of stages that a Rerun runs again. `in` and `keys` compute nothing."""

    def __init__(self, held: MutableMapping[str, Tensor], rerun: Rerun | None = None, views: tuple[View, ...] = ()):
        """`views` are what a tensor from `rerun` goes through, the batch axis removed, say."""
        self.held, self.rerun, self.views = held, rerun, views
        self._later = dict.fromkeys(rerun.names() if rerun else ())

    def __getitem__(self, name: str) -> Tensor:
        if name in self.held or name not in self._later:
            return self.held[name]
        tensor = self.rerun.site(name)
        for view in self.views:
            tensor = view(name, tensor)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.held[name] = tensor

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self.held.pop(name, None)
        self._later.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.held or name in self._later

    def __iter__(self) -> Iterator[str]:
        yield from self.held
        yield from (name for name in self._later if name not in self.held)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def viewed(self, view: View) -> "Activations":
        """Everything through one more view; what it gives None for is left out."""
        held = {name: new for name, tensor in self.held.items() if (new := view(name, tensor)) is not None}
        new = Activations(held, self.rerun, (*self.views, view))
        new._later = dict(self._later)
        return new

    def to(self, device: torch.device | str) -> "Activations":
        """Everything on another device, and what is recomputed there too."""
        new = self.viewed(lambda name, tensor: tensor.to(device))
        new.rerun = self.rerun and self.rerun.to(device)
        return new

    def kept(self) -> list[Tensor]:
        """What is in memory now."""
        return [*self.held.values(), *(self.rerun.tensors() if self.rerun else ())]
