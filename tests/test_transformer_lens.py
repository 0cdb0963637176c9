"""TransformerLens's own tools on the shipped models: what its users know works here, and patches what it says."""

import itertools
import math
from functools import partial

import pandas
import pytest
import torch
import transformer_lens.patching as patching
from transformer_lens.head_detector import detect_head
from transformer_lens.model_protocol import TransformerLensModelWithWeights

import gemmascope as gs
from gemmascope.weights import shipped_models

CLEAN = "When Mary and John went to the store, John gave a book to"
CORRUPTED = "When Mary and John went to the store, Mary gave a book to"


@pytest.fixture(scope="module", params=shipped_models())
def model(request):
    return gs.load(request.param)


@pytest.fixture(scope="module")
def setting(model):
    """Corrupted tokens, the clean run's cache, the metric, and its value on the corrupted run."""
    mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")

    def metric(logits):
        return logits[0, -1, mary] - logits[0, -1, john]

    corrupted = model.to_tokens(CORRUPTED)
    with torch.no_grad():
        clean_logits, cache = model.run_with_cache(CLEAN)
        start = metric(model(corrupted))
    assert metric(clean_logits) > 0 > start
    return corrupted, cache, metric, start.item()


SWEEPS = {
    name: sweep for name, sweep in vars(patching).items() if name.startswith("get_act_patch") and type(sweep) is partial
}


def _cells(model, corrupted: torch.Tensor, axes: tuple[str, ...], kv: bool) -> pandas.DataFrame:
    """A sweep's cells at the positions that matter; k and v only in the layers that own them."""
    last = corrupted.shape[1] - 1
    changed = int((model.to_tokens(CLEAN) != corrupted).nonzero()[0, 1])
    if kv:
        rows = model.kv_index(last + 1) if "pos" in axes else model.kv_index()
        return rows[rows["pos"].isin((changed, last))] if "pos" in axes else rows
    sizes = {"layer": range(model.cfg.n_layers), "head": range(4), "head_index": range(4)}
    sizes |= {"pos": (changed, last), "dest_pos": (last,), "src_pos": (2, 4, changed)}  # where the names stand
    return pandas.DataFrame(list(itertools.product(*(sizes[axis] for axis in axes))), columns=list(axes))


def test_all_sweeps_are_found():
    assert len(SWEEPS) == 15


@pytest.mark.parametrize("name", SWEEPS)
@torch.no_grad()
def test_sweep_runs_and_patches(name, model, setting):
    corrupted, cache, metric, start = setting
    sweep = SWEEPS[name]
    cells = _cells(model, corrupted, sweep.keywords["index_axis_names"], kv="_k_" in name or "_v_" in name)
    result = sweep(model, corrupted, cache, metric, index_axis_names=None, index_df=cells)
    assert result.shape == (len(cells),) and result.isfinite().all()
    assert (result - start).abs().max() > 1e-2  # patching does something: patterns and scores too


@torch.no_grad()
def test_sweep_without_an_index(model, setting):
    corrupted, cache, metric, start = setting
    result = patching.get_act_patch_attn_head_pattern_all_pos(model, corrupted, cache, metric)
    assert result.shape == (model.cfg.n_layers, 4) and (result - start).abs().max() > 1e-2
    every = patching.get_act_patch_attn_head_all_pos_every(
        model, corrupted, cache, metric, index_axis_names=None, index_df=model.kv_index()
    )
    assert every.shape == (5, len(model.kv_index()))
    rows = [tuple(row) for row in model.kv_index().to_numpy()]
    torch.testing.assert_close(every[4], torch.stack([result[row] for row in rows]))


@torch.no_grad()
def test_one_number_of_kv_heads_is_refused_where_it_would_lie(model, setting):
    corrupted, cache, metric, _ = setting
    with pytest.raises((AttributeError, KeyError), match="differs between the layers|reads those of layer"):
        patching.get_act_patch_attn_head_k_all_pos(model, corrupted, cache, metric)


@torch.no_grad()
def test_head_detector(model):
    scores = detect_head(model, CLEAN, "previous_token_head")
    assert scores.shape == (model.cfg.n_layers, 4)
    _, cache = model.run_with_cache(CLEAN)
    layer, head = divmod(int(scores.argmax()), 4)
    pattern = cache.pattern(layer, heads=head)[0]
    expected = pattern.diagonal(offset=-1).sum() / pattern.sum()
    torch.testing.assert_close(scores[layer, head], expected)
    duplicates = detect_head(model, [CLEAN, CORRUPTED], "duplicate_token_head")
    assert ((0 <= duplicates) & (duplicates <= 1)).all() and duplicates.max() > 0


def test_protocol(model):
    assert isinstance(model, TransformerLensModelWithWeights)
    assert model.cfg.n_ctx and model.cfg.n_heads and model.cfg.d_vocab and model.cfg.device


@torch.no_grad()
def test_logit_lens_ends_in_the_models_own_output(model):
    logits, cache = model.run_with_cache(CLEAN)
    stack = cache.accumulated_resid(apply_ln=True)
    lens = model.softcap(stack @ model.W_U)
    torch.testing.assert_close(lens[-1], logits, rtol=1e-4, atol=1e-4)
    values, labels = cache.logit_attribution(" Mary", " John", heads=True)
    before_cap = cache["hook_unembed"][0, -1]
    difference = before_cap[model.to_single_token(" Mary")] - before_cap[model.to_single_token(" John")]
    assert math.isclose(values.sum().item(), difference.item(), rel_tol=1e-4) and len(labels) == len(values)
