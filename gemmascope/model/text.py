"""Gemma 4's text model, hookable: small parts first, `HookedGemma4.forward` last.

What is unusual about this family, each where it happens below: norms without "+1"; attention scale 1, with normed
queries, keys *and* values; values taken before the key norm where one projection serves both; rope that turns a quarter
of the wide heads; layers that read an earlier layer's keys and values; four norms a block, the output of each sub-layer
normed before it is added; a router that reads the raw stream; per-layer embeddings; and a scalar that multiplies the
whole stream at the end of each block.

Every part has two lines: `forward`, which touches no hook point, and `with_sites`, the same arithmetic with every
tensor shown. A block runs the second only while one of its points has a hook.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from gemmascope import ops
from gemmascope.config import Gemma4Config, LayerGeometry
from gemmascope.generate import KVCache
from gemmascope.hooks import Site, WatchedBlock, watched, written
from gemmascope.model.inputs import Pass, prepare
from gemmascope.model.lens import LensModel
from gemmascope.model.moe import MoE, drawn
from gemmascope.tokenizer import Gemma4Tokenizer

Stream = Float[Tensor, "batch pos d_model"]


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

    def forward(self, x: Tensor, sites: bool = False) -> Tensor:
        if not sites:
            return super().forward(x)
        normalized = self.hook_normalized(ops.wide(x) / self.hook_scale(ops.rms(x, self.eps)))
        return (normalized * ops.wide(self.weight)).type_as(x)


class Attention(nn.Module):
    def __init__(self, cfg: Gemma4Config, layer: int):
        super().__init__()
        self.layer, self.geometry, self.eps, self.n_heads = layer, cfg.layers[layer], cfg.eps, cfg.n_heads
        H, K, h = cfg.n_heads, self.geometry.n_kv_heads, self.geometry.d_head
        self.q_proj = nn.Linear(cfg.d_model, H * h, bias=False)
        self.q_norm = RMSNorm(h, cfg.eps)
        self.is_read = any(other.kv_source == layer for other in cfg.layers)
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
        if self.is_read:
            run.kv[self.layer] = k, v
        return k, v

    def forward(self, x: Stream, run: Pass, sites: bool = False) -> Stream:
        if sites:
            return self.with_sites(x, run)
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
        if not watched(self.hook_result):
            return self.o_proj(z.flatten(-2))
        result = self.hook_result(torch.einsum("bphe,hed->bphd", z, self.W_O))
        return result.sum(-2) if written(self.hook_result) else self.o_proj(z.flatten(-2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: ops.Mask) -> Tensor:
        """z, by the fused path unless a hook writes scores or pattern; for a reader they are computed beside it."""
        explicit = written(self.hook_attn_scores) or written(self.hook_pattern)
        if not (explicit or watched(self.hook_attn_scores) or watched(self.hook_pattern)):
            return ops.attention(q, k, v, mask)
        scores = self.hook_attn_scores(ops.attention_scores(q, k, mask))
        pattern = self.hook_pattern(scores.softmax(-1))
        return ops.mix_values(pattern, v) if explicit else ops.attention(q, k, v, mask)


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

    def forward(self, x: Stream, sites: bool = False) -> Stream:
        if sites:
            return self.with_sites(x)
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

    def forward(self, x: Stream, signal: Tensor, sites: bool = False) -> Stream:
        if sites:
            return self.with_sites(x, signal)
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
        attn_out = self.ln1_post(self.attn(self.ln1(x, sites=True), run, sites=True), sites=True)
        x = self.hook_resid_mid(x + self.hook_attn_out(attn_out))
        # 2 feed-forward
        out = self.mlp(self.ln2(x, sites=True), sites=True)
        if self.moe is not None:
            dense = self.hook_dense_out(self.dense_ln_post(out, sites=True))
            choice = self.moe.router(x, sites=True)
            experts = self.moe(self.moe_ln_pre(x, sites=True), choice, sites=True)
            out = dense + self.hook_moe_out(self.moe_ln_post(experts, sites=True))
        x = self.hook_resid_mlp(x + self.hook_mlp_out(self.ln2_post(out, sites=True)))
        # 3 per-layer embedding
        if self.ple is not None:
            added = self.ple(x, run.ple[:, :, self.layer], sites=True)
            x = x + self.hook_ple_out(self.ple_ln_post(added, sites=True))
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
        """The shape of one layer: kind, d_head, n_kv_heads, d_mlp, kv_source, ... May be negative."""
        n_layers = self.cfg.n_layers
        if not -n_layers <= layer < n_layers:
            raise ValueError(f"Layer {layer} does not exist: {self.cfg.model_name} has layers 0 to {n_layers - 1}.")
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
        run = input if isinstance(input, Pass) else self._begin(
            input, attention_mask, position_ids, past_kv_cache, image_blocks, prepend_bos
        )  # fmt: skip
        stop = self._stop(stop_at_layer, run)
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type is {return_type!r}; it is 'logits', 'loss', 'both' or None.")
        x = self.hook_embed(self.embed(run.tokens) * scale_as(self.embed.weight, self.cfg.d_model))
        if self.per_layer is not None:
            run.ple = self.hook_ple_inputs(self.per_layer(run.tokens, x))
        for block in self.blocks[:stop]:
            x = block(x, run)
        if run.past is not None:
            run.past.advance(run.tokens.shape[1], run.mask)
        if stop is not None:
            return x

        head = (self.ln_final.hook_scale, self.ln_final.hook_normalized, self.hook_unembed, self.hook_logits)
        if not any(watched(point) for point in head):
            if return_type is None:
                return None
            x = x[:, -1:] if run.last_only else x
        logits = self.hook_logits(self.softcap(self.hook_unembed(self.unembed(self.ln_final(x, sites=True)))))
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = self._loss(logits, run, loss_per_token)
        return (logits, loss) if return_type == "both" else loss

    def _begin(self, input, attention_mask=None, position_ids=None, past=None, image_blocks=None, prepend_bos=None):
        """Text or tokens to a Pass: all that is known before the first layer."""
        tokens = input
        if isinstance(input, str) or (isinstance(input, list | tuple) and all(isinstance(t, str) for t in input)):
            if past is not None and past.length:
                raise ValueError("Text cannot continue a past_kv_cache, it would get BOS again: pass token ids.")
            tokens, padded = self._need_tokenizer().batch(input, prepend_bos)
            attention_mask = padded if attention_mask is None else attention_mask
        return prepare(self.cfg, tokens, attention_mask, position_ids, past, image_blocks)

    def _stop(self, stop_at_layer: int | None, run: Pass) -> int | None:
        n_layers, stop = self.cfg.n_layers, stop_at_layer
        if stop is None:
            return None
        if not -n_layers <= stop <= n_layers:
            raise ValueError(f"stop_at_layer is {stop}; {self.cfg.model_name} has layers 0 to {n_layers - 1}.")
        if run.past is not None:
            raise ValueError(
                "stop_at_layer would leave the later layers of past_kv_cache without keys: drop one of the two."
            )
        stop = stop + n_layers if stop < 0 else stop
        points = (point for block in self.blocks[stop:] if block.watched for point in block.points)
        inert = next((point for point in points if isinstance(point, Site) and written(point)), None)
        if inert is not None:
            raise ValueError(f"The hook at {inert.name} would never run: stop_at_layer={stop_at_layer} ends before it.")
        return stop

    @staticmethod
    def _loss(logits: Tensor, run: Pass, per_token: bool) -> Tensor:
        if run.tokens.shape[1] < 2:
            raise ValueError("The loss of a next token needs two tokens, and there is one.")
        loss = F.cross_entropy(ops.wide(logits[:, :-1]).flatten(0, 1), run.tokens[:, 1:].flatten(), reduction="none")
        loss = loss.view(len(run.tokens), -1)
        if run.mask is None:
            return loss if per_token else loss.mean()
        real = run.mask[:, -run.tokens.shape[1] :]
        real = real[:, 1:] & real[:, :-1]
        return loss * real if per_token else (loss * real).sum() / real.sum()
