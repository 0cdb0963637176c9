"""Direct logit attribution: what each part of the model added to one logit, or to a difference of two.

Before the soft cap a logit is linear in the stream once the final norm's scale is frozen, and the stream is the sum
that `decomposition.py` spells out. So a part's share is the product of what it wrote with one vector, the direction:
the difference of unembeddings, pulled back through the frozen norms and the later scalars to where the part wrote.
Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); Gemma 4's post-norms and scalars are
included, so that the shares add up.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from gemmascope import ops
from gemmascope.cache import ActivationCache
from gemmascope.metrics import Answer
from gemmascope.readout.prompts import Prompts, answers, encoded, names_of_tokens, positions_in
from gemmascope.results import Result, about

Direction = Float[Tensor, "prompt d_model"]
Part = tuple[pandas.DataFrame, Float[Tensor, "prompt cell"]]


class Shares(NamedTuple):
    """A logit, or a difference of two, taken apart."""

    cells: pandas.DataFrame
    """A row for each part."""
    values: Float[Tensor, "prompt cell"]
    total: Float[Tensor, " prompt"]
    """What `values` are shares of, before the soft cap."""


class _Reading:
    """The activations at one position, and the direction at each place that writes to the stream."""

    def __init__(
        self,
        cache: ActivationCache,
        pos: int,
        tokens: tuple[Answer, Answer | None],
        layers: Sequence[int] | None = None,
        at: ActivationCache | None = None,
    ):
        self.whole, self.pos, self.model = cache, pos, cache.model
        self.layers = range(self.model.cfg.n_layers) if layers is None else layers
        self.at = cache._at(Slice(pos)) if at is None else at
        self.n_prompts = len(self.get("ln_final.hook_scale"))
        right, wrong = (None if one is None else answers(self.model, one, self.n_prompts) for one in tokens)
        unembed = self.model.W_U.T
        reads = ops.wide(unembed[right]) - (0 if wrong is None else ops.wide(unembed[wrong]))
        self.final = reads * self.frozen("ln_final", self.model.ln_final)
        self.later = self.at._later_scalars(self.model.cfg.n_layers)

    def batched(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.whole.has_batch_dim else tensor[None]
        return tensor.to(self.model.cfg.device)

    def get(self, name: str) -> Tensor:
        """An activation at the position: [prompt, ...], its position axis dropped."""
        found = self.batched(self.at[name])[:, 0]
        return ops.wide(found) if found.is_floating_point() else found

    def frozen(self, name: str, norm) -> Direction:
        return self.batched(self.at._frozen(name, norm))[:, 0]

    # Directions: what a part wrote, times this, is its share.

    def stream(self, layer: int) -> Direction:
        """Of what block `layer` adds to the stream."""
        return self.final * self.later[layer].to(self.final.device)

    def attention(self, layer: int) -> Direction:
        """Of what heads give, before the post-norm."""
        return self.stream(layer) * self.frozen(f"blocks.{layer}.ln1_post", self.model.blocks[layer].ln1_post)

    def feed_forward(self, layer: int) -> Direction:
        """Of what comes before the joint post-norm: the dense MLP's output, or both branches' sum."""
        return self.stream(layer) * self.frozen(f"blocks.{layer}.ln2_post", self.model.blocks[layer].ln2_post)

    def dense(self, layer: int) -> Direction:
        """Of the dense MLP's output before any post-norm."""
        block, joint = self.model.blocks[layer], self.feed_forward(layer)
        if block.moe is None:
            return joint
        return joint * self.frozen(f"blocks.{layer}.dense_ln_post", block.dense_ln_post)

    def experts(self, layer: int) -> Direction:
        """Of each chosen expert's weighted output."""
        norm = self.model.blocks[layer].moe_ln_post
        return self.feed_forward(layer) * self.frozen(f"blocks.{layer}.moe_ln_post", norm)


def _components(reading: _Reading) -> Iterator[Part]:
    embed = (reading.get("hook_embed") * reading.stream(0)).sum(-1)
    yield pandas.DataFrame({"layer": [-1], "component": ["embed"]}), embed[:, None]
    kinds = ("attn", "mlp", "ple") if reading.model.cfg.d_ple else ("attn", "mlp")
    for layer in reading.layers:
        wrote = torch.stack([reading.get(f"blocks.{layer}.hook_{kind}_out") for kind in kinds], dim=1)
        cells = pandas.DataFrame({"layer": layer, "component": kinds})
        yield cells, torch.einsum("bcd,bd->bc", wrote, reading.stream(layer))


