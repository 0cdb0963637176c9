"""What each layer of a run would say next."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gemmascope import ops
from gemmascope.readout.lens import Lens, Stream, measured, unembedded
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.results import fingerprint
from gemmascope.views.run import array, run_of
from gemmascope.widgets.base import Question, Selection
from gemmascope.widgets.lens_view import LensView

TOP = 5
"""Tokens listed at each place."""
LOGITS = 2**25
"""Logits behind one answer, about: positions are answered in blocks, so that each takes well under a second."""
EXPORTED = {"table": 2**14, "course": 2**11}
"""Places (positions times rows) of which an exported page carries answers, the last positions first; courses, with a
figure for each row and token, are the larger part."""


def lens_view(
    model, prompt, *, tuned=None, selection: Selection | None = None, state: Mapping | None = None
) -> LensView:
    """The likeliest token of every layer at every position, with the courses of tokens over layers.

    Args:
        prompt: text, token ids, or a cache of one prompt.
        tuned: a TunedLens of this model, to read through its translators as well.
        selection: the Selection to follow, to link it with other views.
        state: what to show at first: see LensView.

    Raises:
        KeyError: for a cache without the stream after each layer.
        ValueError: for a tuned lens of another model, or a state that there is not.
    """
    run = run_of(model, prompt)
    cfg = run.model.cfg
    if tuned is not None and fingerprint(tuned.model) != fingerprint(model):
        raise ValueError(
            f"This tuned lens is of {tuned.model.cfg.model_name}, and not of these weights: fit one to them."
        )
    rows, top = cfg.n_layers + 1, min(TOP, cfg.d_vocab)
    size = min(256, max(8, LOGITS // (rows * cfg.d_vocab)))
    first = {what: max(0, run.n - places // rows) for what, places in EXPORTED.items()}
    first["table"] -= first["table"] % size

    def streams(site: str) -> list[Tensor]:
        """[pos d_model] of each row."""
        return [run.stored("hook_embed"), *(run.stored((site, layer)) for layer in range(cfg.n_layers))]

    last = streams("resid_post")[-1]  # raises here, and not in the page, where a cache lacks a stream
    others = functools.lru_cache(maxsize=1)(streams)  # those inside a block may have to be computed again

    def read(lens: str, site: str, part: slice) -> dict[int, Stream]:
        """Some positions of each row, as the lens reads them."""
        found = {
            row - 1: stream[None, part].to(cfg.device)
            for row, stream in enumerate((streams if site == "resid_post" else others)(site))
        }
        if lens == "logit":
            return found
        if tuned is None or site != "resid_post":
            raise ValueError(f"No tuned lens reads {site} here: a TunedLens, given as tuned=, reads resid_post.")
        return {layer: tuned.translate(stream, layer) for layer, stream in found.items()}

    def texts(ids: Tensor) -> dict[str, str]:
        unique = ids.unique().tolist()
        return {str(one): str(text) for one, text in zip(unique, names_of_tokens(run.model, unique), strict=True)}

    @functools.lru_cache(maxsize=64)
    def table(lens: str, site: str, block: int) -> dict[str, Any]:
        part = slice(block * size, (block + 1) * size)
        figures, ids, probs = measured(run.model, read(lens, site, part), last[None, part].to(cfg.device), None, top)
        by_pos = figures[:, :, 0].transpose(1, 2)
        return {
            "ids": array(ids[:, 0].transpose(0, 1)),
            "probs": array(probs[:, 0].transpose(0, 1)),
            "entropy": array(by_pos[2]),
            "kl": array(by_pos[3]),
            "texts": texts(ids),
        }

    def listed(lens: str, site: str, pos: int) -> list[int]:
        return sorted(set(table(lens, site, pos // size)["ids"][pos % size].ravel().tolist()))

    def course(lens: str, site: str, pos: int, ids: list[int]) -> dict[str, Any]:
        stream = torch.cat(list(read(lens, site, slice(pos, pos + 1)).values()))
        log_probs = ops.wide(unembedded(run.model, stream)).log_softmax(-1)[:, 0]  # [row d_vocab]
        wanted = torch.tensor([*listed(lens, site, pos), *ids], device=log_probs.device)
        own = log_probs[:, wanted].T  # [token row]
        ranks = torch.stack([(log_probs > one[:, None]).sum(-1) for one in own]).float()
        ranks[own.isnan()] = torch.nan
        return {"ids": array(wanted), "probs": array(own.exp()), "ranks": array(ranks), "texts": texts(wanted)}

    def exported() -> Iterator[Question]:
        shown = {"lens": view.state["lens"], "site": view.state["site"]}
        for block in range(first["table"] // size, run.last // size + 1):
            yield "table", shown | {"block": block}
        for pos in range(first["course"], run.n):
            with run.using():
                known = listed(**shown, pos=pos)
            yield "course", shown | {"pos": pos, "ids": sorted(set(view.state["pins"]).difference(known))}

    view = LensView(
        run.texts,
        array(run.tokens),
        cfg.n_layers,
        cfg.d_vocab,
        answers={"table": run.answering(table), "course": run.answering(course)},
        size=size,
        tuned=tuned is not None,
        exported=exported,
        carried=first,
        setup=run.setup,
        selection=selection,
        state=state,
    )
    return view


def view_of(lens: Lens, *, selection: Selection | None = None, state: Mapping | None = None) -> LensView:
    """A Lens as a view; raises as `Lens.view` does."""
    if len(lens.tokens) > 1:
        raise ValueError(f"This lens is of {len(lens.tokens)} prompts: a view shows one, so read one.")
    run = run_of(lens.model, lens.tokens)
    positions = lens.kl.about["settings"]["positions"]
    layer = max(lens.streams)
    again = ops.wide(run.stored(("resid_post", layer))[positions])
    apart = (again - lens.streams[layer][0].to(again)).norm() / again.norm()
    if apart > (1e-4 if run.model.cfg.dtype.itemsize >= 4 else 2e-2):
        raise ValueError(
            "The model now runs otherwise than when this lens was read: call lens_view(model, prompt) while its hooks "
            "are there."
        )
    if lens.tuned is not None:
        state = {"lens": "tuned", **(state or {})}
    if selection is None and len(positions) < run.n:
        selection = Selection(pos=positions[-1])
    return lens_view(lens.model, run, tuned=lens.tuned, selection=selection, state=state)
