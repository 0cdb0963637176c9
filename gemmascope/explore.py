"""One prompt, looked at from every side: what a page needs to show it, and the page.

`explore` runs the model once and reduces the run to plain arrays; `write_page` turns them into one self-contained HTML
file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, UInt8
from torch import Tensor
from torch.nn import functional as F

from gemmascope.cache import ActivationCache
from gemmascope.widgets.explore import page  # noqa: TID251  (this module is the page's other half, no part of the core)

MAX_SIDE = 256
"""Attention maps of longer prompts are pooled to at most this many blocks a side."""
LENS_ELEMENTS = 2**26
"""Logits held at once while the lens is read: 256 MB of float32."""


@dataclass(frozen=True)
class Exploration:
    """One run on one prompt. A row of the lens is a place in the stream: 0 the embedding, l + 1 after layer l."""

    model_name: str
    prompt: str
    tokens: tuple[str, ...]
    """The text of each token, BOS included where the tokenizer adds it."""
    ids: Int32[np.ndarray, " pos"]
    surprise: Float32[np.ndarray, " pos"]
    """-log p(token | the tokens before), in nats; NaN at the first token, which nothing precedes."""
    lens_ids: Int32[np.ndarray, "pos row rank"]
    """The most probable tokens of softmax(softcap(unembed(ln_final(stream)))), most probable first."""
    lens_probs: Float32[np.ndarray, "pos row rank row"]
    """[p, r, i, s]: the probability, at row s of position p, of the token lens_ids[p, r, i]. So the token's course over
    the layers is [p, r, i], and its probability in its own cell is [p, r, i, r]."""
    lens_tokens: dict[int, str]
    """The text of every id in `lens_ids`."""
    patterns: UInt8[np.ndarray, "layer head query key"]
    """Attention times 255, rounded; the largest weight of each block of `block` queries x `block` keys."""
    block: int
    """Positions a cell of `patterns` covers in each direction: 1 up to 256 tokens."""
    layer_kinds: tuple[str, ...]
    """"sliding" or "global"."""
    window: int
    """Keys a query of a sliding layer sees, its own included."""
    n_kv_heads: tuple[int, ...]
    kv_sources: tuple[int | None, ...]
    """The layer whose keys and values each layer reads, None where it has its own."""
    n_experts: int | None
    expert_indices: Int32[np.ndarray, "layer pos slot"] | None
    """Chosen experts, numbered within their layer; None for a model without experts."""
    expert_weights: Float32[np.ndarray, "layer pos slot"] | None
    """Their final weights."""


@torch.inference_mode()
def explore(model: Any, prompt: str, *, top_k: int = 10) -> Exploration:
    """Runs `model` once on `prompt`, hooks and all, and keeps what a page shows.

    Patterns are recomputed layer by layer, some rows at a time, so that no full map of a long prompt is ever held.

    Args:
        top_k: tokens kept for each cell of the logit lens.

    Raises:
        ValueError: for an empty prompt, or a `top_k` the vocabulary does not have.
    """
    cfg = model.cfg
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"There is nothing to explore in {prompt!r}: give one prompt of at least one character.")
    if not 1 <= top_k <= cfg.d_vocab:
        raise ValueError(f"top_k is {top_k}; {cfg.model_name} has a vocabulary to take 1 to {cfg.d_vocab} tokens from.")
    tokens = model.to_tokens(prompt)
    logits, cache = model.run_with_cache(tokens, names_filter=_names(model))
    n_pos, layers = tokens.shape[1], range(cfg.n_layers)

    streams = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in layers)]
    lens_ids, lens_probs = _lens(model, [stream[0] for stream in streams], top_k)
    shown = lens_ids.unique()
    block = -(-n_pos // MAX_SIDE)
    routed = {
        what: np.stack([_array(cache[f"moe.router.{what}", layer][0]) for layer in layers]) if cfg.n_experts else None
        for what in ("hook_indices", "hook_weights")
    }
    return Exploration(
        model_name=cfg.model_name,
        prompt=prompt,
        tokens=tuple(model.to_str_tokens(tokens[0])),
        ids=_array(tokens[0]),
        surprise=_array(_surprise(logits[0], tokens[0])),
        lens_ids=_array(lens_ids),
        lens_probs=_array(lens_probs),
        lens_tokens=dict(zip(shown.tolist(), model.to_str_tokens(shown), strict=True)),
        patterns=np.stack([_array(_codes(cache, layer, n_pos, block)) for layer in layers]),
        block=block,
        layer_kinds=cfg.layer_kinds,
        window=cfg.window,
        n_kv_heads=tuple(model.layer(layer).n_kv_heads for layer in layers),
        kv_sources=tuple(model.layer(layer).kv_source for layer in layers),
        n_experts=cfg.n_experts,
        expert_indices=routed["hook_indices"],
        expert_weights=routed["hook_weights"],
    )


def write_page(model: Any, prompt: str, path: str | Path) -> Path:
    """Writes the page about one prompt: one HTML file that needs nothing else. Raises as `explore` does."""
    html = page(**vars(explore(model, prompt)))
    path = Path(path)
    path.write_text(html, encoding="utf-8")
    return path


def _names(model: Any) -> list[str]:
    """The stream, the routing, and what patterns are recomputed from; a pattern itself only where a hook edits it."""
    names = ["blocks.0.hook_resid_pre"]
    for layer in range(model.cfg.n_layers):
        names += [f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.attn.hook_rot_q"]
        if model.layer(layer).kv_source is None:
            names.append(f"blocks.{layer}.attn.hook_rot_k")
        if model.cfg.n_experts:
            names += [f"blocks.{layer}.moe.router.hook_indices", f"blocks.{layer}.moe.router.hook_weights"]
    return names + sorted(name for name in model.changed_expansions() if name.endswith("hook_pattern"))


def _surprise(logits: Float[Tensor, "pos d_vocab"], ids: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    nats = F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
    return torch.cat((nats.new_full((1,), torch.nan), nats))


def _lens(
    model: Any, streams: list[Float[Tensor, "pos d_model"]], top_k: int
) -> tuple[Int[Tensor, "pos row rank"], Float[Tensor, "pos row rank row"]]:
    """The ids and probabilities of `Exploration`, a few positions at a time: the whole vocabulary is wide."""
    n_pos, n_rows = len(streams[0]), len(streams)
    step = max(1, LENS_ELEMENTS // (n_rows * model.cfg.d_vocab))
    ids, probs = [], []
    for first in range(0, n_pos, step):
        stream = torch.stack([stream[first : first + step] for stream in streams], dim=1)
        p = model.softcap(model.unembed(model.ln_final(stream))).float().softmax(-1)  # [pos, row, d_vocab]
        top = p.topk(top_k).indices  # [pos, row, rank]
        wanted = top.flatten(1)[:, None].expand(-1, n_rows, -1)  # at every row, the tokens of all rows
        ids.append(top)
        probs.append(p.gather(-1, wanted).unflatten(-1, top.shape[1:]).movedim(1, -1))
    return torch.cat(ids), torch.cat(probs)


def _codes(cache: ActivationCache, layer: int, n_pos: int, block: int) -> UInt8[Tensor, "head query key"]:
    """The pooled, quantised pattern of `Exploration`, computed some rows at a time."""
    rows = block * max(1, MAX_SIDE // block)
    pieces = [cache.pattern(layer, rows=slice(first, first + rows))[0] for first in range(0, n_pos, rows)]
    pooled = torch.cat([F.max_pool2d(piece, block, ceil_mode=True) for piece in pieces], dim=1)
    return (pooled * 255).round().to(torch.uint8)


def _array(tensor: Tensor) -> np.ndarray:
    """float32, int32 or uint8, which is what pages carry."""
    narrow = {torch.int64: torch.int32, torch.uint8: torch.uint8}
    return tensor.to("cpu", narrow.get(tensor.dtype, torch.float32)).numpy()
