"""Measures a shipped model against the corpus's ground truth, and writes its card from what was measured.

    python -m gemmascope.zoo.evaluate nano-moe        prints the figures; writes evaluation.json and README.md

Everything is measured on documents that training did not see: another seed, and for indirect objects pairs of names
that training never shows together.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torch.nn import functional as F

from gemmascope.model.text import HookedGemma4
from gemmascope.weights import ZOO, load
from gemmascope.zoo.corpus import BOS, DOMAINS, FACTS, LANGUAGES, PHRASINGS, Batch, Corpus, gift, language_entropy

SEED = 1_000_003
"""Of the held-out documents; training uses small seeds."""
PAD = 0
SPAN = 50
"""Length of the repeated span on which induction is measured."""


def _next_logits(model: HookedGemma4, prompts: list[list[int]]) -> Float[Tensor, "prompt d_vocab"]:
    """Logits after the last token of each prompt, padded on the right."""
    width = max(map(len, prompts))
    rows = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        tokens = torch.tensor([prompt + [PAD] * (width - len(prompt)) for prompt in part])
        last = torch.tensor([len(prompt) - 1 for prompt in part])
        rows.append(model(tokens, attention_mask=tokens != PAD).cpu()[torch.arange(len(part)), last])
    return torch.cat(rows)


@torch.no_grad()
def indirect_objects(model: HookedGemma4, n: int = 500) -> dict[str, float]:
    """On `n` sentences with held-out pairs of names.

    `io_accuracy`: share where the indirect object is the most likely of all tokens; `io_logit_difference`: mean logit
    of the indirect object minus that of the subject.
    """
    corpus, rng = Corpus(model.tokenizer.backend), random.Random(SEED)
    gifts = [gift(rng, held_out=True) for _ in range(n)]
    logits = _next_logits(model, [[BOS, *corpus.ids(g.prompt)] for g in gifts])
    io, subject = (torch.tensor([corpus.ids(" " + getattr(g, who))[0] for g in gifts]) for who in ("io", "subject"))
    rows = torch.arange(n)
    return {
        "io_accuracy": (logits.argmax(-1) == io).double().mean().item(),
        "io_logit_difference": (logits[rows, io] - logits[rows, subject]).double().mean().item(),
    }


@torch.no_grad()
def induction(model: HookedGemma4, n: int = 16) -> dict:
    """On `n` sequences <bos> S S, S being SPAN random token ids.

    `repeat_loss` and `first_loss`: nats a token in the second and in the first S, each without its first token (the
    second S cannot be foreseen before it has begun). `induction_scores` [layer][head]: mean attention from each
    position of the second S to the token after its previous occurrence. `induction_score` is the largest of them and
    `induction_head` its [layer, head].
    """
    corpus, rng = Corpus(model.tokenizer.backend), random.Random(SEED)
    spans = [rng.choices(corpus.random_ids, k=SPAN) for _ in range(n)]
    tokens = torch.tensor([[BOS, *span, *span] for span in spans], device=model.cfg.device)
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(n, -1)
    scores = []
    for layer in range(model.cfg.n_layers):
        # Query SPAN + 1 + r, the second S's token r, looks at key r + 2: the token after its first occurrence at r + 1.
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, :, SPAN + 1 :]
        scores.append(pattern.diagonal(offset=2, dim1=-2, dim2=-1).mean((0, -1)).tolist())
    best, head = max((score, [layer, head]) for layer, heads in enumerate(scores) for head, score in enumerate(heads))
    return {
        "repeat_loss": nats[:, SPAN + 1 :].double().mean().item(),
        "first_loss": nats[:, 1:SPAN].double().mean().item(),
        "induction_score": best,
        "induction_head": head,
        "induction_scores": scores,
    }


@torch.no_grad()
def recall(model: HookedGemma4) -> dict[str, float]:
    """Share of the facts whose value is the most likely next token: in the phrasings shown, and in the one held out."""
    corpus = Corpus(model.tokenizer.backend)
    asked = [(fact, phrasing) for fact in FACTS for phrasing in range(len(PHRASINGS))]
    logits = _next_logits(model, [[BOS, *corpus.ids(fact.prompt(phrasing))] for fact, phrasing in asked])
    right = logits.argmax(-1) == torch.tensor([corpus.ids(" " + fact.value)[0] for fact, _ in asked])
    held_out = torch.tensor([phrasing == fact.held_out for fact, phrasing in asked])
    shown, new = right[~held_out].double().mean().item(), right[held_out].double().mean().item()
    return {"facts_recalled": shown, "facts_recalled_new_phrasing": new}


def _held_out(model: HookedGemma4, batches: int) -> Iterator[Batch]:
    corpus = Corpus(model.tokenizer.backend, SEED)
    for step in range(batches):
        yield corpus.batch(step, 16, model.cfg.n_ctx)


@torch.no_grad()
def routing(model: HookedGemma4, batches: int = 4) -> dict[str, list]:
    """Normalised mutual information of the first-choice expert and the domain, a number a layer; every token but <bos>.

    Also `expert_shares` [layer][domain][expert]: the share of the domain's tokens whose first choice is the expert.
    """
    names = [name for name in model.hook_dict if name.endswith("router.hook_indices")]
    experts, domains = {name: [] for name in names}, []
    for batch in _held_out(model, batches):
        _, cache = model.run_with_cache(batch.tokens, names_filter=names)
        inside = batch.tokens != BOS
        domains.append(batch.domains[inside])
        for name in names:
            experts[name].append(cache[name][..., 0].cpu()[inside])
    domain = torch.cat(domains)
    nmi, shares = [], []
    for name in names:
        first = torch.cat(experts[name])
        nmi.append(float(normalized_mutual_info_score(domain, first)))
        counts = torch.zeros(len(DOMAINS), model.cfg.n_experts)
        counts.index_put_((domain, first), torch.ones(()), accumulate=True)
        shares.append((counts / counts.sum(-1, keepdim=True)).tolist())
    return {"nmi": nmi, "expert_shares": shares}


def circuits(model: HookedGemma4) -> dict:
    """Every circuit's own curve: what training measures as it goes."""
    found = indirect_objects(model, 200) | induction(model, 8) | recall(model)
    del found["induction_scores"]
    return found | ({"nmi": routing(model, 1)["nmi"]} if model.cfg.n_experts else {})


