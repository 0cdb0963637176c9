"""Is this the same model? One checkpoint, run by gemmascope and by transformers, compared layer by layer.

1. gemmascope loads the checkpoint and runs the prompt: every layer's stream, the experts it chose, the logits, and some
   greedy tokens. Its model is let go.
2. transformers loads the same files (attention and experts in their plainest form) and runs the same token ids twice.
   Once each block is given *our* stream and its router follows our choice, so that each layer is measured alone, on one
   and the same input: this is what the verdict on layers rests on, in every dtype.
   Once the blocks run on their own streams, which shows how the small differences add up, down to the logits. The
   routers still follow our choices: a near-tie between two experts can fall either way, for an honest reason.
3. The greedy tokens are each model's own, without any help.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gemmascope.model.text import HookedGemma4
from gemmascope.weights import ZOO, load

N_GREEDY = 16
_TEXT = (
    "When the ferry reached Porto Velo at 6:45, Marta gave the sealed letter to Jonas, and Jonas gave Marta his coat. "
    "It had rained for 3 days; 17 of the 40 boats were still out. `total = sum(boats) - lost` said the harbour's page. "
)


class Limits(NamedTuple):
    """How far two correct implementations may stand apart in one dtype."""

    layer: float
    """max |a - b| / max |b| over the output of one layer, both given the same input."""
    margin: float
    """Gap in router logits between the experts chosen by one side only: more is no near-tie."""
    logits: float
    """max |a - b| at the end."""
    kl: float
    """Mean over positions, in nats, at the end."""
    same_tokens: bool
    """The most likely token must be the same everywhere."""


LIMITS = {
    "float32": Limits(layer=1e-5, margin=1e-3, logits=1e-3, kl=1e-6, same_tokens=True),
    "bfloat16": Limits(layer=3e-2, margin=0.1, logits=2.0, kl=1e-2, same_tokens=False),
    "float16": Limits(layer=4e-3, margin=0.01, logits=0.5, kl=1e-3, same_tokens=False),
}
"""In float32 the limits are some ten times what sums in another order cost; in the others they follow the rounding."""


@dataclass
class Trace:
    """What one implementation did on the prompt, by block ("blocks.3"); the first stream is "embed"."""

    streams: dict[str, Float[Tensor, "pos d_model"]] = field(default_factory=dict)
    chosen: dict[str, Int[Tensor, "pos slot"]] = field(default_factory=dict)
    """Expert numbers, in any order."""
    router_probs: dict[str, Float[Tensor, "pos expert"]] = field(default_factory=dict)
    """Of the reference only."""
    logits: Float[Tensor, "pos d_vocab"] | None = None
    greedy: list[int] = field(default_factory=list)
    """Tokens that follow the prompt, the model left to itself."""


class Row(NamedTuple):
    """One stream: the embedding, or the output of one block."""

    name: str
    alone: float
    """max |a - b| / max |b|, both given the same input."""
    accumulated: float
    """The same, each on its own stream."""
    same_experts: float | None = None
    """Share of positions whose chosen experts are the same set; None without experts."""
    margin: float | None = None
    """Largest router-logit gap among the choices that differ; 0 where none does."""


@dataclass(frozen=True)
class VerifyReport:
    """The comparison: `passed`, `verdict`, and, printed, the whole table."""

    model: str
    dtype: str
    device: str
    n_tokens: int
    rows: tuple[Row, ...]
    logits_error: float
    kl: float
    same_argmax: float
    same_greedy: float

    @property
    def limits(self) -> Limits:
        return LIMITS[self.dtype]

    @property
    def same_experts(self) -> float | None:
        """Share of (token, layer) pairs with the same chosen experts; None without experts."""
        shares = [row.same_experts for row in self.rows if row.same_experts is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def failures(self) -> list[str]:
        """Every figure outside its limit, in the order of the computation. NaN is outside every limit."""
        limits, found = self.limits, []
        for row in self.rows:
            if row.margin is not None and not row.margin <= limits.margin:
                found.append(f"{row.name} chooses other experts, margin {row.margin:.1e} (limit {limits.margin:.0e})")
            if not row.alone <= limits.layer:
                found.append(f"{row.name} departs, relative error {row.alone:.1e} (limit {limits.layer:.0e})")
        if not self.logits_error <= limits.logits:
            found.append(f"the logits differ by {self.logits_error:.1e} (limit {limits.logits:.0e})")
        if not self.kl <= limits.kl:
            found.append(f"the predictions differ by {self.kl:.1e} nats (limit {limits.kl:.0e})")
        if limits.same_tokens and self.same_argmax < 1:
            found.append(f"the most likely token is the same at only {self.same_argmax:.2%} of positions")
        if limits.same_tokens and self.same_greedy < 1:
            found.append(f"only {self.same_greedy:.0%} of {N_GREEDY} greedy tokens are the same")
        return found

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def verdict(self) -> str:
        if self.passed:
            return f"PASS: every figure is within its limit for {self.dtype}."
        return "FAIL: " + "; ".join(self.failures) + "."

    def __str__(self) -> str:
        limits, moe = self.limits, self.same_experts is not None
        head = f"{'stream':<12}{'layer alone':>12}{'accumulated':>13}" + f"{'same experts':>14}{'margin':>10}" * moe
        lines = [
            f"{self.model}: gemmascope beside transformers {version('transformers')}",
            f"{self.dtype} on {self.device}, {self.n_tokens} tokens; differences relative to the largest value",
            "",
            head,
        ]
        for row in self.rows:
            experts = "" if row.same_experts is None else f"{row.same_experts:>14.2%}{row.margin:>10.1e}"
            lines.append(f"{row.name:<12}{row.alone:>12.1e}{row.accumulated:>13.1e}{experts}")
        lines += [
            f"{'limit':<12}{limits.layer:>12.1e}" + f"{'':>13}{'':>14}{limits.margin:>10.1e}" * moe,
            "",
            f"logits       largest difference {self.logits_error:.1e} (limit {limits.logits:.0e})",
            f"predictions  KL {self.kl:.1e} nats a position (limit {limits.kl:.0e})",
            f"             same most likely token at {self.same_argmax:.2%} of positions",
            f"greedy       {self.same_greedy:.0%} of {N_GREEDY} tokens the same",
        ]
        if moe:
            lines.append(f"experts      the same set for {self.same_experts:.2%} of (token, layer) pairs")
        return "\n".join([*lines, "", self.verdict])


def verify(path: str | Path, *, prompt: str | None = None, dtype: str = "float32", device: str = "cpu") -> VerifyReport:
    """Compare gemmascope with transformers on one checkpoint, holding one model at a time.

    Arguments:
        path: a shipped model's name, a hub id, or a folder.
        prompt: the text to run. By default one that is longer than the sliding window, or, for a checkpoint without a
            tokenizer, fixed token ids.
        dtype: "float32" is the sharp comparison; the limits of the others are those of their rounding.

    Raises:
        FileNotFoundError, ValueError, MemoryError: from the loader.
        ValueError: for a dtype without limits, or where transformers does not find all its weights in the checkpoint.
    """
    if dtype not in LIMITS:
        raise ValueError(f"dtype {dtype!r} has no limits to compare with; it can be {', '.join(LIMITS)}.")
    model = load(path, dtype=dtype, device=device)
    tokens = _tokens(model, prompt)
    ours = _run_ours(model, tokens)
    del model
    _release(device)
    reference = _load_reference(path, dtype, device)
    alone = _run_reference(reference, tokens, ours, same_input=True)
    theirs = _run_reference(reference, tokens, ours, same_input=False)
    rows = tuple(_row(name, ours, alone, theirs) for name in ours.streams)
    figures = _compare_logits(ours.logits, theirs.logits)
    greedy = _greedy_reference(reference, tokens)
    same_greedy = sum(a == b for a, b in zip(ours.greedy, greedy, strict=True)) / N_GREEDY
    return VerifyReport(str(path), dtype, device, tokens.shape[1], rows, *figures, same_greedy)


def _tokens(model: HookedGemma4, prompt: str | None) -> Int[Tensor, "1 pos"]:
    if prompt is not None:
        return model.to_tokens(prompt)
    length = min(model.cfg.window + 32, model.cfg.n_ctx - N_GREEDY)
    if model.tokenizer is None:
        return torch.randint(model.cfg.d_vocab, (1, length), generator=torch.Generator().manual_seed(0))
    return model.to_tokens(_TEXT * (1 + length // 20))[:, :length]


def _release(device: str) -> None:
    """Memory of a model just let go returns to the system, so that the next one finds it free."""
    gc.collect()  # modules and their hooks refer to one another
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@torch.inference_mode()
def _run_ours(model: HookedGemma4, tokens: Int[Tensor, "1 pos"]) -> Trace:
    blocks = [f"blocks.{layer}" for layer in range(model.cfg.n_layers)]
    streams = {"embed": "hook_embed"} | {block: f"{block}.hook_resid_post" for block in blocks}
    routers = {block: f"{block}.moe.router.hook_indices" for block in blocks if model.cfg.n_experts is not None}
    wanted = [*streams.values(), *routers.values()]
    _, cache = model.run_with_cache(tokens, names_filter=wanted, device="cpu", remove_batch_dim=True, return_type=None)
    return Trace(
        streams={name: cache[site] for name, site in streams.items()},
        chosen={name: cache[site] for name, site in routers.items()},
        # From a second pass without any hook: the line that runs when nobody looks has to agree as well.
        logits=model(tokens)[0].cpu(),
        greedy=model.generate(tokens, max_new_tokens=N_GREEDY, stop_ids=[])[0, tokens.shape[1] :].tolist(),
    )


def _load_reference(path: str | Path, dtype: str, device: str) -> nn.Module:
    """transformers' model of the checkpoint, in the plainest form it has."""
    from transformers import AutoModelForCausalLM

    place = next((place for place in (ZOO / str(path), Path(path).expanduser()) if place.is_dir()), str(path))
    model, info = AutoModelForCausalLM.from_pretrained(
        place,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"transformers does not find {missing} in {path}, so there is nothing to compare with.")
    return model.to(device).eval()


