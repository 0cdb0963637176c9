"""Activation patching: which activations carry what differs between two prompts.

Denoising puts activations of the clean run into the corrupted one and asks what restores the clean answer; noising does
the reverse and asks what breaks it (Heimersheim & Nanda 2024, https://arxiv.org/abs/2404.15255).
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import pandas
from jaxtyping import Float, Int
from torch import Tensor

from gemmascope import interventions
from gemmascope.experiments.sweep import ROWS, Baseline, resumed, run_cells, unit_of
from gemmascope.interventions import Intervention
from gemmascope.model.inputs import Pass
from gemmascope.results import Result, about
from gemmascope.sites import SiteInfo

AXES = {
    "pos": ("pos", "query"),
    "head": ("head", "kv_head"),
    "slot": ("slot",),
    "expert": ("expert",),
    "neuron": ("d_mlp", "d_expert", "d_ple"),
}
"""What a cell may name besides its site and layer, and the axes of a site that it means."""
_AXES_SAID = ", ".join(AXES)
_PART = {"pos": "positions", "head": "heads", "slot": "slots", "expert": "experts", "neuron": "neurons"}


def activation_patching(
    model,
    clean,
    corrupted,
    metric: Callable[[Tensor], Tensor],
    site: str | Sequence[str] = "resid_pre",
    by: Sequence[str] = ("layer", "pos"),
    *,
    direction: str = "denoising",
    layers: Sequence[int] | None = None,
    positions: Sequence[int | tuple[int, int]] | None = None,
    cells: pandas.DataFrame | None = None,
    attention_mask: Tensor | None = None,
    rows: int = ROWS,
    resume: Result | None = None,
    progress: bool = True,
) -> Result:
    """Patches one part of a site at a time from one run into another, and measures.

    Args:
        clean, corrupted: text, texts or token ids [prompt, pos], of the same number of tokens.
        metric: logits [prompt, pos, d_vocab] -> one figure a prompt (`gs.logit_difference(model, " Mary", " John")`).
        site: a short name ("resid_pre", "attn_out", "z", "mlp_out", "attn.hook_k", "mlp.hook_post",
            "moe.hook_expert_out", ...) or several, which are then an axis too.
        by: the axes of the sweep: "layer", and "pos", "head", "slot", "expert", "neuron" as the site has them. What is
            not named is patched whole. An "expert" of "moe.hook_expert_out" is what it adds at each position, whether
            or not both runs chose it there.
        direction: "denoising" patches from the clean run into the corrupted one, "noising" the other way.
        layers, positions: those to sweep; all by default. A pair of positions (clean, corrupted) patches between
            prompts of different lengths; `gs.aligned` finds pairs.
        cells: any set of cells, a column for each axis, in place of `by`, `layers` and `positions`.
        attention_mask: [prompt, pos] of token ids with padding, the same for both runs.
        rows: rows (cells x prompts) of one forward pass.
        resume: the result of an interrupted call with these arguments.

    Returns:
        A Result with baselines "clean" and "corrupted".

    Raises:
        ValueError: for prompts of different lengths without pairs of positions, an axis that a site does not have, a
            cell out of range, a metric that gives NaN or another shape.
    """
    sweep = PatchingSweep(
        model, clean, corrupted, metric, site, by, direction, layers, positions, cells, attention_mask
    )
    done = resumed(resume, sweep.cells)
    return sweep.result(run_cells(sweep.runs[sweep.base], sweep.made, rows=rows, done=done, progress=progress))


class PatchingSweep:
    """A sweep of `activation_patching`, its two prompts run and its cells laid out, before any cell runs."""

    def __init__(
        self,
        model,
        clean,
        corrupted,
        metric: Callable[[Tensor], Tensor],
        site: str | Sequence[str] = "resid_pre",
        by: Sequence[str] = ("layer", "pos"),
        direction: str = "denoising",
        layers: Sequence[int] | None = None,
        positions: Sequence[int | tuple[int, int]] | None = None,
        cells: pandas.DataFrame | None = None,
        attention_mask: Tensor | None = None,
    ):
        """See `activation_patching`, which says what is raised too."""
        sites = [site] if isinstance(site, str) else list(site)
        if direction not in ("denoising", "noising"):
            raise ValueError(f"direction is {direction!r}; it is 'denoising' or 'noising'.")
        begun = {"clean": model._begin(clean, attention_mask), "corrupted": model._begin(corrupted, attention_mask)}
        pairs = _pairs(begun, positions, by if cells is None else list(cells))
        source, base = ("clean", "corrupted") if direction == "denoising" else ("corrupted", "clean")
        place = {pair[base == "corrupted"]: pair[source == "corrupted"] for pair in pairs}
        cells = _cells(model, sites, by, layers, list(place)) if cells is None else cells.reset_index(drop=True)
        _check_cells(cells, sites)
        named = cells.to_dict("records")
        names = _names(model, sites, named)
        self.cells = cells
        self.runs = {name: Baseline(model, run, metric, names) for name, run in begun.items()}
        """The clean and the corrupted run."""
        self.base = base
        """The name of the run that cells change."""
        self.made = _interventions(model, self.runs[source].stored, self.runs[base].stored, sites, named, place)
        """What each cell patches, made when it runs."""
        self._unit, self._about = unit_of(metric), about(model, site=sites, direction=direction)
        if model.tokenizer is not None:
            self._about["tokens"] = model.to_str_tokens(begun[base].tokens[0])

    def result(self, values: Float[Tensor, "cell prompt"]) -> Result:
        """Figures of the cells, NaN in those that have not run, as a Result."""
        figures = {name: run.figures for name, run in self.runs.items()}
        name = "activation patching" + (" (noising)" if self.base == "clean" else "")
        return Result(name, self.cells, values, self._unit, figures, self._about, self.base)


def aligned(model, clean, corrupted) -> list[tuple[int, int]]:
    """Pairs of positions (clean, corrupted) of one prompt each that hold the same tokens in the same order."""
    ids = [model._begin(prompt).tokens[0].tolist() for prompt in (clean, corrupted)]
    blocks = difflib.SequenceMatcher(None, *ids, autojunk=False).get_matching_blocks()
    return [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]


def _pairs(begun: dict[str, Pass], positions, by: Sequence[str]) -> list[tuple[int, int]]:
    """The positions to patch, as (clean, corrupted)."""
    (n_clean, clean_len), (n_corrupted, corrupted_len) = (begun[name].tokens.shape for name in ("clean", "corrupted"))
    if n_clean != n_corrupted:
        raise ValueError(f"There are {n_clean} clean prompts and {n_corrupted} corrupted ones: they go in pairs.")
    if positions is None or not any(isinstance(pos, tuple) for pos in positions):
        if clean_len != corrupted_len:
            raise ValueError(
                f"The clean prompt has {clean_len} tokens and the corrupted one {corrupted_len}, so that positions do "
                "not match: make them equally long, or sweep positions=gs.aligned(model, clean, corrupted)."
            )
        chosen = range(clean_len) if positions is None else positions
        positions = [(pos, pos) for pos in chosen]
    elif "pos" not in by:
        raise ValueError('Pairs of positions are patched one by one: name "pos" in `by`.')
    pairs = []
    for pair in positions:
        pair = pair if isinstance(pair, tuple) else (pair, pair)
        for pos, length, name in zip(pair, (clean_len, corrupted_len), ("clean", "corrupted"), strict=True):
            if not -length <= pos < length:
                raise ValueError(f"Position {pos} does not exist: the {name} prompt has {length} tokens.")
        pairs.append((pair[0] % clean_len, pair[1] % corrupted_len))
    return pairs


def _site(model, short: str, layer: int) -> SiteInfo | None:
    """The row of a site at a layer, named in full; None where that layer does not have it."""
    name = model.full_name((short, layer))
    return model.sites[name]._replace(name=name) if name in model.sites else None


def _cells(model, sites: list[str], by: Sequence[str], layers, positions: list[int]) -> pandas.DataFrame:
    unknown = next((axis for axis in by if axis not in ("layer", *AXES)), None)
    if unknown is not None:
        raise ValueError(f"by names {unknown!r}; axes are layer, {', '.join(AXES)}.")
    if "layer" not in by:
        raise ValueError('by needs "layer": a site is patched in one layer at a time.')
    every = range(model.cfg.n_layers)
    for layer in layers or ():
        model.layer(layer)  # raises where there is none
    rows = []
    for short, layer in product(sites, every if layers is None else [every[layer] for layer in layers]):
        site = _site(model, short, layer)
        if site is None:
            continue  # a layer without keys of its own, say
        sizes = [
            positions if axis == "pos" else range(_size(model, site, axis, layer)) for axis in by if axis != "layer"
        ]
        for parts in product(*sizes):
            named = iter(parts)
            rows.append([short, *(layer if axis == "layer" else next(named) for axis in by)])
    if not rows:
        model._check_name(model.full_name((sites[0], 0)))  # raises, with the nearest names
    cells = pandas.DataFrame(rows, columns=["site", *by])
    return cells if len(sites) > 1 else cells.drop(columns="site")


def _size(model, site: SiteInfo, axis: str, layer: int) -> int:
    cfg, geometry = model.cfg, model.layer(layer)
    found = next((name for name in AXES[axis] if name in site.axes.split()), None)
    if axis == "expert" and site.name.endswith("hook_expert_out"):
        found = "expert"
    if found is None:
        has = [name for name, means in AXES.items() if set(means) & set(site.axes.split())]
        raise ValueError(f"{site.name} has no {axis}; a sweep there goes by layer, {', '.join(has)}.")
    return {
        "head": cfg.n_heads,
        "kv_head": geometry.n_kv_heads,
        "slot": cfg.experts_per_token,
        "expert": cfg.n_experts,
        "d_mlp": geometry.d_mlp,
        "d_expert": cfg.d_expert,
        "d_ple": cfg.d_ple,
    }[found]


def _names(model, sites: list[str], rows: list[dict]) -> list[str]:
    """The sites to keep of both runs."""
    names = []
    for short, layer in dict.fromkeys((row.get("site", sites[0]), row["layer"]) for row in rows):
        name = model.full_name((short, layer))
        model._check_name(name)
        names.append(name)
    return names + [_indices(name) for name in names if name.endswith(_BY_EXPERT)]


_BY_EXPERT = "moe.hook_expert_out"


def _indices(name: str) -> str:
    return name.removesuffix("hook_expert_out") + "router.hook_indices"


def _check_cells(cells: pandas.DataFrame, sites: list[str]) -> None:
    needed = ["layer"] if len(sites) == 1 else ["site", "layer"]
    missing = next((axis for axis in needed if axis not in cells), None)
    if missing is not None:
        raise ValueError(
            f"cells has no column {missing!r}: it needs {' and '.join(needed)}, and may name {_AXES_SAID}."
        )
    unknown = next((axis for axis in cells if axis not in ("site", "layer", *AXES)), None)
    if unknown is not None:
        raise ValueError(f"cells has a column {unknown!r}; columns are site, layer, {_AXES_SAID}.")


def _interventions(
    model, source: dict[str, Tensor], base: dict[str, Tensor], sites: list[str], rows: list[dict], place: dict[int, int]
) -> list[Callable[[], Intervention]]:
    """What each cell patches, made when it runs: all experts' contributions at once would fill the memory."""
    moved = any(there != here for here, there in place.items())

    def at(pos: int) -> int:
        if pos not in place:
            raise ValueError(f"Position {pos} has no partner in the other run; positions pairs {sorted(place)}.")
        return place[pos]

    def made(row: dict) -> Intervention:
        name = model.full_name((row.get("site", sites[0]), row["layer"]))
        where = {part: int(row[axis]) for axis, part in _PART.items() if axis in row}
        if "experts" in where and name.endswith(_BY_EXPERT):
            expert = where.pop("experts")
            new, old = (_said_by(expert, run[name], run[_indices(name)]) for run in (source, base))
            if "positions" in where:
                here = where["positions"]
                new, old = new[:, [at(here)]], old[:, [here]]
            return interventions.add(name.removesuffix("hook_expert_out") + "hook_out", new - old, **where)
        # Along an axis with one entry, that entry stands for any position.
        value = source[name][:, [at(where["positions"])]] if moved else source[name]
        return interventions.patch(name, value, **where)

    return [partial(made, row) for row in rows]


def _said_by(
    expert: int, out: Float[Tensor, "batch pos slot d_model"], indices: Int[Tensor, "batch pos slot"]
) -> Float[Tensor, "batch pos d_model"]:
    """What one expert adds to the sum over slots."""
    return (out * (indices == expert)[..., None]).sum(-2)
