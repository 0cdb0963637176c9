"""From token ids, masks and positions to what the layers of one pass share. What cannot be right is refused here."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemmascope import ops
from gemmascope.config import Gemma4Config, LayerKind
from gemmascope.generate import KVCache


@dataclass
class Pass:
    """One forward pass: its input, and what its layers share."""

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch key"] | None
    """False on padding, earlier tokens included; None when there is none."""
    rope: dict[LayerKind, tuple[Tensor, Tensor]]
    masks: dict[LayerKind, ops.Mask]
    past: KVCache | None
    ple: Float[Tensor, "batch pos layer d_ple"] | None = None
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Keys and values of the layers that later ones read."""
    shared_kv: bool = False
    """Whether K = V layers keep and read their keys' turning columns only (HookedGemma4.shared_kv)."""
    last_only: bool = False
    """Only the last position's logits are wanted, unless a hook looks at the others."""
    start: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None
    """A layer, and the stream that enters it: the layers before are not run."""
    record: Any = None
    """What keeps the stream before each stage (see `Rerun.entering`), so that a part of the pass can be run again."""

    def entering(self, stage: int, x: Tensor) -> AbstractContextManager:
        """Goes around a block, or the head as stage n_layers; `x` is the stream that enters it."""
        return nullcontext() if self.record is None else self.record.entering(stage, x)


def prepare(
    cfg: Gemma4Config,
    tokens,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past: KVCache | None = None,
    image_blocks: Tensor | None = None,
) -> Pass:
    """Checks the arguments of forward and builds rope tables and masks, one of each a kind of layer.

    Raises:
        TypeError, ValueError: for anything that would give numbers other than those meant.
    """
    tokens = _checked_tokens(cfg, tokens)
    before = 0 if past is None else past.length
    batch, total = tokens.shape[0], before + tokens.shape[1]
    if total > cfg.n_ctx:
        raise ValueError(f"The prompt has {total} tokens but {cfg.model_name} reads at most {cfg.n_ctx}; shorten it.")
    if before and past.batch != batch:
        raise ValueError(f"past_kv_cache holds {past.batch} sequences and {batch} came: continue them all, or none.")
    mask = _mask(cfg, tokens, attention_mask, past, total)
    if position_ids is None:
        count = torch.arange(total, device=tokens.device)[None]
        count = count if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        position_ids = count[:, before:]
    elif position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens.shape[1]:
        raise ValueError(f"position_ids has shape {list(position_ids.shape)}; the tokens need {list(tokens.shape)}.")
    if image_blocks is not None:
        _check_blocks(cfg, image_blocks, before, (batch, total))

    rope, masks = {}, {}
    for layer in {layer.kind: layer for layer in cfg.layers}.values():
        rope[layer.kind] = ops.rope_tables(
            position_ids.to(tokens.device), layer.d_head, layer.rope_theta, layer.rope_fraction, cfg.dtype
        )
        first = 0 if past is None else past.first_kept(layer.window)
        blocks = image_blocks if layer.window is not None else None  # global layers read images causally
        masks[layer.kind] = ops.Mask(
            n_queries=tokens.shape[1],
            n_keys=total - first,
            device=tokens.device,
            window=layer.window,
            key_mask=None if mask is None else mask[:, first:],
            image_blocks=None if blocks is None else blocks[:, first:].to(tokens.device, copy=True),
        )
    return Pass(tokens, mask, rope, masks, past)


def _readable(tensor: Tensor) -> bool:
    """Whether numbers can be looked at now: not on `meta`, nor while torch.compile traces, which would break there."""
    return not tensor.is_meta and not torch.compiler.is_compiling()


def _checked_tokens(cfg: Gemma4Config, tokens) -> Int[Tensor, "batch pos"]:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"The model takes text or a tensor of token ids, not a {type(tokens).__name__}.")
    if tokens.ndim not in (1, 2) or tokens.is_floating_point():
        raise ValueError(
            f"Token ids are integers of shape [batch, pos]; got {tokens.dtype} of shape {list(tokens.shape)}."
        )
    tokens = tokens.to(cfg.device, torch.long)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.numel() == 0:
        raise ValueError("The prompt is empty: give at least one token (BOS alone will do).")
    if _readable(tokens):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= cfg.d_vocab:
            raise ValueError(
                f"Token id {low if low < 0 else high} is out of range: {cfg.model_name} has ids 0 to {cfg.d_vocab - 1}."
            )
    return tokens


def _mask(
    cfg: Gemma4Config, tokens: Tensor, attention_mask: Tensor | None, past: KVCache | None, total: int
) -> Bool[Tensor, "batch key"] | None:
    """The attention mask over all tokens so far, None when nothing is padding."""
    batch, earlier = tokens.shape[0], None if past is None else past.mask
    if attention_mask is None:
        if earlier is not None:  # what was padding stays padding
            return torch.cat((earlier, torch.ones_like(tokens, dtype=torch.bool)), dim=1)
        at_an_end = (tokens[:, 0] == cfg.pad_token_id) | (tokens[:, -1] == cfg.pad_token_id)
        if past is None and tokens.shape[1] > 1 and _readable(tokens) and at_an_end.any():
            raise ValueError(
                f"Row {int(at_an_end.nonzero()[0])} of the tokens starts or ends with padding (id {cfg.pad_token_id}) "
                "and no attention_mask came: pass attention_mask=(tokens != pad_token_id), or a mask of ones."
            )
        return None
    if attention_mask.shape != (batch, total):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; the tokens so far need {[batch, total]}."
        )
    mask = attention_mask.to(tokens.device, torch.bool, copy=True)  # a cache may read it later
    return mask if earlier is not None or not _readable(mask) or not mask.all() else None


def _check_blocks(cfg: Gemma4Config, blocks: Tensor, before: int, shape: tuple[int, int]) -> None:
    if not cfg.bidirectional_images:
        raise ValueError(f"{cfg.model_name} reads images causally: leave image_blocks out.")
    if blocks.shape != shape:
        raise ValueError(f"image_blocks has shape {list(blocks.shape)}; the tokens so far need {list(shape)}.")
    if before and ((blocks[:, before - 1] == blocks[:, before]) & (blocks[:, before] >= 0)).any():
        raise ValueError("An image lies partly in past_kv_cache: give all of its tokens in one pass.")
