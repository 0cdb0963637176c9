"""Probes: what can be read from activations by a linear classifier, against what any labels would give.

    logistic, ridge   scikit-learn's, on activations standardised within each training fold
    mass-mean         the difference of the class means (Marks & Tegmark 2023, arXiv 2310.06824)
    control task      the same probe on random labels, one for each type (Hewitt & Liang 2019, arXiv 1909.03368);
                      selectivity = score - control
    k-sparse          a logistic probe on the k neurons whose class means differ most (Gurnee et al. 2023,
                      arXiv 2305.01610)

Whether the model uses what a probe reads is another question: see gemmascope.experiments.steering.causal_check.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm.auto import tqdm

from gemmascope.readout.activations import Positions, Prompts, collect, find_site
from gemmascope.results import Result, about

Labels = Sequence[Hashable] | np.ndarray | Tensor
UNITS = {"logistic": "accuracy", "ridge": "R^2", "mass-mean": "accuracy"}
"""The kinds of probe, and what each is scored in."""


@dataclass(frozen=True)
class Probe:
    """A probe fitted to all examples, and how it does on those it has not seen."""

    kind: str
    classes: list[Any]
    """Two classes have one direction, from the first to the second; more have one each; a ridge has no classes."""
    directions: Float[Tensor, "direction d"]
    """In activation space: the probe's score is activations @ directions.T + bias."""
    bias: Float[Tensor, " direction"]
    scores: Float[Tensor, " fold"]
    """Accuracy (R^2 of a ridge) on each held-out fold."""
    chance: Float[Tensor, " fold"]
    """The same of the most frequent label (of the mean) of the training folds."""
    control: Float[Tensor, " fold"] | None
    """The same of a probe trained and tested on the control task's labels."""
    labels: list[Any]
    """Of every example."""
    held_out: list[Any]
    """What was said of every example by the probe of the folds that it is not in."""

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """The only direction."""
        if len(self.directions) > 1:
            raise ValueError(f"A probe of {len(self.classes)} classes has a direction each: take one of .directions.")
        return self.directions[0]

    @property
    def selectivity(self) -> float:
        """Mean score minus mean control score."""
        if self.control is None:
            raise ValueError("This probe was fitted with control=False and has no selectivity.")
        return float(self.scores.mean() - self.control.mean())

    def score(self, activations: Float[Tensor, "example d"]) -> Float[Tensor, "example direction"]:
        """activations @ directions.T + bias: above 0 the second of two classes, the largest of more, or a ridge's
        numbers. Of a logistic probe these are logits."""
        return activations.to(self.directions) @ self.directions.T + self.bias

    def predict(self, activations: Float[Tensor, "example d"]) -> list[Any]:
        """A class for each example, or the ridge's numbers."""
        score = self.score(activations)
        if self.kind == "ridge":
            return score[:, 0].tolist()
        best = (score[:, 0] > 0).long() if len(self.classes) == 2 else score.argmax(-1)
        return [self.classes[i] for i in best.tolist()]

    def view(self, *, selection=None, state=None, **of_model):
        """Its score beside chance and control, and where it errs: see `gemmascope.probe_view`, which says what to give
        (`model=` and `site=`, say) to see it read text."""
        from gemmascope.views.probing import probe_view

        return probe_view(self, selection=selection, state=state, **of_model)


