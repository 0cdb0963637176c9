"""The logit lens: what the model would say if it stopped after each layer.

nostalgebraist, "interpreting GPT: the logit lens" (2020). The stream goes through the final norm (with a scale of its
own), the unembedding and the soft cap, which is what the model does to its last stream.
"""

from dataclasses import dataclass

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemmascope import ops
from gemmascope.metrics import Answer
from gemmascope.readout.prompts import Positions, answers, encoded, names_of_tokens, positions_in
from gemmascope.results import Result, about

Stream = Float[Tensor, "prompt pos d_model"]
_BLOCK = 2**25
"""Logits in memory at once: positions are read in blocks of about this many."""


def stream_names(n_layers: int) -> dict[int, str]:
    """The site of every layer's stream: after block `layer`, and -1 for the embedding."""
    return {-1: "hook_embed"} | {layer: f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)}


def unembedded(model, stream: Stream) -> Float[Tensor, "prompt pos d_vocab"]:
    """What the model makes of its last stream: final norm, unembedding, soft cap."""
    return model.softcap(model.unembed(model.ln_final(stream)))


@dataclass
class Lens:
    """What every layer's stream predicts. `layer` l is the stream after block l, and -1 the embedding.

    Figures are Results with cells (layer, pos) and a sample for each prompt, in nats where they are of probabilities.
    """

    top: pandas.DataFrame
    """The likeliest tokens: columns prompt, layer, pos, rank (0 = the likeliest), token, id, prob."""
    log_prob: Result
    """Log probability of the target token."""
    rank: Result
    """How many tokens are likelier than the target."""
    entropy: Result
    """Entropy of the layer's distribution."""
    kl: Result
    """KL(final || layer): what the layer's distribution misses of the model's own."""
    model: object
    streams: dict[int, Stream]
    """Each layer's stream as the lens reads it, at the positions asked for."""
    tokens: Int[Tensor, "prompt token"]
    """The prompts, whole."""
    tuned: object | None
    """The TunedLens that translated the streams."""

    @torch.no_grad()
    def logits(self, layer: int) -> Float[Tensor, "prompt pos d_vocab"]:
        """One layer's logits, after the soft cap, at the positions asked for. The last layer's are the model's own."""
        if layer not in self.streams:
            raise ValueError(f"Layer {layer} is not in this lens: it has -1 (the embedding) to {max(self.streams)}.")
        return unembedded(self.model, self.streams[layer])

    def view(self, *, selection=None, state=None):
        """What every layer predicts, as a table to look into: see `gemmascope.lens_view`. The prompt is run again.

        Raises:
            ValueError: for several prompts, or when the model now runs otherwise than when this lens was read.
        """
        from gemmascope.views.lens import view_of

        return view_of(self, selection=selection, state=state)

    def __repr__(self) -> str:
        n_prompts, n_pos = self.streams[-1].shape[:2]
        return f"Lens({len(self.streams)} streams, {n_pos} positions, {n_prompts} prompts)"

    def _repr_html_(self) -> str:
        """The likeliest token at each layer and position of the first prompt."""
        first = self.top[(self.top["rank"] == 0) & (self.top["prompt"] == 0)]
        table = first.pivot_table(index="layer", columns="pos", values="token", aggfunc="first")
        read = self.kl.about.get("tokens")
        if read is not None:
            table.columns = [f"{pos} {read[pos]}" for pos in table.columns]
        return table.to_html(escape=True)


def logit_lens(
    model, prompt, target: Answer | None = None, *, positions: int | list[int] | None = None, top: int = 5
) -> Lens:
    """Reads every layer's stream as if it were the last (nostalgebraist 2020).

    Logits exist for a block of positions of one layer at a time, so that a large vocabulary fits.

    Args:
        prompt: text, texts, or token ids [pos] or [prompt, pos].
        target: the token that the figures are of: its text or id, or one for each prompt. By default the model's own
            likeliest token at each position.
        positions: where to read; all by default. Among prompts of different lengths, counted from the end.
        top: how many of the likeliest tokens to list.

    Raises:
        ValueError: for a target that is not one token, or a position that is not there.
    """
    return read(model, prompt, target, positions, top)


