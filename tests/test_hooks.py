"""Every hook point fires, is written in place or by returning, is inert when it should, refuses what it cannot do."""

import pytest
import torch

import gemmascope as gs
from gemmascope.sites import SITES, sites_of
from gemmascope.testing import ARCHITECTURES, tiny_config, tiny_model

N_POS = 11  # past the window of 7
TOKENS = torch.randint(3, 101, (2, N_POS), generator=torch.Generator().manual_seed(1))


def _other(tensor: torch.Tensor, n_experts: int | None) -> torch.Tensor:
    """Another value for an activation: other experts, or the tensor times noise that no norm undoes."""
    if not tensor.is_floating_point():
        return (tensor + 1) % n_experts
    noise = 0.5 + torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2))
    # A norm's scale is one number a position. Queries, keys and values are normed again, so only a change so large that
    # their norms' eps matters gets from ln1's scale to the logits.
    return tensor * noise * (1e5 if tensor.shape[-1] == 1 else 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_site_is_live_and_in_place_equals_returned(architecture):
    model = tiny_model(architecture)
    plain, n_experts = model(TOKENS), model.cfg.n_experts
    inert, unequal, disturbed = [], [], []

    def in_place(tensor, hook):
        tensor.copy_(_other(tensor, n_experts))

    for name in model.sites:
        returned = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: _other(t, n_experts))])
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, in_place)])
        identity = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: t)])
        inert += [name] if (returned - plain).abs().max() < 1e-4 else []
        unequal += [name] if not torch.equal(returned, edited) else []
        # An expansion has its layer take the explicit path: same value, other rounding. All else is exact to the bit.
        same = (identity - plain).abs().max() < 2e-5 if model.sites[name].expansion else torch.equal(identity, plain)
        disturbed += [] if same else [name]
    assert (inert, unequal, disturbed) == ([], [], [])
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_table_names_exactly_the_live_points_with_their_shapes(architecture):
    model = tiny_model(architecture)
    assert set(model.sites) == set(model.hook_dict)
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: True)
    cfg = model.cfg
    for name, site in model.sites.items():
        layer = cfg.layers[int(name.split(".")[1])] if name.startswith("blocks.") else None
        size = dict(batch=2, pos=N_POS, query=N_POS, key=N_POS, head=cfg.n_heads, layer=cfg.n_layers)
        size |= dict(slot=cfg.experts_per_token, expert=cfg.n_experts, d_model=cfg.d_model, d_expert=cfg.d_expert)
        size |= {"d_ple": cfg.d_ple, "d_vocab": cfg.d_vocab, "1": 1}
        size |= dict(kv_head=layer.n_kv_heads, d_head=layer.d_head, d_mlp=layer.d_mlp) if layer else {}
        assert list(cache[name].shape) == [size[axis] for axis in site.axes.split()], name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_pass_meets_the_sites_in_the_order_of_the_table(architecture):
    model, met = tiny_model(architecture), []
    model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, lambda t, hook: met.append(hook.name))])
    assert sorted(met) == sorted(model.sites)
    order = [site.name for site in SITES]
    in_block = [name.replace("blocks.0.", "blocks.{l}.") for name in met if name.startswith("blocks.0.")]
    assert in_block == [name for name in order if name in in_block]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_straight_line_equals_line_with_sites_bitwise(architecture):
    """Watching a block only to read never changes a number, forward or backward."""
    model = tiny_model(architecture)
    loss = model(TOKENS, return_type="loss")
    loss.backward()
    straight = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    watched, _ = model.run_with_cache(TOKENS, return_type="loss")
    watched.backward()
    assert torch.equal(loss, watched)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, straight[name], rtol=1e-4, atol=1e-6)


def test_only_watched_blocks_touch_their_points(monkeypatch):
    model = tiny_model("26B-A4B")
    called = []
    for number, block in enumerate(model.blocks):
        original = block.with_sites
        monkeypatch.setattr(block, "with_sites", lambda *a, n=number, f=original: called.append(n) or f(*a))
    model(TOKENS)
    assert called == []
    model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.attn.hook_z", lambda t, hook: None)])
    assert called == [2]
    model(TOKENS)
    assert called == [2]  # the hook is gone, and the block knows
    handle = model.blocks[1].hook_resid_mid.register_forward_hook(lambda module, args, output: output * 2)
    plain_torch = model(TOKENS)
    assert called == [2, 1]
    handle.remove()
    assert not torch.equal(model(TOKENS), plain_torch) and called == [2, 1]


