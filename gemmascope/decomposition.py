"""What follows exactly from the activations of one run: the stream as a sum of what wrote it.

With s_l the layer_scalar of block l,

    stream_L = embed * prod(s) + sum_l (prod_{j >= l} s_j) * (attn_l + ffn_l + ple_l),
    attn_l = sum_h D_attn (z_h W_O^h),
    ffn_l = D_ff (D_dense dense + D_moe sum_slots w_e E_e(x)),

each D the gain of a norm over its scale, frozen from the run, so that every term is linear in what made it.
"""

from typing import Any, NamedTuple

import torch
import transformer_lens
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities import Slice

from gemmascope import ops


class Decomposition(NamedTuple):
    """A stream taken apart: `terms.sum(0)` is the stream."""

    terms: Float[Tensor, "term *batch_and_pos d_model"]
    labels: list[str]


def _slice(given: Any) -> Slice:
    """An int drops its axis, as in TransformerLens's cache methods."""
    return given if isinstance(given, Slice) else Slice(given)


class Decomposable(transformer_lens.ActivationCache):
    """The half of ActivationCache that takes the stream apart."""

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
        in that stream, the later layer scalars multiplied in. Where hooks edited the run, a last term "edits" is the
        rest of the stream.

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
        part = self._at(_slice(pos_slice))
        later = part._later_scalars(layer)
        terms, labels = [part["hook_embed"] * later[0]], ["embed"]
        for number in range(layer):
            written, names = part._written_by(number, heads, experts)
            terms, labels = terms + [term * later[number] for term in written], labels + names
        if mlp_input:
            written, names = part._attention_terms(layer, heads)
            terms, labels = terms + written, labels + names
        part._add_what_hooks_added(terms, labels, layer, mlp_input)
        stack = torch.stack(terms)
        stack = stack.squeeze(-2) if _slice(pos_slice).mode == "int" else stack
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim)
        return Decomposition(stack, labels)

    def _later_scalars(self, layer: int) -> list[Tensor]:
        """By layer l up to `layer`: the product of the scalars of blocks l to layer - 1."""
        device = next(iter(self.cache_dict.values())).device
        later = [torch.ones(1, device=device)]
        for block in reversed(self.model.blocks[:layer]):
            later.insert(0, later[0] * ops.wide(block.layer_scalar.detach()).to(device))
        return later

    def _add_what_hooks_added(self, terms: list[Tensor], labels: list[str], layer: int, mlp_input: bool) -> None:
        """Where hooks edited the stream, or what a branch is made of, the difference is a term of its own."""
        name = f"blocks.{layer}.hook_resid_mid" if mlp_input else f"blocks.{layer}.hook_resid_pre"
        name = name if layer < self.model.cfg.n_layers else f"blocks.{layer - 1}.hook_resid_post"
        if name in self.cache_dict:
            rest = ops.wide(self.cache_dict[name]) - sum(ops.wide(term) for term in terms)
            rounding = 1e-4 if self.cache_dict[name].dtype in (torch.float32, torch.float64) else 0.05
            if rest.abs().max() > rounding * self.cache_dict[name].abs().max():
                terms.append(rest.type_as(terms[0]))
                labels.append("edits")

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
            return self.model.ln_final(residual_stack.to(self.model.cfg.device)).to(residual_stack.device)
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

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ):
        """The stream as it stood before each layer up to `layer`, as a part of the stream there.

        Unlike TransformerLens's, the layer scalars in between are multiplied in, so that an entry equals the sum of the
        terms of `decompose` that had been written by then. With `apply_ln` at the final norm each entry gets its own
        scale (logit lens), which the scalars do not change.
        """
        layer = self.model.cfg.n_layers if layer in (None, -1) else layer
        stack, labels = super().accumulated_resid(layer, incl_mid, False, pos_slice, mlp_input, return_labels=True)
        later = self._later_scalars(layer)
        at = [layer if label == "final_post" else int(label.split("_")[0]) for label in labels]
        stack = torch.stack([entry * later[number] for entry, number in zip(stack, at, strict=True)])
        if apply_ln:
            recompute = layer == self.model.cfg.n_layers
            batched = self.has_batch_dim
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice, None, batched, recompute)
        return (stack, labels) if return_labels else stack

    def compute_head_results(self) -> None:
        """Stores `hook_result` of every layer, [batch, pos, head, d_model] each."""
        for layer in range(self.model.cfg.n_layers):
            self.cache_dict[f"blocks.{layer}.attn.hook_result"] = self["result", layer]

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
        """Refused: TransformerLens's neuron terms skip the norm after the MLP. Use `decompose(heads=True)`."""
        raise ValueError(
            "TransformerLens's neuron terms skip Gemma 4's post-norms and would not add up; "
            "use cache.decompose(heads=True)."
        )

    get_neuron_results = stack_neuron_results = get_full_resid_decomposition