# --- losses beside their baselines -----------------------------------------------------------------------------------


def _predictable(batch: Batch) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"], Int[Tensor, " token"], Tensor]:
    """(previous token, token, domain, where) of all tokens but <bos> and each document's first."""
    where = (batch.tokens[:, 1:] != BOS) & (batch.tokens[:, :-1] != BOS)
    return batch.tokens[:, :-1][where], batch.tokens[:, 1:][where], batch.domains[:, 1:][where], where


class Ngrams:
    """Unigram and bigram models of each domain, counted on the training stream.

    The bigram falls back on the unigram as often as a context was followed by something new (Witten and Bell 1991).
    """

    def __init__(self, corpus: Corpus, d_vocab: int, n_ctx: int, batches: int):
        self.d_vocab = d_vocab
        self.counts = torch.zeros(len(DOMAINS), d_vocab, d_vocab, dtype=torch.float64)
        for step in range(batches):
            previous, token, domain, _ = _predictable(corpus.batch(step, 16, n_ctx))
            self.counts.index_put_((domain, previous, token), torch.ones((), dtype=torch.float64), accumulate=True)
        seen = self.counts.sum(1)
        self.unigram = (seen + 0.01) / (seen + 0.01).sum(-1, keepdim=True)

    def nats(self, previous: Tensor, token: Tensor, domain: Tensor) -> dict[str, Tensor]:
        """Each token's price in nats under both models."""
        unigram = self.unigram[domain, token]
        after = self.counts[domain, previous]
        novel = (after > 0).sum(-1).clamp(min=1)
        bigram = (after.gather(-1, token[:, None]).squeeze(-1) + novel * unigram) / (after.sum(-1) + novel)
        return {"unigram": -unigram.log(), "bigram": -bigram.log()}


