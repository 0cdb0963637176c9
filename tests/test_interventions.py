"""Interventions: what each verb does, written out by hand beside it."""

import pytest
import torch

import gemmascope as gs
from gemmascope.generate import KVCache
from gemmascope.sites import sites_of
from gemmascope.testing import ARCHITECTURES, tiny_model

TOKENS = torch.randint(3, 101, (3, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def moe():
    return tiny_model("26B-A4B")


def edited(model, name, change, tokens=TOKENS):
    """Logits of a run in which `change` edits the tensor at a site in place."""
    return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: change(x))])


def test_a_part_is_an_outer_product_of_what_is_named(moe):
    def change(z):
        for pos in (2, -1):
            for head in (0, 3):
                z[1, pos, head] = 0

    got = moe(TOKENS, interventions=[gs.zero(("z", 1), batch=1, positions=[2, -1], heads=[0, 3])])
    assert torch.equal(got, edited(moe, "blocks.1.attn.hook_z", change))
    assert not torch.equal(got, moe(TOKENS))


def test_verbs_do_what_they_say(moe):
    _, cache = moe.run_with_cache(TOKENS.flip(1))
    name, direction = "blocks.2.hook_resid_post", torch.randn(48)
    other = cache[name]

    def patched(x):
        x[:, [3, 5]] = other[:, [3, 5]]

    for one, change in (
        (gs.scale(name, 0.3, positions=4), lambda x: x[:, 4].mul_(0.3)),
        (gs.add(name, direction, 2.0, positions=slice(5, None)), lambda x: x[:, 5:].add_(2 * direction)),
        (gs.replace(name, direction, positions=-2), lambda x: x[:, -2].copy_(direction.expand(3, -1))),
        (gs.patch(name, cache, positions=[3, 5]), patched),
        (gs.mean(name, cache, positions=3), lambda x: x[:, 3].copy_(other.mean((0, 1)).expand(3, -1))),
    ):

        def at_site(x, change=change):
            change(x)

        assert torch.equal(moe(TOKENS, interventions=one), edited(moe, name, at_site)), str(one)


def test_resampling_gives_no_prompt_its_own_activation(moe):
    _, cache = moe.run_with_cache(TOKENS)
    for seed in range(5):
        drawn = gs.resample(("resid_pre", 2), cache, seed).value
        rows = [int((cache["resid_pre", 2] == row).all(-1).all(-1).nonzero()) for row in drawn]
        assert sorted(rows) == [0, 1, 2] and all(row != own for own, row in enumerate(rows))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("renormalize", [True, False])
def test_knockouts_in_the_kernel_equal_the_explicit_edit(architecture, renormalize):
    model, layers = tiny_model(architecture), (1, 2, 5)
    cut = gs.knockout(layers, [3, 5, 6, -1], [0, 2, 4, 5], heads=[1, 2], batch=[0, 2], renormalize=renormalize)
    got = model(TOKENS, interventions=cut)

    def change(x, hook):
        for b in (0, 2):
            for head in (1, 2):
                for query in (3, 5, 6, -1):
                    x[b, head, query, [0, 2, 4, 5]] = float("-inf") if renormalize else 0.0

    what = "hook_attn_scores" if renormalize else "hook_pattern"
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{layer}.attn.{what}", change) for layer in layers])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (got - model(TOKENS)).abs().max() > 1e-2
    _, cache = model.run_with_cache(TOKENS, interventions=cut)
    pattern = cache["pattern", 2]
    assert not pattern[0, 1, 6, [0, 2, 4, 5]].any() and torch.equal(pattern[1], model.run_with_cache(
        TOKENS, interventions=[gs.patch(("resid_pre", 2), cache)])[1]["pattern", 2][1])  # fmt: skip


def test_cutting_every_edge_of_a_query_is_zeroing_z_there(moe):
    for renormalize in (True, False):
        cut = moe(TOKENS, interventions=gs.knockout(3, queries=4, heads=1, renormalize=renormalize))
        zeroed = moe(TOKENS, interventions=gs.zero(("z", 3), positions=4, heads=1))
        torch.testing.assert_close(cut, zeroed, rtol=0, atol=2e-5)


@pytest.mark.parametrize("distance, matters", [(6, True), (7, False)])
def test_a_sliding_layer_sees_its_window_and_no_further(moe, distance, matters):
    assert moe.layer(1).window == 7
    cut = moe(TOKENS, interventions=gs.knockout(1, queries=10, keys=10 - distance))
    assert ((cut - moe(TOKENS)).abs().max() > 1e-3) == matters


