"""SITES: the one table of hook points. What can be read and changed in a model, with axes and meaning."""

from typing import NamedTuple

from gemmascope.config import Gemma4Config, LayerGeometry


class SiteInfo(NamedTuple):
    """One row of the table: a hook point, or one in every block when the name has `{l}`."""

    name: str
    axes: str
    """Spaced: batch pos query key head kv_head layer slot expert d_model d_head d_mlp d_expert d_ple d_vocab 1."""
    meaning: str
    where: str = "every layer"
    """Which layers have it: "every layer", "own kv", "moe", "ple"; or "model" for a point outside the blocks."""
    expansion: bool = False
    """An expansion of other sites: recomputed on demand, stored in a cache only when named."""


def _norm_sites(norm: str, of: str, where: str = "every layer") -> tuple[SiteInfo, SiteInfo]:
    prefix = norm if where == "model" else "blocks.{l}." + norm
    return (
        SiteInfo(f"{prefix}.hook_scale", "batch pos 1", f"RMS, eps included, of {of}", where),
        SiteInfo(f"{prefix}.hook_normalized", "batch pos d_model", f"{of}, divided by its RMS, before the gain", where),
    )


_STREAM, _QUERY, _KV, _MLP = "batch pos d_model", "batch pos head d_head", "batch pos kv_head d_head", "batch pos d_mlp"
_EXPERT = "batch pos slot d_expert"

