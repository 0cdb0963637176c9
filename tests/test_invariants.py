"""What holds of any Gemma 4 whatever its weights, on a mixture of experts (26B-A4B) and an edge model (E2B).

Tested here: hook-free = watched = cached logits; rows of a pattern; a query without edges; the router's own choice; the
order of slots; which layers an edit of keys or values reaches. Tested elsewhere, on both architectures:

- returned = in-place edit, and an identity write changes nothing, at every site: `test_hooks.py`,
  test_every_site_is_live_and_in_place_equals_returned. Patching a run with itself: `test_interventions.py`.
- decompositions sum to the stream and attributions to the logit: `test_cache.py`, "Exact arithmetic"; by head, neuron,
  expert and source: `test_attribution_direct.py`.
- attribution = exact patching on a linearised model: `test_attribution.py`,
  test_equals_exact_patching_on_a_linear_model; edges: `test_circuits.py`,
  test_scores_equal_exact_patching_on_a_linear_model.
- generation with a KV cache = whole runs, with the same hooks: `test_generate.py`,
  test_hooks_act_at_every_step_alike_with_and_without_kv_cache; with interventions: `test_interventions.py`.
- what a cache computes again = what the run had, bit for bit: `test_rerun.py`.
- a token beyond the window does not matter: `test_model.py`, test_window_edge; its edge cut: `test_interventions.py`.
- gradients of the kernels: `kernels/test_ops.py`.
"""

import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model

both = pytest.mark.parametrize("architecture", ["26B-A4B", "E2B"])
N_POS = 13  # past the window of 7
TOKENS = torch.randint(3, 101, (2, N_POS), generator=torch.Generator().manual_seed(1))


@both
@pytest.mark.parametrize("grad", [True, False])
def test_hook_free_watched_and_cached_logits_are_the_same_bits(architecture, grad):
    model, met = tiny_model(architecture), []
    # A hook on an expansion (scores, pattern, ...) may write, so its layer takes the explicit path, which rounds
    # otherwise: `test_hooks.py` has those. A cache only reads them.
    points = [name for name, site in model.sites.items() if not site.expansion]
    with torch.set_grad_enabled(grad):
        plain = model(TOKENS)
        watched = model.run_with_hooks(
            TOKENS, fwd_hooks=[(name, lambda x, hook: met.append(hook.name)) for name in points]
        )
        cached, lazy = model.run_with_cache(TOKENS)
        stored, whole = model.run_with_cache(TOKENS, names_filter=lambda name: True)
    assert sorted(met) == sorted(points) and set(whole.keys()) == set(model.sites)
    for logits in (watched, cached, stored, lazy["hook_logits"], whole["hook_logits"]):
        assert torch.equal(logits, plain)


@both
@torch.no_grad()
def test_rows_of_a_pattern_sum_to_1_and_see_their_window_only(architecture):
    model = tiny_model(architecture)
    _, cache = model.run_with_cache(TOKENS)
    distance = torch.arange(N_POS)[:, None] - torch.arange(N_POS)
    for layer, shape in enumerate(model.cfg.layers):
        pattern = cache["pattern", layer]
        torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, N_POS), rtol=0, atol=1e-6)
        seen = (distance >= 0) & (distance < (shape.window or N_POS))
        assert torch.equal(pattern > 0, seen.expand_as(pattern))  # at distance W - 1 on, at W off, exactly
        assert (shape.window == 7) == (shape.kind == "sliding")


@both
@pytest.mark.parametrize("renormalize", [True, False])
@torch.no_grad()
def test_a_query_without_edges_is_z_zeroed_in_every_layer(architecture, renormalize):
    model = tiny_model(architecture)
    plain = model(TOKENS)
    for layer in range(model.cfg.n_layers):
        cut = model(TOKENS, interventions=gs.knockout(layer, queries=8, heads=[0, 3], renormalize=renormalize))
        zeroed = model(TOKENS, interventions=gs.zero(("z", layer), positions=8, heads=[0, 3]))
        torch.testing.assert_close(cut, zeroed, rtol=0, atol=2e-5)
        assert (cut - plain).abs().max() > 1e-3


@torch.no_grad()
def test_forcing_the_routers_own_choice_is_nothing():
    model = tiny_model("26B-A4B")
    plain, cache = model.run_with_cache(TOKENS)
    for layer in range(model.cfg.n_layers):
        own = cache.routing.indices[layer]
        same = model(TOKENS, interventions=gs.replace(("moe.router.hook_indices", layer), own))
        assert torch.equal(same, plain)
        expert, other = int(own[0, 5, -1]), next(one for one in range(8) if one not in own[0, 5])
        one = model(TOKENS[:1])
        assert torch.equal(model(TOKENS[:1], interventions=gs.force_expert(layer, expert, positions=5)), one)
        forced = model(TOKENS[:1], interventions=gs.force_expert(layer, other, positions=5))
        assert (forced - one).abs().max() > 1e-3


@torch.no_grad()
def test_the_order_of_slots_means_nothing():
    model = tiny_model("26B-A4B")
    plain, cache = model.run_with_cache(TOKENS)
    for layer in range(model.cfg.n_layers):
        turned = gs.replace(("moe.router.hook_indices", layer), cache.routing.indices[layer].roll(1, -1))
        logits, other = model.run_with_cache(TOKENS, interventions=turned)
        torch.testing.assert_close(logits, plain, rtol=0, atol=2e-5)
        for site in ("moe.router.hook_weights", "moe.hook_expert_out"):
            dim = -1 if site.endswith("weights") else -2
            torch.testing.assert_close(other[site, layer], cache[site, layer].roll(1, dim), rtol=1e-5, atol=1e-6)


@both
@torch.no_grad()
def test_an_edit_of_keys_or_values_reaches_its_layer_and_those_that_share_it(architecture):
    """With the stream held as it was, so that nothing else carries the edit on."""
    model = tiny_model(architecture)
    _, cache = model.run_with_cache(TOKENS)
    n_layers, shapes = model.cfg.n_layers, model.cfg.layers
    held = [gs.patch(("resid_pre", layer), cache) for layer in range(n_layers)]
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]
    shared = {shape.kv_source for shape in shapes} - {None}
    assert len(shared) == (2 if architecture == "E2B" else 0)
    for layer, shape in enumerate(shapes):
        if shape.kv_source is not None:
            continue
        readers = {layer} | {other for other, its in enumerate(shapes) if its.kv_source == layer}
        for site in ("attn.hook_k", "attn.hook_rot_k", "attn.hook_v", "attn.hook_v_normed"):
            edit = gs.add((site, layer), torch.randn(shape.d_head), 2.0, positions=slice(3, 9))
            _, after = model.run_with_cache(TOKENS, names_filter=names, interventions=[*held, edit])
            change = [(after["z", l] - cache["z", l]).abs().amax((0, 2, 3)) for l in range(n_layers)]
            assert {l for l in range(n_layers) if change[l].max() > 1e-3} == readers
            assert {l for l in range(n_layers) if change[l].max() > 0} == readers
            for reader in readers:  # not before the edit, and in a sliding layer not once it is out of sight
                last = 8 + shape.window - 1 if shape.window else N_POS
                assert not change[reader][:3].any() and not change[reader][last + 1 :].any()
                assert (change[reader][4:9] > 0).all()
