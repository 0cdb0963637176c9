"""One prompt and its run, which every view of it reads, also while a cell runs.

Answers to a page come in a thread of their own while a cell may be running the same model. So a run has a twin of the
model, on the same weights, with the hooks the model had when the run was made: what a cell hooks later is not in the
picture, and what the picture hooks is not in the cell.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemmascope.cache import ActivationCache
from gemmascope.hooks import Site
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.rerun import bare


class Run:
    """A prompt, run once. What views are made from, in place of model and prompt, when several show the same."""

    def __init__(self, model, prompt):
        """
        Args:
            prompt: text, token ids of one prompt (a tensor, an array or a list), or the cache of a run of one prompt
                by this model.

        Raises:
            ValueError: for no tokens, several prompts, or a cache of another model.
        """
        self.model = twin(model)
        self.lock = threading.RLock()
        if isinstance(prompt, ActivationCache):
            self.cache, self.tokens = prompt, _tokens_of(model, prompt)
        else:
            self.tokens = _one(model, prompt)
            with self.using():
                logits, self.cache = self.model.run_with_cache(self.tokens[None])
            self.logits = logits[0]
        self.texts = [str(text) for text in names_of_tokens(model, self.tokens.tolist())]
        self.setup = _setup(model, prompt if isinstance(prompt, str) else self.tokens.tolist())
        """Python that makes `model` and `prompt`, for what is copied from a view."""

    @property
    def n(self) -> int:
        """Tokens of the prompt."""
        return len(self.tokens)

    @property
    def last(self) -> int:
        return self.n - 1

    @functools.cached_property
    def logits(self) -> Float[Tensor, "pos d_vocab"]:
        """The run's logits, after the soft cap."""
        return self.stored("hook_logits")

    def stored(self, name: str | tuple) -> Tensor:
        """An activation of the run without its batch axis, as `cache[name]` gives it.

        Raises:
            KeyError: where a cache that was given does not hold it, with what to name in `names_filter`.
        """
        with self.using():
            found = self.cache[name]
        return found[0] if self.cache.has_batch_dim else found

    @contextmanager
    def using(self) -> Iterator[Any]:
        """The twin, for one thread at a time and without gradients."""
        with self.lock, torch.inference_mode():
            yield self.model

    def answering(self, answer: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """An answer to a page that uses the model or its cache."""

        @functools.wraps(answer)
        def locked(**arguments: Any) -> dict[str, Any]:
            with self.using():
                return answer(**arguments)

        return locked

    def layers(self) -> list[dict[str, Any]]:
        """What a view says of each layer: kind, window (None where it sees everything), kv_heads, kv_source."""
        cfg = self.model.cfg
        shapes = [self.model.layer(layer) for layer in range(cfg.n_layers)]
        return [
            {
                "kind": shape.kind,
                "window": cfg.window if shape.kind == "sliding" else None,
                "kv_heads": shape.n_kv_heads,
                "kv_source": shape.kv_source,
            }
            for shape in shapes
        ]


def run_of(model, prompt) -> Run:
    """The run of a prompt; one that was made already is taken as it is."""
    return prompt if isinstance(prompt, Run) else Run(model, prompt)


def twin(model):
    """The same model on the same weights, with the hooks that it has now; later hooks are each one's own.

    Raises:
        ValueError: where a module carries a plain torch hook, which would be lost.
    """
    points = set(model.hook_dict.values())
    for name, module in model.named_modules():
        if module not in points and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(
                f"{name} carries a torch hook, which a view would lose: use model.add_hook at a hook point."
            )
    copied = bare(model)
    copied.following = list(model.following)
    copied.setup()
    for name, point in model.hook_dict.items():
        for handle in point.fwd_hooks if isinstance(point, Site) else ():
            hook = handle.user_hook
            copied.add_hook(name, getattr(hook, "__wrapped__", hook))
    return copied


def array(tensor: Tensor) -> np.ndarray:
    """float32, int32 or uint8, which is what views carry."""
    narrow = {torch.int64: torch.int32, torch.uint8: torch.uint8, torch.int32: torch.int32}
    return tensor.to("cpu", narrow.get(tensor.dtype, torch.float32)).numpy()


def _one(model, prompt) -> Int[Tensor, " pos"]:
    """The ids of one prompt."""
    if isinstance(prompt, list | tuple | np.ndarray) and len(prompt) and not isinstance(prompt[0], str):
        prompt = torch.as_tensor(prompt)
    tokens = model._begin(prompt).tokens
    if len(tokens) != 1:
        raise ValueError(f"There are {len(tokens)} prompts: a view shows one, so give one.")
    return tokens[0]


def _tokens_of(model, cache: ActivationCache) -> Int[Tensor, " pos"]:
    if cache.model is not model:
        raise ValueError(f"This cache is of another model, {cache.model.cfg.model_name}: give the one that ran.")
    if cache.tokens is None or len(cache.tokens) != 1 or cache.tokens.ndim != 2:
        raise ValueError("A view shows one prompt, whole: give the cache of one, as cache.apply_slice_to_batch_dim(0).")
    if cache._padding is not None and not cache._padding.all():
        raise ValueError("This prompt is padded, and a view shows one as it is: give the cache of its own run.")
    if cache._positions.mode != "identity":
        raise ValueError("This cache holds some positions, and a view shows all: leave pos_slice out of its run.")
    return cache.tokens[0]


def loading(model) -> str:
    """Python that makes `model`."""
    cfg, given = model.cfg, []
    if cfg.dtype != torch.float32:
        given.append(f"dtype={str(cfg.dtype).removeprefix('torch.')!r}")
    if cfg.device.type != "cpu":
        given.append(f"device={str(cfg.device)!r}")
    return f"import gemmascope as gs\nmodel = gs.load({', '.join([repr(cfg.model_name), *given])})"


def _setup(model, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return f"{loading(model)}\nprompt = {prompt!r}"
    return f"import torch\n{loading(model)}\nprompt = torch.tensor({[prompt]})"
