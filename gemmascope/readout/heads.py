"""What each head does: the patterns it makes, and whether what it writes copies what it reads.

Previous-token, duplicate-token and induction heads: Olsson et al., "In-context Learning and Induction Heads" (2022).
Scores here are mean attention, so 1 is a head that does nothing else. Copying: see `circuits.py`.
"""

import difflib
from collections.abc import Callable

import pandas
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemmascope.readout.circuits import copying_score
from gemmascope.readout.prompts import Prompts, encoded
from gemmascope.results import Result, about

Tokens = Int[Tensor, "prompt pos"]
Marked = Bool[Tensor, "prompt query key"]


def _latest_earlier(tokens: Tokens) -> Int[Tensor, "prompt pos"]:
    """Where each token last occurred before; -1 where it did not."""
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(same, places, -1).amax(-1)


def _keys(chosen: Int[Tensor, "prompt pos"]) -> Marked:
    """Marks one key for each query, none where it is negative."""
    places = torch.arange(chosen.shape[1], device=chosen.device)
    return chosen[:, :, None] == places


def previous_token(tokens: Tokens) -> Marked:
    """Query q looks at key q - 1."""
    return _keys((torch.arange(tokens.shape[1], device=tokens.device) - 1).expand_as(tokens))


def duplicate_token(tokens: Tokens) -> Marked:
    """Query q looks at the last earlier occurrence of its token."""
    return _keys(_latest_earlier(tokens))


def induction(tokens: Tokens) -> Marked:
    """Query q looks at the token after the last earlier occurrence of its own."""
    earlier = _latest_earlier(tokens)
    return _keys(torch.where(earlier < 0, -1, earlier + 1))


PATTERNS: dict[str, Callable[[Tokens], Marked]] = {
    "previous token": previous_token,
    "duplicate token": duplicate_token,
    "induction": induction,
}


