"""Small models for tests: every feature of each published architecture, a few thousand random parameters."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gemmascope.config import PRESETS, Gemma4Config
from gemmascope.model.norms import RMSNorm
from gemmascope.model.text import HookedGemma4
from gemmascope.weights import hf_name

ARCHITECTURES = tuple(name.removeprefix("google/gemma-4-") for name in PRESETS)
"""E2B, E4B, 12B, 26B-A4B, 31B."""


def tiny_config(architecture: str, **changes) -> Gemma4Config:
    """One of ARCHITECTURES, shrunk, with its kinds of layers, K=V, KV sharing, per-layer embeddings and experts."""
    cfg = PRESETS[f"google/gemma-4-{architecture}"]
    n_layers = 8 if cfg.n_kv_shared_layers else 6
    every = 2 if cfg.n_kv_shared_layers else 3
    small: dict[str, Any] = dict(
        n_layers=n_layers,
        layer_kinds=tuple("global" if (layer + 1) % every == 0 else "sliding" for layer in range(n_layers)),
        d_model=48,
        n_heads=4,
        d_vocab=101,
        n_ctx=512,
        window=7,
        d_head_sliding=8,
        d_head_global=16,
        n_kv_heads_sliding=min(cfg.n_kv_heads_sliding, 2),
        n_kv_heads_global=min(cfg.n_kv_heads_global, 2) if not cfg.k_is_v else 1,
        d_mlp_narrow=40,
        n_kv_shared_layers=4 if cfg.n_kv_shared_layers else 0,
        dtype="float32",
        model_name=f"tiny {architecture}",
    )
    if cfg.n_experts:
        small |= dict(n_experts=8, experts_per_token=3, d_expert=20)
    if cfg.d_ple:
        small |= dict(d_ple=12, d_vocab_ple=101)
    return replace(cfg, **(small | changes))


def tiny_model(architecture: str, seed: int = 0, **changes) -> HookedGemma4:
    """A tiny model in eval mode; norms, scales and layer_scalars are drawn away from 1, so none is forgotten unseen."""
    model = HookedGemma4(tiny_config(architecture, **changes))
    generator = torch.Generator().manual_seed(seed)

    def near_one(tensor: Tensor) -> None:
        tensor.uniform_(0.5, 1.5, generator=generator)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("layer_scalar", "per_expert_scale", "router.scale")):
                near_one(tensor)
            elif tensor.ndim > 1:
                # Matrices keep the size of what passes through them; the embedding starts at RMS 1 after its scale.
                tensor.normal_(0, (tensor.shape[-1]) ** -0.5, generator=generator)
        for name, module in model.named_modules():
            if isinstance(module, RMSNorm):
                near_one(module.weight)
                if name.endswith(("q_norm", "k_norm")):
                    module.weight *= module.weight.numel() ** -0.25  # scores of standard deviation 1, the scale being 1
    return model.eval()


def transformers_twin(
    model: HookedGemma4, dtype: torch.dtype = torch.float32, attention: str = "eager", experts: str = "eager"
):
    """transformers' own Gemma 4 with the weights of `model`, by one of its implementations of attention and experts."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    ours = ("architectures", "model_type", "dtype")
    raw = {key: value for key, value in model.cfg.to_hf().items() if key not in ours}
    cfg = Gemma4TextConfig(**raw, attn_implementation=attention, experts_implementation=experts)
    twin = Gemma4ForCausalLM(cfg).eval()
    weights = {f"model.{hf_name(name)}": tensor for name, tensor in model.state_dict().items()}
    keys = twin.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) <= {"lm_head.weight"}, keys
    twin.tie_weights()
    return twin.to(dtype)
