"""The activations of one run: TransformerLens's ActivationCache, and what can be recomputed from it when asked for."""

import difflib
from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities import Slice

from gemmascope import ops
from gemmascope.decomposition import Decomposable
from gemmascope.rerun import Activations, fingerprint, refuse_if_edited
from gemmascope.results import about
from gemmascope.routing.trace import RoutingTrace, refuse_dense

_EXPERT_PARTS = ("moe.hook_expert_post", "moe.router.hook_indices", "moe.router.hook_weights")


class ActivationCache(Decomposable):
    """Activations by name: `cache["blocks.3.attn.hook_z"]`, `cache["z", 3]`, `cache["moe.router.hook_probs", 3]`.

    What a default run_with_cache gives keeps the stream before each block, and runs a block again when asked for what
    is inside it. Attention scores and patterns, per-head results and per-slot expert outputs are computed when asked
    for, unless they were stored; `pattern(layer, heads, rows)` costs only what it names. Weights that were edited since
    the run raise ValueError where they would be used.
    """

    def __init__(
        self,
        cache_dict: MutableMapping[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        masks: dict[str, ops.Mask] | None = None,
        pos_slice: Any = None,
        changed: frozenset[str] = frozenset(),
        padding: Tensor | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
    ):
        """What run_with_cache gives: also the masks by kind of layer, the positions that were kept, the expansions that
        hooks may have changed, the attention mask [batch, key], None without padding, and the token ids that were read.
        """
        cache_dict = cache_dict if isinstance(cache_dict, Activations) else Activations(cache_dict)
        super().__init__(cache_dict, model, has_batch_dim)
        # Fresh ones: a mask keeps the S x S form that the run may have asked it for.
        self._masks = {kind: replace(mask) for kind, mask in (masks or {}).items()}
        self._positions = Slice.unwrap(pos_slice)
        self._changed = changed
        self._padding = padding
        self.tokens = tokens
        """The token ids that were read; None where they are not known."""
        self._lse: dict[int, Tensor] = {}
        self._weights = fingerprint(self._weights_used())

    # What is in it

    def __repr__(self) -> str:
        size = f"{len(self.cache_dict)} tensors, {self.nbytes / 1e6:.1f} MB"
        return f"ActivationCache({size}, of {self.model.cfg.model_name})"

    def __contains__(self, key: object) -> bool:
        """Whether `cache[key]` has an answer; nothing is computed."""
        try:
            name = self.full_name(key)
        except (KeyError, IndexError):
            return False
        site = self.model.sites.get(name)
        if name in self.cache_dict or site is None or not site.expansion or name in self._changed:
            return name in self.cache_dict
        layer, what = int(name.split(".")[1]), name.split(".")[-1]
        if what in ("hook_pattern", "hook_attn_scores"):
            return self._has_every_key(layer)
        block = f"blocks.{layer}."
        made_of = ("attn.hook_z",) if what == "hook_result" else _EXPERT_PARTS
        return all(block + part in self.cache_dict for part in made_of)

    @property
    def nbytes(self) -> int:
        """Memory that this cache keeps alive, in bytes; tensors that share memory count once.

        The block that was looked at last is kept too, until another is.
        """
        storages = (tensor.untyped_storage() for tensor in self.cache_dict.kept())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def full_name(self, key: str | tuple) -> str:
        """The hook point that a key means: its own name, or a short name and a layer, which may be negative."""
        return key if key in self.cache_dict else self.model.full_name(key)

    def __getitem__(self, key: str | tuple) -> Tensor:
        name = self.full_name(key)
        if name in self.cache_dict:
            return self.cache_dict[name]
        site = self.model.sites.get(name)
        if site is None and not name.endswith("_grad"):
            self.model._check_name(name)  # raises, with the nearest names
        if site is None or not site.expansion:
            near = difflib.get_close_matches(name, self.cache_dict, n=3)
            remedy = "pass incl_bwd=True, and name its site" if name.endswith("_grad") else "name it"
            raise KeyError(
                f"{name} was not cached" + (f" (near it: {', '.join(near)})" if near else "") + f": {remedy} in "
                "names_filter."
            )
        self._refuse_if_changed(name)
        layer, what = int(name.split(".")[1]), name.split(".")[-1]
        if what == "hook_pattern":
            return self.pattern(layer)
        if what == "hook_attn_scores":
            return self.attn_scores(layer)
        block, device = self.model.blocks[layer], self.model.cfg.device
        weight = f"blocks.{layer}." + ("attn.o_proj.weight" if what == "hook_result" else "moe.down_proj")
        refuse_if_edited(name, {weight: self._weights.get(weight)}, self._weights_used())
        if what == "hook_result":
            z = self["z", layer]
            return torch.einsum("...he,hed->...hd", z.to(device), block.attn.W_O).to(z.device)
        post, indices, weights = (self[f"blocks.{layer}.{part}"] for part in _EXPERT_PARTS)
        if self.has_batch_dim:
            return block.moe.down(post.to(device), (indices.to(device), weights.to(device))).to(post.device)
        return block.moe.down(post[None].to(device), (indices[None].to(device), weights[None].to(device)))[0].to(
            post.device
        )

    def _weights_used(self) -> list[tuple[str, Tensor]]:
        """Those that expansions are made with."""
        ends = ("attn.o_proj.weight", "moe.down_proj")
        return [(name, weight) for name, weight in self.model.named_parameters() if name.endswith(ends)]

    def _refuse_if_changed(self, name: str) -> None:
        if name in self._changed:
            raise KeyError(
                f"{name} had a hook that may have changed it and was not cached, so it cannot be recomputed: "
                "name it in names_filter."
            )

    # Attention, recomputed

    def _has_every_key(self, layer: int) -> bool:
        geometry = self.model.layer(layer)
        q = f"blocks.{layer}.attn.hook_rot_q"
        k = f"blocks.{layer if geometry.kv_source is None else geometry.kv_source}.attn.hook_rot_k"
        mask, whole = self._masks.get(geometry.kind), self._positions.mode == "identity"
        if q not in self.cache_dict or k not in self.cache_dict or mask is None or not whole:
            return False
        return mask.n_queries == mask.n_keys  # or else a past_kv_cache had the others

    def _qk(self, layer: int, wanted: str) -> tuple[Tensor, Tensor]:
        """Queries and keys after rope, with their batch axis."""
        source = self.model.layer(layer).kv_source
        q, k = self["rot_q", layer], self["rot_k", layer if source is None else source]
        if not self._has_every_key(layer):
            raise KeyError(
                f"{wanted} cannot be recomputed: this cache does not hold every key (pos_slice, or a past_kv_cache); "
                "name the scores or the pattern in names_filter."
            )
        return (q, k) if self.has_batch_dim else (q[None], k[None])

    def attn_scores(
        self, layer: int, heads: int | list[int] | None = None, rows: slice | list[int] | None = None
    ) -> Float[Tensor, "*batch head row key"]:
        """Masked scores of some heads and some query rows (all by default), from the cached queries and keys.

        An int names one head and drops its axis.
        """
        layer = range(self.model.cfg.n_layers)[layer]
        name = f"blocks.{layer}.attn.hook_attn_scores"
        if name in self.cache_dict:
            return self._part(self.cache_dict[name], heads, rows)
        self._refuse_if_changed(name)
        q, k = self._qk(layer, name)
        rows = slice(None) if rows is None else rows
        q, visible = q[:, rows], self._masks[self.model.layer(layer).kind].rows(rows).to(q.device)
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
        if name in self.cache_dict:
            return self._part(self.cache_dict[name], heads, rows)
        self._refuse_if_changed(name)
        return self.attn_scores(layer, heads, rows).softmax(-1)

    @staticmethod
    def _part(stored: Tensor, heads: int | list[int] | None, rows: slice | list[int] | None) -> Tensor:
        stored = stored if rows is None else stored[..., rows, :]
        return stored if heads is None else stored[..., heads, :, :]

    # Read-outs of a pattern that is never built. They equal the same function of `pattern(layer)`.

    def attention_pool(
        self, layer: int, block: int, reduce: str = "mean"
    ) -> Float[Tensor, "*batch head query_block key_block"]:
        """The pattern of every head in square blocks, their "mean" or "max": a map of a prompt of any length."""
        return self._read(ops.attention_pool, layer, block, reduce)

    def attention_colsum(self, layer: int) -> Float[Tensor, "*batch head key"]:
        """How much attention each key gets, summed over queries."""
        return self._read(ops.attention_colsum, layer)

    def attention_topk(
        self, layer: int, n: int
    ) -> tuple[Float[Tensor, "*batch head query n"], Int[Tensor, "*batch head query n"]]:
        """The n keys each query attends to most, and how much: (values, indices); 0 and -1 where it sees fewer."""
        return self._read(ops.attention_topk, layer, n)

    def attention_entropy(self, layer: int) -> Float[Tensor, "*batch head query"]:
        """The entropy of each row of attention, in nats."""
        return self._read(ops.attention_entropy, layer)

    def attention_by_source(
        self, layer: int, source: Int[Tensor, "*prompt key"], n_sources: int
    ) -> Float[Tensor, "*batch query head source d_head"]:
        """z split by groups of keys, which `source` numbers from 0; the parts sum to z."""
        number = source.to(self.model.cfg.device)
        number = number if number.ndim == 2 else number[None]
        geometry = self.model.layer(layer)
        layer = range(self.model.cfg.n_layers)[layer]
        v = self["attn.hook_v_normed", layer if geometry.kv_source is None else geometry.kv_source]
        v = v if self.has_batch_dim else v[None]
        q, k, lse, mask = self._qk_lse(layer)
        parts = ops.attention_by_source(q, k, v.to(q.device), lse, mask, number, n_sources)
        return parts if self.has_batch_dim else parts[0]

    def _read(self, readout, layer: int, *rest):
        found = readout(*self._qk_lse(layer), *rest)
        if self.has_batch_dim:
            return found
        return tuple(part[0] for part in found) if isinstance(found, tuple) else found[0]

    def _qk_lse(self, layer: int) -> tuple[Tensor, Tensor, Tensor, ops.Mask]:
        """The cached queries and keys of a layer, each row's normaliser, and the mask."""
        layer = range(self.model.cfg.n_layers)[layer]
        name = f"blocks.{layer}.attn.hook_pattern"
        if name in self._changed:
            raise KeyError(
                f"{name} had a hook that may have changed it, and read-outs come from queries and keys: "
                "name it in names_filter and take them from the tensor."
            )
        q, k = self._qk(layer, name)
        mask = self._masks[self.model.layer(layer).kind]
        q, k = (x.to(mask.device) for x in (q, k))
        if layer not in self._lse:  # keys in place of values: z is thrown away
            self._lse[layer] = ops.attention(q, k, k, mask)[1]
        return q, k, self._lse[layer], mask

    # Routing

    @property
    def routing(self) -> RoutingTrace:
        """The experts of every layer of a mixture-of-experts model."""
        refuse_dense(self.model)
        layers = tuple(range(self.model.cfg.n_layers))

        names = ("hook_indices", "hook_weights", "hook_probs")
        by_layer = [[self[f"moe.router.{name}", layer] for name in names] for layer in layers]
        indices, weights, probs = (torch.stack(found) for found in zip(*by_layer, strict=True))
        real = torch.ones(indices.shape[1:-1], dtype=torch.bool, device=indices.device)
        if self._padding is not None:
            fed = self._padding if self.has_batch_dim else self._padding[0]
            n_queries = next(iter(self._masks.values())).n_queries
            real = self._positions.apply(fed[..., -n_queries:], dim=-1).to(indices.device)
        return RoutingTrace(layers, indices, weights, probs, real.bool(), about=about(self.model))

    def view(self, **how):
        """The linked views of this run of one prompt: `gs.dashboard(cache.model, cache, **how)`."""
        from gemmascope.views.dashboard import dashboard

        return dashboard(self.model, self, **how)

    # Whole-cache operations

    def _at(self, positions: Slice) -> "ActivationCache":
        """Views of some positions of everything that has positions; an int keeps its axis."""
        if positions.mode == "identity":
            return self
        positions = Slice([positions.slice]) if positions.mode == "int" else positions
        batched = self.has_batch_dim

        def cut(name: str, tensor: Tensor) -> Tensor | None:
            axes = self.model.sites[name].axes.split() if name in self.model.sites else []
            return positions.apply(tensor, dim=axes.index("pos") - (not batched)) if "pos" in axes else None

        new = ActivationCache(self.cache_dict.viewed(cut), self.model, batched, pos_slice=[0], changed=self._changed)
        new._weights = self._weights
        return new

    def _batch_size(self) -> int:
        return next((len(tensor) for tensor in self.cache_dict.values()), 1)  # the first is at hand

    def remove_batch_dim(self, batch_size: int | None = None) -> "ActivationCache":
        """Drops the batch axis of everything, in place. Raises ValueError where there is more than one prompt."""
        if self.has_batch_dim:
            if self._batch_size() > 1:
                raise ValueError(f"remove_batch_dim needs one prompt, and there are {self._batch_size()}.")
            self.cache_dict = self.cache_dict.viewed(lambda name, tensor: tensor[0])
            self.has_batch_dim = False
        return self

    def to(self, device: torch.device | str) -> "ActivationCache":
        """Moves what is kept, in place; what is recomputed comes back on that device too."""
        self.cache_dict = self.cache_dict.to(device)
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "ActivationCache":
        """A cache of some of the prompts (an int drops the batch axis)."""
        if not self.has_batch_dim:
            raise ValueError("This cache has no batch axis to take prompts from.")
        prompts = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        sliced = self.cache_dict.viewed(lambda name, tensor: prompts.apply(tensor, dim=0))
        keep = Slice.unwrap(batch_slice)  # which, unlike Slice(...), keeps the axis of an int

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else keep.apply(x, dim=0)

        masks = {
            kind: replace(mask, key_mask=cut(mask.key_mask), image_blocks=cut(mask.image_blocks))
            for kind, mask in self._masks.items()
        }
        new = ActivationCache(sliced, self.model, prompts.mode != "int", masks, None, self._changed)
        new._positions, new._padding, new._weights = self._positions, cut(self._padding), self._weights
        new.tokens = cut(self.tokens)
        return new
