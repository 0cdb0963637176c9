"""What an experiment returns: figures by cell and sample, as a table, a picture, and files that say what was run."""

import hashlib
import html
import importlib.metadata
import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class Result:
    """The figures of one experiment. In a notebook it shows its table; `plot()` draws it."""

    experiment: str
    cells: pandas.DataFrame
    """What was varied: a row for each cell, a column for each axis ("layer", "head", "pos", ...)."""
    values: Float[Tensor, "cell sample"]
    """A figure for each cell and sample (a prompt, most often); NaN in cells that have not run."""
    unit: str
    """What a figure is: "logit difference", "accuracy", "nats", ..."""
    baselines: dict[str, Float[Tensor, " sample"]] = field(default_factory=dict)
    """The same figure in other runs. With "clean" and "corrupted", the table says how much of their difference a cell
    recovers: 1 as in the clean run, 0 as in the corrupted one."""
    about: dict[str, Any] = field(default_factory=dict)
    """What was run: model, fingerprint, versions, settings."""
    base: str | None = None
    """The baseline that cells are changes of: one with its figure did nothing. None where cells change no run."""

    def __post_init__(self) -> None:
        if len(self.cells) != len(self.values):
            raise ValueError(f"{len(self.cells)} cells came with figures for {len(self.values)}.")
        if self.base is not None and self.base not in self.baselines:
            raise ValueError(f"base is {self.base!r}; the baselines are {', '.join(self.baselines) or 'none'}.")

    @property
    def axes(self) -> list[str]:
        """The columns that say which cell a row is."""
        return list(self.cells.columns)

    @property
    def done(self) -> Tensor:
        """Which cells have run: bool [cell]."""
        return ~self.values.isnan().any(-1)

    @property
    def mean(self) -> Float[Tensor, " cell"]:
        """Each cell's figure, the mean over samples."""
        return self.values.mean(-1)

    @property
    def effect(self) -> Float[Tensor, " cell"]:
        """What each cell changed: its mean less that of the run it changes (`base`); the mean itself where there is
        none."""
        return self.mean if self.base is None else self.mean - self.baselines[self.base].mean()

    @property
    def recovered(self) -> Float[Tensor, " cell"]:
        """(mean - corrupted) / (clean - corrupted), of the means over samples."""
        if not {"clean", "corrupted"} <= self.baselines.keys():
            raise ValueError(f"This {self.experiment} has no clean and corrupted run to compare with.")
        clean, corrupted = (self.baselines[name].double().mean() for name in ("clean", "corrupted"))
        if clean == corrupted:
            raise ValueError(f"The clean and the corrupted run have the same {self.unit}: there is nothing to recover.")
        return ((self.mean.double() - corrupted) / (clean - corrupted)).type_as(self.values)

    def interval(self, level: float = 0.95, draws: int = 1000, seed: int = 0) -> Float[Tensor, "2 cell"]:
        """The bootstrap interval of each cell's mean: samples drawn again with replacement (Efron 1979)."""
        n = self.values.shape[1]
        if n < 2:
            raise ValueError(f"An interval needs two samples at least, and this {self.experiment} has {n}.")
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n, (draws, n), generator=generator)
        once = torch.full(drawn.shape, 1 / n, dtype=self.values.dtype)
        shares = torch.zeros_like(once).scatter_add_(1, drawn, once)
        tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=self.values.dtype)
        return torch.quantile(self.values @ shares.T, tails, dim=1)

    @property
    def table(self) -> pandas.DataFrame:
        """One row a cell: its axes, `value`, `low` and `high` (95 % bootstrap, with two samples or more), `recovered`
        (with a clean and a corrupted run)."""
        table = self.cells.assign(value=self.mean.tolist())
        if self.values.shape[1] > 1 and len(self.cells):
            low, high = self.interval()
            table = table.assign(low=low.tolist(), high=high.tolist())
        clean, corrupted = self.baselines.get("clean"), self.baselines.get("corrupted")
        if clean is not None and corrupted is not None and clean.mean() != corrupted.mean():
            table = table.assign(recovered=self.recovered.tolist())
        return table

    def top(self, n: int = 10) -> pandas.DataFrame:
        """The rows of the table with the largest effects: the farthest from the run that cells change (`base`), or from
        0 where they change none."""
        order = pandas.Series(self.effect.abs().tolist()).sort_values(ascending=False).index
        return self.table.iloc[order[:n]]

    def only(self, **where) -> "Result":
        """The cells that have one value on an axis, or one of several: `only(layer=3, head=[0, 2])`.

        Raises:
            ValueError: for an axis that is not there, or when no cell is left.
        """
        unknown = next((axis for axis in where if axis not in self.axes), None)
        if unknown is not None:
            raise ValueError(f"This {self.experiment} has no axis {unknown!r}; its axes are {', '.join(self.axes)}.")
        asked = {axis: list(v) if isinstance(v, list | tuple | range) else [v] for axis, v in where.items()}
        chosen = self.cells.index[self.cells[list(asked)].isin(asked).all(axis=1)]
        if not len(chosen):
            raise ValueError(f"No cell of this {self.experiment} has {where}.")
        return replace(self, cells=self.cells.loc[chosen].reset_index(drop=True), values=self.values[chosen.tolist()])

    def __repr__(self) -> str:
        n_cells, n_samples = self.values.shape
        missing = n_cells - int(self.done.sum())
        rest = f", {missing} not run" if missing else ""
        return f"Result({self.experiment}: {n_cells} cells by {', '.join(self.axes)}, {n_samples} samples{rest})"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.table.to_html(max_rows=12, escape=True)}"

    # Pictures

    @property
    def pictured(self) -> list[str]:
        """The axes of a picture, one to three: those that tell cells apart, without what follows from the ones before.

        Raises:
            ValueError: where more axes vary.
        """
        varied: list[str] = []
        for axis in self.axes:
            parts = len(self.cells[[*varied, axis]].drop_duplicates())
            if parts > (len(self.cells[varied].drop_duplicates()) if varied else 1):
                varied.append(axis)
        if len(varied) > 3:
            raise ValueError(
                f"A picture has three axes at most and this {self.experiment} varies {', '.join(varied)}: "
                "take a part, as result.only(layer=3) does."
            )
        return varied or self.axes[:1]

    def of_nothing(self, value: str) -> float:
        """What a cell that did nothing would have in a column of the table, "value" or "recovered"."""
        if self.base is None:
            return 0.0
        if value == "recovered":
            return 1.0 if self.base == "clean" else 0.0
        return float(self.baselines[self.base].mean())

    def token_at(self, axis: str, value) -> str | None:
        """The token at an entry of an axis of positions, where it is known."""
        tokens = self.about.get("tokens")
        there = axis in ("pos", "query", "key") and tokens is not None and 0 <= value < len(tokens)
        return tokens[value] if there else None

    def plot(self, value: str | None = None):
        """A plotly figure: for one axis a line along numbers or bars for names, a heatmap for two, a row of heatmaps
        for three. A heatmap's neutral colour is a cell that did nothing.

        Args:
            value: the column of the table to draw; "recovered" where there is one, else "value".

        Raises:
            ValueError: for a column that is not there, or more than three axes.
        """
        from gemmascope import plots

        return plots.of_result(self, value)

    def view(self, *, selection=None, state=None):
        """A view of the cells as a grid, for one axis to three. It starts at the cell with the largest effect.

        Args:
            selection: the gs.Selection to follow, to link it with other views; what it names goes first.
            state: of three axes, {"facet": the entry of the first whose picture is shown}, as in `view.state`.

        Raises:
            ValueError: where more axes vary, or for a facet that is not there.
        """
        from gemmascope.views.patching import result_view

        return result_view(self, selection=selection, state=state)

    # Files

    def save(self, folder: str | Path) -> None:
        """Writes figures.safetensors and manifest.json into a folder, which is made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"values": self.values} | {f"baseline.{name}": x for name, x in self.baselines.items()}
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "figures.safetensors")
        manifest = {
            "experiment": self.experiment,
            "unit": self.unit,
            "base": self.base,
            "cells": {axis: self.cells[axis].tolist() for axis in self.axes},
            "about": self.about,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> "Result":
        """Reads what `save` wrote."""
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise FileNotFoundError(f"{folder} holds no manifest.json: give a folder that Result.save wrote.")
        manifest = json.loads((folder / "manifest.json").read_text())
        tensors = load_file(folder / "figures.safetensors")
        return cls(
            experiment=manifest["experiment"],
            cells=pandas.DataFrame(manifest["cells"]),
            values=tensors["values"],
            unit=manifest["unit"],
            baselines={n.removeprefix("baseline."): x for n, x in tensors.items() if n.startswith("baseline.")},
            about=manifest["about"],
            base=manifest["base"],
        )


def about(model, **settings) -> dict[str, Any]:
    """What a Result says of its making. Settings must be what JSON can hold."""
    packages = ("gemmascope", "torch", "transformer-lens")
    return {
        "model": model.cfg.model_name,
        "fingerprint": fingerprint(model),
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "versions": {package: _version(package) for package in packages},
        "settings": json.loads(json.dumps(settings)),
    }


@cache
def _version(package: str) -> str:
    from gemmascope import __version__

    return __version__ if package == "gemmascope" else importlib.metadata.version(package)


@cache
def _spread(n: int) -> Int[Tensor, " place"]:
    """Up to 64 places spread over n. Most tensors of a model have few different sizes."""
    return torch.linspace(0, max(0, n - 1), min(64, n), dtype=torch.float64).long()


def fingerprint(model) -> str:
    """Sixteen hex digits that change with a model's shape or weights: SHA-256 of 64 entries spread over each tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[_spread(flat.numel()).to(flat.device)].double().cpu()
        digest.update(f"{name} {list(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