SITES: tuple[SiteInfo, ...] = (
    SiteInfo("hook_embed", _STREAM, "token embedding after the sqrt(d_model) scale", "model"),
    SiteInfo("hook_ple_inputs", "batch pos layer d_ple", "the per-layer signal", "ple model"),
    SiteInfo("blocks.{l}.hook_resid_pre", _STREAM, "the stream before the block"),
    *_norm_sites("ln1", "the stream before attention"),
    SiteInfo("blocks.{l}.attn.hook_q", _QUERY, "query projection, before norm and rope"),
    SiteInfo("blocks.{l}.attn.hook_k", _KV, "key projection, before norm and rope", "own kv"),
    SiteInfo("blocks.{l}.attn.hook_v", _KV, "value projection, before its norm", "own kv"),
    SiteInfo("blocks.{l}.attn.hook_q_normed", _QUERY, "queries after their norm"),
    SiteInfo("blocks.{l}.attn.hook_k_normed", _KV, "keys after their norm", "own kv"),
    SiteInfo("blocks.{l}.attn.hook_v_normed", _KV, "values after their norm: what heads mix", "own kv"),
    SiteInfo("blocks.{l}.attn.hook_rot_q", _QUERY, "queries after rope"),
    SiteInfo("blocks.{l}.attn.hook_rot_k", _KV, "keys after rope", "own kv"),
    SiteInfo(
        "blocks.{l}.attn.hook_attn_scores", "batch head query key", "masked scores before the softmax", expansion=True
    ),
    SiteInfo("blocks.{l}.attn.hook_pattern", "batch head query key", "attention after the softmax", expansion=True),
    SiteInfo("blocks.{l}.attn.hook_z", _QUERY, "per-head value mix, the input of W_O"),
    SiteInfo(
        "blocks.{l}.attn.hook_result", "batch pos head d_model", "per-head output before the post-norm", expansion=True
    ),
    *_norm_sites("ln1_post", "the attention output"),
    SiteInfo("blocks.{l}.hook_attn_out", _STREAM, "what attention adds to the stream"),
    SiteInfo("blocks.{l}.hook_resid_mid", _STREAM, "the stream after attention"),
    *_norm_sites("ln2", "the stream before the dense MLP"),
    SiteInfo("blocks.{l}.mlp.hook_pre", _MLP, "gate, before the activation"),
    SiteInfo("blocks.{l}.mlp.hook_pre_linear", _MLP, "up projection"),
    SiteInfo("blocks.{l}.mlp.hook_post", _MLP, "gelu(gate) * up: the neurons"),
    SiteInfo("blocks.{l}.mlp.hook_out", _STREAM, "dense MLP output before any post-norm"),
    *_norm_sites("dense_ln_post", "the dense MLP output", "moe"),
    SiteInfo("blocks.{l}.hook_dense_out", _STREAM, "the dense branch after its own post-norm", "moe"),
    SiteInfo("blocks.{l}.moe.router.hook_in", _STREAM, "normed and scaled router input", "moe"),
    SiteInfo(
        "blocks.{l}.moe.router.hook_logits",
        "batch pos expert",
        "before the softmax; a write re-derives the selection",
        "moe",
    ),
    SiteInfo(
        "blocks.{l}.moe.router.hook_probs",
        "batch pos expert",
        "after the softmax; a write re-derives the selection",
        "moe",
    ),
    SiteInfo(
        "blocks.{l}.moe.router.hook_indices",
        "batch pos slot",
        "chosen experts (int64); a write forces the choice and re-derives the weights",
        "moe",
    ),
    SiteInfo("blocks.{l}.moe.router.hook_weights", "batch pos slot", "final weights of the chosen experts", "moe"),
    *_norm_sites("moe_ln_pre", "the stream before the experts", "moe"),
    SiteInfo("blocks.{l}.moe.hook_expert_pre", _EXPERT, "gate inside the chosen experts", "moe"),
    SiteInfo("blocks.{l}.moe.hook_expert_pre_linear", _EXPERT, "up projection inside the chosen experts", "moe"),
    SiteInfo("blocks.{l}.moe.hook_expert_post", _EXPERT, "neurons of the chosen experts", "moe"),
    SiteInfo(
        "blocks.{l}.moe.hook_expert_out",
        "batch pos slot d_model",
        "each chosen expert's weighted output",
        "moe",
        expansion=True,
    ),
    SiteInfo("blocks.{l}.moe.hook_out", _STREAM, "sum over slots, before the post-norm", "moe"),
    *_norm_sites("moe_ln_post", "the expert sum", "moe"),
    SiteInfo("blocks.{l}.hook_moe_out", _STREAM, "the expert branch after its own post-norm", "moe"),
    *_norm_sites("ln2_post", "the feed-forward output"),
    SiteInfo("blocks.{l}.hook_mlp_out", _STREAM, "what the feed-forward adds to the stream"),
    SiteInfo("blocks.{l}.hook_resid_mlp", _STREAM, "the stream after the feed-forward"),
    SiteInfo("blocks.{l}.ple.hook_gate", "batch pos d_ple", "per-layer gate before the activation", "ple"),
    SiteInfo("blocks.{l}.ple.hook_post", "batch pos d_ple", "the gated per-layer signal", "ple"),
    *_norm_sites("ple_ln_post", "the per-layer output", "ple"),
    SiteInfo("blocks.{l}.hook_ple_out", _STREAM, "what the per-layer embedding adds to the stream", "ple"),
    SiteInfo("blocks.{l}.hook_resid_post", _STREAM, "the stream after the per-layer embedding and layer_scalar"),
    *_norm_sites("ln_final", "the final stream", "model"),
    SiteInfo("hook_unembed", "batch pos d_vocab", "logits before the soft cap", "model"),
    SiteInfo("hook_logits", "batch pos d_vocab", "logits after the soft cap", "model"),
)
"""Every hook point, in the order in which a forward pass meets them."""


def _has(site: SiteInfo, cfg: Gemma4Config, layer: LayerGeometry | None) -> bool:
    match site.where:
        case "own kv":
            return layer is not None and layer.kv_source is None
        case "moe":
            return cfg.n_experts is not None
        case "ple" | "ple model":
            return cfg.d_ple is not None
        case _:
            return True


def sites_of(cfg: Gemma4Config) -> dict[str, SiteInfo]:
    """The hook points of one model, by full name."""
    found = {}
    for site in SITES:
        if "{l}" not in site.name:
            found |= {site.name: site} if _has(site, cfg, None) else {}
        else:
            having = [number for number, layer in enumerate(cfg.layers) if _has(site, cfg, layer)]
            found |= {site.name.format(l=number): site for number in having}
    return found
