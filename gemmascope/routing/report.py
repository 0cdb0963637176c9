"""One report on a model's routing: what its experts do, and beside it whether that matters.

1. Texts are counted as a stream (counts.py); a random sample of their windows is kept (reservoir sampling).
2. On the sample, experts' contributions are measured (contribution.py) and, unless told not to, experts are silenced
   one by one beside their controls, and layers lose their experts (causal.py).
3. What was measured is made into tables; page.py draws them and writes them to a page.

Published audits find that routing statistics do not predict causal importance (arXiv 2606.10703). So every statistic
of an expert stands beside its effect, and `correlations` says how far one goes with the other here.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice, product
from pathlib import Path
from statistics import NormalDist

import pandas
from torch import Tensor

from gemmascope.progress import bar, interruptible
from gemmascope.results import Result
from gemmascope.routing import statistics as S
from gemmascope.routing.causal import branch_ablation, expert_ablation, fewer_experts, others_of, silencing_estimate
from gemmascope.routing.contribution import ExpertProfile, profile_experts
from gemmascope.routing.counts import RoutingCounts, count_routing, windows
from gemmascope.routing.effects import RoutingEffect
from gemmascope.routing.sample import Sample, by_length, in_step
from gemmascope.routing.trace import Label, refuse_dense

CELL = ["layer", "expert"]
MEANING = {
    "load": "its share of all choices",
    "first": "share of tokens whose first choice it is",
    "mass": "the mean weight that a token gives it",
    "prob": "the mean of the router's softmax",
    "vocabulary": "how much it lives on few token ids: the mean share of an id that goes to it",
    "lift": "its use by the label that favours it most, over its use by all text",
    "norm": "mean length of what it adds to the stream, where it is chosen",
    "share": "its share of what the feed-forward adds, where it is chosen",
    "cosine": "of its part with the sum of all experts' parts, where it is chosen",
    "max_output": "the largest entry of its output",
    "label": "the label that favours it most",
    "loss": "change of the loss when it is silenced, in nats a token; low and high: 95 % interval over texts",
    "kl": "KL between the predictions with and without it, in nats a token",
    "random expert": "control: the mean change of the loss when other experts of its layer are silenced",
    "matched load": "control: the change of the loss when as many random tokens lose another of their experts",
    "excess": "loss less matched load: what it matters more than its number of tokens says",
    "estimate": "the change of the loss estimated from one backward pass",
}
"""Columns of `RoutingReport.experts`."""
STATISTICS = tuple(MEANING)[:10]
"""Those that are looked up without changing the model."""
EFFECTS = ("loss", "low", "high", "matched load", "random expert", "excess", "kl", "estimate")
"""Those of changing it, controls among them; `experts` has them beside the load."""
TESTED = {"loss": "effect", "excess": "effect beyond matched load"}
"""What statistics are correlated with."""
MIN_COUNT = 10
"""Token ids that occur less often are left out of vocabularies, where the corpus has any that occur as often."""
SHOWN = 50
"""Experts whose words are listed, and pairs of experts."""


@dataclass
class RoutingReport:
    """What was measured, and the tables that follow from it. In a notebook it shows a summary; `to_html` writes all."""

    counts: RoutingCounts
    """Sums over all tokens of the corpus."""
    n_texts: int
    """Texts that were read."""
    n_sampled: int
    """How many of these (or windows of those longer than the context) contributions and effects are measured on."""
    profile: ExpertProfile | None = None
    """Contributions; None where it was interrupted before."""
    silenced: RoutingEffect | None = None
    """Each expert silenced, beside its controls; None without the causal part, or where it was interrupted before."""
    branch: RoutingEffect | None = None
    """Layer by layer, no experts and wrong experts; None also where a layer has too few experts to be wrong."""
    first_only: RoutingEffect | None = None
    """Layer by layer, the first choice alone."""
    estimate: Result | None = None
    """The effects of all silencings, estimated by gradient."""
    interrupted: list[str] = field(default_factory=list)
    """What Ctrl-C left out, in sentences."""

    # Tables

    @cached_property
    def experts(self) -> pandas.DataFrame:
        """One row for each layer and expert; MEANING says what the columns are. Effects are NaN for experts that were
        not silenced."""
        counts = self.counts
        figures = {"load": S.load(counts), "first": S.first_load(counts), "mass": S.mass(counts)}
        figures["prob"] = S.mean_prob(counts)
        if counts.vocabulary:
            figures["vocabulary"] = S.vocabulary_specialization(counts, min_count=self._min_count)
        index = pandas.MultiIndex.from_product([counts.layers, range(counts.n_experts)], names=CELL)
        table = index.to_frame(index=False).assign(**{name: x.flatten().tolist() for name, x in figures.items()})
        parts = []
        if self.labelled:
            most = self.domains.dropna(subset="lift").sort_values("lift").drop_duplicates(CELL, keep="last")
            parts.append(most[[*CELL, "label", "lift"]])
        if self.profile is not None:
            parts.append(self.profile.experts.drop(columns="tokens"))
        if self.silenced is not None:
            effects = self.silenced.table.drop(columns="load")
            parts.append(effects.assign(excess=effects["loss"] - effects["matched load"]))
        if self.estimate is not None:
            parts.append(self.estimate.cells.assign(estimate=self.estimate.mean.tolist()))
        for part in parts:
            table = table.merge(part, how="left", on=CELL)
        first = [name for name in (*CELL, "load", *EFFECTS) if name in table]  # side by side
        return table[[*first, *table.columns.difference(first, sort=False)]]

    @cached_property
    def layers(self) -> pandas.DataFrame:
        """One row a layer: `balance`; `nmi` and the standing committee (with labels); `temporal_locality`; next_layer
        (what a first choice tells about the next layer's, 0 to 1); means of the contributions; and the change of the
        loss with an expert silenced (the mean over them), with none, with wrong experts, with the first choice alone.
        """
        counts = self.counts
        table = S.balance(counts)
        if self.labelled:
            committee = S.standing_committee(counts)
            table = table.assign(
                nmi=S.nmi(counts).tolist(), committee=committee["committee"], committee_share=committee["share"]
            )
        if counts.total("steps"):
            table = table.merge(S.temporal_locality(counts), on="layer")
        tells = S.transition_information(counts)[["layer", "normalised"]].rename(columns={"normalised": "next_layer"})
        table = table.merge(tells, how="left", on="layer")
        if self.profile is not None:
            table = table.merge(self.profile.layers, on="layer")
        effects = {}
        if self.silenced is not None:
            effects["silenced"] = self.silenced.table.groupby("layer")["loss"].mean()
        if self.branch is not None:
            effects |= dict(self.branch.table.pivot(index="layer", columns="experts", values="loss").items())
        if self.first_only is not None:
            effects["first_only"] = self.first_only.table.set_index("layer")["loss"]
        return table.assign(**{name: table["layer"].map(effect) for name, effect in effects.items()})

    @cached_property
    def correlations(self) -> pandas.DataFrame:
        """Do statistics tell what matters? Spearman's correlation, over experts, of each statistic with the effect of
        silencing and with what of it is beyond the matched-load control.

        One row for each: statistic, of (one of TESTED), spearman, low, high (all intervals hold together at 95 %,
        Bonferroni; standard error of Fieller, Hartley and Pearson 1957), within_layers (the mean of each layer's own
        correlation), n experts. The gradient's estimate, no statistic but a measurement, is the last. Empty without the
        causal part.
        """
        columns = ["statistic", "of", "spearman", "low", "high", "within_layers", "n"]
        if self.silenced is None:
            return pandas.DataFrame(columns=columns)
        table = self.experts.dropna(subset="loss")
        names = [name for name in (*STATISTICS, "estimate") if name in table]
        z = NormalDist().inv_cdf(1 - 0.025 / (len(names) * len(TESTED)))
        rows = []
        for effect, of in TESTED.items():
            for name in names:
                both = table[["layer", name, effect]].dropna()
                rho, n = _spearman(both[name], both[effect]), len(both)
                reach = z * math.sqrt(1.06 / max(1, n - 3))
                middle = math.atanh(max(-0.9999, min(0.9999, rho)))
                low, high = math.tanh(middle - reach), math.tanh(middle + reach)
                within = pandas.Series([_spearman(part[name], part[effect]) for _, part in both.groupby("layer")])
                rows.append((name, of, rho, low, high, within.mean(), n))
        return pandas.DataFrame(rows, columns=columns)

    @cached_property
    def domains(self) -> pandas.DataFrame:
        """`domain_specialization`: the share of each label's tokens that go to each expert; beside it loss and kl, what
        silencing does to the predictions of that label (NaN where the sample has none), and their number n."""
        table = S.domain_specialization(self.counts).sort_values(["label", *CELL], ignore_index=True)
        if self.silenced is None or not self.labelled:
            return table
        return table.merge(self.silenced.by_label, how="left", on=["label", "layer", "expert"])

    @cached_property
    def similarity(self) -> pandas.DataFrame:
        """Jensen-Shannon divergence (bits) of two labels' loads, the mean over layers; label by label."""
        if not self.labelled:
            return pandas.DataFrame()
        labels = self.counts.labels
        table = pandas.DataFrame(S.domain_similarity(self.counts).mean(0).numpy(), index=labels, columns=labels)
        return table.sort_index().sort_index(axis=1)

    @cached_property
    def words(self) -> pandas.DataFrame:
        """What experts read and write: reads, the token ids that go to it most surely (with their share), writes, the
        tokens that its mean contribution promotes; of the SHOWN experts with the largest effects, or loads."""
        columns = ["layer", "expert", "reads", "writes"]
        rows = []
        for layer, expert in self.leading[CELL][:SHOWN].itertuples(index=False):
            reads = writes = ""
            if self.counts.vocabulary:
                found = S.expert_vocabulary(self.counts, layer, expert, top=6, min_count=self._min_count)
                found = found[found["share"] > 0]
                names = found["token"] if "token" in found else found["id"]
                reads = ", ".join(
                    f"{_shown(token)} {share:.0%}" for token, share in zip(names, found["share"], strict=True)
                )
            if self.profile is not None:
                writes = ", ".join(map(_shown, self.profile.written_tokens(layer, expert, top=6)["token"]))
            rows.append((layer, expert, reads, writes))
        return pandas.DataFrame(rows, columns=columns)

    @cached_property
    def pairs(self) -> pandas.DataFrame:
        """Experts chosen together more than by chance: layer, expert, other, together (share of tokens), lift, chance
        (the lift without preference); the SHOWN largest lifts among pairs that occur as often as by chance, at least.
        """
        counts, k, n = self.counts, self.counts.k, self.counts.n_experts
        found = S.coactivation(counts)
        layer, expert, other = found.lift.triu(1).nan_to_num().nonzero().unbind(1)
        share = counts.total("chosen").sum(1)[layer, expert] / counts.n_tokens
        table = pandas.DataFrame({"layer": [counts.layers[row] for row in layer.tolist()], "expert": expert.tolist()})
        table = table.assign(
            other=other.tolist(),
            together=(found.conditional[layer, expert, other] * share).tolist(),
            lift=found.lift[layer, expert, other].tolist(),
            chance=(1 - 1 / k) / (1 - 1 / n),
        )
        often = table["together"] >= k * (k - 1) / (n * (n - 1))
        return table[often].sort_values("lift", ascending=False)[:SHOWN].reset_index(drop=True)

    @property
    def tables(self) -> dict[str, pandas.DataFrame]:
        """All tables by name."""
        names = ("experts", "layers", "correlations", "domains", "similarity", "words", "pairs")
        return {name: getattr(self, name) for name in names}

    @property
    def leading(self) -> pandas.DataFrame:
        """The rows of `experts`, those with the largest effects first; without effects, the largest loads."""
        by = "load" if self.silenced is None else "loss"
        order = self.experts[by].abs().sort_values(ascending=False, kind="stable").index
        return self.experts.loc[order].reset_index(drop=True)

    @property
    def labelled(self) -> bool:
        """Whether there are labels to compare: two at least."""
        return len(self.counts.labels) > 1

    @property
    def _min_count(self) -> int:
        return min(MIN_COUNT, int(self.counts.seen["input"].max()))

    # Words, pictures, pages

    @property
    def findings(self) -> list[str]:
        """What was measured, in sentences."""
        counts, layers, experts = self.counts, self.layers, self.experts
        said = [
            f"{counts.n_tokens:,} tokens of {self.n_texts:,} texts went through {len(counts.layers)} layers of "
            f"{counts.n_experts} experts, {counts.k} a token.",
            *self.interrupted,
        ]
        effective = layers["effective_experts"]
        said.append(
            f"The load is spread as over {effective.min():.1f} to {effective.max():.1f} equally used experts a layer; "
            f"{int(layers['dead'].sum())} of {len(experts)} experts were never chosen."
        )
        if self.labelled:
            best = layers.loc[layers["nmi"].idxmax()]
            said.append(
                f"Of the {len(counts.labels)} labels, the first choice tells most in layer {int(best['layer'])} "
                f"(normalised mutual information {best['nmi']:.2f})."
            )
        if self.silenced is None:
            return [*said, "No effect was measured, so nothing here says which experts matter."]
        done, first = experts.dropna(subset="loss"), self.leading.iloc[0]
        said.append(
            f"On {self.silenced.n_texts} texts drawn at random, {len(done)} experts were silenced one by one: the loss "
            f"changes by {done['loss'].median():.4f} nats a token in the median (control of matched load "
            f"{done['matched load'].median():.4f}), and most by {first['loss']:.4f} without expert "
            f"{int(first['expert'])} of layer {int(first['layer'])} (its control {first['matched load']:.4f})."
        )
        if "low" in done:
            above = int((done["low"] > done["matched load"]).sum())
            said.append(f"{above} of them matter more than their matched-load control, their whole interval above it.")
        return [*said, self._told()]

    def _told(self) -> str:
        """How far statistics tell effects."""
        table = self.correlations[self.correlations["statistic"] != "estimate"].dropna(subset="spearman")
        said = (
            "Published audits find that routing statistics do not predict causal importance (arXiv 2606.10703). Here, "
        )
        if table.empty:
            return said + "statistics or effects are all equal, so that nothing can be compared."
        parts = []
        for of, part in table.groupby("of"):
            best = part.loc[part["spearman"].abs().idxmax()]
            parts.append(
                f"of {len(part)} statistics {best['statistic']} goes best with the {of}: Spearman "
                f"{best['spearman']:.2f} ({best['low']:.2f} to {best['high']:.2f}, {int(best['n'])} experts)"
                + (", which is not told from 0" if best["low"] < 0 < best["high"] else "")
            )
        return said + "; ".join(parts) + "."

    @cached_property
    def plots(self) -> dict:
        """Plotly figures by name: effects, scatter, correlations, layers, domains, margins; those that there is
        something to draw for."""
        from gemmascope.routing import page

        return page.figures(self)

    def to_html(self, path: str | Path) -> Path:
        """Writes everything to one HTML file that needs nothing else: no server, no network."""
        from gemmascope.routing import page

        path = Path(path)
        path.write_text(page.page(self), encoding="utf-8", newline="\n")
        return path

    def __repr__(self) -> str:
        causal = "no causal part" if self.silenced is None else f"effects on {self.silenced.n_texts} texts"
        model = self.counts.about.get("model")
        return f"RoutingReport({model}, {self.counts.n_tokens} tokens of {self.n_texts} texts, {causal})"

    def _repr_html_(self) -> str:
        from gemmascope.routing import page

        return page.summary(self)


def _spearman(one: pandas.Series, other: pandas.Series) -> float:
    """NaN where either is constant."""
    if one.nunique() < 2 or other.nunique() < 2:
        return math.nan
    return float(one.rank().corr(other.rank()))


def _shown(token) -> str:
    """A token that can be seen: its spaces and line ends marked."""
    return str(token).replace(" ", "·").replace("\n", "⏎")


# Making one


def report(
    model,
    texts: str | Iterable[str | Tensor],
    labels: Iterable[Label] | None = None,
    *,
    causal: bool = True,
    max_texts: int | None = None,
    sample: int = 128,
    max_experts: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> RoutingReport:
    """What a model's experts do on some texts, and whether it matters.

    Statistics are of all texts, which are read as a stream. Effects are of a random sample of them: each expert is
    silenced at every token, beside other experts of its layer and as many random tokens that lose another expert
    (`expert_ablation`); layers lose all experts, get wrong ones, or keep their first choice alone.

    Ctrl-C ends the counting, and the report is of the tokens counted so far; or it ends the measuring of effects, and
    the report has those done so far, the one that ran on the texts done. `findings` and the page say what is missing.

    Args:
        texts: any iterable of texts, or of token ids [pos]; of a data set, its column: `dataset["text"]`.
        labels: one for each text (its domain, say), or for each a list of labels, one for each token.
        causal: False leaves the effects out, which take most of the time.
        max_texts: read no more than these.
        sample: texts that contributions and effects are measured on; of texts longer than the model's context, windows.
        max_experts: silence no more than these in the whole model: of more, the same numbers in each layer, at random.
        batch_size: texts counted at once; effects are measured in smaller batches.

    Raises:
        ValueError: for a dense model, no texts, an empty text, another number of labels than texts, or a size below 1.
    """
    refuse_dense(model)
    for name, size in {"max_texts": max_texts, "sample": sample, "max_experts": max_experts}.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}: give 1 or more.")
    kept, counts = Sample(sample, seed), RoutingCounts(model)
    given = islice([texts] if isinstance(texts, str) else texts, max_texts)
    whose = None if labels is None else islice([labels] if isinstance(labels, str) else labels, max_texts)
    n = min(len(texts), max_texts or len(texts)) if isinstance(texts, Sequence | Tensor) else max_texts
    experts = _experts(model, max_experts, seed)
    passes = _passes(model, experts, seed) if causal else {"profile": 1}
    each = sum(passes.values())
    with bar(None if n is None else n + each * min(sample, n), "counting", "text", progress) as shown:
        pieces = windows(model, kept.reading(given, shown.update), whose, model.cfg.n_ctx)
        pieces, made = kept.passing(by_length(pieces, 16 * batch_size)), None
        with interruptible(lambda: f"the report is of the {counts.n_tokens} tokens counted so far."):
            count_routing(model, *in_step(pieces), batch_size=batch_size, into=counts, progress=False)
            made = RoutingReport(counts, kept.n_texts, len(kept.kept))
        if made is None:
            if not counts.n_tokens:
                raise KeyboardInterrupt
            said = f"Counting was interrupted: not all of the {kept.n_texts:,} texts that were read are counted."
            made = RoutingReport(counts, kept.n_texts, len(kept.kept), interrupted=[said])
        shown.total = made.n_texts + each * made.n_sampled
        if kept.kept:
            _measure(model, made, kept, passes, experts, seed, shown)
    return made


PARTS = {
    "profile": "contributions",
    "silenced": "silencing",
    "first_only": "the first choice alone",
    "branch": "no and wrong experts",
    "estimate": "the estimate",
}
"""What is measured on the sample."""


def _experts(model, max_experts: int, seed: int) -> list[int]:
    """Those to silence in each layer."""
    every, each = range(model.cfg.n_experts), max(1, max_experts // model.cfg.n_layers)
    return list(every) if each >= len(every) else sorted(random.Random(seed).sample(every, each))


def _passes(model, experts: list[int], seed: int) -> dict[str, int]:
    """How often each of the PARTS runs a text; without the branch where no wrong experts are left."""
    n_layers, n_experts = model.cfg.n_layers, model.cfg.n_experts
    asked = list(product(range(n_layers), experts))
    singles = {*asked, *chain.from_iterable(others_of(cell, n_experts, seed) for cell in asked)}
    passes = dict(zip(PARTS, (1, len(singles) + len(asked), n_layers, 2 * n_layers, 1), strict=True))
    if n_experts < 2 * model.cfg.experts_per_token:
        del passes["branch"]
    return passes


def _measure(
    model, made: RoutingReport, kept: Sample, passes: dict[str, int], experts: list[int], seed: int, shown
) -> None:
    """Measures the parts that `passes` names on the sample, in turn, and says what an interrupt leaves out."""
    prompts, labels = kept.prompts(model), kept.labels if made.labelled else None
    measures = {
        "profile": lambda: profile_experts(model, prompts, progress=False),
        "silenced": lambda: expert_ablation(model, prompts, experts=experts, labels=labels, seed=seed),
        "first_only": lambda: fewer_experts(model, prompts),
        "branch": lambda: branch_ablation(model, prompts, seed=seed),
        "estimate": lambda: silencing_estimate(model, prompts),
    }
    waiting = list(passes)
    with interruptible("what was not measured yet is left out."):
        while waiting:
            part = waiting[0]
            shown.set_description(PARTS[part])
            found = measures[part]()
            setattr(made, part, found)
            if isinstance(found, RoutingEffect):  # these step on their own, and end with fewer texts on Ctrl-C
                if found.n_texts < made.n_sampled:
                    break
            else:
                shown.update(made.n_sampled)
            waiting.remove(part)
    if waiting:
        left = ", ".join(PARTS[part] for part in waiting)
        made.interrupted.append(f"Measuring was interrupted: not done, or not on all {made.n_sampled} texts: {left}.")