@torch.inference_mode()
def _run_reference(model: nn.Module, tokens: Int[Tensor, "1 pos"], ours: Trace, same_input: bool) -> Trace:
    """The reference on the same tokens, its routers following our choices; the trace keeps its own.

    With `same_input` each block is given our stream instead of its own.
    """
    trace = Trace()
    text = model.get_decoder()
    text = getattr(text, "language_model", text)  # the decoder of a multimodal model holds the text model
    streams = list(ours.streams)
    handles = [text.embed_tokens.register_forward_hook(_keep(trace, streams[0]))]
    for name, before, block in zip(streams[1:], streams, text.layers, strict=False):
        handles.append(block.register_forward_hook(_keep(trace, name)))
        if same_input:
            handles.append(block.register_forward_pre_hook(_give(ours.streams[before])))
        if name in ours.chosen:
            handles.append(block.router.register_forward_hook(_follow(trace, name, ours.chosen[name])))
    trace.logits = model(tokens.to(model.device), use_cache=False).logits[0].cpu()
    for handle in handles:
        handle.remove()
    return trace


def _keep(trace: Trace, name: str) -> Callable:
    """A hook that keeps the stream that a reference module puts out."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        trace.streams[name] = output[0].to("cpu", copy=True)

    return hook


def _give(stream: Float[Tensor, "pos d_model"]) -> Callable:
    """A hook that gives a reference block our stream in place of its own."""

    def hook(block: nn.Module, args: tuple) -> tuple:
        return (stream[None].to(args[0].device), *args[1:])

    return hook


def _follow(trace: Trace, name: str, chosen: Int[Tensor, "pos slot"]) -> Callable:
    """A hook for a reference router: keeps its own choice, and returns ours, weighted by the reference's own rule."""

    def hook(router: nn.Module, args: tuple, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        probs, _, indices = output
        trace.router_probs[name], trace.chosen[name] = probs.cpu(), indices.cpu()
        forced = chosen.to(indices.device)
        weights = probs.gather(-1, forced)
        weights = weights / weights.sum(-1, keepdim=True) * router.per_expert_scale[forced]
        return probs, weights, forced

    return hook


@torch.inference_mode()
def _greedy_reference(model: nn.Module, tokens: Int[Tensor, "1 pos"]) -> list[int]:
    # Not model.generate: the checkpoint's generation_config would have a say in it.
    past, new, step = None, [], tokens.to(model.device)
    for _ in range(N_GREEDY):
        out = model(step, past_key_values=past, use_cache=True)
        past, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        new.append(int(step))
    return new


# ------------------------------------------------------------------------------------------- the comparison


def _row(name: str, ours: Trace, alone: Trace, theirs: Trace) -> Row:
    errors = [_relative(ours.streams[name], trace.streams[name]) for trace in (alone, theirs)]
    if name not in ours.chosen:
        return Row(name, *errors)
    return Row(name, *errors, *_compare_choices(ours.chosen[name], alone.chosen[name], alone.router_probs[name]))


def _relative(a: Float[Tensor, "pos d_model"], b: Float[Tensor, "pos d_model"]) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max())