def repeated_tokens(model, length: int | None = None, n: int = 8, seed: int = 0) -> Tokens:
    """`n` sequences <bos> S S, S being `length` different random tokens, special ones left out; 50 by default, or as
    many as the context holds twice.

    Raises:
        ValueError: for a length that the context does not hold twice, or for which there are not enough tokens.
    """
    cfg = model.cfg
    special = {cfg.bos_token_id, cfg.pad_token_id, 0, 1}
    if model.tokenizer is not None:
        special |= set(model.tokenizer.backend.get_added_tokens_decoder())
    ids = torch.tensor([token for token in range(cfg.d_vocab) if token not in special])
    most = min((cfg.n_ctx - 1) // 2, len(ids))
    length = min(50, most) if length is None else length
    if not 1 <= length <= most:
        drawn = f"{cfg.model_name} reads {cfg.n_ctx} tokens and has {len(ids)} to draw from"
        raise ValueError(f"length is {length}: {drawn}, so give 1 to {most}.")
    generator = torch.Generator().manual_seed(seed)
    spans = torch.stack([ids[torch.randperm(len(ids), generator=generator)[:length]] for _ in range(n)])
    return torch.cat((torch.full((n, 1), cfg.bos_token_id), spans, spans), dim=1).to(cfg.device)


def detect_heads(model, prompt, pattern: str | Tensor) -> Result:
    """How much of each head's attention follows a pattern: the mean over the queries that the pattern marks of the
    attention they pay to the keys it marks for them.

    Patterns of attention exist for one layer at a time. What a sliding layer's window hides counts as not attended to.

    Args:
        prompt: text, texts, or token ids; `repeated_tokens(model)` makes those on which induction is measured.
        pattern: "previous token", "duplicate token", "induction", or a mask [query, key] or [prompt, query, key] that
            is true at the edges that count.

    Returns:
        A Result with cells (layer, head) and a sample for each prompt.

    Raises:
        ValueError: for a pattern that is not known, has another shape, or marks nothing in some prompt.
    """
    prompts = encoded(model, prompt)
    if isinstance(pattern, str):
        if pattern not in PATTERNS:
            near = difflib.get_close_matches(pattern, PATTERNS, n=1) or list(PATTERNS)
            raise ValueError(
                f"There is no pattern {pattern!r}: did you mean {' or '.join(map(repr, near))}? A mask does."
            )
        name, marked = pattern, PATTERNS[pattern](prompts.tokens)
    else:
        n_prompts, n_pos = prompts.tokens.shape
        if tuple(pattern.shape) not in ((n_pos, n_pos), (n_prompts, n_pos, n_pos)):
            raise ValueError(
                f"The pattern has shape {list(pattern.shape)}; {n_prompts} prompts of {n_pos} tokens take "
                f"[{n_pos}, {n_pos}] or [{n_prompts}, {n_pos}, {n_pos}], query by key."
            )
        name, marked = "given pattern", pattern.bool().to(prompts.tokens.device).expand(n_prompts, -1, -1)
    values = _scores(model, prompts, {name: marked})[name]
    return Result(f"heads: {name}", _cells(model), values, "mean attention", about=about(model, pattern=name))


def head_table(model, tokens: Tokens | None = None, *, n_tokens: int = 64, seed: int = 0) -> pandas.DataFrame:
    """Every head with its scores: a row each.

    Columns: layer, head, kind ("sliding" or "global"), kv_source (the layer whose keys and values it reads, where not
    its own), previous_token, duplicate_token, induction (see `detect_heads`), copying (see `copying_score`).

    Args:
        tokens: prompts with repeated tokens on which attention is measured; `repeated_tokens(model)` by default.
        n_tokens: how many random tokens copying is measured on.
        seed: of the random tokens.
    """
    tokens = repeated_tokens(model, seed=seed) if tokens is None else tokens
    prompts = encoded(model, tokens)
    scores = _scores(model, prompts, {name: mark(prompts.tokens) for name, mark in PATTERNS.items()})
    table = _cells(model)
    geometry = [model.layer(layer) for layer in table["layer"]]
    table["kind"] = [layer.kind for layer in geometry]
    table["kv_source"] = pandas.array([layer.kv_source for layer in geometry], dtype="Int64")
    for name, values in scores.items():
        table[name.replace(" ", "_")] = values.mean(-1).tolist()
    sample = repeated_tokens(model, min(n_tokens, (model.cfg.n_ctx - 1) // 2), n=1, seed=seed)[0]
    sample = sample[1 : (len(sample) + 1) // 2]  # the span, once
    table["copying"] = copying_score(model, sample).mean.tolist()
    return table


def _cells(model) -> pandas.DataFrame:
    return pandas.DataFrame(
        [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)],
        columns=["layer", "head"],
    )


@torch.no_grad()
def _scores(model, prompts: Prompts, marks: dict[str, Marked]) -> dict[str, Float[Tensor, "cell prompt"]]:
    """Each pattern's score, layer by layer, from one run."""
    if prompts.mask is not None:
        marks = {name: mark & prompts.mask[:, :, None] & prompts.mask[:, None] for name, mark in marks.items()}
    n_queries = {name: mark.any(-1).sum(-1) for name, mark in marks.items()}
    for name, counts in n_queries.items():
        if (counts == 0).any():
            raise ValueError(
                f"Prompt {int((counts == 0).nonzero()[0])} has no query that {name} marks: it is too short, or "
                "no token returns; repeated_tokens(model) makes prompts that have them."
            )
    names = [name for name in model.sites if name.endswith(("hook_rot_q", "hook_rot_k"))]
    _, cache = model.run_with_cache(prompts.tokens, attention_mask=prompts.mask, names_filter=names, return_type=None)
    found = {name: [] for name in marks}
    for layer in range(model.cfg.n_layers):
        pattern = cache.pattern(layer)
        for name, mark in marks.items():
            # A row of padding sees nothing and is NaN; it is never marked, so it is left out, not multiplied by 0.
            attention = pattern.masked_fill(~mark[:, None], 0).sum((-2, -1))
            found[name].append((attention / n_queries[name][:, None]).T)
    return {name: torch.cat(layers).cpu() for name, layers in found.items()}