class MassMean(ClassifierMixin, BaseEstimator):
    """Two classes told apart along the difference of their means, half-way between them."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> "MassMean":
        self.classes_ = np.unique(y)
        means = [x[y == one].mean(0) for one in self.classes_]
        self.coef_ = (means[1] - means[0])[None]
        self.intercept_ = -self.coef_ @ (means[0] + means[1]) / 2
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.classes_[((x @ self.coef_.T + self.intercept_)[:, 0] > 0).astype(int)]


def probe(
    activations: Float[Tensor, "example d"],
    labels: Labels,
    kind: str = "logistic",
    *,
    folds: int = 5,
    groups: Labels | None = None,
    l2: float = 1.0,
    control: bool = True,
    types: Labels | None = None,
    seed: int = 0,
) -> Probe:
    """Fits a linear probe, cross-validated.

    Args:
        labels: one for each example: classes, or numbers for "ridge".
        kind: "logistic", "ridge" or "mass-mean".
        groups: examples of one group (a template, a subject) are never on both sides of a split.
        l2: the weight penalty, on standardised activations: scikit-learn's alpha, or 1 / C. "mass-mean" has none.
        control: also train on random labels. These are the labels shuffled, or, with `types` (each example's word,
            say), one drawn for every type: a probe that does well there has learned types by heart.

    Raises:
        ValueError: for lengths that differ, NaN, one class only, or too few examples (or groups) for the folds.
    """
    x, y = _arrays(activations, labels, kind)
    estimator = _estimator(kind, l2)
    splits = _splits(y, kind, folds, groups, seed)
    blank = DummyRegressor() if kind == "ridge" else DummyClassifier()
    control_scores = None
    if control:
        drawn = _control_labels(y, types, kind, folds, seed)
        control_scores, _ = _held_out(estimator, x, drawn, _splits(drawn, kind, folds, groups, seed))
    scores, said = _held_out(estimator, x, y, splits)
    chance, _ = _held_out(blank, x, y, splits)
    directions, bias = _in_activation_space(estimator.fit(x, y))
    classes = [] if kind == "ridge" else np.unique(y).tolist()
    return Probe(kind, classes, directions, bias, scores, chance, control_scores, y.tolist(), said.tolist())


def _arrays(activations: Tensor, labels: Labels, kind: str) -> tuple[np.ndarray, np.ndarray]:
    x = activations.detach().double().cpu().numpy()
    y = _classes_or_numbers(labels, len(x), kind)
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise ValueError(f"The activations of example {bad[0]} are not all finite: a probe cannot be fitted to them.")
    return x, y


def _classes_or_numbers(labels: Labels, n: int, kind: str) -> np.ndarray:
    if kind not in UNITS:
        raise ValueError(f"There is no probe {kind!r}: take {', '.join(UNITS)}.")
    y = _array(labels)
    if y.ndim != 1 or len(y) != n:
        raise ValueError(f"{n} activations came with labels of shape {list(y.shape)}: give one for each.")
    if kind == "ridge":
        if y.dtype.kind not in "iuf" or not np.isfinite(y).all():
            raise ValueError(f"A ridge probe needs finite numbers as labels, and {labels[0]!r}, ... came.")
        return y.astype(float)
    classes = np.unique(y).tolist()
    if len(classes) < 2:
        raise ValueError(f"All labels are {classes[0] if classes else 'missing'}: a probe needs two classes at least.")
    if kind == "mass-mean" and len(classes) > 2:
        raise ValueError(f"A mass-mean probe tells two classes apart, and the labels have {len(classes)}.")
    return y


def _array(labels: Labels) -> np.ndarray:
    return labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)


def _estimator(kind: str, l2: float) -> BaseEstimator:
    match kind:
        case "logistic":
            return make_pipeline(StandardScaler(), LogisticRegression(C=1 / l2, max_iter=2000))
        case "ridge":
            return make_pipeline(StandardScaler(), Ridge(alpha=l2))
        case _:
            return MassMean()


def _splits(
    y: np.ndarray, kind: str, folds: int, groups: Labels | None, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training, held-out) examples of each fold, the classes in equal shares where there are classes."""
    what, n = ("examples", len(y)) if groups is None else ("groups", len(set(_array(groups).tolist())))
    if groups is not None and len(groups) != len(y):
        raise ValueError(f"There are groups for {len(groups)} examples and {len(y)} examples: give one for each.")
    if not 2 <= folds <= n:
        raise ValueError(f"{folds} folds cannot be made of {n} {what}: take 2 to {n}.")
    settings: dict[str, Any] = dict(n_splits=folds, shuffle=True, random_state=seed)
    if kind == "ridge":
        splitter = KFold(**settings) if groups is None else GroupKFold(**settings)
    else:
        classes, counts = np.unique(y, return_counts=True)
        if counts.min() < folds:
            raise ValueError(
                f"Class {classes[counts.argmin()]} has {counts.min()} examples, fewer than the {folds} folds: "
                f"give more, or folds={max(2, counts.min())}."
            )
        splitter = StratifiedKFold(**settings) if groups is None else StratifiedGroupKFold(**settings)
    splits = list(splitter.split(np.zeros((len(y), 1)), y, None if groups is None else _array(groups)))
    for train, test in splits:
        if not len(test) or (kind != "ridge" and len(np.unique(y[train])) < len(np.unique(y))):
            raise ValueError(
                "The groups leave a fold with a class unlearnt, or nothing to test: take fewer folds or finer groups."
            )
    return splits


def _held_out(
    estimator: BaseEstimator, x: np.ndarray, y: np.ndarray, splits: list
) -> tuple[Float[Tensor, " fold"], np.ndarray]:
    """The score on each held-out fold, and what was said there of every example."""
    scores, said = [], np.empty_like(y)
    for train, test in splits:
        fitted = clone(estimator).fit(x[train], y[train])
        scores.append(fitted.score(x[test], y[test]))
        said[test] = fitted.predict(x[test])
    return torch.tensor(scores, dtype=torch.float32), said