def test_generation_with_a_cache_equals_whole_runs(moe):
    direction = torch.randn(48)
    edits = [
        gs.knockout([1, 2, 5], queries=slice(4, None), keys=[0, 1, 9], heads=[0, 2]),
        gs.add(("resid_post", 2), direction, positions=slice(11, None)),
        gs.zero(("z", 3), heads=1, positions=[3, 15]),
        gs.drop_expert(4, [0, 3]),
    ]
    grown = moe.generate(TOKENS, 9, interventions=edits, stop_ids=[])
    for n in range(9):
        if 13 + n <= 15:  # position 15 does not exist yet
            continue
        whole = grown[:, : 13 + n]
        logits = moe(whole, attention_mask=torch.ones_like(whole), interventions=edits)
        assert torch.equal(logits[:, -1].argmax(-1), grown[:, 13 + n])


def test_experts_are_dropped_silenced_and_forced(moe):
    _, cache = moe.run_with_cache(TOKENS)
    expert = int(cache.routing.indices[2].flatten().mode().values)
    _, dropped = moe.run_with_cache(TOKENS, interventions=gs.drop_expert(2, expert))
    assert not (dropped.routing.indices[2] == expert).any() and (cache.routing.indices[2] == expert).any()

    _, silent = moe.run_with_cache(TOKENS, interventions=gs.drop_expert(2, expert, reroute=False))
    hit = cache.routing.indices[2] == expert
    assert torch.equal(silent.routing.indices[2], cache.routing.indices[2])
    assert torch.equal(silent.routing.weights[2], cache.routing.weights[2].masked_fill(hit, 0))
    by_output = moe(TOKENS, interventions=gs.zero(("moe.hook_expert_out", 2), experts=expert))
    torch.testing.assert_close(by_output, moe(TOKENS, interventions=gs.drop_expert(2, expert, reroute=False)))

    _, forced = moe.run_with_cache(TOKENS, interventions=gs.force_expert(2, expert, positions=[0, 4]))
    assert (forced.routing.indices[2][:, [0, 4]] == expert).any(-1).all()
    kept = [p for p in range(13) if p not in (0, 4)]
    assert torch.equal(forced.routing.indices[2][:, kept], cache.routing.indices[2][:, kept])


def test_freezing_what_is_there_changes_nothing_and_freezing_norms_makes_the_last_step_linear(moe):
    logits, cache = moe.run_with_cache(TOKENS)
    frozen = [gs.freeze_routing(range(6), cache), gs.freeze_norms(moe, cache)]
    torch.testing.assert_close(moe(TOKENS, interventions=frozen), logits, rtol=0, atol=1e-5)

    def before_cap(strength):
        edits = [gs.freeze_norms(moe, cache), gs.add(("resid_post", 5), torch.ones(48), strength)]
        return moe.run_with_cache(TOKENS, names_filter="hook_unembed", interventions=edits)[1]["hook_unembed"]

    step = before_cap(1.0) - before_cap(0.0)
    torch.testing.assert_close(before_cap(3.0) - before_cap(0.0), 3 * step, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["26B-A4B", "E2B"])
def test_patching_a_run_with_itself_changes_nothing_at_any_site(architecture):
    model = tiny_model(architecture)
    logits, cache = model.run_with_cache(TOKENS)
    for name in sites_of(model.cfg):
        if name.startswith("blocks.5.") or not name.startswith("blocks."):
            same = model(TOKENS, interventions=gs.patch(name, cache))
            torch.testing.assert_close(same, logits, rtol=0, atol=1e-5, msg=name)


def test_they_print_and_come_back_from_a_file(moe, tmp_path):
    _, cache = moe.run_with_cache(TOKENS.flip(1))
    given = [
        gs.zero("blocks.3.attn.hook_z", heads=2, positions=-1),
        gs.patch(("resid_post", 3), cache, positions=slice(4, None)),
        *gs.knockout([1, 2], queries=[-1], keys=slice(1, 4)),
        gs.scale(("mlp.hook_post", 1), 0.5, neurons=[3, 7]),
        *gs.drop_expert(2, 5),
    ]
    assert list(map(str, given)) == [
        "zero blocks.3.attn.hook_z (heads 2; positions -1)",
        "patch resid_post of layer 3 (positions 4:)",
        "knock out attn_scores of layer 1 (queries -1; keys 1:4)",
        "knock out attn_scores of layer 2 (queries -1; keys 1:4)",
        "scale mlp.hook_post of layer 1 by 0.5 (neurons 3, 7)",
        "drop expert moe.router.hook_logits of layer 2 (experts 5)",
    ]
    gs.save_interventions(tmp_path / "edits.safetensors", given)
    back = gs.load_interventions(tmp_path / "edits.safetensors")
    assert back == given
    assert torch.equal(moe(TOKENS, interventions=back), moe(TOKENS, interventions=given))