@torch.no_grad()
def read(
    model,
    prompt,
    target: Answer | None,
    positions: int | list[int] | None,
    top: int,
    tuned=None,
) -> Lens:
    """A lens; with a TunedLens, the streams pass through its translators first."""
    if not 1 <= top <= model.cfg.d_vocab:
        raise ValueError(f"top is {top}: it is a number of tokens, 1 to {model.cfg.d_vocab}.")
    prompts = encoded(model, prompt)
    at = positions_in(prompts, positions)
    wanted = None if target is None else answers(model, target, len(prompts.tokens))
    names = stream_names(model.cfg.n_layers)
    _, cache = model.run_with_cache(
        prompts.tokens,
        attention_mask=prompts.mask,
        names_filter=list(names.values()),
        pos_slice=at.index,
        return_type=None,
    )
    streams = {layer: cache[name] for layer, name in names.items()}
    if tuned is not None:
        streams = {layer: tuned.translate(stream, layer) for layer, stream in streams.items()}
    figures, ids, probs = measured(model, streams, streams[max(streams)], wanted, top)
    cells = pandas.DataFrame([(layer, pos) for layer in streams for pos in at.names], columns=["layer", "pos"])
    said = about(model, target=None if wanted is None else wanted.tolist(), positions=at.names)
    if len(prompts.tokens) == 1:
        said["tokens"] = [str(token) for token in names_of_tokens(model, prompts.tokens[0].tolist())]

    experiment = "logit lens" if tuned is None else "tuned lens"

    def result(number: int, what: str, unit: str) -> Result:
        values = figures[number].transpose(1, 2).flatten(0, 1).cpu()
        return Result(f"{experiment}: {what}", cells, values, unit, about=said)

    return Lens(
        top=_listed(model, list(streams), at, ids, probs),
        log_prob=result(0, "target", "log probability (nats)"),
        rank=result(1, "target", "rank"),
        entropy=result(2, "entropy", "nats"),
        kl=result(3, "KL to the final distribution", "nats"),
        model=model,
        streams=streams,
        tokens=prompts.tokens,
        tuned=tuned,
    )


def measured(
    model, streams: dict[int, Stream], last: Stream, wanted: Int[Tensor, " prompt"] | None, top: int
) -> tuple[
    Float[Tensor, "figure layer prompt pos"],
    Int[Tensor, "layer prompt pos top"],
    Float[Tensor, "layer prompt pos top"],
]:
    """Log probability and rank of the target, entropy, and KL to what the model makes of `last`, in that order; the
    likeliest ids and their probabilities."""
    n_prompts, n_pos = last.shape[:2]
    step = max(1, _BLOCK // (n_prompts * model.cfg.d_vocab))
    blocks = []
    for start in range(0, n_pos, step):

        def log_probs(stream: Stream, part: slice = slice(start, start + step)) -> Tensor:
            return ops.wide(unembedded(model, stream[:, part])).log_softmax(-1)

        final = log_probs(last)
        final_probs = final.exp()
        target = final.argmax(-1) if wanted is None else wanted[:, None].expand(final.shape[:2])
        rows = []
        for stream in streams.values():
            now = log_probs(stream)
            own = now.gather(-1, target[..., None])
            best, ids = now.topk(top, dim=-1)
            entropy, kl = -(now.exp() * now).sum(-1), (final_probs * (final - now)).sum(-1)
            rows.append((torch.stack((own[..., 0], (now > own).sum(-1), entropy, kl)), ids, best.exp()))
        figures, ids, probs = zip(*rows, strict=True)
        blocks.append((torch.stack(figures, dim=1), torch.stack(ids), torch.stack(probs)))
    figures, ids, probs = zip(*blocks, strict=True)
    return torch.cat(figures, dim=3), torch.cat(ids, dim=2), torch.cat(probs, dim=2)


def _listed(model, layers: list[int], at: Positions, ids: Tensor, probs: Tensor) -> pandas.DataFrame:
    n_layers, n_prompts, n_pos, top = ids.shape
    index = pandas.MultiIndex.from_product(
        [layers, range(n_prompts), at.names, range(top)], names=["layer", "prompt", "pos", "rank"]
    )
    table = index.to_frame(index=False)[["prompt", "layer", "pos", "rank"]]
    flat = ids.flatten().tolist()
    return table.assign(token=names_of_tokens(model, flat), id=flat, prob=probs.flatten().tolist())