@torch.no_grad()
def domain_losses(model: HookedGemma4, batches: int = 16, counted: int = 400) -> dict[str, dict[str, float | None]]:
    """Nats a token in each domain, all columns over the same tokens: all but <bos> and each document's first.

    `model`; `unigram` and `bigram` fitted to that domain on `counted` batches of the training stream; `floor`, the
    generator's own price, None where it is not known.
    """
    ngrams = Ngrams(Corpus(model.tokenizer.backend, seed=0), model.cfg.d_vocab, model.cfg.n_ctx, counted)
    columns = {name: [] for name in ("model", "unigram", "bigram", "floor", "domain")}
    for batch in _held_out(model, batches):
        logits = model(batch.tokens)[:, :-1].cpu()
        previous, token, domain, where = _predictable(batch)
        columns["model"].append(F.cross_entropy(logits[where], token, reduction="none").double())
        columns["floor"].append(batch.floor[:, 1:][where].double())
        columns["domain"].append(domain)
        for name, nats in ngrams.nats(previous, token, domain).items():
            columns[name].append(nats)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    domain = joined.pop("domain")
    table = {}
    for d, name in enumerate(DOMAINS):
        means = {column: nats[domain == d].mean().item() for column, nats in joined.items()}
        table[name] = {column: None if math.isnan(mean) else mean for column, mean in means.items()}
    return table


def evaluate(model: HookedGemma4) -> dict:
    """Every figure of the card."""
    figures = {"parameters": sum(p.numel() for p in model.parameters())}
    figures |= indirect_objects(model) | induction(model) | recall(model)
    if model.cfg.n_experts:
        figures |= routing(model)
    figures["losses"] = domain_losses(model)
    return figures | {"language_entropy": {name: language_entropy(name) for name in LANGUAGES}}


# --- the card --------------------------------------------------------------------------------------------------------

_SHAPES = {
    "moe": "Gemma 4 26B-A4B's shape: sliding and global layers, one projection for keys and values on the global\n"
    "ones, and in every layer a dense MLP beside routed experts",
    "edge": "Gemma 4 E2B's shape: sliding and global layers, per-layer embeddings, and last layers that read an\n"
    "earlier layer's keys and values and have MLPs twice as wide",
}


_ROUTING = """
The separation of the domains by the router is trained, not only found. Left alone, the router followed kinds of tokens
more than domains; so beside a load-balancing loss, training rewards what the choice of expert tells about the document
(their mutual information, averaged over layers). It never sees a domain's label.
"""


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figures_table(figures: dict) -> str:
    of = figures
    layer, head = of["induction_head"]
    rows = [
        ["indirect objects, held-out pairs of names: the most likely of all tokens", f"{of['io_accuracy']:.1%}"],
        ["indirect objects: mean logit difference to the subject", f"{of['io_logit_difference']:.2f}"],
        [f"induction score of layer {layer}, head {head}, the highest", f"{of['induction_score']:.3f}"],
        [f"repeated random tokens (<bos> S S, {SPAN} each): loss in the second S", f"{of['repeat_loss']:.3f} nats"],
        ["the same: loss in the first S", f"{of['first_loss']:.2f} nats"],
        ["facts recalled, in the phrasings that training shows", f"{of['facts_recalled']:.1%}"],
        ["facts recalled, in the phrasing never shown of that fact", f"{of['facts_recalled_new_phrasing']:.1%}"],
    ]
    if "nmi" in of:
        nmi = ", ".join(f"{nmi:.2f}" for nmi in of["nmi"])
        rows.append(["routing: NMI of the first-choice expert and the domain, layer by layer", nmi])
    return _table(["measured on the files in this folder", "figure"], rows)


def _loss_table(figures: dict) -> str:
    show = lambda nats: "unknown" if nats is None else f"{nats:.3f}"  # noqa: E731
    columns = ("model", "floor", "bigram", "unigram")
    rows = [[name, *(show(row[column]) for column in columns)] for name, row in figures["losses"].items()]
    return _table(["domain", *columns], rows)


