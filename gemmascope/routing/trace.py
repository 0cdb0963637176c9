"""Which experts each token went to: of a prompt, of several, or of a generation.

`RoutingTrace` holds every token. For a corpus, `counts.py` keeps sums of traces and not the traces.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from gemmascope import ops
from gemmascope.config import PRESETS
from gemmascope.hooks import Reader
from gemmascope.results import about

Label = Any
"""What a prompt is of: a label, such as a string, or one for each of its tokens, in a list, an array or a tensor."""


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token went to. Layers are stacked in the order of `layers`."""

    layers: tuple[int, ...]
    indices: Int[Tensor, "layer *batch_and_pos slot"]
    """Chosen experts, the router's most probable first (or in the order in which a hook chose them)."""
    weights: Float[Tensor, "layer *batch_and_pos slot"]
    """Their final weights: renormalised probabilities times the per-expert scale."""
    probs: Float[Tensor, "layer *batch_and_pos expert"]
    """The router's softmax over all experts."""
    real: Bool[Tensor, " *batch_and_pos"]
    """False on padding."""
    tokens: Int[Tensor, " *batch_and_pos"] | None = None
    """The ids that were read; None in `cache.routing`, which does not know them."""
    predicted: Int[Tensor, " *batch_and_pos"] | None = None
    """The model's likeliest next token after each."""
    labels: Int[Tensor, " *batch_and_pos"] | None = None
    """The number, in `label_names`, of each token's label."""
    label_names: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    """The model, its fingerprint, versions; under "texts", the text of every token id in the trace."""

    @property
    def n_experts(self) -> int:
        return self.probs.shape[-1]

    @property
    def k(self) -> int:
        """Experts a token."""
        return self.indices.shape[-1]

    def load(self) -> Float[Tensor, "layer expert"]:
        """The share of (token, slot) pairs that went to each expert, padding left out; rows sum to 1."""
        chosen = [layer[self.real].flatten() for layer in self.indices]
        return torch.stack([experts.bincount(minlength=self.n_experts) / len(experts) for experts in chosen])

    @property
    def margins(self) -> Float[Tensor, " layer *batch_and_pos"]:
        """How close a flip is: the k-th largest probability minus the next (minus 0 where every expert is chosen)."""
        return margins_of(self.probs, self.k)

    @property
    def entropy(self) -> Float[Tensor, " layer *batch_and_pos"]:
        """The entropy of the router's softmax at each token, in nats."""
        return entropy_of(self.probs)

    def batched(self) -> "RoutingTrace":
        """The same with a prompt axis, which a cache without a batch axis leaves out."""
        if self.real.ndim == 2:
            return self
        return self._mapped(lambda name, x: x[:, None] if name in ("indices", "weights", "probs") else x[None])

    def to(self, device: torch.device | str) -> "RoutingTrace":
        """A trace whose tensors are on that device."""
        return self._mapped(lambda name, x: x.to(device))

    def _tensors(self) -> dict[str, Tensor]:
        names = ("indices", "weights", "probs", "real", "tokens", "predicted", "labels")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _mapped(self, change) -> "RoutingTrace":
        changed = {name: change(name, x) for name, x in self._tensors().items()}
        return RoutingTrace(self.layers, **changed, label_names=self.label_names, about=self.about)

    @property
    def positions(self) -> Int[Tensor, " *batch_and_pos"]:
        """The place of each token among its prompt's own, from 0; of no meaning on padding."""
        return self.real.long().cumsum(-1) - 1

    @property
    def table(self) -> pandas.DataFrame:
        """One row for each prompt, pos (padding left out), layer and rank of choice: the expert, its weight and
        probability, the token's margin and entropy in that layer (nats), and the token and label where known."""
        all_of = self.to("cpu").batched()
        real, n_layers = all_of.real, len(self.layers)
        n_tokens = int(real.sum())

        def each(values: Tensor) -> list:
            """[prompt, pos] values, once for every layer and rank."""
            return values[real].repeat(n_layers).repeat_interleave(self.k).tolist()

        def by_layer(values: Tensor) -> list:
            return values[:, real].flatten().repeat_interleave(self.k).tolist()

        prompts = torch.arange(len(real))[:, None].expand_as(real)
        columns: dict[str, Any] = {"prompt": each(prompts), "pos": each(all_of.positions)}
        if all_of.tokens is not None:
            columns["id"] = each(all_of.tokens)
            texts = self.about.get("texts")
            columns |= {} if texts is None else {"token": [texts[str(token)] for token in columns["id"]]}
        if all_of.labels is not None:
            columns["label"] = [self.label_names[label] for label in each(all_of.labels)]
        columns["layer"] = torch.tensor(self.layers).repeat_interleave(n_tokens * self.k).tolist()
        columns["rank"] = list(range(self.k)) * (n_tokens * n_layers)
        chosen = all_of.probs.gather(-1, all_of.indices)
        for name, values in (("expert", all_of.indices), ("weight", all_of.weights), ("prob", chosen)):
            columns[name] = values[:, real].flatten().tolist()
        return pandas.DataFrame(columns | {"margin": by_layer(all_of.margins), "entropy": by_layer(all_of.entropy)})

    def __repr__(self) -> str:
        n_prompts = len(self.batched().real)
        return (
            f"RoutingTrace({int(self.real.sum())} tokens of {n_prompts} prompts, {len(self.layers)} layers, "
            f"{self.k} of {self.n_experts} experts, {self.about.get('model', 'unknown model')})"
        )

    def view(self, prompt: int = 0, *, selection=None, state=None):
        """One prompt's experts as a RouterView, linked with other views through `selection`. It has no model:
        `gs.router_view(model, text)` also commits changes."""
        from gemmascope.views.router import trace_view

        return trace_view(self, prompt, selection=selection, state=state)

    # Files

    def save(self, folder: str | Path) -> None:
        """Writes trace.safetensors and manifest.json into a folder, which is made if it is not there."""
        manifest = {"layers": self.layers, "label_names": self.label_names, "about": self.about}
        write_files(folder, "trace", self._tensors(), manifest)

    @classmethod
    def read(cls, folder: str | Path) -> "RoutingTrace":
        """Reads what `save` wrote (`load` is what experts carry)."""
        tensors, manifest = read_files(folder, "trace")
        names = tuple(manifest["label_names"])
        return cls(tuple(manifest["layers"]), **tensors, label_names=names, about=manifest["about"])

    @staticmethod
    def merge(traces: "Sequence[RoutingTrace]") -> "RoutingTrace":
        """One trace of all prompts, in order; shorter ones are padded on the left.

        Raises:
            ValueError: for no traces, traces of different models or layers, or some with tokens or labels and some
                without.
        """
        if not traces:
            raise ValueError("There are no traces to merge: give one at least.")
        refuse_other_model(*(trace.about for trace in traces))
        other = next((trace for trace in traces if trace.layers != traces[0].layers), None)
        if other is not None:
            came = [", ".join(map(str, trace.layers)) for trace in (traces[0], other)]
            raise ValueError(f"Some traces are of layers {came[0]} and some of {came[1]}: make all of them alike.")
        traces = [trace.batched() for trace in traces]
        names = tuple(dict.fromkeys(name for trace in traces for name in trace.label_names))
        parts = [trace._tensors() for trace in traces]
        if any(part.keys() != parts[0].keys() for part in parts):
            raise ValueError("Some traces have tokens or labels and some have none: make all of them alike.")
        width = max(trace.real.shape[1] for trace in traces)
        for part, trace in zip(parts, traces, strict=True):
            if "labels" in part:
                part["labels"] = torch.tensor([names.index(name) for name in trace.label_names])[part["labels"].cpu()]
        joined = {}
        for name in parts[0]:
            routed = name in ("indices", "weights", "probs")
            wide = [_padded(part[name], width, before_last=routed) for part in parts]
            joined[name] = torch.cat(wide, dim=1 if routed else 0)
        texts = {id: text for trace in traces for id, text in trace.about.get("texts", {}).items()}
        said = traces[0].about | ({"texts": texts} if texts else {})
        return RoutingTrace(traces[0].layers, **joined, label_names=names, about=said)