def _heads(reading: _Reading) -> Iterator[Part]:
    for layer in reading.layers:
        wrote = reading.get(f"blocks.{layer}.attn.hook_result")
        cells = pandas.DataFrame({"layer": layer, "head": range(wrote.shape[1])})
        yield cells, torch.einsum("bhd,bd->bh", wrote, reading.attention(layer))


def _experts(reading: _Reading) -> Iterator[Part]:
    n_experts = reading.model.cfg.n_experts
    for layer in reading.layers:
        dense = (reading.get(f"blocks.{layer}.hook_dense_out") * reading.feed_forward(layer)).sum(-1, keepdim=True)
        slots = torch.einsum("bkd,bd->bk", reading.get(f"blocks.{layer}.moe.hook_expert_out"), reading.experts(layer))
        chosen = reading.get(f"blocks.{layer}.moe.router.hook_indices")
        routed = slots.new_zeros(len(slots), n_experts).scatter_add(1, chosen, slots)
        cells = pandas.DataFrame({"layer": layer, "expert": ["dense", *range(n_experts)]})
        yield cells, torch.cat((dense, routed), dim=1)


def _neurons(reading: _Reading) -> Iterator[Part]:
    for layer in reading.layers:
        block = reading.model.blocks[layer]
        post = reading.get(f"blocks.{layer}.mlp.hook_post")
        values = post * (reading.dense(layer) @ ops.wide(block.mlp.W_out).T)
        cells = {"layer": layer, "neuron": range(values.shape[1])}
        if block.moe is None:
            yield pandas.DataFrame(cells), values
        else:
            yield pandas.DataFrame({"layer": layer, "expert": "dense", "neuron": cells["neuron"]}), values
            yield from _expert_neurons(reading, layer)


def _expert_neurons(reading: _Reading, layer: int) -> Iterator[Part]:
    """By expert, those that some prompt chose; 0 for the prompts that did not."""
    if f"blocks.{layer}.moe.hook_expert_out" in reading.whole._changed:
        raise ValueError(
            f"A hook may have changed blocks.{layer}.moe.hook_expert_out, so expert neurons no longer add up to it: "
            "attribute by='expert'."
        )
    moe, direction = f"blocks.{layer}.moe", reading.experts(layer)
    post, chosen = reading.get(f"{moe}.hook_expert_post"), reading.get(f"{moe}.router.hook_indices")
    weighted = post * reading.get(f"{moe}.router.hook_weights")[..., None]
    for expert in chosen.unique().tolist():
        prompts, slots = (chosen == expert).nonzero(as_tuple=True)
        reads = direction[prompts] @ ops.wide(reading.model.blocks[layer].moe.down_proj[expert])
        values = reads.new_zeros(len(chosen), reads.shape[1])
        values.index_put_((prompts,), weighted[prompts, slots] * reads, accumulate=True)
        cells = {"layer": layer, "expert": expert, "neuron": range(reads.shape[1])}
        yield pandas.DataFrame(cells).astype({"expert": object}), values


def _sources(reading: _Reading) -> Iterator[Part]:
    """z is the pattern's mix of values, so each key's share is its attention times its value read by the direction."""
    for layer in reading.layers:
        block = reading.model.blocks[layer]
        source = block.geometry.kv_source
        values = reading.batched(reading.whole["attn.hook_v_normed", layer if source is None else source])
        pattern = reading.batched(reading.whole.pattern(layer, rows=[reading.pos]))[:, :, 0]
        reads = torch.einsum("hed,bd->bhe", ops.wide(block.attn.W_O), reading.attention(layer))
        by_kv_head = reads.unflatten(1, (block.geometry.n_kv_heads, -1))
        shares = pattern * torch.einsum("bkge,bske->bkgs", by_kv_head, ops.wide(values)).flatten(1, 2)
        index = pandas.MultiIndex.from_product([[layer], *map(range, shares.shape[1:])], names=["layer", "head", "key"])
        yield index.to_frame(index=False), shares.flatten(1)


