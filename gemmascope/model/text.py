"""Gemma 4's text model, hookable: small parts first, `HookedGemma4.forward` last.

What is unusual about this family, each where it happens below: norms without "+1"; attention scale 1, with normed
queries, keys *and* values; values taken before the key norm where one projection serves both; rope that turns a quarter
of the wide heads; layers that read an earlier layer's keys and values; four norms a block, the output of each sub-layer
normed before it is added; a router that reads the raw stream; per-layer embeddings; and a scalar that multiplies the
whole stream at the end of each block.

Every part has two lines: `forward`, which touches no hook point, and `with_sites`, the same arithmetic with every
tensor shown. A block runs the second only while one of its points has a hook.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gemmascope import ops
from gemmascope.config import Gemma4Config, LayerGeometry, LayerKind
from gemmascope.generate import KVCache
from gemmascope.hooks import Site, WatchedBlock
from gemmascope.model.lens import LensModel
from gemmascope.model.moe import MoE, drawn
from gemmascope.tokenizer import Gemma4Tokenizer

Stream = Float[Tensor, "batch pos d_model"]


@dataclass
class Pass:
    """What the layers of one forward pass share."""

    rope: dict[LayerKind, tuple[Tensor, Tensor]]
    masks: dict[LayerKind, ops.Mask]
    past: KVCache | None
    ple: Float[Tensor, "batch pos layer d_ple"] | None = None
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of the layers that later ones read."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32, the weight applied before casting back."""

    def __init__(self, d: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return (ops.wide(x) / ops.rms(x, self.eps) * ops.wide(self.weight)).type_as(x)


class SiteNorm(RMSNorm):
    """An RMSNorm of the stream whose scale and normalized value are hook points, in float32 whatever the dtype."""

    def __init__(self, d: int, eps: float):
        super().__init__(d, eps)
        self.hook_scale, self.hook_normalized = Site(), Site()

    def with_sites(self, x: Tensor) -> Tensor:
        normalized = self.hook_normalized(ops.wide(x) / self.hook_scale(ops.rms(x, self.eps)))
        return (normalized * ops.wide(self.weight)).type_as(x)


class Attention(nn.Module):
    def __init__(self, cfg: Gemma4Config, layer: int):
        super().__init__()
        self.layer, self.geometry, self.eps, self.n_heads = layer, cfg.layers[layer], cfg.eps, cfg.n_heads
        H, K, h = cfg.n_heads, self.geometry.n_kv_heads, self.geometry.d_head
        self.q_proj = nn.Linear(cfg.d_model, H * h, bias=False)
        self.q_norm = RMSNorm(h, cfg.eps)
        if self.geometry.kv_source is None:
            self.k_proj = nn.Linear(cfg.d_model, K * h, bias=False)
            self.k_norm = RMSNorm(h, cfg.eps)
            if not self.geometry.k_is_v:
                self.v_proj = nn.Linear(cfg.d_model, K * h, bias=False)
            self.hook_k, self.hook_k_normed, self.hook_rot_k = Site(), Site(), Site()
            self.hook_v, self.hook_v_normed = Site(), Site()
        self.o_proj = nn.Linear(H * h, cfg.d_model, bias=False)
        self.hook_q, self.hook_q_normed, self.hook_rot_q = Site(), Site(), Site()
        self.hook_attn_scores, self.hook_pattern, self.hook_z, self.hook_result = Site(), Site(), Site(), Site()

    # TransformerLens's names and axes for the weights.
    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self.q_proj.weight.unflatten(0, (self.n_heads, -1)).mT

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._own("k_proj").weight.unflatten(0, (self.geometry.n_kv_heads, -1)).mT

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        proj = self._own("k_proj" if self.geometry.k_is_v else "v_proj")
        return proj.weight.unflatten(0, (self.geometry.n_kv_heads, -1)).mT

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.o_proj.weight.T.unflatten(0, (self.n_heads, -1))

    def _own(self, name: str) -> nn.Linear:
        source = self.geometry.kv_source
        if source is not None:
            raise ValueError(
                f"Layer {self.layer} has no key and value weights: it reads the keys and values of layer {source}, "
                f"model.blocks[{source}].attn."
            )
        return getattr(self, name)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.geometry.d_head))

    def _normed_v(self, v: Tensor) -> Tensor:
        return (ops.wide(v) / ops.rms(v, self.eps)).type_as(v)  # a norm without weights

    def _keep(self, run: Pass, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the past, and leaves keys and values for the layers that read them."""
        if run.past is not None:
            k, v = run.past.append(self.layer, k, v)
        run.kv[self.layer] = k, v
        return k, v

    def forward(self, x: Stream, run: Pass) -> Stream:
        kind, source = self.geometry.kind, self.geometry.kv_source
        q = ops.rotate(self.q_norm(self._heads(self.q_proj(x))), *run.rope[kind])
        if source is None:
            k = self._heads(self.k_proj(x))
            v = k if self.geometry.k_is_v else self._heads(self.v_proj(x))
            k, v = self._keep(run, ops.rotate(self.k_norm(k), *run.rope[kind]), self._normed_v(v))
        else:
            k, v = run.kv[source]
        return self.o_proj(ops.attention(q, k, v, run.masks[kind]).flatten(-2))

    def with_sites(self, x: Stream, run: Pass) -> Stream:
        kind, source = self.geometry.kind, self.geometry.kv_source
        q = self.hook_q(self._heads(self.q_proj(x)))
        if source is None:
            projected = self._heads(self.k_proj(x))
            k = self.hook_k(projected)
            v = self.hook_v(projected if self.geometry.k_is_v else self._heads(self.v_proj(x)))
        q = self.hook_q_normed(self.q_norm(q))
        if source is None:
            k, v = self.hook_k_normed(self.k_norm(k)), self.hook_v_normed(self._normed_v(v))
        q = self.hook_rot_q(ops.rotate(q, *run.rope[kind]))
        if source is None:
            k, v = self._keep(run, self.hook_rot_k(ops.rotate(k, *run.rope[kind])), v)
        else:
            k, v = run.kv[source]
        z = self.hook_z(self._mix(q, k, v, run.masks[kind]))
        if not self.hook_result.watched:
            return self.o_proj(z.flatten(-2))
        result = self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O))
        return result.sum(-2) if self.hook_result.written else self.o_proj(z.flatten(-2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: ops.Mask) -> Tensor:
        """z, by the fused path unless a hook writes scores or pattern; for a reader they are computed beside it."""
        written = self.hook_attn_scores.written or self.hook_pattern.written
        if not (written or self.hook_attn_scores.watched or self.hook_pattern.watched):
            return ops.attention(q, k, v, mask)
        scores = self.hook_attn_scores(ops.attention_scores(q, k, mask))
        pattern = self.hook_pattern(scores.softmax(-1))
        return ops.mix_values(pattern, v) if written else ops.attention(q, k, v, mask)


class MLP(nn.Module):
    """down(gelu(gate) * up). TransformerLens calls gate's output `pre`, up's `pre_linear` and their product `post`."""

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=False)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=False)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=False)
        self.hook_pre, self.hook_pre_linear, self.hook_post, self.hook_out = Site(), Site(), Site(), Site()

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.gate_proj.weight.T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self.up_proj.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.down_proj.weight.T

    def forward(self, x: Stream) -> Stream:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))

    def with_sites(self, x: Stream) -> Stream:
        gate, up = self.hook_pre(self.gate_proj(x)), self.hook_pre_linear(self.up_proj(x))
        return self.hook_out(self.down_proj(self.hook_post(F.gelu(gate, approximate="tanh") * up)))


class PerLayer(nn.Module):
    """The per-layer signal of every layer at once: half a table look-up, half a projection of the embedding."""

    def __init__(self, cfg: Gemma4Config):
        super().__init__()
        self.n_layers, self.d_ple = cfg.n_layers, cfg.d_ple
        width = cfg.n_layers * cfg.d_ple
        self.table = nn.Embedding(cfg.d_vocab_ple, width, _weight=drawn(cfg.d_vocab_ple, width))
        self.proj = nn.Linear(cfg.d_model, width, bias=False)
        self.norm = RMSNorm(cfg.d_ple, cfg.eps)

    def forward(self, tokens: Int[Tensor, "batch pos"], embed: Stream) -> Float[Tensor, "batch pos layer d_ple"]:
        by_layer = (self.n_layers, self.d_ple)
        from_token = (self.table(tokens) * scale_as(self.table.weight, self.d_ple)).unflatten(-1, by_layer)
        from_embed = self.norm((self.proj(embed) * embed.shape[-1] ** -0.5).unflatten(-1, by_layer))
        return (from_embed + from_token) * 2**-0.5


class PLE(nn.Module):
    """One layer's use of its signal: the stream gates it, and it is projected back."""

    def __init__(self, cfg: Gemma4Config):
        super().__init__()
        self.gate = nn.Linear(cfg.d_model, cfg.d_ple, bias=False)
        self.proj = nn.Linear(cfg.d_ple, cfg.d_model, bias=False)
        self.hook_gate, self.hook_post = Site(), Site()

    def forward(self, x: Stream, signal: Tensor) -> Stream:
        return self.proj(F.gelu(self.gate(x), approximate="tanh") * signal)

    def with_sites(self, x: Stream, signal: Tensor) -> Stream:
        return self.proj(self.hook_post(F.gelu(self.hook_gate(self.gate(x)), approximate="tanh") * signal))


class Block(WatchedBlock):
    """1 attention, 2 feed-forward (dense MLP; in a MoE, experts beside it), 3 per-layer embedding, 4 stream scale."""

    hook_out_is_single_residual_stream = True  # what transformer_lens.tools asks of a block

    def __init__(self, cfg: Gemma4Config, layer: int):
        super().__init__()
        self.layer, self.geometry = layer, cfg.layers[layer]
        norm = partial(SiteNorm, cfg.d_model, cfg.eps)
        self.ln1, self.attn, self.ln1_post = norm(), Attention(cfg, layer), norm()
        self.ln2, self.mlp, self.ln2_post = norm(), MLP(cfg.d_model, self.geometry.d_mlp), norm()
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = Site(), Site(), Site()
        self.hook_mlp_out, self.hook_resid_mlp, self.hook_resid_post = Site(), Site(), Site()
        self.moe = MoE(cfg) if cfg.n_experts else None
        if self.moe is not None:
            self.dense_ln_post, self.moe_ln_pre, self.moe_ln_post = norm(), norm(), norm()
            self.hook_dense_out, self.hook_moe_out = Site(), Site()
        self.ple = PLE(cfg) if cfg.d_ple else None
        if self.ple is not None:
            self.ple_ln_post, self.hook_ple_out = norm(), Site()
        self.register_buffer("layer_scalar", torch.ones(1))
        self.find_sites()

    def forward(self, x: Stream, run: Pass) -> Stream:
        if self.watched:
            return self.with_sites(x, run)
        x = x + self.ln1_post(self.attn(self.ln1(x), run))
        out = self.mlp(self.ln2(x))
        if self.moe is not None:
            out = self.dense_ln_post(out) + self.moe_ln_post(self.moe(self.moe_ln_pre(x), self.moe.router(x)))
        x = x + self.ln2_post(out)
        if self.ple is not None:
            x = x + self.ple_ln_post(self.ple(x, run.ple[:, :, self.layer]))
        return x * self.layer_scalar

    def with_sites(self, x: Stream, run: Pass) -> Stream:
        # 1 attention
        x = self.hook_resid_pre(x)
        attn_out = self.ln1_post.with_sites(self.attn.with_sites(self.ln1.with_sites(x), run))
        x = self.hook_resid_mid(x + self.hook_attn_out(attn_out))
        # 2 feed-forward
        out = self.mlp.with_sites(self.ln2.with_sites(x))
        if self.moe is not None:
            dense = self.hook_dense_out(self.dense_ln_post.with_sites(out))
            choice = self.moe.router.with_sites(x)
            experts = self.moe.with_sites(self.moe_ln_pre.with_sites(x), choice)
            out = dense + self.hook_moe_out(self.moe_ln_post.with_sites(experts))
        x = self.hook_resid_mlp(x + self.hook_mlp_out(self.ln2_post.with_sites(out)))
        # 3 per-layer embedding
        if self.ple is not None:
            added = self.ple_ln_post.with_sites(self.ple.with_sites(x, run.ple[:, :, self.layer]))
            x = x + self.hook_ple_out(added)
        # 4 scale
        return self.hook_resid_post(x * self.layer_scalar)


def scale_as(weight: Tensor, d: int) -> Tensor:
    """sqrt(d), rounded to the weight's dtype before it multiplies an embedding (2816 -> 53.0 in bfloat16)."""
    return torch.tensor(d**0.5, dtype=weight.dtype, device=weight.device)


class Unembed(nn.Module):
    """Logits before the soft cap, from the embedding's own (tied) weight."""

    def __init__(self, embed: nn.Embedding):
        super().__init__()
        self._embed = (embed,)  # in a tuple, so that the tied weight is a parameter of one module only

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self._embed[0].weight.T

    def forward(self, x: Stream) -> Float[Tensor, "batch pos d_vocab"]:
        return x @ self.W_U


class HookedGemma4(LensModel):
    """A Gemma 4 text model whose every intermediate tensor can be read and changed.

    `cfg` carries TransformerLens's names, `layer(l)` what differs between layers; `sites` lists the hook points.
    """

    def __init__(self, cfg: Gemma4Config, tokenizer: Gemma4Tokenizer | None = None):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        self.embed = nn.Embedding(cfg.d_vocab, cfg.d_model, _weight=drawn(cfg.d_vocab, cfg.d_model))
        self.hook_embed = Site()
        self.per_layer = PerLayer(cfg) if cfg.d_ple else None
        if cfg.d_ple:
            self.hook_ple_inputs = Site()
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.ln_final = SiteNorm(cfg.d_model, cfg.eps)
        self.unembed = Unembed(self.embed)
        self.hook_unembed, self.hook_logits = Site(), Site()
        self.setup()
        self.sync_cfg()

    def sync_cfg(self) -> None:
        """cfg.dtype and cfg.device follow the weights."""
        weight = self.embed.weight
        self.cfg = replace(self.cfg, dtype=weight.dtype, device=weight.device)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.sync_cfg()
        return self

    def layer(self, layer: int) -> LayerGeometry:
        """The shape of one layer: kind, d_head, n_kv_heads, d_mlp, kv_source, ..."""
        return self.cfg.layers[layer]

    def softcap(self, logits: Tensor) -> Tensor:
        """cap * tanh(logits / cap), the last step of the model."""
        cap = self.cfg.final_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # Running

    def forward(
        self,
        input,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#batch pos"] | None = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        past_kv_cache: KVCache | None = None,
        image_blocks: Int[Tensor, "batch key"] | None = None,
        prepend_bos: bool | None = None,
    ):
        """Runs the model.

        Args:
            input: text, which gets BOS as the tokenizer's rules say (a list of texts is left-padded), or token ids
                [pos] or [batch, pos], taken as they are.
            attention_mask: [batch, past + pos], 0 or False on padding, at either side.
            position_ids: for rope only; by default they count the real tokens. What a query sees follows from the order
                of the sequence, not from these.
            return_type: "logits", "loss" (mean next-token cross-entropy in nats, over real tokens), "both", or None.
            loss_per_token: the loss as [batch, pos - 1], 0 where the target is padding.
            stop_at_layer: return the stream [batch, pos, d_model] before this layer, which is not run; may be negative.
            past_kv_cache: keys and values of earlier tokens; the new ones are added to it.
            image_blocks: [batch, past + pos], the number of each position's image, -1 for text (12B, 26B-A4B, 31B).
            prepend_bos: overrides the tokenizer's rule for text.

        Returns:
            logits [batch, pos, d_vocab], the loss, both as a tuple, or None.

        Raises:
            ValueError: for an empty prompt, one longer than the context, or a token id out of range.
        """
        tokens, run, mask = self._begin(input, attention_mask, position_ids, past_kv_cache, image_blocks, prepend_bos)
        return self._run(tokens, run, mask, return_type, loss_per_token, stop_at_layer)

    def _begin(
        self, input, attention_mask=None, position_ids=None, past_kv_cache=None, image_blocks=None, prepend_bos=None
    ) -> tuple[Tensor, Pass, Tensor | None]:
        """Tokens, what the layers share, and the attention mask: all that is known before the first layer."""
        tokens = input
        if isinstance(input, str) or (isinstance(input, list | tuple) and all(isinstance(t, str) for t in input)):
            tokens, padded = self._need_tokenizer().batch(input, prepend_bos)
            attention_mask = padded if attention_mask is None else attention_mask
        tokens = self._checked_tokens(tokens)
        past = past_kv_cache.length if past_kv_cache is not None else 0
        batch, total = tokens.shape[0], past + tokens.shape[1]
        if total > self.cfg.n_ctx:
            raise ValueError(
                f"The prompt has {total} tokens but {self.cfg.model_name} reads at most {self.cfg.n_ctx}; shorten it."
            )
        if image_blocks is not None and not self.cfg.bidirectional_images:
            raise ValueError(f"{self.cfg.model_name} reads images causally: leave image_blocks out.")
        for name, given in (("attention_mask", attention_mask), ("image_blocks", image_blocks)):
            if given is not None and given.shape != (batch, total):
                raise ValueError(f"{name} has shape {list(given.shape)}; the tokens so far need {[batch, total]}.")
        mask = None
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask.to(tokens.device, torch.bool)
        if position_ids is None:
            count = torch.arange(total, device=tokens.device)[None]
            count = count if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
            position_ids = count[:, past:]

        rope, masks = {}, {}
        for layer in {layer.kind: layer for layer in self.cfg.layers}.values():
            rope[layer.kind] = ops.rope_tables(
                position_ids, layer.d_head, layer.rope_theta, layer.rope_fraction, self.cfg.dtype
            )
            first = past_kv_cache.first_kept(layer.window, tokens.shape[1]) if past_kv_cache is not None else 0
            blocks = image_blocks if layer.window is not None else None
            masks[layer.kind] = ops.Mask(
                n_queries=tokens.shape[1],
                n_keys=total - first,
                device=tokens.device,
                window=layer.window,
                key_mask=None if mask is None else mask[:, first:],
                image_blocks=None if blocks is None else blocks[:, first:].to(tokens.device),
            )
        return tokens, Pass(rope, masks, past_kv_cache), mask

    def _checked_tokens(self, tokens) -> Int[Tensor, "batch pos"]:
        if not isinstance(tokens, Tensor):
            raise TypeError(f"The model takes text or a tensor of token ids, not a {type(tokens).__name__}.")
        tokens = tokens.to(self.cfg.device)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"Token ids are integers of shape [batch, pos]; got {tokens.dtype} of shape {list(tokens.shape)}."
            )
        if tokens.numel() == 0:
            raise ValueError("The prompt is empty: give at least one token (BOS alone will do).")
        if not self.embed.weight.is_meta:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.cfg.d_vocab:
                raise ValueError(
                    f"Token id {low if low < 0 else high} is out of range: "
                    f"{self.cfg.model_name} has ids 0 to {self.cfg.d_vocab - 1}."
                )
        return tokens

    def _run(
        self,
        tokens: Int[Tensor, "batch pos"],
        run: Pass,
        mask: Tensor | None = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        last_only: bool = False,
    ):
        x = self.hook_embed(self.embed(tokens) * scale_as(self.embed.weight, self.cfg.d_model))
        if self.per_layer is not None:
            run.ple = self.hook_ple_inputs(self.per_layer(tokens, x))
        stop = range(self.cfg.n_layers + 1)[stop_at_layer] if stop_at_layer is not None else None
        for block in self.blocks[:stop]:
            x = block(x, run)
        if run.past is not None:
            run.past.advance(tokens.shape[1])
        if stop is not None:
            return x

        head = (self.ln_final.hook_scale, self.ln_final.hook_normalized, self.hook_unembed, self.hook_logits)
        if not any(site.watched for site in head):
            if return_type is None:
                return None
            x = x[:, -1:] if last_only else x  # nobody looks at the others
        logits = self.hook_logits(self.softcap(self.hook_unembed(self.unembed(self.ln_final.with_sites(x)))))
        match return_type:
            case "logits":
                return logits
            case "loss":
                return self._loss(logits, tokens, mask, loss_per_token)
            case "both":
                return logits, self._loss(logits, tokens, mask, loss_per_token)
            case None:
                return None
        raise ValueError(f"return_type is {return_type!r}; it is 'logits', 'loss', 'both' or None.")

    @staticmethod
    def _loss(logits: Tensor, tokens: Tensor, mask: Tensor | None, per_token: bool) -> Tensor:
        loss = F.cross_entropy(ops.wide(logits[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = loss.view(len(tokens), -1)
        if mask is None:
            return loss if per_token else loss.mean()
        real = mask[:, -tokens.shape[1] :]
        real = real[:, 1:] & real[:, :-1]
        return loss * real if per_token else (loss * real).sum() / real.sum()
