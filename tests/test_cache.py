"""What a cache holds, what it recomputes, and that its decompositions add up."""

import functools

import pytest
import torch

from gemmascope.generate import KVCache
from gemmascope.testing import ARCHITECTURES, tiny_model

N_POS = 13
TOKENS = torch.randint(3, 101, (2, N_POS), generator=torch.Generator().manual_seed(4))


def relative(error_of: torch.Tensor, against: torch.Tensor) -> float:
    return ((error_of - against).abs().max() / against.abs().max()).item()


# Expansions, recomputed


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_recomputed_expansions_equal_the_real_tensors(architecture):
    model = tiny_model(architecture).double()  # the run with hooks takes the explicit path, and rounds elsewhere
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    expansions = [name for name, site in model.sites.items() if site.expansion]
    real = {}
    with model.hooks(fwd_hooks=[(name, lambda t, hook: real.__setitem__(hook.name, t.clone())) for name in expansions]):
        model(TOKENS, attention_mask=mask)
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    assert not set(expansions) & set(cache.keys())  # nothing S x S is stored
    for name in expansions:
        torch.testing.assert_close(cache[name], real[name], rtol=1e-10, atol=1e-10)


def test_pattern_of_some_heads_and_rows_costs_and_equals_that_part(monkeypatch):
    from gemmascope import ops

    model = tiny_model("26B-A4B")
    _, cache = model.run_with_cache(TOKENS)
    whole = cache["pattern", 2]
    seen = []
    original = ops.masked_scores
    monkeypatch.setattr(ops, "masked_scores", lambda q, k, m: seen.append((q.shape, k.shape)) or original(q, k, m))
    part = cache.pattern(2, heads=[3, 0], rows=slice(-2, None))
    assert seen == [((2, 2, 2, 16), (2, N_POS, 2, 16))]
    torch.testing.assert_close(part, whole[:, [3, 0], -2:])
    torch.testing.assert_close(cache.pattern(-4, heads=1), whole[:, 1])
    torch.testing.assert_close(cache.pattern(2, rows=[5]), whole[:, :, [5]])
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 4, N_POS))


@pytest.mark.parametrize("architecture", ["26B-A4B", "E2B"])
@pytest.mark.parametrize("remove_batch_dim", [False, True])
def test_read_outs_equal_the_same_function_of_the_pattern(architecture, remove_batch_dim):
    model = tiny_model(architecture)
    tokens, mask = (TOKENS[1:], None) if remove_batch_dim else (TOKENS, torch.ones_like(TOKENS))
    if mask is not None:
        mask[1, :4] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask, remove_batch_dim=remove_batch_dim)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer]
        close(cache.attention_colsum(layer), pattern.sum(-2))
        close(cache.attention_entropy(layer), -torch.xlogy(pattern, pattern).sum(-1))
        values, keys = cache.attention_topk(layer, 2)
        close(values, pattern.topk(2).values)
        close(pattern.gather(-1, keys.clamp(min=0)) * (keys >= 0), values)
        close(cache.attention_pool(layer, 4, "max")[..., 1, 0], pattern[..., 4:8, :4].amax((-2, -1)))
        close(cache.attention_pool(layer, 4)[..., 1, 0], pattern[..., 4:8, :4].mean((-2, -1)))
        source = torch.arange(N_POS) * 2 // N_POS
        close(cache.attention_by_source(layer, source, 2).sum(-2), cache["z", layer])


def test_read_outs_of_a_pattern_that_a_hook_changed_are_refused():
    model = tiny_model("12B")
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda t, hook: t / 2)]):
        _, cache = model.run_with_cache(TOKENS)
    cache.attention_entropy(0)
    with pytest.raises(KeyError, match="read-outs come from queries and keys"):
        cache.attention_entropy(1)