@torch.no_grad()
@pytest.mark.parametrize("part", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "attn.q_norm", "ln1_post"])
def test_another_forward_on_an_instance_is_called(part):
    """Libraries that offload weights put theirs there."""
    model = tiny_model("26B-A4B")
    plain, module = model(TOKENS), model.blocks[1].get_submodule(part)
    original, calls = module.forward, []
    module.forward = lambda *args, **given: calls.append(part) or 2 * original(*args, **given)
    doubled = model(TOKENS)
    assert calls == [part]
    del module.forward
    handle = module.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(doubled, model(TOKENS))
    handle.remove()
    assert torch.equal(model(TOKENS), plain)


def test_in_place_edit_reaches_no_other_holder():
    """An edit at resid_pre of block 1 must not change what a cache holds of block 0's resid_post, the same tensor."""
    model = tiny_model("12B")
    _, before = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda t, hook: t.zero_())]):
        _, after = model.run_with_cache(TOKENS)
    assert torch.equal(after["resid_post", 0], before["resid_post", 0])
    assert after["resid_pre", 1].abs().max() == 0


def test_reading_a_pattern_keeps_the_fused_path_and_writing_it_does_not(monkeypatch):
    from gemmascope import ops

    model, calls = tiny_model("12B"), []
    original = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(1) or original(*args))
    n_layers = model.cfg.n_layers
    model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("pattern"))
    assert len(calls) == n_layers
    model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.3.attn.hook_pattern", lambda t, hook: t)])
    assert len(calls) == 2 * n_layers - 1  # that layer only


@pytest.mark.parametrize("site", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_z", "attn.hook_rot_k"])
def test_hook_on_heads_equals_the_same_edit_of_the_whole_tensor(site):
    model, name = tiny_model("26B-A4B"), f"blocks.1.{site}"
    n_heads = 2 if site.endswith("k") else 4

    def scale(tensor, factors):
        tensor *= torch.tensor(factors).view(-1, *([1] * (tensor.ndim - 1 - list(tensor.shape).index(len(factors), 1))))

    some = gs.OnHeads([1, 0], lambda t, hook: scale(t, [3.0, 2.0]))  # in place, in the order named
    edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, some)])
    whole = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda t, hook: scale(t, [2.0, 3.0, 1.0, 1.0][:n_heads]))])
    torch.testing.assert_close(edited, whole, rtol=1e-5, atol=1e-5)
    assert (edited - model(TOKENS)).abs().max() > 1e-4