def entropy_of(probs: Float[Tensor, "*token expert"]) -> Float[Tensor, " *token"]:
    """In nats. 0 log 0 is 0, by a bound on the logarithm, which is twice as fast as torch.special.entr."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


def margins_of(probs: Float[Tensor, "*token expert"], k: int) -> Float[Tensor, " *token"]:
    if k == probs.shape[-1]:
        return probs.min(-1).values
    best = probs.topk(k + 1, dim=-1).values
    return best[..., k - 1] - best[..., k]


def _padded(tensor: Tensor, width: int, before_last: bool) -> Tensor:
    """Zeros (False) on the left of the position axis, which is the last, or the one before it."""
    missing = width - tensor.shape[-2 if before_last else -1]
    return F.pad(tensor, (0, 0, missing, 0) if before_last else (missing, 0))


def write_files(folder: str | Path, what: str, tensors: dict[str, Tensor], manifest: dict) -> None:
    """`what`.safetensors and manifest.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, folder / f"{what}.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"what": f"routing {what}"} | manifest, indent=1))


def read_files(folder: str | Path, what: str) -> tuple[dict[str, Tensor], dict]:
    """What `write_files` wrote.

    Raises:
        FileNotFoundError: where there is nothing of the kind.
    """
    folder = Path(folder)
    if not (folder / f"{what}.safetensors").is_file() or not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} holds no routing {what}: give a folder that `save` wrote.")
    return load_file(folder / f"{what}.safetensors"), json.loads((folder / "manifest.json").read_text())


