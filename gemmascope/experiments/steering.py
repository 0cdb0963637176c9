"""Directions: made from contrasts, added at a site, and checked.

contrast_direction   the difference of two sets of prompts' mean activations
                     (Turner et al. 2023, arXiv 2308.10248; Rimsky et al. 2023, arXiv 2312.06681)
steer_sweep          what adding a direction does, by strength: to a metric, and to neutral text
causal_check         does the model use a direction? Projected out or added, beside random ones of its norm
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from gemmascope.interventions import Site
from gemmascope.progress import interruptible
from gemmascope.readout.activations import Change, Positions, Prompts, changing, collect, find_site, measure
from gemmascope.results import Result, about
from gemmascope.sites import SiteInfo

Texts = str | Sequence[str] | Tensor | Prompts


def contrast_direction(
    model,
    positive: Texts,
    negative: Texts,
    site: Site,
    *,
    positions: Positions = -1,
    normalise: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> Float[Tensor, " d"]:
    """Mean activation on `positive` minus that on `negative` prompts, on the CPU.

    Args:
        positions: as in `collect`, of the prompts on each side.
        normalise: give it the length of the site's mean activation norm on these prompts, so that a strength of 1 is
            as large as what is there.

    Raises:
        KeyError, ValueError: as `collect` does, or when both means are equal.
    """
    settings = dict(positions=positions, batch_size=batch_size, progress=progress)
    up, down = (collect(model, side, site, **settings)[site].float() for side in (positive, negative))
    direction = up.mean(0) - down.mean(0)
    if not direction.isfinite().all() or not direction.any():
        raise ValueError(f"At {site} both sides have the same mean, or one that is not finite: no direction between.")
    return direction * torch.cat((up, down)).norm(dim=-1).mean() / direction.norm() if normalise else direction


@dataclass(frozen=True)
class SteerSweep:
    """What a direction did at each strength."""

    effect: Result
    """The metric by strength; samples are prompts, baseline "unsteered"."""
    side_effects: Result
    """KL(unsteered || steered) by strength, in nats a token: a sample is the mean over a neutral text's tokens."""

    @property
    def table(self) -> pandas.DataFrame:
        """A row for each strength and measure."""
        measures = (self.effect, self.side_effects)
        return pandas.concat([one.table.assign(measure=one.unit) for one in measures], ignore_index=True)

    def plot(self):
        """Both measures against strength, as a plotly figure: see `table` for the figures."""
        from plotly.subplots import make_subplots

        from gemmascope.plots import look

        figure = make_subplots(1, 2, subplot_titles=[self.effect.unit, self.side_effects.unit])
        for column, result in enumerate((self.effect, self.side_effects), 1):
            figure.add_scatter(x=result.cells["strength"], y=result.mean.tolist(), row=1, col=column)
        figure.update_xaxes(title="strength")
        return figure.update_layout(showlegend=False, template=look(), title=self.effect.experiment)

    def view(self, *, selection=None):
        """The metric by strength: see `Result.view`. `side_effects.view()` is the other half."""
        return self.effect.view(selection=selection)

    def _repr_html_(self) -> str:
        return self.table.to_html(escape=True)