def test_changed_pattern_is_what_the_cache_holds():
    model = tiny_model("12B")
    uniform = lambda t, hook: torch.full_like(t, 1 / N_POS)  # noqa: E731
    hook = [("blocks.1.attn.hook_pattern", uniform)]
    with model.hooks(fwd_hooks=hook):
        _, cache = model.run_with_cache(TOKENS)
        _, without = model.run_with_cache(TOKENS, names_filter=lambda name: "rot" in name)
    assert (cache["pattern", 1] == 1 / N_POS).all() and (cache.pattern(1, heads=2) == 1 / N_POS).all()
    assert "blocks.0.attn.hook_pattern" not in cache.keys()
    with pytest.raises(KeyError, match="hook that may have changed it and was not cached"):
        without["pattern", 1]
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", lambda t, hook: torch.zeros_like(t))]):
        _, cache = model.run_with_cache(TOKENS)
    assert cache.attn_scores(1, heads=0).abs().max() == 0
    torch.testing.assert_close(cache["pattern", 1], torch.full((2, 4, N_POS, N_POS), 1 / N_POS))


def test_named_pattern_is_stored():
    model = tiny_model("E4B")
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.5.attn.hook_pattern")
    assert list(cache.keys()) == ["blocks.5.attn.hook_pattern"]
    _, full = model.run_with_cache(TOKENS)
    torch.testing.assert_close(cache["pattern", 5], full["pattern", 5])


# Names and slices


def test_names_in_all_their_forms():
    model = tiny_model("26B-A4B")
    _, cache = model.run_with_cache(TOKENS)
    for key in [("z", 3), ("z", 3, "attn"), ("z", -3), ("attn.hook_z", 3), "blocks.3.attn.hook_z"]:
        assert cache[key] is cache["blocks.3.attn.hook_z"]
    assert cache["resid_post", -1] is cache["blocks.5.hook_resid_post"]
    assert cache["moe.router.hook_probs", 1] is cache["blocks.1.moe.router.hook_probs"]
    assert cache["scale", 2, "ln1"].shape == (2, N_POS, 1)
    assert ("pattern", 3) in cache and ("moe.hook_expert_out", 2) in cache
    assert "blocks.9.attn.hook_z" not in cache and ("z", 99) not in cache
    names = ["blocks.0.hook_resid_pre", "hook_embed"]
    for names_filter in (names, tuple(names), lambda name: name in names):
        assert set(model.run_with_cache(TOKENS, names_filter=names_filter)[1].keys()) == set(names)


def test_what_was_not_cached_says_how_to_get_it():
    model = tiny_model("12B")
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.0.attn.hook_z"])
    with pytest.raises(KeyError, match="blocks.0.attn.hook_rot_q was not cached.*name it in names_filter"):
        cache["pattern", 0]
    with pytest.raises(KeyError, match="nearest are blocks.0.attn.hook_z"):
        cache["blocks.0.attn.hook_zz"]


@pytest.mark.parametrize("positions", [-1, slice(2, 5), [0, 7]])
def test_pos_slice(positions):
    model = tiny_model("26B-A4B")
    names_filter = lambda name: True  # noqa: E731
    _, whole = model.run_with_cache(TOKENS, names_filter=names_filter)
    _, cache = model.run_with_cache(TOKENS, names_filter=names_filter, pos_slice=positions)
    for name, site in model.sites.items():
        axes = site.axes.split()
        axis = axes.index("pos" if "pos" in axes else "query")
        index = torch.arange(N_POS)[positions].flatten()  # an int keeps its axis here, as in TransformerLens
        expected = whole[name].index_select(axis, index)
        assert torch.equal(cache[name], expected), name
    assert cache.nbytes < whole.nbytes / 3  # no view keeps the rest alive
    _, lazy = model.run_with_cache(TOKENS, pos_slice=positions)
    with pytest.raises(KeyError, match="does not hold every key"):
        lazy["pattern", 0]


def test_remove_batch_dim():
    model = tiny_model("26B-A4B")
    _, batched = model.run_with_cache(TOKENS[:1])
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    for key in [("z", 0), ("pattern", 2), ("result", 1), ("moe.hook_expert_out", 3)]:
        torch.testing.assert_close(cache[key], batched[key][0])
    assert cache.decompose(heads=True).terms.shape[1:] == (N_POS, 48)
    later = batched.remove_batch_dim()
    torch.testing.assert_close(later["pattern", 2], cache["pattern", 2])


def test_some_prompts_of_a_batch():
    model = tiny_model("E2B")
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    second = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(second["pattern", 3], cache["pattern", 3][1])
    assert torch.equal(cache.apply_slice_to_batch_dim(slice(1, 2))["pattern", 3], cache["pattern", 3][1:])


