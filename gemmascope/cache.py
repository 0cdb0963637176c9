"""The activations of one run, and what follows from them exactly.

TransformerLens's ActivationCache, with Gemma 4's arithmetic. With s_l the layer_scalar of block l,

    stream_L = embed * prod(s) + sum_l (prod_{j >= l} s_j) * (attn_l + ffn_l + ple_l),
    attn_l = sum_h D_attn (z_h W_O^h),
    ffn_l = D_ff (D_dense dense + D_moe sum_slots w_e E_e(x)),

each D the gain of a norm over its scale, frozen from the run, so that every term is linear in what made it.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import transformer_lens
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import Slice, get_act_name

from gemmascope import ops


class Decomposition(NamedTuple):
    """A stream taken apart: `terms.sum(0)` is the stream."""

    terms: Float[Tensor, "term *batch_and_pos d_model"]
    labels: list[str]


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token went to. Layers are stacked in the order of `layers`."""

    layers: tuple[int, ...]
    indices: Int[Tensor, "layer *batch_and_pos slot"]
    """Chosen experts, most probable first."""
    weights: Float[Tensor, "layer *batch_and_pos slot"]
    """Their final weights: renormalised probabilities times the per-expert scale."""
    probs: Float[Tensor, "layer *batch_and_pos expert"]
    """The router's softmax over all experts."""

    def load(self) -> Float[Tensor, "layer expert"]:
        """The share of (token, slot) pairs that went to each expert; rows sum to 1."""
        n_experts = self.probs.shape[-1]
        return torch.stack([chosen.flatten().bincount(minlength=n_experts) / chosen.numel() for chosen in self.indices])


def _slice(given: Any) -> Slice:
    """An int drops its axis, as in TransformerLens's cache methods."""
    return given if isinstance(given, Slice) else Slice(given)


