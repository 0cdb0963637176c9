"""Continuing a prompt: the cache of keys and values, sampling, and generation with hooks live at every step."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from gemmascope.cache import ActivationCache
from gemmascope.config import Gemma4Config
from gemmascope.hooks import SiteInfo

_LONG = 64
"""New tokens from which a progress bar is shown."""


class KVCache:
    """Keys (after rope) and values (after their norm) of the tokens so far, for the layers that own them.

    Sliding layers keep their window and no more: nothing reads further back, since the layers that share a sliding
    layer's keys slide over the same window. Holds no gradients.
    """

    def __init__(self, cfg: Gemma4Config):
        self.layers = cfg.layers
        self.length = 0
        """Tokens so far."""
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}  # [batch, capacity, kv_head, d_head], from position _start on
        self._start: dict[int, int] = {}

    def first_kept(self, window: int | None, n_new: int) -> int:
        """The oldest position that any of the next `n_new` queries sees."""
        return 0 if window is None else max(0, self.length - window + 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens' k and v [batch, pos, kv_head, d_head]; returns all that the new queries see."""
        if k.requires_grad and torch.is_grad_enabled():
            raise ValueError("A KVCache holds no gradients: run under torch.no_grad(), or without past_kv_cache.")
        first, end = self.first_kept(self.layers[layer].window, k.shape[1]), self.length + k.shape[1]
        start = self._start.get(layer, 0)
        if layer not in self._kv or end - start > self._kv[layer][0].shape[1]:
            self._kv[layer] = tuple(self._grown(layer, new, index, first, end) for index, new in enumerate((k, v)))
            self._start[layer] = start = first
        for held, new in zip(self._kv[layer], (k, v), strict=True):
            held[:, self.length - start : end - start] = new
        return tuple(held[:, first - start : end - start] for held in self._kv[layer])

    def _grown(self, layer: int, new: Tensor, index: int, first: int, end: int) -> Tensor:
        """Twice the room that is needed now, so that copying stays linear in the length."""
        grown = new.new_empty(new.shape[0], 2 * (end - first), *new.shape[2:])
        if layer in self._kv:
            start = self._start[layer]
            grown[:, : self.length - first] = self._kv[layer][index][:, first - start : self.length - start]
        return grown

    def advance(self, n_new: int) -> None:
        self.length += n_new

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for kv in self._kv.values() for held in kv)