def refuse_other_model(*abouts: dict[str, Any]) -> None:
    """Raises ValueError unless all are of one model, with the same weights."""
    first = abouts[0]
    other = next((one for one in abouts if one.get("fingerprint") != first.get("fingerprint")), None)
    if other is not None:
        came = [f"{one.get('model')} ({one.get('fingerprint')})" for one in (first, other)]
        raise ValueError(
            f"These are of different models, {came[0]} and {came[1]}: expert 3 of one is not expert 3 of the other. "
            "Keep them apart."
        )


def refuse_dense(model) -> None:
    """Raises ValueError for a model that does not route."""
    if model.cfg.n_experts is None:
        routing = ["nano-moe", *(name for name, cfg in PRESETS.items() if cfg.n_experts)]
        raise ValueError(
            f"{model.cfg.model_name} is dense and has no experts to route to. Models that route: {', '.join(routing)}."
        )


def check_expert(n_layers: int, n_experts: int, layer: int, expert: int | None = None) -> int:
    """The layer, counted from 0. Raises ValueError for a layer or an expert that is not there."""
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"Layer {layer} does not exist: there are layers 0 to {n_layers - 1}.")
    if expert is not None and not 0 <= expert < n_experts:
        raise ValueError(f"Expert {expert} does not exist: a layer has experts 0 to {n_experts - 1}.")
    return layer % n_layers


def plain(label: Label) -> Any:
    """A label, or a list of one for each token, from whatever holds it: a tuple, an array, a tensor, a column."""
    label = label.tolist() if hasattr(label, "tolist") else label
    return list(label) if isinstance(label, tuple | range) else label


def numbered(labels: Sequence[Label], real: Bool[Tensor, "prompt pos"], names: list[str]) -> Int[Tensor, "prompt pos"]:
    """Each token's label as its number in `names`, which grows by those that are new; 0 on padding.

    Raises:
        ValueError: for another number of labels than prompts, or than a prompt has tokens.
    """
    if len(labels) != len(real):
        raise ValueError(f"There are {len(labels)} labels for {len(real)} prompts: give one for each.")
    numbers = torch.zeros(real.shape, dtype=torch.long)
    for row, (label, here) in enumerate(zip(labels, real.cpu(), strict=True)):
        label = plain(label)
        each = label if isinstance(label, list) else [label]
        if isinstance(label, list) and len(each) != here.sum():
            raise ValueError(
                f"Prompt {row} has {int(here.sum())} tokens and {len(each)} labels: give one for all, or one for each."
            )
        for name in dict.fromkeys(map(str, each)):
            if name not in names:
                names.append(name)
        numbers[row, here] = torch.tensor([names.index(str(one)) for one in each])  # one label fills the row
    return numbers


def likeliest(logits: Float[Tensor, "*batch_and_pos d_vocab"]) -> Int[Tensor, " *batch_and_pos"]:
    """argmax. On a CPU numpy's, which is vectorised as torch's is not: 2 ms and 20 for 8192 tokens of 1328."""
    return torch.from_numpy(ops.wide(logits).numpy().argmax(-1)) if logits.is_cpu else logits.argmax(-1)


ROUTER = ("indices", "weights", "probs")


