"""A head's two circuits, from its weights: QK says which token attends to which, OV what attending to one does.

Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021), restricted to given tokens. Three
conventions, since norms stand where the paper's model has none:

- A token's stream is what the first `blocks` blocks make of it after <bos>: 0 is the bare embedding (Elhage 2021), 1
  the stream after the first block (as Wang et al. 2022 do), which is what later layers know of a token by itself. A
  layer never reads a stream later than its own input.
- Queries, keys and values go through their own norms exactly. A value has RMS 1 after its norm, so there is no OV
  matrix, only its effect on each token; the scale of a token's row says nothing, its order does.
- The post-attention norm and the final norm depend on the other heads: their gains apply, their scales are 1.

A layer that reads an earlier layer's keys and values takes their weights, and the tokens' streams, there.
"""

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemmascope import ops
from gemmascope.metrics import Answer, answer_ids
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.results import Result, about

Streams = Float[Tensor, "token d_model"]
TOP = 5
"""A token counts as copied when its logit is among this many largest (Wang et al. 2022)."""
_VOCABULARY_PART = 2**14


def qk_scores(model, layer: int, head: int, tokens: Answer, *, distance: int = 0, blocks: int = 1) -> Result:
    """The attention score, before the softmax, of each token as a query for each token as a key.

    Args:
        tokens: texts or ids of single tokens.
        distance: how many positions the query is after the key (rope turns them accordingly).
        blocks: how many blocks make a token's stream; see the module.

    Returns:
        A Result with cells (query, key), one sample.

    Raises:
        ValueError: for a layer or head that is not there, a text that is not one token, or a distance out of sight.
    """
    geometry, head = model.layer(layer), _head(model, head)
    reach = min(model.cfg.n_ctx, geometry.window or model.cfg.n_ctx)
    if not 0 <= distance < reach:
        raise ValueError(f"distance is {distance}; a query of layer {layer} sees 0 to {reach - 1} positions back.")
    ids = answer_ids(model, tokens)
    layer, source = _layers(model, layer)
    with torch.no_grad():
        queries = _projected(model, layer, ids, blocks, "q")[:, head]
        keys = _projected(model, source, ids, blocks, "k")[:, _kv_head(model, source, head)]
        places = torch.full((1, distance + 1), model.cfg.bos_token_id, device=ids.device)
        cos, sin = model._begin(places).rope[geometry.kind]
        queries = ops.rotate(queries[:, None, None], cos[:, -1:], sin[:, -1:])[:, 0, 0]
        keys = ops.rotate(keys[:, None, None], cos[:, :1], sin[:, :1])[:, 0, 0]
        scores = ops.wide(queries) @ ops.wide(keys).T
    said = about(model, layer=layer, head=head, distance=distance, blocks=blocks, ids=ids.tolist())
    return _square(model, f"QK of layer {layer}, head {head}", ("query", "key"), ids, scores, "score", said)


def ov_scores(model, layer: int, head: int, tokens: Answer, *, blocks: int = 1) -> Result:
    """What a head that attends to a token alone adds to each token's logit, up to a positive factor a row.

    Args:
        tokens: texts or ids of single tokens.
        blocks: how many blocks make a token's stream; see the module.

    Returns:
        A Result with cells (source, output), one sample.

    Raises:
        ValueError: for a layer or head that is not there, or a text that is not one token.
    """
    head, ids = _head(model, head), answer_ids(model, tokens)
    layer, _ = _layers(model, layer)
    with torch.no_grad():
        scores = _written(model, layer, ids, blocks)[:, head] @ ops.wide(model.W_U[:, ids])
    said = about(model, layer=layer, head=head, blocks=blocks, ids=ids.tolist())
    unit = "logit, norm scales 1"
    return _square(model, f"OV of layer {layer}, head {head}", ("source", "output"), ids, scores, unit, said)