def _control_labels(y: np.ndarray, types: Labels | None, kind: str, folds: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if types is None:
        return rng.permutation(y)
    if len(types) != len(y):
        raise ValueError(f"There are types for {len(types)} examples and {len(y)} examples: give one for each.")
    _, of_type = np.unique(_array(types), return_inverse=True)
    n_types = of_type.max() + 1
    for _ in range(100):
        drawn = rng.choice(y, n_types)[of_type]
        counts = np.unique(drawn, return_counts=True)[1]
        if len(counts) > 1 and (kind == "ridge" or counts.min() >= folds):
            return drawn
    raise ValueError(f"{n_types} types are too few for a control task in {folds} folds: leave types out.")


def _in_activation_space(fitted: BaseEstimator) -> tuple[Float[Tensor, "direction d"], Float[Tensor, " direction"]]:
    """Weights and bias on the activations themselves, the standardisation undone."""
    if isinstance(fitted, MassMean):
        return torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    scaler, linear = fitted[0], fitted[-1]
    weights = np.atleast_2d(linear.coef_) / scaler.scale_
    return torch.from_numpy(weights).float(), torch.from_numpy(linear.intercept_ - weights @ scaler.mean_).float()


# --- of a model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerProbes:
    """The same probe at every layer."""

    scores: Result
    """Cells by layer, samples by fold; baseline "chance" is the most frequent label's score."""
    control: Result | None
    """The same on the control task."""
    probes: dict[int, Probe]

    @property
    def directions(self) -> dict[int, Float[Tensor, "direction d"]]:
        """Each layer's directions in activation space."""
        return {layer: one.directions for layer, one in self.probes.items()}

    @property
    def table(self) -> pandas.DataFrame:
        """A row for each layer: value, its bootstrap interval, control and selectivity."""
        table = self.scores.table
        if self.control is not None:
            control = self.control.mean.tolist()
            table = table.assign(control=control, selectivity=table["value"] - control)
        return table

    def plot(self):
        """The scores, and those on the control task, as a plotly figure."""
        figure = self.scores.plot()
        if self.control is not None:
            line = dict(x=self.control.cells["layer"], y=self.control.mean.tolist(), mode="lines+markers")
            figure.data[0].name = "probe"
            figure.add_scatter(**line, name="control task")
        return figure

    def view(self, *, selection=None, state=None, **of_model):
        """Scores by layer beside the control task's, and what is behind each: see `gemmascope.probe_view`, which says
        what to give (`model=`, `prompts=`) to see the probes read text."""
        from gemmascope.views.probing import probe_view

        return probe_view(self, selection=selection, state=state, **of_model)

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True)