_PARTS = {"component": _components, "head": _heads, "expert": _experts, "neuron": _neurons, "source": _sources}

_NEEDED = {
    "component": ("hook_attn_out", "hook_mlp_out", "hook_ple_out"),
    "head": ("attn.hook_z", "ln1_post.hook_scale"),
    "expert": ("hook_dense_out", "moe.hook_expert_post", "moe.router.hook_indices", "moe.router.hook_weights")
    + ("ln2_post.hook_scale", "moe_ln_post.hook_scale"),
    "neuron": ("mlp.hook_post", "moe.hook_expert_post", "moe.router.hook_indices", "moe.router.hook_weights")
    + ("ln2_post.hook_scale", "dense_ln_post.hook_scale", "moe_ln_post.hook_scale"),
    "source": ("attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v_normed", "ln1_post.hook_scale"),
}
"""The sites of a block that each question reads."""


@torch.no_grad()
def direct_logit_attribution(
    model,
    prompt,
    correct: Answer,
    wrong: Answer | None = None,
    *,
    by: str = "component",
    pos: int = -1,
    top: int | None = None,
) -> Result:
    """What each part of the model added to logit(correct) - logit(wrong) before the soft cap, or to one logit.

    Exact: final and post-norms at the scales of the run, the later layer scalars multiplied in.

    Args:
        prompt: text, texts, token ids [pos] or [prompt, pos], or the ActivationCache of a run of this model.
        correct, wrong: a token's text or id, or one for each prompt.
        by: what the cells are.
            "component": (layer, "attn", "mlp" or "ple"), and (-1, "embed"). They sum to the logit difference.
            "head": (layer, head). A layer's sum to its "attn".
            "expert": (layer, expert id, or "dense" for the dense branch), 0 for prompts that did not choose it. A
            layer's sum to its "mlp".
            "neuron": (layer, neuron), with experts (layer, expert or "dense", neuron) without those that no prompt
            chose. A layer's sum to its "mlp".
            "source": (layer, head, key): what the head took from each position. A head's sum to the "head".
        pos: the position whose logits these are.
        top: keep the cells with the largest means in absolute value. By default all, but 100 of the neurons.

    Returns:
        A Result with a sample for each prompt. Its baselines are "logit difference", and "everything else": what the
        cells leave of it (other parts, cells below the top, what hooks added to the stream).

    Raises:
        ValueError: for an answer that is not one token, a position that is not there, experts of a model that has none,
            sources in prompts of different lengths, or neurons of experts whose output a hook changed.
        KeyError: for a cache that lacks an activation, or one that a hook changed without its being cached.
    """
    if by not in _PARTS:
        near = difflib.get_close_matches(by, _PARTS, n=1)
        raise ValueError(f"by is {by!r}; it is one of {', '.join(_PARTS)}" + (f" ({near[0]!r}?)." if near else "."))
    if by == "expert" and model.cfg.n_experts is None:
        raise ValueError(f"{model.cfg.model_name} has no experts: its neurons are by='neuron'.")
    if top is not None and top < 1:
        raise ValueError(f"top is {top}: it is a number of cells, 1 or more, or None.")
    cache, prompts, index = _run(model, prompt, by, pos)
    cells, values, total = shares(
        cache, correct, wrong, by=by, pos=index, top=100 if by == "neuron" and top is None else top
    )
    unit = "logit" if wrong is None else "logit difference"
    said = about(model, by=by, pos=pos, correct=_plain(correct), wrong=_plain(wrong))
    if prompts is not None and len(prompts.tokens) == 1:
        said["tokens"] = [str(token) for token in names_of_tokens(model, prompts.tokens[0].tolist())]
    return Result(
        experiment=f"direct logit attribution by {by}",
        cells=cells,
        values=values.T.cpu().contiguous(),
        unit=f"{unit} before the soft cap",
        baselines={"logit difference": total.cpu(), "everything else": (total - values.sum(1)).cpu()},
        about=said,
    )