@torch.no_grad()
def copying_score(model, tokens: Answer, *, blocks: int = 1) -> Result:
    """Whether a head copies: the share of tokens whose own logit is among the 5 largest of all tokens when the head
    attends to that token alone.

    Wang et al., "Interpretability in the Wild" (2022, arXiv 2211.00593), section 3.1. Chance is 5 / d_vocab.

    Returns:
        A Result with cells (layer, head) and a sample, 0 or 1, for each token.

    Raises:
        ValueError: for a text that is not one token.
    """
    ids = answer_ids(model, tokens)
    found = []
    for layer in range(model.cfg.n_layers):
        likeliest = _likeliest(model, _written(model, layer, ids, blocks))
        found.append((likeliest == ids[:, None, None]).any(-1).T)
    cells = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    said = about(model, blocks=blocks, ids=ids.tolist())
    cells = pandas.DataFrame(cells, columns=["layer", "head"])
    return Result("heads: copying", cells, torch.cat(found).float().cpu(), "share copied", about=said)


def _likeliest(model, written: Float[Tensor, "token head d_model"]) -> Int[Tensor, "token head top"]:
    """The TOP ids that each vector raises most, a part of the vocabulary at a time."""
    best, ids = written.new_empty(*written.shape[:2], 0), None
    for first in range(0, model.cfg.d_vocab, _VOCABULARY_PART):
        logits = written @ ops.wide(model.W_U[:, first : first + _VOCABULARY_PART])
        here = torch.arange(first, first + logits.shape[-1], device=logits.device).expand_as(logits)
        best, ids = torch.cat((best, logits), -1), here if ids is None else torch.cat((ids, here), -1)
        best, kept = best.topk(TOP, dim=-1)
        ids = ids.gather(-1, kept)
    return ids


def _head(model, head: int) -> int:
    n_heads = model.cfg.n_heads
    if not -n_heads <= head < n_heads:
        raise ValueError(f"Head {head} does not exist: the layers of {model.cfg.model_name} have 0 to {n_heads - 1}.")
    return head % n_heads


def _layers(model, layer: int) -> tuple[int, int]:
    """A layer counted from 0, and the one whose keys and values it reads."""
    source = model.layer(layer).kv_source
    layer %= model.cfg.n_layers
    return layer, layer if source is None else source


def _kv_head(model, source: int, head: int) -> int:
    return head * model.layer(source).n_kv_heads // model.cfg.n_heads


def _streams(model, ids: Int[Tensor, " token"], blocks: int) -> Streams:
    """Each token's stream after `blocks` blocks, of the prompt <bos> token."""
    if not 0 <= blocks <= model.cfg.n_layers:
        raise ValueError(f"blocks is {blocks}; {model.cfg.model_name} has 0 to {model.cfg.n_layers} to run first.")
    prompts = torch.stack((torch.full_like(ids, model.cfg.bos_token_id), ids), dim=1)
    return model(prompts, attention_mask=torch.ones_like(prompts), stop_at_layer=blocks)[:, -1]


def _projected(model, layer: int, ids: Tensor, blocks: int, what: str) -> Float[Tensor, "token head d_head"]:
    """Queries, keys or values of a layer that owns them, normed, before rope."""
    block = model.blocks[layer]
    attn, read = block.attn, block.ln1(_streams(model, ids, min(blocks, layer)))
    weight = {"q": "W_Q", "k": "W_K", "v": "W_V"}[what]
    found = torch.einsum("td,hde->the", read, getattr(attn, weight))
    return ops.rms_norm(found, None, attn.eps) if what == "v" else getattr(attn, f"{what}_norm")(found)


def _written(model, layer: int, ids: Tensor, blocks: int) -> Float[Tensor, "token head d_model"]:
    """What each head writes when it attends to one token alone, as the unembedding reads it."""
    _, source = _layers(model, layer)
    kv_heads = [_kv_head(model, source, head) for head in range(model.cfg.n_heads)]
    values = _projected(model, source, ids, blocks, "v")[:, kv_heads]
    block = model.blocks[layer]
    gain = ops.wide(block.ln1_post.weight) * ops.wide(model.ln_final.weight)
    return ops.wide(torch.einsum("the,hed->thd", values, block.attn.W_O)) * gain


def _square(model, what: str, axes: tuple[str, str], ids: Tensor, scores: Tensor, unit: str, said: dict) -> Result:
    """A table of tokens by tokens."""
    names = names_of_tokens(model, ids.tolist())
    cells = pandas.MultiIndex.from_product([names, names], names=axes).to_frame(index=False)
    return Result(what, cells, scores.reshape(-1, 1).cpu(), unit, about=said)