@torch.no_grad()
def run_traced(
    model, tokens: Int[Tensor, "prompt pos"], mask: Tensor | None, said: dict[str, Any], labels=None, names=()
) -> RoutingTrace:
    """One plain run of one batch, watched at the routers only."""
    layers, seen = tuple(range(model.cfg.n_layers)), {}
    sites = [f"blocks.{layer}.moe.router.hook_{what}" for layer in layers for what in ROUTER]
    with model.hooks([(site, Reader(seen.__setitem__)) for site in sites]):
        predicted = likeliest(model(tokens, attention_mask=mask))
    by_layer = {what: [seen[f"blocks.{layer}.moe.router.hook_{what}"] for layer in layers] for what in ROUTER}
    routed = {what: torch.stack(found) for what, found in by_layer.items()}
    real = torch.ones_like(predicted, dtype=torch.bool) if mask is None else mask.bool()
    return RoutingTrace(
        layers, **routed, real=real.to(predicted.device), tokens=tokens.to(predicted.device), predicted=predicted,
        labels=labels, label_names=tuple(names), about=said,
    )  # fmt: skip


def with_texts(model, said: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """`about`, with the text of these token ids, where the model has a tokenizer."""
    if model.tokenizer is None:
        return said
    ids = tokens.unique().tolist()
    return said | {"texts": dict(zip(map(str, ids), model.tokenizer.to_str_tokens(ids), strict=True))}


@torch.no_grad()
def trace_routing(
    model,
    prompts,
    labels: Sequence[Label] | None = None,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    **sampling,
) -> RoutingTrace:
    """Every token's experts, on the CPU.

    Costs a plain forward and some 5 % more; every token's routing is kept, so for a corpus take `count_routing`.

    Args:
        prompts: text, texts, or token ids [pos] or [prompt, pos].
        labels: for each prompt, its label or a list of labels, one for each of its tokens.
        attention_mask: [prompt, pos], False on padding, for ids of different lengths.
        max_new_tokens: how far to continue the prompts and trace what is written; all but the last new token are read,
            so those are traced. Without labels, tokens are then labelled "prompt" and "generated".
        sampling: temperature, seed, stop_ids, ... of `generate`.

    Raises:
        ValueError: for a dense model, no prompts, or labels of the wrong length.
    """
    refuse_dense(model)
    if sampling and not max_new_tokens:
        raise ValueError(f"{', '.join(sampling)} is for a generation: give max_new_tokens too.")
    run = model._begin(prompts, attention_mask)
    tokens, mask = run.tokens, None if run.mask is None else run.mask.bool()
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    names: list[str] = []
    numbers = None
    if labels is not None:
        numbers = numbered([labels] if isinstance(labels, str) else labels, real, names)
    said, parts = about(model), []
    for start in tqdm(range(0, len(tokens), batch_size), "tracing", delay=1, leave=False, disable=not progress):
        rows = slice(start, start + batch_size)
        part, padding = tokens[rows], None if mask is None else mask[rows]
        own = None if numbers is None else numbers[rows]
        if max_new_tokens:
            parts.append(_generated(model, part, padding, max_new_tokens, said, own, names, sampling))
        else:
            parts.append(run_traced(model, part, padding, with_texts(model, said, part), own, names).to("cpu"))
    return RoutingTrace.merge(parts)


def _generated(model, tokens, mask, n_new: int, said, labels, names, sampling) -> RoutingTrace:
    sites = [f"blocks.{layer}.moe.router.hook_{what}" for layer in range(model.cfg.n_layers) for what in ROUTER]
    out, cache = model.generate(
        tokens, n_new, attention_mask=mask, return_cache=True, names_filter=[*sites, "hook_logits"], **sampling
    )
    found, read = cache.routing.to("cpu"), out[:, :-1].cpu()
    added = read.shape[1] - tokens.shape[1]
    if labels is None:
        names = ["prompt", "generated"]
        labels = torch.zeros_like(tokens, dtype=torch.long).cpu()
        written = torch.ones(len(read), added, dtype=torch.long)
    else:
        written = labels[:, -1:].expand(-1, added)
    return RoutingTrace(
        found.layers, found.indices, found.weights, found.probs, found.real.bool(), read,
        cache["hook_logits"].argmax(-1).cpu(), torch.cat((labels, written), dim=1), tuple(names),
        with_texts(model, said, read),
    )  # fmt: skip