@torch.no_grad()
def shares(
    cache: ActivationCache,
    correct: Answer,
    wrong: Answer | None = None,
    *,
    by: str,
    pos: int,
    layers: Sequence[int] | None = None,
    top: int | None = None,
    at: ActivationCache | None = None,
) -> Shares:
    """The numbers of `direct_logit_attribution`, from a cache.

    Args:
        pos: index of the position in the cache, from 0.
        layers: those whose parts are wanted; all by default. Of the others nothing is read.
        at: that position of the cache, where it is at hand: see `at_positions`.
    """
    reading = _Reading(cache, pos, (correct, wrong), layers, at)
    cells, values = _collected(_PARTS[by](reading), top)
    last = reading.get(f"blocks.{cache.model.cfg.n_layers - 1}.hook_resid_post")
    return Shares(cells, values, (last * reading.final).sum(-1))


def at_positions(cache: ActivationCache, positions: slice) -> ActivationCache:
    """What the questions read of a cache at the position that is explained, for several of them: taken in one pass over
    the blocks, whatever is asked of it later. What the cache lacks, the new one lacks too."""
    parts = dict.fromkeys(part for by, needed in _NEEDED.items() if by != "source" for part in needed)
    expansions = ("attn.hook_result", "moe.hook_expert_out")  # at hand only where a hook may have changed them
    n_layers = cache.model.cfg.n_layers
    names = ["hook_embed", *(f"blocks.{layer}.{part}" for layer in range(n_layers) for part in (*parts, *expansions))]
    names += [f"blocks.{n_layers - 1}.hook_resid_post", "ln_final.hook_scale"]
    at = cache._at(Slice(positions))
    held = {name: at.cache_dict[name].clone() for name in names if name in at.cache_dict}  # not views of the whole
    new = ActivationCache(held, cache.model, cache.has_batch_dim, pos_slice=[0], changed=cache._changed)
    new._weights = at._weights
    return new


def _run(model, prompt, by: str, pos: int) -> tuple[ActivationCache, Prompts | None, int]:
    """A cache that answers the question, its prompts where they are known, and the position's index in it."""
    if isinstance(prompt, ActivationCache):
        if prompt.model is not model:
            raise ValueError(f"This cache is of another model, {prompt.model.cfg.model_name}: give the one that ran.")
        n_pos = prompt["ln_final.hook_scale"].shape[-2]
        if not -n_pos <= pos < n_pos:
            raise ValueError(f"Position {pos} is out of range: the cache has {n_pos} positions, 0 to {n_pos - 1}.")
        padded = prompt._padding is not None
        cache, prompts, index = prompt, None, pos % n_pos
    else:
        prompts = encoded(model, prompt)
        index, padded = positions_in(prompts, pos).index[0], prompts.mask is not None
        needed = {f"blocks.{layer}.{part}" for layer in range(model.cfg.n_layers) for part in _NEEDED[by]}
        needed |= {f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", "hook_embed", "ln_final.hook_scale"}
        needed |= model.changed_expansions()  # what a hook changes cannot be recomputed
        _, cache = model.run_with_cache(
            prompts.tokens,
            attention_mask=prompts.mask,
            names_filter=sorted(needed & model.sites.keys()),
            pos_slice=None if by == "source" else [index],  # keys and values are needed wherever they are attended to
            return_type=None,
        )
        index = index if by == "source" else 0
    if by == "source" and padded:
        raise ValueError(
            "The prompts have different lengths, so a source position is not the same place in all: "
            "attribute to sources one length at a time."
        )
    return cache, prompts, index


def _collected(parts: Iterator[Part], top: int | None) -> Part:
    """All cells, or the `top` largest; what cannot be among them is dropped layer by layer."""

    def largest(cells: pandas.DataFrame, values: Tensor) -> Part:
        if top is None or len(cells) <= top:
            return cells, values
        kept = values.mean(0).abs().topk(top).indices.sort().values
        return cells.iloc[kept.tolist()], values[:, kept]

    cells, values = zip(*(largest(*part) for part in parts), strict=True)
    cells, values = largest(pandas.concat(cells, ignore_index=True), torch.cat(values, dim=1))
    return cells.reset_index(drop=True), values


def _plain(answer: Answer | None):
    """An answer as JSON can hold it."""
    if isinstance(answer, Tensor):
        return answer.tolist()
    return answer if answer is None or isinstance(answer, str | int) else list(answer)