def sample(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """One token a row: the most probable at temperature 0, else drawn from the softmax of logits / temperature.

    top_k keeps the k most probable; top_p then keeps the fewest whose probabilities sum to at least p (nucleus
    sampling, https://arxiv.org/abs/1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    values, ids = (logits.float() / temperature).sort(-1, descending=True)
    if top_k is not None:
        values, ids = values[:, :top_k], ids[:, :top_k]
    probs = values.softmax(-1)
    if top_p is not None:
        before = probs.cumsum(-1) - probs
        probs = probs * (before < top_p)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)


@torch.no_grad()
def generate(
    model,
    input,
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_ids: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Callable]] = (),
    use_past_kv_cache: bool = True,
    return_cache: bool = False,
    names_filter=None,
    progress: bool | None = None,
):
    """Continues text or token ids; greedy unless a temperature is given.

    Hooks, these and any added before, run at every step: first on the whole prompt, then on one new position at a time
    (on the whole sequence each time without a KV cache).

    Args:
        input: a text, several, or token ids [batch, pos].
        max_new_tokens: how many at most; a sequence ends before that at a stop id, and is padded from there on.
        temperature, top_k, top_p, seed: see `sample`; the seed makes a draw repeatable.
        stop_ids: by default the checkpoint's own end-of-sequence ids; [] for none.
        attention_mask: [batch, pos], False on padding (left), for token ids of different lengths.
        return_cache: also return an ActivationCache of every position that was fed in: all but the last token.
        names_filter: what that cache holds, as in run_with_cache.
        progress: show a bar; by default for 64 new tokens and more.

    Returns:
        What came in, continued: text (special tokens left out), a list of texts, or token ids [batch, pos + new]; with
        return_cache, (that, cache).
    """
    _check_settings(max_new_tokens, temperature, top_k, top_p, return_cache and not use_past_kv_cache)
    cfg = model.cfg
    is_text = not isinstance(input, Tensor)
    tokens, _, mask = model._begin(input, attention_mask, prepend_bos=prepend_bos)
    stop = cfg.eos_token_id if stop_ids is None else stop_ids
    stop = torch.tensor([stop] if isinstance(stop, int) else list(stop), dtype=torch.long, device=tokens.device)
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    if tokens.shape[1] + max_new_tokens - 1 > cfg.n_ctx:
        raise ValueError(
            f"{tokens.shape[1]} prompt tokens and {max_new_tokens} new ones do not fit "
            f"the {cfg.n_ctx} tokens {cfg.model_name} reads."
        )

    past = KVCache(cfg) if use_past_kv_cache else None
    record = _Record(model, names_filter) if return_cache else None
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    show = max_new_tokens >= _LONG if progress is None else progress
    with (
        model.hooks(fwd_hooks=list(fwd_hooks)),
        tqdm(total=max_new_tokens, unit="token", disable=not show, leave=False) as bar,
    ):
        for _ in range(max_new_tokens):
            new = tokens if past is None else tokens[:, past.length :]
            step, run, _ = model._begin(new, mask, past_kv_cache=past)
            with record.step() if record is not None else nullcontext():
                logits = model._run(step, run, last_only=True)[:, -1]
            chosen = sample(logits, temperature, top_k, top_p, generator).masked_fill(done, cfg.pad_token_id)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            if mask is not None:
                mask = torch.cat((mask, ~done[:, None]), dim=1)
            done = done | torch.isin(chosen, stop)
            bar.update()
            if done.all():
                break

    out = tokens
    if is_text:
        out = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        out = out[0] if isinstance(input, str) else out
    if record is None:
        return out
    fed = tokens[:, :-1]
    return out, record.cache(model._begin(fed, None if mask is None else mask[:, :-1])[1].masks)


def _check_settings(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, cache_without_kv: bool
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least 1.")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it is 0 for greedy, or positive.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; keep at least 1 token, or pass None for all.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it lies above 0 and up to 1.")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p change nothing at temperature 0; give a temperature to sample.")
    if cache_without_kv:
        raise ValueError(
            "return_cache needs the KV cache: without it every step runs all positions again, "
            "and hooks may differ between steps."
        )


class _Record:
    """The activations of every step, joined along the positions."""

    def __init__(self, model, names_filter):
        self.model, self.names_filter = model, names_filter
        self.steps: dict[str, list[Tensor]] = {}
        self.changed: frozenset[str] = frozenset()

    @contextmanager
    def step(self):
        self.changed = self.model.changed_expansions()
        stored, fwd, _ = self.model.get_caching_hooks(self.names_filter)
        with self.model.hooks(fwd_hooks=fwd):
            yield
        for name, tensor in stored.items():
            self.steps.setdefault(name, []).append(tensor)

    def cache(self, masks: dict) -> ActivationCache:
        joined = {name: _join(self.model.sites[name], parts) for name, parts in self.steps.items()}
        return ActivationCache(joined, self.model, masks=masks, changed=self.changed)


def _join(site: SiteInfo, steps: list[Tensor]) -> Tensor:
    """Steps joined along the positions. Early score and pattern rows are filled up with the keys they did not see."""
    axes = site.axes.split()
    if "key" not in axes:
        return torch.cat(steps, dim=axes.index("pos"))
    unseen = float("-inf") if site.name.endswith("scores") else 0.0
    total, so_far, rows = sum(step.shape[-2] for step in steps), 0, []
    for step in steps:
        so_far += step.shape[-2]
        rows.append(F.pad(step, (so_far - step.shape[-1], total - so_far), value=unseen))
    return torch.cat(rows, dim=-2)