def test_cost_is_shown():
    model = tiny_model("12B")
    _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"])
    assert cache.nbytes == 2 * N_POS * 48 * 4  # one tensor under two names
    assert repr(cache) == "ActivationCache(2 tensors, 0.0 MB, of tiny 12B)"


def test_cache_moves_to_a_device():
    _, cache = tiny_model("12B").run_with_cache(TOKENS, names_filter="blocks.0.attn.hook_z", device="meta")
    assert cache["z", 0].device.type == "meta"
    _, cache = tiny_model("12B").run_with_cache(TOKENS, device="meta")
    assert cache["resid_pre", 3].device.type == "meta"


def test_past_keys_are_missed_loudly():
    model, past = tiny_model("12B"), None
    past = KVCache(model.cfg)
    with torch.no_grad():
        model(TOKENS[:, :9], past_kv_cache=past)
        _, cache = model.run_with_cache(TOKENS[:, 9:], past_kv_cache=past)
        with pytest.raises(KeyError, match="does not hold every key"):
            cache["pattern", 0]


# Exact arithmetic


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_decomposition_sums_to_the_stream(architecture):
    model = tiny_model(architecture)
    logits, cache = model.run_with_cache(TOKENS)
    n_layers, moe = model.cfg.n_layers, model.cfg.n_experts is not None
    for layer in (0, 1, 4, n_layers):
        stream = cache["resid_pre", layer] if layer < n_layers else cache["resid_post", -1]
        for heads in (False, True):
            for experts in {False, moe}:
                terms, labels = cache.decompose(layer, heads=heads, experts=experts)
                assert len(terms) == len(labels) == len(set(labels))
                assert relative(terms.sum(0), stream) < 1e-5
    middle = cache.decompose(3, heads=True, mlp_input=True).terms.sum(0)
    assert relative(middle, cache["resid_mid", 3]) < 1e-5
    normed = cache.decompose(heads=True, apply_ln=True).terms.sum(0)
    assert relative(normed, model.ln_final(cache["resid_post", -1])) < 1e-5
    entering = cache.decompose(2, apply_ln=True).terms.sum(0)
    assert relative(entering, model.blocks[2].ln1(cache["resid_pre", 2])) < 1e-5
    # TransformerLens's own calls
    terms, labels = cache.decompose_resid(return_labels=True)
    assert relative(terms.sum(0), cache["resid_post", -1]) < 1e-5 and labels[:3] == ["embed", "0_attn_out", "0_mlp_out"]
    results, labels = cache.stack_head_results(incl_remainder=True, return_labels=True)
    assert relative(results.sum(0), cache["resid_post", -1]) < 1e-5
    assert labels[5] == "L1H1" and len(labels) == n_layers * 4 + 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_logit_attribution_sums_to_the_logit(architecture):
    model = tiny_model(architecture)
    logits, cache = model.run_with_cache(TOKENS)
    answer, wrong = torch.tensor([7, 50]), torch.tensor([9, 12])
    before_cap = cache["hook_unembed"][:, -1]
    values, _ = cache.logit_attribution(answer, heads=True)
    expected = before_cap.gather(-1, answer[:, None])[:, 0]
    torch.testing.assert_close(values.sum(0), expected, rtol=1e-4, atol=1e-4)
    values, labels = cache.logit_attribution(answer, wrong)
    expected = expected - before_cap.gather(-1, wrong[:, None])[:, 0]
    torch.testing.assert_close(values.sum(0), expected, rtol=1e-4, atol=1e-4)
    terms = cache.decompose_resid(pos_slice=-1)
    torch.testing.assert_close(cache.logit_attrs(terms, answer, wrong, pos_slice=-1), values)


@torch.no_grad()
def test_accumulated_resid_ends_in_the_models_logits():
    model = tiny_model("31B")
    logits, cache = model.run_with_cache(TOKENS)
    whole, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    terms = cache.decompose().terms
    written = {"0_pre": 1, "0_mid": 2, "1_pre": 3, "1_mid": 4, "5_mid": 12, "final_post": 13}
    for label, n_terms in written.items():  # each entry is what had been written by then
        assert relative(whole[labels.index(label)], terms[:n_terms].sum(0)) < 1e-5, label
    stack, labels = cache.accumulated_resid(apply_ln=True, incl_mid=True, return_labels=True)
    assert labels[:3] == ["0_pre", "0_mid", "1_pre"] and labels[-1] == "final_post"
    torch.testing.assert_close(model.softcap(stack[-1] @ model.W_U), logits)
    assert torch.equal(cache.accumulated_resid(3)[-1], cache["resid_pre", 3])
    lens = cache.logit_lens(return_type="logits").values
    torch.testing.assert_close(lens[-1], logits[:, -1], rtol=1e-4, atol=1e-4)  # through the soft cap