def _curve_table(log: list[dict]) -> str:
    """Some ten rows of the training log, the last among them."""
    every = math.ceil(len(log) / 10)
    columns = {
        "step": lambda line: f"{line['step']}",
        "M tokens": lambda line: f"{line['tokens'] / 1e6:.2f}",
        "batch loss": lambda line: f"{line['loss']:.2f}",
        "IO accuracy": lambda line: f"{line['io_accuracy']:.0%}",
        "IO logit difference": lambda line: f"{line['io_logit_difference']:.1f}",
        "induction score": lambda line: f"{line['induction_score']:.2f}",
        "loss in second S": lambda line: f"{line['repeat_loss']:.2f}",
        "facts": lambda line: f"{line['facts_recalled']:.0%}",
    }
    if "nmi" in log[-1]:
        columns["best NMI"] = lambda line: f"{max(line['nmi']):.2f}"
    return _table(list(columns), [[show(line) for show in columns.values()] for line in log[::-every][::-1]])


def card(name: str, figures: dict, config: dict, log: list[dict]) -> str:
    """The model's README.md: every number in it comes from `evaluate`, config.json and the training log."""
    kinds = ", ".join("global" if kind == "full_attention" else "sliding" for kind in config["layer_types"])
    entropies = ", ".join(f"{language} {nats:.3f}" for language, nats in figures["language_entropy"].items())
    n_ctx, last, is_moe = config["max_position_embeddings"], log[-1], config["enable_moe_block"]
    return f"""---
license: apache-2.0
library_name: gemmascope
tags: [interpretability, gemma4]
---
# {name}

A small language model that ships with gemmascope, so that known circuits can be checked and not only displayed. It has
{_SHAPES["moe" if is_moe else "edge"]}.

{figures["parameters"]:,} parameters; layers {kinds}; width {config["hidden_size"]}; window {config["sliding_window"]};
context {n_ctx}; {config["vocab_size"]} tokens. It knows its generated corpus and nothing
else: it is no assistant, and its facts are invented.

## Measured
{_figures_table(figures)}

The induction score is the mean attention from each position of the second S to the token after its previous occurrence.

Loss on held-out documents in nats a token, beside the floor (what the generator itself pays for the same tokens) and a
bigram and a unigram model fitted to the same domain. <bos> and each document's first token are left out.

{_loss_table(figures)}

The exact entropy rates of the mini-languages: {entropies}.

## Data
Eight generated domains, packed into windows of {n_ctx} tokens: gifts (indirect objects; one pair of names in nine is
never shown together), repeats (spans of random token ids that return after random gaps), facts ({len(FACTS)} invented
ones, each shown in {len(PHRASINGS) - 1} of {len(PHRASINGS)} phrasings), four mini-languages with disjoint words, and
code-like text. See `gemmascope/zoo/corpus.py`.

## Recipe
`python -m gemmascope.zoo.train {name} --steps {last["step"]} --seed {last["seed"]}`: {last["tokens"] / 1e6:.1f} million
tokens in {last["seconds"] / 60:.0f} minutes on {last["device"]}. See `gemmascope/zoo/train.py`.
{_ROUTING if is_moe else ""}
Each circuit's own curve, on smaller samples than above (all rows are in `log.jsonl`):

{_curve_table(log)}

The figures and this card were written by `python -m gemmascope.zoo.evaluate {name}`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gemmascope.zoo.evaluate", description="Measures a model and writes its card."
    )
    parser.add_argument("model", help="nano-moe, nano-edge, or a folder that gemmascope.zoo.train wrote")
    name = parser.parse_args().model
    folder = ZOO / name if (ZOO / name).is_dir() else Path(name)
    figures = evaluate(load(name))
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (folder / "README.md").write_text(card(folder.name, figures, json.loads((folder / "config.json").read_text()), log))
    print(f"{_figures_table(figures)}\n\n{_loss_table(figures)}\n\nWritten to {folder / 'README.md'}.")


if __name__ == "__main__":
    main()
