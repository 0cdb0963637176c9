"""Gemma 4's text model, hookable: small parts first, `HookedGemma4.forward` last.

What is unusual about this family, each where it happens: in `norms.py`, no "+1"; in `attention.py`, scale 1, normed
queries, keys *and* values, values taken before the key norm where one projection serves both, rope that turns a quarter
of the wide heads, and layers that read an earlier layer's keys and values; in `moe.py`, a router that reads the raw
stream; here, four norms a block, the output of each sub-layer normed before it is added, per-layer embeddings, and a
scalar that multiplies the whole stream at the end of each block.

Every part has two lines: `forward`, which touches no hook point, and `with_sites`, the same arithmetic with every
tensor shown. A part runs the second only while one of its points has a hook.
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
from gemmascope.hooks import Part, Progress, Site, WatchedBlock, untouched, watched, written
from gemmascope.model.attention import Attention
from gemmascope.model.inputs import Pass, prepare
from gemmascope.model.lens import LensModel
from gemmascope.model.linear import Linear
from gemmascope.model.moe import MoE, drawn
from gemmascope.model.norms import RMSNorm, SiteNorm, Stream, added
from gemmascope.rerun import kinds_of, modules_of
from gemmascope.tokenizer import Gemma4Tokenizer


class MLP(Part):
    """down(gelu(gate) * up). TransformerLens calls gate's output `pre`, up's `pre_linear` and their product `post`."""

    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        self.gate_proj = Linear(d_model, d_mlp)
        self.up_proj = Linear(d_model, d_mlp)
        self.down_proj = Linear(d_mlp, d_model)
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
        if sites and self.shown:
            return self.with_sites(x)
        if all(untouched(part, Linear) for part in (self.gate_proj, self.up_proj, self.down_proj)):
            return ops.mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x)))

    def with_sites(self, x: Stream) -> Stream:
        gate, up = self.hook_pre(self.gate_proj(x)), self.hook_pre_linear(self.up_proj(x))
        return self.hook_out(self.down_proj(self.hook_post(ops.geglu(gate, up))))


class PerLayer(nn.Module):
    """The per-layer signal of every layer at once: half a table look-up, half a projection of the embedding."""

    def __init__(self, cfg: Gemma4Config):
        super().__init__()
        self.n_layers, self.d_ple = cfg.n_layers, cfg.d_ple
        width = cfg.n_layers * cfg.d_ple
        self.table = nn.Embedding(cfg.d_vocab_ple, width, _weight=drawn(cfg.d_vocab_ple, width))
        self.proj = Linear(cfg.d_model, width)
        self.norm = RMSNorm(cfg.d_ple, cfg.eps)

    def forward(self, tokens: Int[Tensor, "batch pos"], embed: Stream) -> Float[Tensor, "batch pos layer d_ple"]:
        by_layer = (self.n_layers, self.d_ple)
        from_token = (self.table(tokens) * scale_as(self.table.weight, self.d_ple)).unflatten(-1, by_layer)
        from_embed = self.norm((self.proj(embed) * embed.shape[-1] ** -0.5).unflatten(-1, by_layer))
        return (from_embed + from_token) * 2**-0.5


class PLE(Part):
    """One layer's use of its signal: the stream gates it, and it is projected back."""

    def __init__(self, cfg: Gemma4Config):
        super().__init__()
        self.gate = Linear(cfg.d_model, cfg.d_ple)
        self.proj = Linear(cfg.d_ple, cfg.d_model)
        self.hook_gate, self.hook_post = Site(), Site()

    def forward(self, x: Stream, signal: Tensor, sites: bool = False) -> Stream:
        if sites and self.shown:
            return self.with_sites(x, signal)
        return self.proj(ops.geglu(self.gate(x), signal))

    def with_sites(self, x: Stream, signal: Tensor) -> Stream:
        return self.proj(self.hook_post(ops.geglu(self.hook_gate(self.gate(x)), signal)))


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
        x = added(x, self.attn(self.ln1(x), run), self.ln1_post)
        out = self.mlp(self.ln2(x))
        if self.moe is not None:
            experts = self.moe(self.moe_ln_pre(x), self.moe.router(x, sites=self.router_watched))
            out = added(self.dense_ln_post(out), experts, self.moe_ln_post)
        if self.ple is None:
            return added(x, out, self.ln2_post, self.layer_scalar)
        x = added(x, out, self.ln2_post)
        return added(x, self.ple(x, run.ple[:, :, self.layer]), self.ple_ln_post, self.layer_scalar)

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
        return ops.linear(x, self._embed[0].weight)


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
        self._shared_kv = False
        self.following: list[Progress] = []
        """Whom to tell, as a pass begins, where in its sequence it stands."""
        self.built = [kinds_of(modules_of(self, stage)) for stage in range(cfg.n_layers + 1)]
        self.setup()
        self.sync_cfg()

    def sync_cfg(self) -> None:
        """cfg.dtype and cfg.device follow the weights."""
        weight = self.embed.weight
        self.cfg = replace(self.cfg, dtype=weight.dtype, device=weight.device)
        _ = self.cfg.layers  # found once, here: torch.compile cannot trace into a cached property's lock

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.sync_cfg()
        return self

    @property
    def shared_kv(self) -> bool:
        """Whether layers whose keys and values are one projection keep, and read, one tensor for both.

        Off by default. On the global layers of 26B-A4B and 31B it saves 37.5 % of the KV cache and of what attention
        reads. The key norm's weight then multiplies queries in place of keys: the same number in exact arithmetic, and
        in bfloat16 another rounding than transformers'.
        """
        return self._shared_kv

    @shared_kv.setter
    def shared_kv(self, on: bool) -> None:
        if on and not any(layer.k_is_v for layer in self.cfg.layers):
            raise ValueError(f"{self.cfg.model_name} has no layer whose keys and values are one: leave shared_kv off.")
        self._shared_kv = on

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

    def _logits(self, x: Stream) -> Float[Tensor, "batch pos d_vocab"]:
        x, cap = self.unembed(self.ln_final(x, sites=True)), self.cfg.final_softcap
        if cap is None or torch.is_grad_enabled() or watched(self.hook_unembed) or not untouched(self.unembed, Unembed):
            x = self.softcap(self.hook_unembed(x))
        else:
            x.div_(cap).tanh_().mul_(cap)  # the largest tensor of all: once in memory, not four times
        return self.hook_logits(x)

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
        interventions=(),
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
            interventions: edits of this run (see `gemmascope.interventions`).

        Returns:
            logits [batch, pos, d_vocab], the loss, both as a tuple, or None.

        Raises:
            ValueError: for an empty prompt, one longer than the context, or a token id out of range.
        """
        run = input if isinstance(input, Pass) else self._begin(
            input, attention_mask, position_ids, past_kv_cache, image_blocks, prepend_bos
        )  # fmt: skip
        if interventions:
            with self.with_interventions(interventions):
                return self(run, return_type=return_type, loss_per_token=loss_per_token, stop_at_layer=stop_at_layer)
        stop = self._stop(stop_at_layer, run)
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(f"return_type is {return_type!r}; it is 'logits', 'loss', 'both' or None.")
        for now in self.following:
            now.begin(run.past)
        first, x = run.start or (0, None)
        if x is None:
            x = self.hook_embed(self.embed(run.tokens) * scale_as(self.embed.weight, self.cfg.d_model))
            if self.per_layer is not None:
                run.ple = self.hook_ple_inputs(self.per_layer(run.tokens, x))
        for block in self.blocks[first:stop]:
            with run.entering(block.layer, x):
                x = block(x, run)
        if run.past is not None:
            run.past.advance(run.tokens.shape[1], run.mask)
        if stop is not None:
            return x
        with run.entering(self.cfg.n_layers, x):
            return self._head(x, run, return_type, loss_per_token)

    def _head(self, x: Stream, run: Pass, return_type: str | None, loss_per_token: bool):
        head = (self.ln_final.hook_scale, self.ln_final.hook_normalized, self.hook_unembed, self.hook_logits)
        if not any(watched(point) for point in head):
            if return_type is None:
                return None
            x = x[:, -1:] if run.last_only else x
        logits = self._logits(x)
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
        run = prepare(self.cfg, tokens, attention_mask, position_ids, past, image_blocks)
        run.shared_kv = self.shared_kv
        return run

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
        points = (point for block in self.blocks[stop:] for point in block.points)
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