def test_hook_on_heads_costs_those_heads_of_that_layer(monkeypatch):
    from gemmascope import ops

    model, seen = tiny_model("12B"), []
    original = ops.attention_scores
    monkeypatch.setattr(ops, "attention_scores", lambda q, k, mask: seen.append(q.shape[2]) or original(q, k, mask))
    halve = lambda t, hook: t / 2  # noqa: E731
    name = "blocks.3.attn.hook_pattern"
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, gs.OnHeads(2, halve)), (name, gs.OnHeads([0, 2], halve))])
    model.run_with_hooks(TOKENS, fwd_hooks=[(name, gs.OnHeads(2, halve)), (name, halve)])  # the second takes them all
    assert seen == [2, model.cfg.n_heads]
    with pytest.raises(ValueError, match="has no head 4; it has heads 0 to 3"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.3.attn.hook_z", gs.OnHeads(4, halve))])
    with pytest.raises(ValueError, match="hook_resid_mid has no heads"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.3.hook_resid_mid", gs.OnHeads(0, halve))])
    with pytest.raises(ValueError, match="different heads counted from 0"):
        gs.OnHeads([-1], halve)


def test_forced_experts_get_weights_from_the_probabilities():
    model, seen = tiny_model("26B-A4B"), {}

    def force(indices, hook):
        indices[...] = torch.tensor([5, 0, 2])

    def keep(tensor, hook):
        seen[hook.name.split(".")[-1]] = tensor.detach().clone()

    router = "blocks.4.moe.router."
    hooks = [(router + "hook_indices", force)] + [(router + name, keep) for name in ("hook_probs", "hook_weights")]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    chosen = seen["hook_probs"][..., [5, 0, 2]]
    expected = chosen / chosen.sum(-1, keepdim=True) * model.blocks[4].moe.router.per_expert_scale[[5, 0, 2]]
    torch.testing.assert_close(seen["hook_weights"], expected)


def test_router_writes_rederive_the_selection():
    model, seen = tiny_model("26B-A4B"), []
    router = "blocks.2.moe.router."

    def favour(logits, hook):
        logits[..., 6] = 100.0

    def look(indices, hook):
        seen.append(indices[..., 0].clone())

    hooks = [(router + "hook_logits", favour), (router + "hook_indices", look)]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert (seen[0] == 6).all()


@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
def test_gradient_of_every_site(architecture):
    model = tiny_model(architecture)
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: True, incl_bwd=True, return_type="loss")
    differentiable = [name for name in model.sites if not name.endswith("hook_indices")]
    for name in differentiable:
        grad = cache[name + "_grad"]
        assert grad.shape == cache[name].shape and grad.isfinite().all(), name
    live = [name for name in differentiable if cache[name + "_grad"].abs().max() > 0]
    assert live == differentiable


def test_backward_hook_changes_the_gradient():
    model = tiny_model("31B")
    seen = {}
    model.add_hook("blocks.2.hook_resid_post", lambda grad, hook: torch.zeros_like(grad), dir="bwd")
    model.add_hook("blocks.1.hook_resid_post", lambda grad, hook: seen.update(grad=grad.clone()), dir="bwd")
    model(TOKENS, return_type="loss").backward()
    assert seen["grad"].abs().max() == 0
    model.reset_hooks(direction="both")
    model.zero_grad()
    model(TOKENS, return_type="loss").backward()
    assert model.blocks[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_gradient_edited_in_place_equals_returned():
    """Autograd hands one gradient to both branches of the stream: an edit must stay in the branch it was made in."""
    model, grads = tiny_model("12B"), []

    def in_place(grad, hook):
        grad.zero_()

    for edit in (lambda grad, hook: torch.zeros_like(grad), in_place):
        with model.hooks(bwd_hooks=[("blocks.1.hook_attn_out", edit)]):
            model(TOKENS, return_type="loss").backward()
        grads.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        model.zero_grad()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert grads[0]["blocks.1.attn.o_proj.weight"].abs().max() == 0 < grads[0]["embed.weight"].abs().max()


def test_hooks_on_modules_act_whether_or_not_a_block_is_watched():
    """Plain torch hooks on a part of the model, as PEFT and others use them."""
    parts = ["blocks.1.mlp", "blocks.1.attn", "blocks.2.ln2_post", "blocks.3.moe", "blocks.3.moe.router", "ln_final"]
    model = tiny_model("26B-A4B")
    for part in parts:

        def edit(module, args, output):
            # Positions swapped: the norms that follow most parts would undo a change of scale.
            return (output[0].flip(-2), output[1]) if isinstance(output, tuple) else output.flip(-2)

        plain = model(TOKENS)
        handle = model.get_submodule(part).register_forward_hook(edit)
        changed, (watched, _) = model(TOKENS), model.run_with_cache(TOKENS)
        handle.remove()
        assert torch.equal(changed, watched), part
        assert (changed - plain).abs().max() > 1e-3, part
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(1))
    model.run_with_cache(TOKENS)
    model.generate(TOKENS, 2)
    assert len(seen) == 3


def test_module_in_the_place_of_a_point():
    """As SAE libraries do it: replace the point, then setup()."""
    from transformer_lens.hook_points import HookPoint

    class Flipped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_acts = HookPoint()

        def forward(self, x):
            return self.hook_acts(x.flip(1))

    model = tiny_model("12B")
    plain = model(TOKENS)
    for site, name in (("hook_resid_post", "hook_acts"), ("attn.hook_z", "hook_acts")):
        model = tiny_model("12B")
        owner = model.blocks[1] if "." not in site else model.blocks[1].attn
        setattr(owner, site.rpartition(".")[2], Flipped())
        model.setup()
        changed = model(TOKENS)
        assert (changed - plain).abs().max() > 1e-3
        _, cache = model.run_with_cache(TOKENS)
        assert f"blocks.1.{site}.{name}" in cache and f"blocks.1.{site}" not in cache
        zeroed = model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.1.{site}.{name}", lambda t, hook: t * 0)])
        assert not torch.equal(zeroed, changed)
        assert model(TOKENS, stop_at_layer=1).shape == (
            2,
            N_POS,
            48,
        )  # it lies past the stop, and is no hook of anyone's


def test_reader_before_a_writer_keeps_what_it_saw():
    model = tiny_model("12B")
    name = "blocks.2.hook_resid_mid"
    stored, readers, _ = model.get_caching_hooks(name)

    def in_place(tensor, hook):
        tensor.zero_()

    model.run_with_hooks(TOKENS, fwd_hooks=[*readers, (name, in_place)])
    assert stored[name].abs().max() > 0


def test_legacy_caching_hooks():
    model = tiny_model("12B")
    cache = model.add_caching_hooks()
    model(TOKENS)
    model.reset_hooks()
    assert "blocks.0.hook_resid_pre" in cache and "blocks.0.attn.hook_pattern" not in cache
    with pytest.raises(KeyError, match="nearest"):
        model.add_caching_hooks("blocks.0.attn.hook_patern")


def test_other_kinds_of_torch_hooks_are_refused():
    site = tiny_model("12B").blocks[0].attn.hook_v
    for register in (site.register_forward_pre_hook, site.register_full_backward_pre_hook, site.register_backward_hook):
        with pytest.raises(ValueError, match="takes add_hook"):
            register(lambda *args: None)
    with pytest.raises(ValueError, match="holds integers, which have no gradient"):
        tiny_model("26B-A4B").add_hook("blocks.0.moe.router.hook_indices", lambda g, hook: g, dir="bwd")


def test_edits_at_a_source_layer_reach_the_layers_that_share_it():
    model = tiny_model("E2B")
    source, reader = 3, 5  # both global
    assert model.layer(reader).kv_source == source
    name = f"blocks.{reader}.attn.hook_z"
    _, before = model.run_with_cache(TOKENS, names_filter=name)
    with model.hooks(fwd_hooks=[(f"blocks.{source}.attn.hook_v_normed", lambda t, hook: t.zero_())]):
        _, after = model.run_with_cache(TOKENS, names_filter=name)
    assert after[name].abs().max() == 0 < before[name].abs().max()


# What is refused, and how it is said


def test_unknown_name_gives_the_three_nearest():
    model = tiny_model("12B")
    with pytest.raises(KeyError, match="hook_resid_pot.*blocks.1.hook_resid_post") as error:
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_pot", lambda t, hook: t)])
    assert str(error.value).count("blocks.1.") == 4  # what came, and three
    with pytest.raises(KeyError, match="nearest"):
        model.run_with_cache(TOKENS, names_filter=["hook_embed", "blocks.1.attn.hook_zz"])
    with pytest.raises(KeyError, match="layers 0 to 5"):
        model.add_hook("blocks.6.hook_resid_pre", lambda t, hook: t)
    with pytest.raises(ValueError, match="matches no hook point"):
        model.add_hook(lambda name: "router" in name, lambda t, hook: t)


def test_kv_site_on_a_sharing_layer_names_the_source():
    model = tiny_model("E2B")
    with pytest.raises(KeyError, match="reads those of layer 3; use blocks.3.attn.hook_k"):
        model.add_hook("blocks.7.attn.hook_k", lambda t, hook: t)
    assert "blocks.7.attn.hook_q" in model.sites and "blocks.7.attn.hook_k" not in model.sites
    with pytest.raises(ValueError, match="model.blocks\\[3\\].attn"):
        _ = model.blocks[7].attn.W_K


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda t: t[..., :-1], "returned shape .*47.*this point carries .*48"),
        (lambda t: t.double(), "returned dtype torch.float64; this point carries torch.float32"),
        (lambda t: t.to("meta"), "returned device meta; this point carries cpu"),
    ],
)
def test_hook_that_returns_the_wrong_thing(answer, said):
    model = tiny_model("31B")
    plain = model(TOKENS)

    def my_edit(tensor, hook):
        return answer(tensor)

    with pytest.raises(ValueError, match="'my_edit' at blocks.1.hook_attn_out " + said):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", my_edit)])
    assert torch.equal(model(TOKENS), plain)  # nothing is left behind
    with pytest.raises(TypeError, match="returned a float"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", lambda t, hook: 1.0)])


def test_hook_past_the_stop_is_refused():
    model = tiny_model("12B")
    with pytest.raises(ValueError, match="blocks.4.hook_mlp_out would never run: stop_at_layer=3"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.4.hook_mlp_out", lambda t, hook: t)], stop_at_layer=3)
    _, cache = model.run_with_cache(TOKENS, stop_at_layer=3)  # reading what is there is fine
    assert ("resid_post", 2) in cache and ("resid_pre", 3) not in cache


def test_expert_out_of_range():
    model = tiny_model("26B-A4B")
    with pytest.raises(ValueError, match="experts 0 to 7"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.moe.router.hook_indices", lambda t, hook: t + 90)])


def test_hooks_leave_with_their_context():
    model = tiny_model("12B")
    plain = model(TOKENS)
    with pytest.raises(RuntimeError, match="stop"), model.hooks(fwd_hooks=[("hook_embed", lambda t, hook: t * 0)]):
        raise RuntimeError("stop")
    assert torch.equal(model(TOKENS), plain)
    model.add_perma_hook("hook_embed", lambda t, hook: t * 2)
    model.reset_hooks()
    assert not torch.equal(model(TOKENS), plain)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(TOKENS), plain)


def test_table_has_no_name_twice_and_a_meaning_for_each():
    assert len({site.name for site in SITES}) == len(SITES)
    assert all(site.meaning and site.axes for site in SITES)
    assert "blocks.3.moe.hook_expert_pre" in sites_of(tiny_config("26B-A4B"))