def test_the_model_is_left_as_it_was(moe):
    before = moe(TOKENS)
    with moe.with_interventions([gs.zero(("resid_post", 2)), [gs.knockout(1)]]):
        assert not torch.equal(moe(TOKENS), before)
    with pytest.raises(ValueError):
        moe(TOKENS, interventions=gs.zero(("z", 1), heads=9))
    assert torch.equal(moe(TOKENS), before)
    assert not moe.following and not any(block.watched for block in moe.blocks)


def test_experts_of_slots_may_be_narrowed_to_positions_slots_and_neurons(moe):
    _, cache = moe.run_with_cache(TOKENS, names_filter=lambda name: "blocks.2.moe" in name)
    indices, post = cache["moe.router.hook_indices", 2], cache["moe.hook_expert_post", 2]
    expert = int(indices[:, :, 1].flatten().mode().values)
    where = dict(experts=expert, positions=slice(2, 11), slots=[0, 1], neurons=[3, 7])
    _, edited_cache = moe.run_with_cache(
        TOKENS,
        names_filter=lambda name: "blocks.2.moe" in name,
        interventions=gs.zero(("moe.hook_expert_post", 2), **where),
    )
    expected = post.clone()
    for b, p, slot in (indices == expert).nonzero().tolist():
        if 2 <= p < 11 and slot < 2:
            expected[b, p, slot, [3, 7]] = 0
    assert torch.equal(edited_cache["moe.hook_expert_post", 2], expected) and not torch.equal(expected, post)

    _, swapped = moe.run_with_cache(TOKENS, interventions=gs.replace(("moe.router.hook_indices", 2), 7, experts=expert))
    assert torch.equal(swapped["moe.router.hook_indices", 2], indices.masked_fill(indices == expert, 7))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: gs.zero(("z", 1), heads=4), "blocks.1.attn.hook_z: heads 4 does not exist; there are 4"),
        (lambda: gs.zero(("z", 1), positions=13), "positions 13 does not exist; there are 13"),
        (lambda: gs.zero(("resid_pre", 1), heads=0), "has no heads; an intervention there takes batch, positions"),
        (lambda: gs.zero(("z", 1), experts=0), "has no experts"),
        (lambda: gs.zero(("moe.router.hook_logits", 1), experts=8), "experts 8 does not exist; there are 8"),
        (lambda: gs.zero(("z", 1), head=0), "has no part 'head'; parts are batch, positions, heads"),
        (lambda: gs.patch(("z", 1), torch.zeros(3, 9, 4, 8)), "has 9 entries on axis 'pos' and this one has 13"),
        (lambda: gs.resample(("z", 1), torch.zeros(1, 13, 4, 8)), "resample needs two prompts"),
        (lambda: gs.knockout(1, heads=7), "heads 7 does not exist"),
        (lambda: gs.force_expert(1, 8), "a hook chose expert 8"),
        (
            lambda: gs.patch(("moe.hook_expert_out", 1), torch.zeros(3, 13, 3, 48), experts=2),
            "is by slot, and a slot of",
        ),
        (lambda: gs.Intervention(("z", 1), "cut"), "has no edges to cut: gs.knockout"),
    ],
)
def test_a_part_that_does_not_exist_is_said_in_one_sentence(moe, make, said):
    with pytest.raises(ValueError, match=said):
        moe(TOKENS, interventions=make())


def test_an_unknown_site_names_the_nearest(moe):
    with pytest.raises(KeyError, match="blocks.1.attn.hook_z"):
        moe(TOKENS, interventions=gs.zero("blocks.1.attn.hook_zz"))
    with pytest.raises(TypeError, match=r"gs\.zero"):
        moe(TOKENS, interventions=["blocks.1.attn.hook_z"])


def test_positions_count_from_the_start_in_every_way_of_running(moe):
    """run_with_hooks calls forward itself, and not the model."""
    edit = gs.add(("resid_post", 2), torch.ones(48), 3.0, positions=[3, 10])
    whole = moe(TOKENS, interventions=edit)
    past = KVCache(moe.cfg)
    with torch.no_grad(), moe.with_interventions(edit):
        parts = [moe.run_with_hooks(part, past_kv_cache=past) for part in TOKENS.split([6, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-5)


def test_a_longer_run_is_patched_from_while_generating(moe):
    """Its later positions wait until they are there."""
    longer = torch.cat((TOKENS, TOKENS[:, 1:8]), dim=1)
    _, cache = moe.run_with_cache(longer)
    edit = gs.patch(("resid_post", 2), cache)
    past, outs = KVCache(moe.cfg), []
    with torch.no_grad():
        for part in longer.split([6, 1, 13], dim=1):
            outs.append(moe(part, past_kv_cache=past, interventions=edit))
        whole = moe(longer, interventions=edit)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=0, atol=2e-5)


def test_a_layer_that_is_not_there_is_said(moe):
    with pytest.raises(KeyError, match="z of layer 6: this model has layers 0 to 5"):
        moe(TOKENS, interventions=gs.zero(("z", 6)))
