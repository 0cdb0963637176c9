"""The map of a model: every preset without weights, and norms that are those of the run."""

import json
import math

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model


@pytest.mark.parametrize("name", gs.PRESETS)
def test_every_size_has_a_map_without_its_weights(name):
    with torch.device("meta"):
        model = gs.HookedGemma4(gs.PRESETS[name])
    view = gs.model_map(model)
    layers, groups, sites = (view.data[part] for part in ("layers", "groups", "sites"))
    assert sum(layer["parameters"] for layer in layers) == sum(p.numel() for p in model.parameters())
    named = [
        sites[i]["name"].format(l=n - 1) for n, layer in enumerate(layers) for i in groups[layer["group"]]["sites"]
    ]
    assert sorted(named) == sorted(model.sites)
    for layer, row in enumerate(layers[1:-1]):
        shape = model.layer(layer)
        assert (row["kind"], row["kv_heads"], row["kv_source"]) == (shape.kind, shape.n_kv_heads, shape.kv_source)
        modules = groups[row["group"]]["modules"]
        assert sum(math.prod(size) for of in modules.values() for _, size in of) == row["parameters"]
    assert len(json.dumps(view.data)) < 40_000 and name in view.still()[0] and len(view.still()[1]) == len(layers) - 2
    names: dict = {}
    exec(view.data["setup"], names)
    assert names["model"].cfg.model_name == name


@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
def test_norms_are_those_of_the_run(architecture):
    model = tiny_model(architecture)
    prompt = torch.arange(5, 16)
    view = gs.model_map(model, prompt)
    _, cache = model.run_with_cache(prompt, names_filter=lambda name: True)
    n_layers = model.cfg.n_layers
    for layer in (-1, 0, n_layers - 1, n_layers):
        told = view.answer("norms", {"layer": layer})["norms"]
        sites = view.data["groups"][view.data["layers"][layer + 1]["group"]]["sites"]
        for number, norm in zip(sites, np.frombuffer(told["data"], np.float32), strict=True):
            row = view.data["sites"][number]
            name = row["name"].format(l=layer)
            if row["expansion"] or name.endswith("hook_indices"):
                assert np.isnan(norm), name
            else:
                assert norm == pytest.approx(float(cache[name][0].flatten(1).norm(dim=-1).mean()), rel=1e-4), name


def test_steps_are_in_the_order_of_a_block():
    view = gs.model_map(tiny_model("E2B"))
    steps = {row["name"].removeprefix("blocks.{l}."): row["step"] for row in view.data["sites"]}
    assert [steps[f"hook_{name}"] for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_mlp")] == [
        0,
        0,
        0,
        1,
        1,
    ]
    assert [steps[name] for name in ("ple.hook_gate", "hook_ple_out", "hook_resid_post", "hook_logits")] == [
        2,
        2,
        3,
        None,
    ]


def test_a_prompt_needs_weights():
    with torch.device("meta"):
        model = gs.HookedGemma4(gs.PRESETS["google/gemma-4-E2B"])
    with pytest.raises(ValueError, match="without weights"):
        gs.model_map(model, torch.arange(3, 6))
    with pytest.raises(ValueError, match="empty"):
        gs.model_map(tiny_model("E2B"), torch.tensor([], dtype=torch.long))


def test_a_cache_without_what_is_shown_says_what_to_name():
    model = tiny_model("E2B")
    _, cache = model.run_with_cache(torch.arange(3, 6), names_filter="hook_logits")
    with pytest.raises(KeyError, match="hook_embed was not cached.*names_filter"):
        gs.model_map(model, cache)
