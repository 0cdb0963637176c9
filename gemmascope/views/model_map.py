"""The architecture of a model, which needs no weights; and how large each activation is in a run of a prompt."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from gemmascope.config import PRESETS
from gemmascope.sites import SITES, SiteInfo
from gemmascope.views.run import Run, loading, run_of
from gemmascope.widgets.base import Selection
from gemmascope.widgets.model_map import ModelMap

_STEP_ENDS = ("hook_resid_mid", "hook_resid_mlp")
"""The points with which the first two steps end; the last step has one point."""


def model_map(model, prompt=None, *, selection: Selection | None = None, state: Mapping | None = None) -> ModelMap:
    """The model as a tree of layers, modules and hook points: where to look, and what it is called.

        gs.model_map(model, "When Mary and John went to the store")

        with torch.device("meta"):      # the largest one on a laptop: shapes, no weights
            gs.model_map(gs.HookedGemma4(gs.PRESETS["google/gemma-4-31B"]))

    Args:
        prompt: text, token ids, or a cache of one prompt: hook points then show the norm of what they held.
        selection: the Selection to follow; a click sets its site and layer.
        state: `open` layers and `filter`, as in `view.state`.

    Raises:
        ValueError: for a prompt where the model has no weights to run.
        KeyError: for a cache that lacks a hook point, with what to name in `names_filter`.
    """
    if prompt is not None and model.cfg.device.type == "meta":
        raise ValueError("This model is on the meta device, without weights: leave the prompt out, or load the model.")
    run = None if prompt is None else run_of(model, prompt)
    if run is not None:
        for name, site in run.model.sites.items():
            if not site.expansion and name not in run.cache:
                run.stored(name)  # raises here, and not in the page
    cfg, n_layers = model.cfg, model.cfg.n_layers
    rows = [site for site in SITES if _at(site, model)]
    stages = range(-1, n_layers + 1)
    groups: list[dict[str, Any]] = []
    layers = []
    for layer in stages:
        weights = _weights(model, layer)
        group = {"sites": [i for i, site in enumerate(rows) if layer in _at(site, model)], "modules": weights}
        if group not in groups:
            groups.append(group)
        n_parameters = sum(math.prod(shape) for module in weights.values() for _, shape in module)
        layers.append(_layer(model, layer, groups.index(group), n_parameters))
    total = sum(layer["parameters"] for layer in layers)
    dtype = str(cfg.dtype).removeprefix("torch.")
    return ModelMap(
        [
            cfg.model_name,
            f"{n_layers} layers",
            f"width {cfg.d_model:,}",
            f"vocabulary {cfg.d_vocab:,}",
            f"context {cfg.n_ctx:,}",
            f"{total:,} parameters",
            f"{_size(total * cfg.dtype.itemsize)} in {dtype}",
            *([] if cfg.dtype.itemsize == 2 else [f"{_size(total * 2)} in bfloat16"]),
        ],
        _steps(cfg),
        [_row(site) for site in rows],
        groups,
        layers,
        dtype=dtype,
        norms=run is not None,
        setup=_setup(model) if run is None else run.setup,
        answers={} if run is None else {"norms": run.answering(lambda layer: {"norms": _norms(run, layer)})},
        exported=lambda: [] if run is None else [("norms", {"layer": layer}) for layer in stages],
        selection=selection,
        state=state,
    )


def _at(site: SiteInfo, model) -> list[int]:
    """The layers that have a site; -1 for the embedding, n_layers for the head."""
    n_layers = model.cfg.n_layers
    if "{l}" in site.name:
        return [layer for layer in range(n_layers) if site.name.format(l=layer) in model.sites]
    return [-1 if site.name in ("hook_embed", "hook_ple_inputs") else n_layers] if site.name in model.sites else []


def _row(site: SiteInfo) -> dict[str, Any]:
    short = site.name.removeprefix("blocks.{l}.")
    return {
        "name": site.name,
        "axes": site.axes.removeprefix("batch ").split(),
        "meaning": site.meaning,
        "step": _step(site) if short != site.name else None,
        "module": short.rpartition(".")[0],
        "expansion": site.expansion,
    }


def _step(site: SiteInfo) -> int:
    """The step of a block that a site belongs to, from 0."""
    names = [one.name.removeprefix("blocks.{l}.") for one in SITES]
    place = names.index(site.name.removeprefix("blocks.{l}."))
    done = sum(names.index(end) < place for end in _STEP_ENDS)
    return 3 if names[place] == "hook_resid_post" else done


def _steps(cfg) -> list[tuple[str, str]]:
    """What a block does, in order."""
    experts = " and, beside it, the experts that a router chooses work" if cfg.n_experts else " works"
    signal = "a signal of the token, one for each layer, is gated by the stream and added"
    return [
        ("attention", "heads read earlier positions, and what they found is normed and added to the stream"),
        ("feed-forward", f"an MLP{experts} on each position by itself"),
        ("per-layer input", signal if cfg.d_ple else "none in this model"),
        ("scale", "the whole stream is multiplied by one learned number"),
    ]


def _weights(model, layer: int) -> dict[str, list[tuple[str, list[int]]]]:
    """Names and shapes of weights by module: of the embedding (-1), a block, or the head."""
    if layer == -1:
        parts = {"embed": model.embed} | ({} if model.per_layer is None else {"per_layer": model.per_layer})
    elif layer == model.cfg.n_layers:
        parts = {"ln_final": model.ln_final}
    else:
        parts = dict(model.blocks[layer].named_children())
    found: dict[str, list] = defaultdict(list)
    for name, part in parts.items():
        for path, parameter in part.named_parameters():
            router = path.startswith("router.")
            module, weight = (f"{name}.router", path.removeprefix("router.")) if router else (name, path)
            found[module].append((weight.removesuffix(".weight"), list(parameter.shape)))
    return dict(found)


def _layer(model, layer: int, group: int, parameters: int) -> dict[str, Any]:
    cfg = model.cfg
    said = {"group": group, "parameters": parameters, "bytes": parameters * cfg.dtype.itemsize}
    sizes = {
        "d_model": cfg.d_model,
        "head": cfg.n_heads,
        "slot": cfg.experts_per_token,
        "expert": cfg.n_experts,
        "d_expert": cfg.d_expert,
        "d_ple": cfg.d_ple,
        "layer": cfg.n_layers,
        "d_vocab": cfg.d_vocab,
    }
    if not 0 <= layer < cfg.n_layers:
        return {**said, "name": "embedding" if layer < 0 else "head", "sizes": sizes}
    shape = model.layer(layer)
    sizes |= {"kv_head": shape.n_kv_heads, "d_head": shape.d_head, "d_mlp": shape.d_mlp}
    return {
        **said,
        "name": f"layer {layer}",
        "sizes": {axis: size for axis, size in sizes.items() if size is not None},
        "kind": shape.kind,
        "window": shape.window,
        "heads": cfg.n_heads,
        "kv_heads": shape.n_kv_heads,
        "kv_source": shape.kv_source,
        "k_is_v": shape.k_is_v,
        "mlp": shape.d_mlp,
        "experts": None if cfg.n_experts is None else [cfg.n_experts, cfg.experts_per_token, cfg.d_expert],
        "ple": cfg.d_ple,
    }


def _norms(run: Run, layer: int) -> Float[np.ndarray, " site"]:
    """The norm of what a position holds at each site of a layer, the mean over positions. NaN for numbers of experts
    and for expansions, which may be as large as the square of the prompt."""
    found = []
    for site in SITES:
        if layer not in _at(site, run.model):
            continue
        name = site.name.format(l=layer)
        none = site.expansion or name.endswith("hook_indices")
        found.append(torch.nan if none else run.stored(name).float().flatten(1).norm(dim=-1).mean().item())
    return np.array(found, np.float32)


def _setup(model) -> str:
    cfg = model.cfg
    if cfg.device.type != "meta":
        return loading(model)
    made = f"gs.HookedGemma4(gs.PRESETS[{cfg.model_name!r}])" if cfg.model_name in PRESETS else "..."
    return f'import gemmascope as gs\nimport torch\nwith torch.device("meta"):\n    model = {made}'


def _size(n_bytes: int) -> str:
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} GB"