@torch.no_grad()
def test_what_hooks_added_is_a_term_of_its_own():
    model, direction = tiny_model("26B-A4B"), torch.randn(48)
    hooks = [
        ("blocks.2.hook_resid_mid", lambda t, hook: t + direction),
        ("blocks.4.moe.hook_out", lambda t, hook: t * -1),
    ]
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(TOKENS)
    for experts in (False, True):
        terms, labels = cache.decompose(heads=True, experts=experts)
        assert labels[-1] == "edits" and relative(terms.sum(0), cache["resid_post", -1]) < 1e-5
    alone = cache.decompose(3).terms[-1]
    torch.testing.assert_close(alone, (direction * model.blocks[2].layer_scalar).expand_as(alone), rtol=1e-3, atol=1e-3)
    assert "edits" not in cache.decompose(2).labels


@torch.no_grad()
def test_decompose_at_some_positions_computes_only_those():
    model = tiny_model("26B-A4B")
    _, cache = model.run_with_cache(TOKENS)
    whole = cache.decompose(heads=True, experts=True).terms
    for positions, expected in ((-1, whole[:, :, -1]), (slice(2, 5), whole[:, :, 2:5]), ([1, 4], whole[:, :, [1, 4]])):
        torch.testing.assert_close(cache.decompose(heads=True, experts=True, pos_slice=positions).terms, expected)
    results = cache.stack_head_results(pos_slice=-1, apply_ln=True)
    torch.testing.assert_close(results, cache.stack_head_results(apply_ln=True)[:, :, -1])


def test_head_results_go_through_the_same_door():
    model = tiny_model("12B")
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_result", lambda t, hook: t * 0)]):
        _, cache = model.run_with_cache(TOKENS)
        _, without = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_z"))
    cache.compute_head_results()
    assert cache["result", 1].abs().max() == 0 < cache["result", 2].abs().max()
    with pytest.raises(KeyError, match="had a hook"):
        without.compute_head_results()


def test_hook_that_comes_during_the_run_is_not_forgotten():
    model, once = tiny_model("12B"), []

    def add_another(tensor, hook):
        if not once:
            once.append(1)
            model.add_hook("blocks.3.attn.hook_pattern", lambda t, hook: torch.full_like(t, 1 / N_POS))

    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", add_another)]):
        _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(KeyError, match="may have changed it"):
        cache["pattern", 3]
    assert ("pattern", 3) not in cache and ("pattern", 2) in cache


def test_helpers_that_would_be_wrong_are_refused():
    _, cache = tiny_model("12B").run_with_cache(TOKENS)
    for call in (cache.get_full_resid_decomposition, cache.stack_neuron_results, lambda: cache.get_neuron_results(0)):
        with pytest.raises(ValueError, match="post-norms"):
            call()
    with pytest.raises(ValueError, match="no experts"):
        cache.decompose(experts=True)
    with pytest.raises(ValueError, match="no experts"):
        _ = cache.routing
    with pytest.raises(ValueError, match="mode is 'neurons'"):
        cache.decompose_resid(mode="neurons")


def test_routing_trace():
    model = tiny_model("26B-A4B")
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "router" in name)
    trace = cache.routing
    assert trace.indices.shape == trace.weights.shape == (6, 2, N_POS, 3) and trace.probs.shape == (6, 2, N_POS, 8)
    assert torch.equal(trace.indices[4], trace.probs[4].topk(3).indices)
    load = trace.load()
    torch.testing.assert_close(load.sum(-1), torch.ones(6))
    assert load[1, 5] == (trace.indices[1] == 5).float().mean()
    mask = torch.ones_like(TOKENS)
    mask[1, :5] = 0
    _, padded = model.run_with_cache(TOKENS, attention_mask=mask, names_filter=lambda name: "router" in name)
    real = padded.routing.indices[:, mask.bool()]
    assert padded.routing.load()[3, 2] == (real[3] == 2).float().mean()