def probe_layers(
    model,
    prompts: str | Sequence[str] | Tensor | Prompts,
    labels: Labels,
    site: str = "resid_post",
    layers: Sequence[int] | None = None,
    *,
    kind: str = "logistic",
    positions: Positions = -1,
    folds: int = 5,
    groups: Labels | None = None,
    l2: float = 1.0,
    control: bool = True,
    types: Labels | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> LayerProbes:
    """A probe at each layer: where does a property become readable?

    Args:
        labels: one for each example, which is a prompt unless `positions` asks for several of each (see `collect`).
        site: the site's short name: "resid_post", "mlp_out", "mlp.hook_post", ...
        layers: all that have the site by default; may be negative.

    Raises:
        KeyError, ValueError: as `collect` and `probe` do.
    """
    given = Prompts.of(model, prompts)
    # Before anything runs: labels that cannot be probed.
    _splits(_classes_or_numbers(labels, len(given.rows(positions).prompt), kind), kind, folds, groups, seed)
    layers = _layers_with(model, site) if layers is None else list(layers)
    at = {layer: (site, layer) for layer in layers}
    found = collect(model, given, list(at.values()), positions=positions, batch_size=batch_size, progress=progress)
    settings = dict(folds=folds, groups=groups, l2=l2, control=control, types=types, seed=seed)
    probes = {
        layer: probe(found.pop(key), labels, kind, **settings)
        for layer, key in tqdm(at.items(), "probing", delay=1, leave=False, disable=not progress)
    }
    what = about(model, site=site, kind=kind, folds=folds, l2=l2, seed=seed, grouped=groups is not None)

    def result(name: str, scores: list[Tensor]) -> Result:
        cells, chance = pandas.DataFrame({"layer": layers}), probes[layers[0]].chance
        return Result(name, cells, torch.stack(scores), UNITS[kind], {"chance": chance}, what)

    return LayerProbes(
        result(f"{kind} probe of {site}", [one.scores for one in probes.values()]),
        result(f"control of {site}", [one.control for one in probes.values()]) if control else None,
        probes,
    )


def _layers_with(model, site: str) -> list[int]:
    """Every layer where a short name means a site; raises as `find_site` does where none has it."""
    having = [layer for layer in range(model.cfg.n_layers) if model.full_name((site, layer)) in model.sites]
    if not having:
        find_site(model, (site, 0))
    return having


@dataclass(frozen=True)
class SparseProbes:
    """Probes on a few neurons each."""

    scores: Result
    """Cells by (neurons, k), neurons "chosen" or "random"; samples by fold; baseline "chance"."""
    neurons: dict[int, list[Any]]
    """By k: the neurons chosen among all examples, the largest mean difference first; (expert, neuron) of experts."""

    def view(self, *, selection=None, state=None):
        """Accuracy by number of neurons, beside as many random ones: see `gemmascope.probe_view`."""
        from gemmascope.views.probing import probe_view

        return probe_view(self, selection=selection, state=state)

    def _repr_html_(self) -> str:
        return self.scores._repr_html_()


def sparse_probe(
    model,
    prompts: str | Sequence[str] | Tensor | Prompts,
    labels: Labels,
    layer: int,
    *,
    experts: bool = False,
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    positions: Positions = -1,
    folds: int = 5,
    groups: Labels | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> SparseProbes:
    """How few neurons of a layer tell two classes apart.

    The k neurons are chosen in each training fold, by the difference of their class means, and a logistic probe is
    fitted to them; beside it, to as many random ones.

    Args:
        experts: neurons of the routed experts (moe.hook_expert_post, 0 where a token was not routed to the expert)
            in place of the dense MLP's (mlp.hook_post).

    Raises:
        KeyError, ValueError: as `collect` and `probe` do, or for a k larger than the neurons there are.
    """
    site = ("moe.hook_expert_post" if experts else "mlp.hook_post", layer)
    found = collect(model, prompts, site, positions=positions, batch_size=batch_size, progress=progress)[site]
    scores, chosen, chance = k_sparse(found, labels, ks, folds=folds, groups=groups, seed=seed)
    cells = pandas.DataFrame([(which, k) for which in ("chosen", "random") for k in ks], columns=["neurons", "k"])
    what = about(model, site=find_site(model, site).name, folds=folds, seed=seed, grouped=groups is not None)
    d = model.cfg.d_expert
    neurons = {k: [divmod(n, d) if experts else n for n in numbers] for k, numbers in chosen.items()}
    return SparseProbes(
        Result(f"k-sparse probe of {site[0]}", cells, scores.flatten(0, 1), "accuracy", {"chance": chance}, what),
        neurons,
    )


def k_sparse(
    activations: Float[Tensor, "example d"],
    labels: Labels,
    ks: Sequence[int],
    *,
    folds: int = 5,
    groups: Labels | None = None,
    seed: int = 0,
) -> tuple[Float[Tensor, "chosen_or_random k fold"], dict[int, list[int]], Float[Tensor, " fold"]]:
    """Accuracies of k-sparse probes, the features chosen among all examples by k, and chance; see `sparse_probe`."""
    x, y = _arrays(activations, labels, "logistic")
    if len(np.unique(y)) > 2:
        raise ValueError("k-sparse probing tells two classes apart: give labels that say which examples have one.")
    if not 1 <= min(ks) <= max(ks) <= x.shape[1]:
        raise ValueError(f"k goes from 1 to the {x.shape[1]} features there are, and {list(ks)} came.")
    splits = _splits(y, "logistic", folds, groups, seed)
    rng = np.random.default_rng(seed)
    scores, chosen = torch.empty(2, len(ks), folds), {}
    for place, k in enumerate(ks):
        best = SelectKBest(_mean_difference, k=k)
        random = SelectKBest(lambda x, y: rng.random(x.shape[1]), k=k)
        for row, choice in enumerate((best, random)):
            scores[row, place], _ = _held_out(make_pipeline(choice, *_estimator("logistic", 1.0)), x, y, splits)
        difference = _mean_difference(x, y)
        chosen[k] = np.argsort(-difference, kind="stable")[:k].tolist()
    return scores, chosen, _held_out(DummyClassifier(), x, y, splits)[0]


def _mean_difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    first, second = np.unique(y)
    return np.abs(x[y == first].mean(0) - x[y == second].mean(0))