def steer_sweep(
    model,
    prompts: Texts,
    direction: Float[Tensor, " d"],
    site: Site,
    strengths: Sequence[int | float],
    metric: Callable[[Tensor], Tensor],
    *,
    neutral: Texts,
    positions: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> SteerSweep:
    """Adds strength * direction at a site, and measures the prompts and, as a side effect, neutral text.

    An interrupted sweep keeps the strengths it has done.

    Args:
        strengths: in units of the direction's own length; negative ones steer the other way.
        metric: of the prompts; see gemmascope.metrics.
        neutral: text on which steering should change nothing; its divergence is taken over all tokens.
        positions: where to add, in prompts and neutral text alike; None for every token.

    Raises:
        KeyError, ValueError: for a site or position that is not there, or a direction of another width.
    """
    info = find_site(model, site, write=True)
    direction, strengths = _checked(direction), [float(strength) for strength in strengths]
    asked, plain = Prompts.of(model, prompts), Prompts.of(model, neutral)
    asked_rows, plain_rows = asked.rows(positions), plain.rows(positions)
    cells = pandas.DataFrame({"strength": strengths})
    effect = torch.full((len(strengths), asked.n), torch.nan)
    divergence = torch.full((len(strengths), plain.n), torch.nan)
    unsteered = measure(model, asked, metric, batch_size=batch_size)
    with interruptible("the cells that did not run are NaN."):
        for cell, strength in enumerate(tqdm(strengths, "strengths", delay=1, leave=False, disable=not progress)):
            change = _adding(direction, info, strength)
            effect[cell] = measure(model, asked, metric, info, asked_rows, change, batch_size)
            divergence[cell] = _divergence(model, plain, info, plain_rows, change, batch_size)
    what = about(model, site=info.name, positions=positions, norm=float(direction.norm()))
    name, unit = f"steering at {info.name}", getattr(metric, "name", "metric")
    return SteerSweep(
        Result(name, cells, effect, unit, {"unsteered": unsteered}, what, "unsteered"),
        Result(f"side effects of {name}", cells, divergence, "KL (nats/token)", {}, what),
    )


@torch.no_grad()
def _divergence(
    model, prompts: Prompts, info: SiteInfo, rows, change: Change, batch_size: int
) -> Float[Tensor, " prompt"]:
    """KL(unsteered || steered), the mean over each prompt's tokens; both runs of a batch are made here, for to keep all
    logits of the unsteered one would take more memory than time."""
    parts = []
    for batch in prompts.batches(batch_size, rows):
        before = model(batch.tokens, attention_mask=batch.mask).float().log_softmax(-1)
        with model.hooks(changing(info.name, batch, change)):
            after = model(batch.tokens, attention_mask=batch.mask).float().log_softmax(-1)
        kl = F.kl_div(after, before, log_target=True, reduction="none").sum(-1)
        real = torch.ones_like(kl) if batch.mask is None else batch.mask.to(kl)
        parts.append((kl * real).sum(-1) / real.sum(-1))
    return torch.cat(parts).cpu()


def causal_check(
    model,
    prompts: Texts,
    site: Site,
    direction: Float[Tensor, " d"],
    metric: Callable[[Tensor], Tensor],
    *,
    positions: Positions = -1,
    strength: float = 1.0,
    n_random: int = 10,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> Result:
    """Does the model use a direction? The metric with it projected out, and with `strength` times it added.

    Cells are (edit, direction): edit "project out" or "add"; direction "given", or "random 0" and so on, of the same
    norm. Samples are prompts, baseline "unedited". A direction that is read but not used does as random ones do. An
    interrupted check keeps the cells it has done.

    Raises:
        KeyError, ValueError: for a site or position that is not there, or a direction of another width, zero or not
            finite.
    """
    asked, info = Prompts.of(model, prompts), find_site(model, site, write=True)
    rows, direction = asked.rows(positions), _checked(direction)
    noise = torch.randn(n_random, len(direction), generator=torch.Generator().manual_seed(seed))
    noise *= direction.norm() / noise.norm(dim=-1, keepdim=True)
    directions = {"given": direction} | {f"random {i}": one for i, one in enumerate(noise)}
    edits = [(edit, of) for edit in ("project out", "add") for of in directions]
    values = torch.full((len(edits), asked.n), torch.nan)
    unedited = measure(model, asked, metric, batch_size=batch_size)
    with interruptible("the cells that did not run are NaN."):
        for cell, (edit, of) in enumerate(tqdm(edits, "edits", delay=1, leave=False, disable=not progress)):
            vector = directions[of]
            change = _adding(vector, info, strength) if edit == "add" else _projecting_out(vector, info)
            values[cell] = measure(model, asked, metric, info, rows, change, batch_size)
    what = about(model, site=info.name, strength=strength, norm=float(direction.norm()), seed=seed)
    cells, unit = pandas.DataFrame(edits, columns=["edit", "direction"]), getattr(metric, "name", "metric")
    return Result("causal check of a direction", cells, values, unit, {"unedited": unedited}, what, "unedited")


def _checked(direction: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    if not direction.isfinite().all() or not direction.any():
        raise ValueError("The direction is zero or not finite: give one that points somewhere.")
    return direction.detach().float()


def _adding(direction: Float[Tensor, " d"], info: SiteInfo, strength: float) -> Change:
    return lambda x, _: x + strength * _as_in(x, direction, info)


def _projecting_out(direction: Float[Tensor, " d"], info: SiteInfo) -> Change:
    def change(x: Float[Tensor, "row d"], _) -> Float[Tensor, "row d"]:
        unit = _as_in(x, direction / direction.norm(), info)
        return x - (x @ unit)[:, None] * unit

    return change


def _as_in(x: Float[Tensor, "row width"], direction: Float[Tensor, " d"], info: SiteInfo) -> Float[Tensor, " d"]:
    if len(direction) != x.shape[-1]:
        raise ValueError(f"The direction has {len(direction)} entries and {info.name} has {x.shape[-1]}.")
    return direction.to(x)