class ActivationCache(transformer_lens.ActivationCache):
    """Activations by name: `cache["blocks.3.attn.hook_z"]`, `cache["z", 3]`, `cache["moe.router.hook_probs", 3]`.

    Attention scores and patterns, per-head results and per-slot expert outputs are computed when asked for, unless they
    were stored; `pattern(layer, heads, rows)` costs only what it names.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        masks: dict[str, ops.Mask] | None = None,
        pos_slice: Any = None,
        changed: frozenset[str] = frozenset(),
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        self._masks = masks or {}
        self._whole = Slice.unwrap(pos_slice).mode == "identity"
        self._changed = changed

    # What is in it

    def __repr__(self) -> str:
        size = f"{len(self.cache_dict)} tensors, {self.nbytes / 1e6:.1f} MB"
        return f"ActivationCache({size}, of {self.model.cfg.model_name})"

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    @property
    def nbytes(self) -> int:
        """Memory that this cache keeps alive, in bytes; tensors that share memory count once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in self.cache_dict.values()
        }
        return sum(storages.values())

    def full_name(self, key: str | tuple) -> str:
        """The hook point that a key means: its own name, or a short name and a layer, which may be negative."""
        if isinstance(key, str):
            return key if key in self.model.sites or key in self.cache_dict else get_act_name(key)
        short, layer = key[0], key[1] if len(key) > 1 else None
        if layer is None:
            return self.full_name(short)
        layer = range(self.model.cfg.n_layers)[layer]
        ours = [
            name for name in (f"blocks.{layer}.{short}", f"blocks.{layer}.hook_{short}") if name in self.model.sites
        ]
        return ours[0] if ours else get_act_name(short, layer, *key[2:])

    def __getitem__(self, key: str | tuple) -> Tensor:
        name = self.full_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        site = self.model.sites.get(name)
        if site is None and not name.endswith("_grad"):
            self.model._check_name(name)  # raises, with the nearest names
        if site is None or not site.expansion:
            near = difflib.get_close_matches(name, self.cache_dict, n=3)
            raise KeyError(
                f"{name} was not cached"
                + (f" (near it: {', '.join(near)})" if near else "")
                + ": name it in names_filter."
            )
        if name in self._changed:
            raise KeyError(
                f"{name} was changed by a hook and not cached, so it cannot be recomputed: name it in names_filter."
            )
        layer, what = int(name.split(".")[1]), name.split(".")[-1]
        if what == "hook_pattern":
            return self.pattern(layer)
        if what == "hook_attn_scores":
            return self.attn_scores(layer)
        block = self.model.blocks[layer]
        if what == "hook_result":
            return torch.einsum("...he,hed->...hd", self["z", layer], block.attn.W_O.to(self["z", layer].device))

        def batched(x: Tensor) -> Tensor:
            return x if self.has_batch_dim else x[None]

        choice = batched(self["moe.router.hook_indices", layer]), batched(self["moe.router.hook_weights", layer])
        out = block.moe.down(batched(self["moe.hook_expert_post", layer]), choice)
        return out if self.has_batch_dim else out[0]

    # Attention, recomputed

    def attn_scores(
        self, layer: int, heads: int | list[int] | None = None, rows: slice | list[int] | None = None
    ) -> Float[Tensor, "*batch head row key"]:
        """Masked scores of some heads and some query rows (all by default), from the cached queries and keys.

        An int names one head and drops its axis.
        """
        layer = range(self.model.cfg.n_layers)[layer]
        geometry = self.model.layer(layer)
        q, k = self["rot_q", layer], self["rot_k", layer if geometry.kv_source is None else geometry.kv_source]
        mask = self._masks.get(geometry.kind)
        if mask is None or not self._whole or k.shape[-3] != mask.n_keys:
            raise KeyError(
                f"blocks.{layer}.attn.hook_attn_scores cannot be recomputed: this cache does not hold every key "
                "(pos_slice, or a past_kv_cache); name the pattern in names_filter."
            )
        q, k = (q, k) if self.has_batch_dim else (q[None], k[None])
        rows = slice(None) if rows is None else rows
        q, visible = q[:, rows], mask.rows(rows).to(q.device)
        if heads is not None:
            group = q.shape[2] // k.shape[2]
            chosen = [range(q.shape[2])[head] for head in ([heads] if isinstance(heads, int) else heads)]
            q, k = q[:, :, chosen], k[:, :, [head // group for head in chosen]]
        scores = ops.masked_scores(q, k, visible)
        scores = scores[:, 0] if isinstance(heads, int) else scores
        return scores if self.has_batch_dim else scores[0]

    def pattern(
        self, layer: int, heads: int | list[int] | None = None, rows: slice | list[int] | None = None
    ) -> Float[Tensor, "*batch head row key"]:
        """Attention of some heads and some query rows (all by default), each row summing to 1.

        An int names one head and drops its axis.
        """
        name = f"blocks.{range(self.model.cfg.n_layers)[layer]}.attn.hook_pattern"
        if name not in self.cache_dict:
            if name in self._changed:
                return self[name]  # raises
            return self.attn_scores(layer, heads, rows).softmax(-1)
        stored = self.cache_dict[name]
        stored = stored if rows is None else stored[..., rows, :]
        return stored if heads is None else stored[..., heads, :, :]

    # Routing

    @property
    def routing(self) -> RoutingTrace:
        """The experts of every layer of a mixture-of-experts model."""
        if self.model.cfg.n_experts is None:
            raise ValueError(f"{self.model.cfg.model_name} has no experts to route to.")
        layers = tuple(range(self.model.cfg.n_layers))

        def stack(what: str) -> Tensor:
            return torch.stack([self[f"moe.router.{what}", layer] for layer in layers])

        return RoutingTrace(layers, stack("hook_indices"), stack("hook_weights"), stack("hook_probs"))

    # The stream, taken apart

    def decompose(
        self,
        layer: int | None = None,
        *,
        heads: bool = False,
        experts: bool = False,
        mlp_input: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Decomposition:
        """The stream that enters `layer` (the final norm by default), as a sum of what wrote it.

        Terms are "embed" and, for every layer l, "{l}_attn_out" (or "L{l}H{h}" for each head), "{l}_mlp_out" (or
        "{l}_dense" and "{l}_slot{i}" for each routed expert, most probable first) and "{l}_ple_out", each as it stands
        in that stream, the later layer scalars multiplied in.

        Args:
            mlp_input: take the stream in the middle of `layer`, after its attention.
            pos_slice: an int, slice or TransformerLens Slice of positions.
            apply_ln: pass every term through the norm that reads this stream, its scale frozen.
        """
        n_layers = self.model.cfg.n_layers
        layer = n_layers if layer is None else range(n_layers + 1)[layer]
        if mlp_input and layer == n_layers:
            raise ValueError(f"mlp_input needs a layer from 0 to {n_layers - 1}; the final norm has no MLP after it.")
        if experts and self.model.cfg.n_experts is None:
            raise ValueError(f"{self.model.cfg.model_name} has no experts: leave experts=False.")
        terms, labels = [self["hook_embed"]], ["embed"]
        for index, block in enumerate(self.model.blocks[:layer]):
            written, names = self._written_by(index, heads, experts)
            scalar = block.layer_scalar.to(terms[0].device)
            terms = [term * scalar for term in [*terms, *written]]
            labels += names
        if mlp_input:
            written, names = self._attention_terms(layer, heads)
            terms, labels = terms + written, labels + names
        stack = _slice(pos_slice).apply(torch.stack(terms), dim=-2)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim)
        return Decomposition(stack, labels)

    def _written_by(self, layer: int, heads: bool, experts: bool) -> tuple[list[Tensor], list[str]]:
        """What one block adds to its stream, before its layer_scalar."""
        terms, labels = self._attention_terms(layer, heads)
        if experts:
            block = self.model.blocks[layer]
            joint = self._frozen(f"blocks.{layer}.ln2_post", block.ln2_post)
            frozen = joint * self._frozen(f"blocks.{layer}.moe_ln_post", block.moe_ln_post)
            slots = self["moe.hook_expert_out", layer] * frozen[..., None, :]
            terms = [*terms, joint * self["hook_dense_out", layer], *slots.unbind(-2)]
            labels = [*labels, f"{layer}_dense", *(f"{layer}_slot{slot}" for slot in range(slots.shape[-2]))]
        else:
            terms, labels = [*terms, self["hook_mlp_out", layer]], [*labels, f"{layer}_mlp_out"]
        if self.model.cfg.d_ple:
            terms, labels = [*terms, self["hook_ple_out", layer]], [*labels, f"{layer}_ple_out"]
        return terms, labels

    def _attention_terms(self, layer: int, heads: bool) -> tuple[list[Tensor], list[str]]:
        if not heads:
            return [self["hook_attn_out", layer]], [f"{layer}_attn_out"]
        frozen = self._frozen(f"blocks.{layer}.ln1_post", self.model.blocks[layer].ln1_post)
        results = self["result", layer] * frozen[..., None, :]
        return list(results.unbind(-2)), [f"L{layer}H{head}" for head in range(results.shape[-2])]

    def _frozen(self, name: str, norm: Any) -> Tensor:
        """D of one norm: its gain over the scale that the run had, [..., d_model]."""
        scale = self[f"{name}.hook_scale"]
        return ops.wide(norm.weight).to(scale.device) / scale

    def apply_ln_to_stack(
        self,
        residual_stack: Float[Tensor, "term *batch_and_pos d_model"],
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Float[Tensor, "term *batch_and_pos d_model"]:
        """Passes every term through the norm that reads the stream at `layer`: gain over the scale frozen from the run.

        Unlike TransformerLens's, the gain is included, since it is not folded into the weights. `recompute_ln` gives
        each term the final norm's own scale instead (logit lens).
        """
        n_layers = self.model.cfg.n_layers
        layer = n_layers if layer is None or layer == -1 else layer
        positions, batches = _slice(pos_slice), _slice(batch_slice)
        if has_batch_dim:
            residual_stack = batches.apply(residual_stack, dim=1)
        if recompute_ln and layer == n_layers:
            return self.model.ln_final(residual_stack)
        if layer == n_layers:
            frozen = self._frozen("ln_final", self.model.ln_final)
        else:
            norm = "ln2" if mlp_input else "ln1"
            frozen = self._frozen(f"blocks.{layer}.{norm}", getattr(self.model.blocks[layer], norm))
        frozen = positions.apply(frozen, dim=-2)
        if self.has_batch_dim:
            frozen = batches.apply(frozen, dim=0)
        return residual_stack * frozen

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ):
        """TransformerLens's decompose_resid, exact here: `decompose` by layer.

        mode "attn" or "mlp" keeps those terms only (and the embedding).
        """
        if mode not in ("all", "attn", "mlp"):
            raise ValueError(f"mode is {mode!r}; it is 'all', 'attn' or 'mlp'.")
        terms, labels = self.decompose(
            None if layer == -1 else layer, mlp_input=mlp_input, pos_slice=pos_slice, apply_ln=apply_ln
        )
        keep = [
            (label == "embed" and incl_embeds)
            or (label != "embed" and (mode == "all" or label.endswith(f"_{mode}_out")))
            for label in labels
        ]
        terms = terms[torch.tensor(keep, device=terms.device)]
        labels = [label for label, kept in zip(labels, keep, strict=True) if kept]
        return (terms, labels) if return_labels else terms

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ):
        """What each head before `layer` adds to the stream there: [layer * head, ..., d_model], labels "L0H0", ...

        Unlike TransformerLens's, the post-attention norm (frozen) and the later layer scalars are applied, so that the
        terms are exact contributions. `incl_remainder` appends the rest of the stream.
        """
        terms, labels = self.decompose(
            None if layer == -1 else layer, heads=True, pos_slice=pos_slice, apply_ln=apply_ln
        )
        is_head = torch.tensor([label.startswith("L") for label in labels], device=terms.device)
        results, labels = terms[is_head], [label for label in labels if label.startswith("L")]
        if incl_remainder:
            results, labels = torch.cat((results, terms[~is_head].sum(0, keepdim=True))), [*labels, "remainder"]
        return (results, labels) if return_labels else results

    def logit_attribution(
        self,
        tokens: Any,
        incorrect_tokens: Any = None,
        *,
        heads: bool = False,
        experts: bool = False,
        pos_slice: Any = -1,
    ) -> tuple[Float[Tensor, " term *batch_and_pos"], list[str]]:
        """What each term of `decompose` adds to a token's logit before the soft cap, or to a difference of two logits.

        Args:
            tokens, incorrect_tokens: a token's text or id, or ids for each prompt [batch].
            pos_slice: where; by default the last position.

        Returns:
            (values, labels); the values sum to `hook_unembed` at those tokens.
        """
        terms, labels = self.decompose(heads=heads, experts=experts, pos_slice=pos_slice)
        values = self.logit_attrs(
            terms, tokens, incorrect_tokens, pos_slice=pos_slice, has_batch_dim=self.has_batch_dim
        )
        return values, labels

    # Inherited helpers that would be silently wrong here

    def get_full_resid_decomposition(self, *args, **kwargs):
        """Refused: TransformerLens's terms skip the norm after the MLP. Use `decompose(heads=True, experts=True)`."""
        raise ValueError(
            "TransformerLens's neuron terms skip Gemma 4's post-norms and would not add up; "
            "use cache.decompose(heads=True)."
        )

    def get_neuron_results(self, *args, **kwargs):
        """Refused, like get_full_resid_decomposition."""
        raise ValueError(
            "TransformerLens's neuron terms skip Gemma 4's post-norms and would not add up; "
            "use cache.decompose(heads=True)."
        )

    stack_neuron_results = get_neuron_results

    # Whole-cache operations

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "ActivationCache":
        """A cache of some of the prompts (an int drops the batch axis)."""
        sliced = super().apply_slice_to_batch_dim(batch_slice)
        keep = Slice.unwrap(batch_slice)  # which, unlike Slice(...), keeps the axis of an int

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else keep.apply(x, dim=0)

        masks = {
            kind: replace(mask, key_mask=cut(mask.key_mask), image_blocks=cut(mask.image_blocks))
            for kind, mask in self._masks.items()
        }
        new = ActivationCache(sliced.cache_dict, self.model, sliced.has_batch_dim, masks, changed=self._changed)
        new._whole = self._whole
        return new
