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
from gemmascope.sites import SiteInfo

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
        self.mask: Tensor | None = None
        """[batch, length], False on padding; None while there is none."""
        self._kv: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer, [batch, room, kv_head, d_head]: global layers keep room for more tokens than came."""

    @property
    def batch(self) -> int:
        """How many sequences it holds."""
        return next(iter(self._kv.values()))[0].shape[0]

    def first_kept(self, window: int | None) -> int:
        """The oldest position that the next query sees."""
        return 0 if window is None else max(0, self.length - window + 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the new tokens' k and v [batch, pos, kv_head, d_head]; returns all that the new queries see."""
        if k.requires_grad and torch.is_grad_enabled():
            raise ValueError("A KVCache holds no gradients: run under torch.no_grad(), or without past_kv_cache.")
        window = self.layers[layer].window
        if window is None:
            return self._append_global(layer, k, v)
        if layer in self._kv:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self._kv[layer], (k, v), strict=True))
        # A copy of the last window - 1, which the next query sees besides itself: a view would keep the whole prompt.
        first = max(0, k.shape[1] - window + 1)
        self._kv[layer] = k[:, first:].clone(), v[:, first:].clone()
        return k, v

    def _append_global(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[1]
        if layer not in self._kv or end > self._kv[layer][0].shape[1]:
            # Twice the room that is needed now, so that copying stays linear in the length.
            grown = tuple(new.new_empty(new.shape[0], 2 * end, *new.shape[2:]) for new in (k, v))
            if layer in self._kv:
                for new, old in zip(grown, self._kv[layer], strict=True):
                    new[:, : self.length] = old[:, : self.length]
            self._kv[layer] = grown
        for held, new in zip(self._kv[layer], (k, v), strict=True):
            held[:, self.length : end] = new
        return tuple(held[:, :end] for held in self._kv[layer])

    def key_width(self, layer: int) -> int | None:
        """The columns of the keys it holds of a layer, None while it holds none."""
        return self._kv[layer][0].shape[-1] if layer in self._kv else None

    def rewrite_keys(self, layer: int, keys_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Puts other keys in place of those of a layer, as computed from its keys and values."""
        k, v = self._kv[layer]
        self._kv[layer] = keys_of(k, v), v

    def advance(self, n_new: int, mask: Tensor | None = None) -> None:
        """Called once all layers have appended. `mask` [batch, length + n_new] is False on padding."""
        self.length, self.mask = self.length + n_new, mask

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
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
    interventions=(),
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
        interventions: edits in effect at every step (see `gemmascope.interventions`); their positions count from the
            start of the sequence, negative ones from the newest token.
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
    start = model._begin(input, attention_mask, prepend_bos=prepend_bos)
    tokens, mask = start.tokens, start.mask
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    if not mask[:, -1].all():
        raise ValueError("A prompt ends with padding, and would be continued from there: pad on the left.")
    stop = cfg.eos_token_id if stop_ids is None else stop_ids
    stop = torch.tensor([stop] if isinstance(stop, int) else list(stop), dtype=torch.long, device=tokens.device)
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    if tokens.shape[1] + max_new_tokens - 1 > cfg.n_ctx:
        raise ValueError(
            f"{tokens.shape[1]} prompt tokens and {max_new_tokens} new ones do not fit the {cfg.n_ctx} tokens "
            f"{cfg.model_name} reads."
        )

    past = KVCache(cfg) if use_past_kv_cache else None
    record = _Record(model, names_filter) if return_cache else None
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    show = max_new_tokens >= _LONG if progress is None else progress
    bar = tqdm(total=max_new_tokens, unit="token", disable=not show, leave=False)
    with model.with_interventions(interventions), model.hooks(fwd_hooks=list(fwd_hooks)), bar:
        for _ in range(max_new_tokens):
            run = model._begin(tokens if past is None else tokens[:, past.length :], mask, past=past)
            run.last_only = True
            with record.step() if record is not None else nullcontext():
                logits = model(run)[:, -1]
            chosen = sample(logits, temperature, top_k, top_p, generator).masked_fill(done, cfg.pad_token_id)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
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
    return out, record.cache(model._begin(tokens[:, :-1], mask[:, :-1]))


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
        self.steps: list[dict[str, Tensor]] = []
        self.changed: frozenset[str] = frozenset()

    @contextmanager
    def step(self):
        self.changed |= self.model.changed_expansions()
        stored, fwd, _ = self.model.get_caching_hooks(self.names_filter)
        with self.model.hooks(fwd_hooks=fwd):
            yield
            self.changed |= self.model.changed_expansions()
        self.steps.append(stored)

    def cache(self, whole) -> ActivationCache:
        # A pattern that hooks changed in some of the steps was stored in those only: the cache then refuses it.
        names = [name for name in self.steps[0] if all(name in step for step in self.steps)]
        joined = {name: _join(self.model.sites[name], [step[name] for step in self.steps]) for name in names}
        return ActivationCache(joined, self.model, masks=whole.masks, changed=self.changed, padding=whole.mask)


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
