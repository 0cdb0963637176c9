"""Models with weights set by hand, so that what they compute is known: a blank Gemma 4, and how to write a part of it.

A blank model is all of Gemma 4's arithmetic in float64 with every matrix 0: global layers, a dense MLP, no soft cap.
Its norms are either live (eps 1e-6), or `linear`: an eps of 1e20 makes a norm x / 1e10 * gain, and gains of 1e10 make
that the identity, so that programs for models without norms can be compiled into it as they are.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from gemmascope.model.text import HookedGemma4
from gemmascope.testing import tiny_config

LINEAR = 1e20
"""An eps beside which the mean square of any stream is nothing, in float64."""
D_HEAD = 32
STILL = (*range(4, 16), *range(20, 32))
"""The dimensions of a head that rope does not turn: what is written there does not depend on positions."""


def blank(n_layers: int, n_heads: int, d_model: int, d_vocab: int, d_mlp: int = 4, linear: bool = False):
    """A model that gives 0 for everything. Its embedding is scaled by sqrt(d_model): see `embed`."""
    cfg = replace(
        tiny_config("31B"),
        n_layers=n_layers,
        layer_kinds=("global",) * n_layers,
        n_heads=n_heads,
        n_kv_heads_global=n_heads,
        n_kv_heads_sliding=n_heads,
        k_is_v=False,
        d_model=d_model,
        d_head_global=D_HEAD,
        d_mlp_narrow=d_mlp,
        d_vocab=d_vocab,
        final_softcap=None,
        eps=LINEAR if linear else 1e-6,
    )
    model = HookedGemma4(cfg).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(cfg.eps**0.5 if linear and weight.ndim == 1 else weight.ndim == 1)
    return model


@torch.no_grad()
def embed(model: HookedGemma4, rows: Float[Tensor, "d_vocab d_model"], read: Tensor | float = 1.0) -> None:
    """Token t enters the stream as rows[t], and its logit is the final stream's product with read * rows[t].

    With live norms the stream is normed before it is read."""
    scale = model.cfg.d_model**0.5
    model.embed.weight.copy_(rows / scale)
    model.ln_final.weight.mul_(scale * read)


@torch.no_grad()
def head(model: HookedGemma4, layer: int, head: int, **parts: list[tuple[int, int, float]]) -> None:
    """Writes q, k, v or o of a head: (dimension of the stream, channel of the head, weight) each.

    Linear norms leave queries, keys and values as they are (W_O undoes the value norm, which has no gain)."""
    attn, eps = model.blocks[layer].attn, model.cfg.eps
    undone = eps**0.5 if eps == LINEAR else 1.0
    for name, entries in parts.items():
        for dim, channel, weight in entries:
            row = head * D_HEAD + STILL[channel]
            if name == "o":
                attn.o_proj.weight[dim, row] += weight * undone
            else:
                getattr(attn, f"{name}_proj").weight[row, dim] += weight


@torch.no_grad()
def noise_head(model: HookedGemma4, layer: int, head: int, to: slice) -> None:
    """Makes a head read everything at random, and write at random to some dimensions."""
    attn, rows = model.blocks[layer].attn, slice(head * D_HEAD, (head + 1) * D_HEAD)
    for proj in (attn.q_proj, attn.k_proj, attn.v_proj):
        proj.weight[rows].normal_(0, 0.1)
    attn.o_proj.weight[to, rows].normal_(0, 0.1 * model.cfg.eps**0.5)


@torch.no_grad()
def noise_mlp(model: HookedGemma4, layer: int, neurons: slice, to: slice) -> None:
    """Makes neurons read everything at random, and write at random to some dimensions."""
    mlp = model.blocks[layer].mlp
    mlp.gate_proj.weight[neurons].normal_(0, 0.1)
    mlp.up_proj.weight[neurons].normal_(0, 0.1)
    mlp.down_proj.weight[to, neurons].normal_(0, 0.1)