def _compare_choices(
    ours: Int[Tensor, "pos slot"], theirs: Int[Tensor, "pos slot"], probs: Float[Tensor, "pos expert"]
) -> tuple[float, float]:
    """(share of positions with the same set of experts, largest margin among the others).

    The margin is in the reference's own router logits: its best expert that we left out, less its worst that we took.
    """
    nobody = torch.zeros_like(probs, dtype=torch.bool)
    we, they = nobody.scatter(-1, ours, True), nobody.scatter(-1, theirs, True)
    differs = (we != they).any(-1)
    logits = probs.log()  # up to a constant at each position
    left_out = logits.masked_fill(we | ~they, -torch.inf).amax(-1)
    taken = logits.masked_fill(they | ~we, torch.inf).amin(-1)
    margins = (left_out - taken)[differs]
    return float(1 - differs.double().mean()), float(margins.max()) if len(margins) else 0.0


def _compare_logits(ours: Float[Tensor, "pos d_vocab"], theirs: Float[Tensor, "pos d_vocab"]) -> tuple[float, ...]:
    """(largest difference, mean KL in nats, share of positions with the same most likely token)."""
    error, kl, same = 0.0, 0.0, 0
    # A few positions at a time: a vocabulary of 262,144 in float64 is 2 MB a position.
    for a, b in zip(ours.split(64), theirs.split(64), strict=True):
        a, b = a.double(), b.double()
        error = torch.maximum(torch.tensor(error), (a - b).abs().max()).item()  # keeps a NaN, which max() may lose
        p, q = b.log_softmax(-1), a.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return error, kl / len(ours), same / len(ours)
