"""What one unit responds to, what it writes, and what the model says when it is turned up or down."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemmascope import interventions as verbs
from gemmascope import ops
from gemmascope.cache import ActivationCache
from gemmascope.hooks import Reader
from gemmascope.interventions import Intervention, Site
from gemmascope.readout.activations import find_site
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.views.compare import compared, likeliest
from gemmascope.views.run import Run, array, twin
from gemmascope.widgets.base import Selection
from gemmascope.widgets.unit_view import UnitView

TOKENS = 2048
"""Tokens of texts that are read for one answer, about."""
EXAMPLES = 8
CONTEXT = 24
"""Tokens of an example on each side of its peak."""
BINS = 48
TOP = 10
"""Tokens that are listed of those that the unit makes likelier, and less likely."""
_STREAM = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_mlp", "hook_resid_post")
_ADDED = ("hook_attn_out", "hook_mlp_out", "hook_ple_out")
Seen = Mapping[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """One thing inside the model, and all that a view needs of it."""

    name: str
    meaning: str
    """What its activation is, and in which unit."""
    layer: int
    """The last layer that must run to read it."""
    sites: tuple[str, ...]
    activation: Callable[[Seen], Float[Tensor, "*batch_and_pos"]]
    """Of the tensors at `sites`."""
    wrote: Callable[[ActivationCache, int], Float[Tensor, " d_model"]]
    """What it added to the stream at a position of one prompt, as the final norm reads it before its scale."""
    changes: Mapping[str, Callable[[float], tuple[Intervention, str]]]
    """"scale" or "add" -> by a strength, the edit and the Python that makes it."""
    python: Callable[[int], str]
    """Lines that give the activation at a position of `cache`."""
    signed: bool
    selects: Mapping[str, int | str]
    """What selecting it means in linked views."""
    needs: str = ""
    """Python that `python` and what `changes` give stand on."""


def unit_view(
    model,
    site: Site,
    texts: "Sequence[str] | Int[Tensor, 'text pos']",
    *,
    neuron: int | None = None,
    head: int | None = None,
    expert: int | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    selection: Selection | None = None,
    state: Mapping | None = None,
) -> UnitView:
    """One neuron, head, expert or direction: where in some texts it is active, what it writes, and what it changes.

        gs.unit_view(model, "blocks.3.mlp.hook_post", texts, neuron=17)
        gs.unit_view(model, ("z", 2), texts, head=2)                       # the norm of what it writes
        gs.unit_view(model, ("moe.hook_expert_out", 4), texts, expert=5)   # its weight
        gs.unit_view(model, ("moe.hook_expert_post", 4), texts, expert=5, neuron=17)
        gs.unit_view(model, ("resid_post", 3), texts, direction=direction)

    Texts are read some at a time while the view is looked at; only activations and the top examples are kept.

    Args:
        site: where the unit is, by the name of a hook point or as (short name, layer).
        texts: what to read, or token ids.
        neuron, head, expert, direction: which of that site; a neuron of an expert needs both.
        selection: the Selection that what is clicked goes to.

    Raises:
        KeyError, ValueError: for a site that is not there or has no such unit, a unit that does not exist, no texts, or
            an empty one.
    """
    given = {"neuron": neuron, "head": head, "expert": expert, "direction": direction}
    unit = _unit(model, site, {name: which for name, which in given.items() if which is not None})
    reading = _Reading(twin(model), unit, texts)
    reading.read(0)  # what cannot be read is heard of now
    return UnitView(
        unit.name,
        unit.meaning,
        n_texts=len(reading.texts),
        signed=unit.signed,
        modes=list(unit.changes),
        selects=unit.selects,
        answers={
            "read": reading.read,
            "found": reading.found,
            "own": reading.own,
            "wrote": reading.wrote,
            "steer": reading.steer,
        },
        selection=selection,
        state=state,
    )


# The kinds of units


def _unit(model, site: Site, which: dict[str, Any]) -> Unit:
    name = find_site(model, site).name
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
    point = name.removeprefix(f"blocks.{layer}.")
    match point, sorted(which):
        case "mlp.hook_post", ["neuron"]:
            return _neuron(model, layer, _there(which["neuron"], model.layer(layer).d_mlp, "neurons", name))
        case (("attn.hook_z" | "attn.hook_result"), ["head"]):
            return _head(model, layer, _there(which["head"], model.cfg.n_heads, "heads", name))
        case (("moe.hook_expert_out" | "moe.router.hook_weights"), ["expert"]):
            return _expert(model, layer, _there(which["expert"], model.cfg.n_experts, "experts", name))
        case "moe.hook_expert_post", ["expert", "neuron"]:
            expert = _there(which["expert"], model.cfg.n_experts, "experts", name)
            return _expert_neuron(model, layer, expert, _there(which["neuron"], model.cfg.d_expert, "neurons", name))
        case _, ["direction"] if point in (*_STREAM, *_ADDED):
            return _direction(model, layer, name, point, which["direction"])
    raise ValueError(
        f"{name} with {' and '.join(which) or 'nothing named'} is no unit: take mlp.hook_post with neuron=, "
        f"attn.hook_z with head=, moe.hook_expert_out with expert=, moe.hook_expert_post with expert= and neuron=, or "
        f"a point of the stream ({', '.join((*_STREAM, *_ADDED))}) with direction=."
    )


def _there(index: int, size: int, what: str, of: str) -> int:
    if not -size <= index < size:
        raise ValueError(f"{of} has {what} 0 to {size - 1}, and no {index}.")
    return index % size


def _final(cache: ActivationCache, layer: int, pos: int, *norms: str) -> Float[Tensor, " d_model"]:
    """What a part of block `layer` is multiplied by on its way to the final norm: the frozen post-norms between it and
    the stream, and the scalars of this block and the later ones."""
    block = cache.model.blocks[layer]
    factor = cache._later_scalars(cache.model.cfg.n_layers)[layer]
    for norm in norms:
        factor = factor * cache._frozen(f"blocks.{layer}.{norm}", getattr(block, norm))[0, pos]
    return factor


def _scaled(site: str, **where: int) -> Callable[[float], tuple[Intervention, str]]:
    said = "".join(f", {axis}={index}" for axis, index in where.items())

    def change(strength: float) -> tuple[Intervention, str]:
        return verbs.scale(site, strength, **where), f'gs.scale("{site}", {strength}{said})'

    return change


def _neuron(model, layer: int, neuron: int) -> Unit:
    site, block = f"blocks.{layer}.mlp.hook_post", model.blocks[layer]
    norms = ("ln2_post",) if block.moe is None else ("ln2_post", "dense_ln_post")

    def wrote(cache: ActivationCache, pos: int) -> Tensor:
        return cache[site][0, pos, neuron] * block.mlp.W_out[neuron] * _final(cache, layer, pos, *norms)

    def add(strength: float) -> tuple[Intervention, str]:
        made = verbs.add(site, torch.tensor(1.0), strength, neurons=neuron)
        return made, f'gs.add("{site}", torch.tensor(1.0), {strength}, neurons={neuron})'

    return Unit(
        name=f"layer {layer} neuron {neuron}",
        meaning="Its activation is gelu(gate) · up, what W_out is multiplied by. To add is to add to it everywhere.",
        layer=layer,
        sites=(site,),
        activation=lambda seen: seen[site][..., neuron],
        wrote=wrote,
        changes={"scale": _scaled(site, neurons=neuron), "add": add},
        python=lambda pos: f'cache["{site}"][0, {pos}, {neuron}]',
        signed=True,
        selects={"layer": layer, "neuron": neuron, "site": site},
        needs="import torch\n",
    )


def _head(model, layer: int, head: int) -> Unit:
    site, result, weight = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.attn.hook_result", model.blocks[layer].attn

    def wrote(cache: ActivationCache, pos: int) -> Tensor:
        return (cache[site][0, pos, head] @ weight.W_O[head]) * _final(cache, layer, pos, "ln1_post")

    return Unit(
        name=f"layer {layer} head {head}",
        meaning="A head has no activation of its own: shown is the norm of its result, what it writes before the "
        "post-norm.",
        layer=layer,
        sites=(site,),
        activation=lambda seen: (seen[site][..., head, :] @ weight.W_O[head]).norm(dim=-1),
        wrote=wrote,
        changes={"scale": _scaled(site, heads=head)},
        python=lambda pos: f'cache["{result}"][0, {pos}, {head}].norm()',
        signed=False,
        selects={"layer": layer, "head": head, "site": site},
    )


def _by_expert(indices: Tensor, values: Tensor, expert: int) -> Tensor:
    """By token, the value in the slot of an expert; 0 where it was not chosen."""
    return torch.where(indices == expert, values, torch.zeros_like(values)).sum(-1)


def _expert(model, layer: int, expert: int) -> Unit:
    moe = f"blocks.{layer}.moe"
    indices, weights = f"{moe}.router.hook_indices", f"{moe}.router.hook_weights"

    def wrote(cache: ActivationCache, pos: int) -> Tensor:
        slots = cache[f"{moe}.hook_expert_out"][0, pos][cache[indices][0, pos] == expert].sum(0)
        return slots * _final(cache, layer, pos, "ln2_post", "moe_ln_post")

    return Unit(
        name=f"layer {layer} expert {expert}",
        meaning="Its activation is the weight that the router gives it, 0 where it is not among the chosen.",
        layer=layer,
        sites=(indices, weights),
        activation=lambda seen: _by_expert(seen[indices], seen[weights], expert),
        wrote=wrote,
        changes={"scale": _scaled(weights, experts=expert)},
        python=lambda pos: f'cache["{weights}"][0, {pos}][cache["{indices}"][0, {pos}] == {expert}].sum()',
        signed=False,
        selects={"layer": layer, "expert": expert, "site": weights},
    )


def _expert_neuron(model, layer: int, expert: int, neuron: int) -> Unit:
    moe, block = f"blocks.{layer}.moe", model.blocks[layer]
    indices, site = f"{moe}.router.hook_indices", f"{moe}.hook_expert_post"

    def wrote(cache: ActivationCache, pos: int) -> Tensor:
        chosen, post = cache[indices][0, pos], cache[site][0, pos, :, neuron]
        amount = _by_expert(chosen, post * cache[f"{moe}.router.hook_weights"][0, pos], expert)
        return amount * block.moe.down_proj[expert, :, neuron] * _final(cache, layer, pos, "ln2_post", "moe_ln_post")

    return Unit(
        name=f"layer {layer} expert {expert} neuron {neuron}",
        meaning="Its activation is gelu(gate) · up inside the expert, 0 where the expert is not among the chosen.",
        layer=layer,
        sites=(indices, site),
        activation=lambda seen: _by_expert(seen[indices], seen[site][..., neuron], expert),
        wrote=wrote,
        changes={"scale": _scaled(site, experts=expert, neurons=neuron)},
        python=lambda pos: f'cache["{site}"][0, {pos}, :, {neuron}][cache["{indices}"][0, {pos}] == {expert}].sum()',
        signed=True,
        selects={"layer": layer, "expert": expert, "site": site},
    )


def _direction(model, layer: int, site: str, point: str, given: Tensor) -> Unit:
    given = torch.as_tensor(given).detach().float()
    if given.shape != (model.cfg.d_model,) or not given.isfinite().all() or not given.any():
        shape = list(given.shape)
        raise ValueError(
            f"The direction has shape {shape}: give [{model.cfg.d_model}] finite numbers, not all zero, as {site} has."
        )
    unit = given / given.norm()
    # In what the block gives, its own scalar is already multiplied in.
    after = layer + (point == "hook_resid_post")
    written = [float(str(x)) for x in unit.numpy()]  # the shortest that float32 reads back

    def wrote(cache: ActivationCache, pos: int) -> Tensor:
        here = unit.to(cache[site])
        return (cache[site][0, pos] @ here) * here * cache._later_scalars(model.cfg.n_layers)[after]

    def add(strength: float) -> tuple[Intervention, str]:
        return verbs.add(site, unit, strength), f'gs.add("{site}", direction, {strength})'

    return Unit(
        name=f"a direction at {site}",
        meaning="Its activation is the projection on the direction, taken at length 1. To add is to add it everywhere.",
        layer=layer,
        sites=(site,),
        activation=lambda seen: seen[site] @ unit.to(seen[site]),
        wrote=wrote,
        changes={"add": add},
        python=lambda pos: f'cache["{site}"][0, {pos}].float() @ direction',
        signed=True,
        selects={"layer": layer, "site": site},
        needs=f"import torch\ndirection = torch.tensor({written})\n",
    )


# Reading


class _Reading:
    """Texts, and what was found in those that were read so far."""

    def __init__(self, model, unit: Unit, texts):
        self.texts = list(texts) if not isinstance(texts, str) else [texts]
        if not self.texts:
            raise ValueError("There are no texts: give one at least.")
        empty = next((i for i, text in enumerate(self.texts) if not len(text)), None)
        if empty is not None:
            raise ValueError(f"Text {empty} is empty: leave it out.")
        self.model, self.unit = model, unit
        self._lock = threading.RLock()
        self._values: list[Float[np.ndarray, " pos"]] = []
        """By text, those that were read."""
        self._tokens: list[Int[np.ndarray, " pos"]] = []
        self._run: tuple[Any, Run | None] = None, None
        self._steered: tuple[Any, Tensor | None] = None, None

    # Each answer may be asked from another thread

    def read(self, start: int) -> dict[str, Any]:
        """Reads some texts from number `start` on, if they were not, and tells what was found in all so far."""
        with self._lock, torch.inference_mode():
            if start == len(self._values) < len(self.texts):
                self._read_on()
            return self._summary()

    def found(self) -> dict[str, Any]:
        """What is found in all texts."""
        with self._lock, torch.inference_mode():
            while len(self._values) < len(self.texts):
                self._read_on()
            return self._summary()

    def _read_on(self) -> None:
        start = stop = len(self._values)
        size = 0
        while stop < len(self.texts) and (stop == start or size + self._size(stop) <= TOKENS):
            size += self._size(stop)
            stop += 1
        chunk = self.texts[start:stop]
        run = self.model._begin(torch.stack(chunk) if isinstance(chunk[0], Tensor) else chunk)
        seen: dict[str, Tensor] = {}
        tokens, mask = run.tokens, run.mask
        with self.model.hooks([(name, Reader(seen.__setitem__)) for name in self.unit.sites]):
            self.model(run, return_type=None, stop_at_layer=self.unit.layer + 1)
        values = ops.wide(self.unit.activation(seen)).cpu()
        for i in range(len(tokens)):
            real = slice(None) if mask is None else mask[i].bool().cpu()
            self._values.append(array(values[i][real]))
            self._tokens.append(array(tokens[i].cpu()[real]))

    def _size(self, text: int) -> int:
        """About how many tokens a text has."""
        one = self.texts[text]
        return len(one) if isinstance(one, Tensor) else 1 + len(one) // 3

    def _summary(self) -> dict[str, Any]:
        values = np.concatenate(self._values)
        bos = np.concatenate(self._tokens) == self.model.cfg.bos_token_id
        finite = values[np.isfinite(values) & ~bos]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        counts, _ = np.histogram(finite, BINS, (low, high if high > low else low + 1))
        return {
            "texts": len(self._values),
            "tokens": len(values),
            "missing": int((~np.isfinite(values)).sum()),
            "active": float((finite != 0).mean()) if len(finite) else None,
            "mean": float(finite.mean()) if len(finite) else None,
            "low": low,
            "high": high,
            "counts": counts,
            "top": self._examples(np.nanargmax, -1),
            "bottom": self._examples(np.nanargmin, 1) if self.unit.signed else [],
        }

    def _examples(self, peak: Callable, order: int) -> list[dict[str, Any]]:
        """The texts where the unit is most active, or least, each around its own peak. <bos>, where all is unusual, is
        left out."""
        at = {}
        for i, (values, tokens) in enumerate(zip(self._values, self._tokens, strict=True)):
            counts = np.isfinite(values) & (values != 0) & (tokens != self.model.cfg.bos_token_id)
            counted = np.where(counts, values, np.nan)
            if not np.isnan(counted).all():
                at[i] = int(peak(counted))
        best = sorted(at, key=lambda i: order * self._values[i][at[i]])[:EXAMPLES]
        return [self._window(i, at[i]) for i in best]

    def _window(self, text: int, at: int) -> dict[str, Any]:
        part = slice(max(0, at - CONTEXT), at + CONTEXT + 1)
        names = names_of_tokens(self.model, self._tokens[text][part].tolist())
        return {
            "text": text,
            "first": part.start,
            "at": at,
            "n": len(self._tokens[text]),
            "tokens": list(map(str, names)),
            "values": self._values[text][part],
        }

    # One text

    def _run_of(self, text: int | str) -> Run:
        """The run of a text, by its number or itself."""
        if self._run[0] != text:
            self._run = text, Run(self.model, self.texts[text] if isinstance(text, int) else text)
        return self._run[1]

    def own(self, text: str) -> dict[str, Any]:
        """The activation along a text of the user's own."""
        with self._lock, torch.inference_mode():
            run = self._run_of(text)
            values = self.unit.activation({site: run.stored(site) for site in self.unit.sites})
            return {"tokens": run.texts, "values": array(ops.wide(values))}

    def wrote(self, text: int | str, pos: int) -> dict[str, Any]:
        """What the unit added at a position to the logits there, before the soft cap: norms held as they were."""
        with self._lock, torch.inference_mode():
            run = self._run_of(text)
            seen = {site: run.stored(site)[pos] for site in self.unit.sites}
            final = run.cache._frozen("ln_final", run.model.ln_final)[0, pos]
            logits = ops.wide(self.unit.wrote(run.cache, pos) * final) @ ops.wide(run.model.W_U)
            return {
                "value": float(self.unit.activation(seen)),
                "most": self._listed(logits, 1),
                "least": self._listed(logits, -1),
                "setup": f"{run.setup}\n{self.unit.needs}",
                "python": f"_, cache = model.run_with_cache(prompt)\nactivation = {self.unit.python(pos)}\n"
                'print(f"{activation.item():.4f}")',
            }

    def _listed(self, logits: Float[Tensor, " d_vocab"], sign: int) -> list[dict[str, Any]]:
        values, ids = (sign * logits).nan_to_num().topk(min(TOP, len(logits)))
        names = names_of_tokens(self.model, ids.tolist())
        found = zip(ids.tolist(), names, (sign * values).tolist(), strict=True)
        return [{"id": token, "text": str(name), "value": value} for token, name, value in found]

    def steer(self, text: int | str, pos: int, mode: str, strength: int | float) -> dict[str, Any]:
        """The text with the unit turned up or down at every position, beside the text as it is, at one position."""
        if mode not in self.unit.changes:
            raise ValueError(f"{self.unit.name} can be changed by {', '.join(self.unit.changes)}, not by {mode!r}.")
        with self._lock, torch.inference_mode():
            run = self._run_of(text)
            made, python = self.unit.changes[mode](float(strength))
            if self._steered[0] != (text, mode, strength):
                steered = run.model(run.tokens[None], interventions=[made])[0]
                self._steered = (text, mode, strength), steered
            before, after = (x[pos : pos + 1] for x in (run.logits, self._steered[1]))
            whole = compared(run.logits, self._steered[1], run.tokens)
            table = likeliest(before, after)
            ids = [token for token in table["ids"][0].tolist() if token >= 0]
            texts = dict(zip(map(str, ids), map(str, names_of_tokens(self.model, ids)), strict=True))
            return {
                "kl": float(whole["kl"][pos]),
                "loss": whole["loss"],
                "texts": texts,
                "python": f"interventions = [{python}]\nlogits = model(prompt, interventions=interventions)\n"
                "before = model(prompt)",
            } | {name: array(of) for name, of in table.items()}
