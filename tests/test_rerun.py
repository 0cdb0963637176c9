"""A default cache keeps the stream before each block: what it recomputes is what the run had, or it says no."""

import contextlib
import copy
import weakref

import pytest
import torch

from gemmascope.generate import KVCache
from gemmascope.rerun import Rerun
from gemmascope.testing import ARCHITECTURES, tiny_model

N_POS = 13
TOKENS = torch.randint(3, 101, (2, N_POS), generator=torch.Generator().manual_seed(4))
Z = "blocks.2.attn.hook_z"


def stored(model, **kwargs):
    """Every default site, stored because it is named."""
    return model.run_with_cache(TOKENS, names_filter=lambda name: not model.sites[name].expansion, **kwargs)


def equal(cache, other) -> None:
    assert set(cache.keys()) == set(other.keys()) and len(cache) == len(other)
    for name, tensor in other.items():
        assert torch.equal(cache[name], tensor), name


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "26B-A4B, one tensor for K and V"])
def test_every_site_is_that_of_the_run_bitwise(architecture, grad):
    model = tiny_model(architecture.split(",")[0])
    model.shared_kv = "one tensor" in architecture
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    blocks = torch.full_like(TOKENS, -1)
    blocks[0, 5:8] = 0
    given = dict(attention_mask=mask, image_blocks=blocks if model.cfg.bidirectional_images else None)
    with torch.set_grad_enabled(grad):
        plain = model(TOKENS, **given)
        logits, cache = model.run_with_cache(TOKENS, **given)
        _, named = stored(model, **given)
    model.shared_kv = False  # the run's own form is what counts
    assert torch.equal(logits, plain)
    assert set(cache.cache_dict.held) == {"hook_embed", "hook_ple_inputs"} & set(model.sites)  # nothing else was stored
    equal(cache, named)
    for name, site in model.sites.items():
        if site.expansion:
            assert name in cache and torch.equal(cache[name], named[name]), name
    assert not any(tensor.requires_grad for tensor in cache.values())


def test_bfloat16_is_bitwise_too():
    model = tiny_model("E2B").bfloat16()
    equal(model.run_with_cache(TOKENS)[1], stored(model)[1])


def test_a_block_runs_once_however_many_of_its_sites_are_read(monkeypatch):
    model, runs = tiny_model("E2B"), []
    again = Rerun._again
    monkeypatch.setattr(Rerun, "_again", lambda self, stage, wanted: runs.append(stage) or again(self, stage, wanted))
    _, cache = model.run_with_cache(TOKENS)
    n_layers = model.cfg.n_layers
    assert Z in cache and ("pattern", 2) in cache and len(cache) == len(list(cache)) and repr(cache) and runs == []
    for layer in range(n_layers):
        _ = cache["resid_pre", layer], cache["resid_post", layer]  # streams are kept
    assert runs == []
    dict(cache.items())
    assert runs == [*range(n_layers), n_layers]
    runs.clear()
    assert model.layer(6).kv_source is not None
    _ = cache["pattern", 6], cache["q", 6], cache.attention_entropy(6)
    assert runs == [6]  # keys that later layers read are kept
    runs.clear()
    assert cache.decompose(3, pos_slice=-1).terms.shape[0] == 1 + 3 * 3 and runs == [0, 1, 2]


def test_routing_runs_each_block_once(monkeypatch):
    model, runs = tiny_model("26B-A4B"), []
    again = Rerun._again
    monkeypatch.setattr(Rerun, "_again", lambda self, stage, wanted: runs.append(stage) or again(self, stage, wanted))
    trace = model.run_with_cache(TOKENS)[1].routing
    assert runs == list(range(6))
    assert torch.equal(trace.weights, stored(model)[1].routing.weights)


def test_only_the_block_last_looked_at_is_in_memory():
    model = tiny_model("12B")
    _, cache = model.run_with_cache(TOKENS)
    streams = (model.cfg.n_layers + 1) * cache["resid_pre", 0].nbytes
    rope = sum(x.nbytes for tables in cache.cache_dict.rerun.run.rope.values() for x in tables)
    assert cache.nbytes == streams + rope < stored(model)[1].nbytes / 5
    before, z = cache.nbytes, weakref.ref(cache["z", 0])
    assert cache.nbytes > before + z().nbytes
    _ = cache["z", 1]
    assert z() is None


# Hooks


def test_hooks_that_come_later_neither_fire_nor_matter():
    model, fired = tiny_model("26B-A4B"), []
    _, cache = model.run_with_cache(TOKENS)
    _, named = stored(model)
    model.add_hook(lambda name: True, lambda t, hook: fired.append(hook.name) or t * 2 if t.is_floating_point() else t)
    for module in model.modules():
        if type(module) in (torch.nn.Linear, type(model.blocks[0]), type(model.ln_final), type(model.unembed)):
            module.register_forward_hook(lambda module, args, output: fired.append(module) or output * 2)
    equal(cache, named)
    assert fired == []


@pytest.mark.parametrize(
    "where", ["site", "identity", "gradient", "module", "block", "inner norm", "forward", "compiled", "head"]
)
def test_what_hooks_touched_is_stored(where):
    model = tiny_model("26B-A4B")
    _, before = model.run_with_cache(TOKENS)

    def flip(module, args, output):
        return output.flip(1)

    handle = None
    if where == "site":
        model.add_hook(Z, lambda t, hook: t.flip(1))
    elif where == "identity":
        model.add_hook(Z, lambda t, hook: None)
    elif where == "gradient":
        model.add_hook(Z, lambda g, hook: None, dir="bwd")
    elif where in ("forward", "compiled"):  # torch leaves what it compiled in an attribute
        own, name = model.blocks[2].mlp.forward, "forward" if where == "forward" else "_compiled_call_impl"
        vars(model.blocks[2].mlp)[name] = lambda x, sites=False: own(x.flip(1), sites)
    else:
        parts = {"module": "blocks.2.mlp", "block": "blocks.2", "inner norm": "blocks.2.attn.q_norm", "head": "unembed"}
        handle = model.get_submodule(parts[where]).register_forward_hook(flip)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        _, named = stored(model)
    # Afterwards they are gone.
    model.reset_hooks()
    for name in ("forward", "_compiled_call_impl"):
        vars(model.blocks[2].mlp).pop(name, None)
    if handle is not None:
        handle.remove()
    equal(cache, named)
    touched = {name for name in cache.cache_dict.held if name.startswith(("blocks.", "hook_logits"))}
    prefix = "hook_logits" if where == "head" else "blocks.2."
    assert touched and all(name.startswith(prefix) for name in touched)
    same = torch.equal(cache["hook_unembed"], before["hook_unembed"])
    assert same == (where in ("identity", "gradient"))


def test_stream_edited_in_place_by_a_plain_hook_is_kept_as_the_earlier_block_gave_it():
    model = tiny_model("12B")
    _, before = model.run_with_cache(TOKENS)

    def double(module, args):
        args[0].mul_(2)

    handle = model.blocks[2].register_forward_pre_hook(double)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        handle.remove()
    assert torch.equal(cache["resid_post", 1], before["resid_post", 1])
    assert torch.equal(cache["z", 1], before["z", 1])
    assert torch.equal(cache["resid_pre", 2], before["resid_pre", 2] * 2)


def test_hooks_that_come_and_go_during_the_run():
    model = tiny_model("12B")
    model.add_hook("blocks.4.hook_attn_out", lambda t, hook: t * 0)

    def other_hooks(tensor, hook):
        model.blocks[4].hook_attn_out.remove_hooks("fwd")
        model.blocks[3].hook_mlp_out.add_hook(lambda t, hook: t.flip(1))

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", other_hooks)]):
        _, cache = model.run_with_cache(TOKENS)
    _, named = stored(model)  # block 3 still has its hook, block 4 no longer
    equal(cache, named)
    assert {name.split(".")[1] for name in cache.cache_dict.held if name.startswith("blocks")} == {"1", "3"}


def test_sae_in_the_place_of_a_point_is_stored_and_one_that_comes_later_is_refused():
    from transformer_lens.hook_points import HookPoint

    class Flipped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hook_acts = HookPoint()

        def forward(self, x):
            return self.hook_acts(x.flip(1))

    model = tiny_model("12B")
    _, early = model.run_with_cache(TOKENS)
    model.blocks[2].attn.hook_z = Flipped()
    model.setup()
    _, cache = model.run_with_cache(TOKENS)
    equal(cache, stored(model)[1])
    assert f"{Z}.hook_acts" in cache.cache_dict.held
    with pytest.raises(ValueError, match="module was replaced since the run, so that blocks.2.attn.hook_q"):
        early["q", 2]


# What is refused


def train(model):
    model(TOKENS, return_type="loss").backward()
    torch.optim.SGD(model.parameters(), 1e-9).step()


def there_and_back(model):
    model.double()
    model.float()


def new_parameter(model):
    model.blocks[2].mlp.down_proj.weight = torch.nn.Parameter(model.blocks[2].mlp.down_proj.weight.detach().clone())


EDITS = {
    "a step of training": (train, r"blocks.2.\S+ was edited or moved since the run"),
    "another dtype and back": (there_and_back, r"blocks.2.\S+ was edited or moved"),
    "another parameter": (new_parameter, "blocks.2.mlp.down_proj.weight was edited or moved"),
    "one row": (lambda m: m.blocks[2].attn.W_O[1].zero_(), "blocks.2.attn.o_proj.weight was edited or moved"),
    "the scalar": (lambda m: m.blocks[2].layer_scalar.mul_(1), "blocks.2.layer_scalar was edited or moved"),
    "through .data": (lambda m: m.blocks[2].mlp.W_out.data[:9].zero_(), "does not give again the stream"),
}


@pytest.mark.parametrize("what", EDITS)
def test_weights_that_changed_are_refused(what):
    edit, message = EDITS[what]
    model = tiny_model("E2B")
    _, cache = model.run_with_cache(TOKENS)
    stream = cache["resid_post", 2].clone()
    with contextlib.nullcontext() if edit is train else torch.no_grad():
        edit(model)
    with pytest.raises(ValueError, match=message):
        cache["z", 2]
    assert torch.equal(cache["resid_post", 2], stream)  # which was kept
    if edit not in (train, there_and_back):
        _ = cache["z", 1]


def test_weights_of_head_and_expansions_that_changed_are_refused():
    model = tiny_model("26B-A4B")
    _, cache = model.run_with_cache(TOKENS)
    used = ("hook_z", "hook_expert_post", "hook_indices", "hook_weights")
    _, named = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith(used))
    second = named.apply_slice_to_batch_dim(1)
    with torch.no_grad():
        model.embed.weight[3] += 1
        model.blocks[2].attn.o_proj.weight[0] += 1
        model.blocks[2].moe.down_proj[0] += 1
    for one in (named, second):
        with pytest.raises(ValueError, match="blocks.2.attn.o_proj.weight was edited .* blocks.2.attn.hook_result"):
            one["result", 2]
        with pytest.raises(ValueError, match="down_proj was edited"):
            one["moe.hook_expert_out", 2]
        _ = one["result", 1], one["moe.hook_expert_out", 1]
    with pytest.raises(ValueError, match="embed.weight was edited or moved since the run, so that hook_logits"):
        cache["hook_logits"]


def test_edits_of_what_the_cache_gave_are_refused():
    model = tiny_model("E2B")
    _, cache = model.run_with_cache(TOKENS)
    cache["resid_pre", 2].zero_()
    cache["rot_k", 3].zero_()
    with pytest.raises(ValueError, match="blocks.2.hook_resid_pre was edited"):
        cache["z", 2]
    with pytest.raises(ValueError, match="blocks.3.attn.hook_rot_k was edited"):
        cache["z", 5]
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, :4] = False
    expected = model.run_with_cache(TOKENS, attention_mask=mask)[1]["z", 2].clone()
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    mask[:] = True
    assert torch.equal(cache["z", 2], expected)


# Forms of a cache


def test_runs_that_end_early_hold_what_ran():
    model = tiny_model("26B-A4B")
    for given in (dict(stop_at_layer=3), dict(stop_at_layer=0), dict(return_type=None), dict(return_type="loss")):
        equal(model.run_with_cache(TOKENS, **given)[1], stored(model, **given)[1])


def test_views_of_it_are_views_of_what_is_recomputed():
    model = tiny_model("E2B")
    (_, cache), (_, named) = model.run_with_cache(TOKENS), stored(model)
    equal(cache.apply_slice_to_batch_dim(1), named.apply_slice_to_batch_dim(1))
    equal(
        cache.apply_slice_to_batch_dim([1, 0]).apply_slice_to_batch_dim(0).to("cpu"), named.apply_slice_to_batch_dim(1)
    )
    with pytest.raises(ValueError, match="there are 2"):
        cache.remove_batch_dim()
    one = cache.apply_slice_to_batch_dim(slice(1, 2)).remove_batch_dim()
    equal(one, named.apply_slice_to_batch_dim(1))
    assert torch.equal(one["pattern", 6], named["pattern", 6][1])
    with pytest.raises(ValueError, match="no batch axis"):
        one.apply_slice_to_batch_dim(0)
    cache.compute_head_results()
    assert torch.equal(cache.cache_dict["blocks.5.attn.hook_result"], named["result", 5])
    del cache.cache_dict[Z]
    assert Z not in cache and Z not in list(cache) and len(cache) == len(named) + model.cfg.n_layers - 1
    with pytest.raises(KeyError, match="was not cached"):
        cache["z", 2]


def test_kept_tensors_move():
    _, cache = tiny_model("E2B").run_with_cache(TOKENS)
    moved = copy.copy(cache).to("meta")
    assert {tensor.device.type for tensor in moved.cache_dict.rerun.streams.values()} == {"meta"}
    assert moved["resid_pre", 3].is_meta and moved["hook_embed"].is_meta and moved["rot_k", 3].is_meta
    assert cache["z", 3].device.type == "cpu"


def test_run_in_inference_mode_can_be_read_outside_it():
    model = tiny_model("26B-A4B")
    with torch.inference_mode():
        _, cache = model.run_with_cache(TOKENS)
    equal(cache, stored(model)[1])
    model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(Z, lambda t, hook: t * cache[Z])]).backward()
    with torch.inference_mode():
        _ = cache["z", 3]
    assert not cache["z", 3].is_inference()


def test_elsewhere_everything_is_stored():
    model = tiny_model("12B")
    n_sites = sum(not site.expansion for site in model.sites.values())
    assert len(model.run_with_cache(TOKENS, pos_slice=-1)[1].cache_dict.held) == n_sites
    assert len(model.run_with_cache(TOKENS, incl_bwd=True, return_type="loss")[1].cache_dict.held) > n_sites
    given = model.run_with_cache(TOKENS, return_cache_object=False)[1]
    assert type(given) is dict and len(given) == n_sites
    with torch.no_grad():
        cache = model.run_with_cache(TOKENS, past_kv_cache=KVCache(model.cfg))[1]
        assert len(cache.cache_dict.held) == n_sites
        cache = model.generate(TOKENS, 3, return_cache=True)[1]
    assert len(cache.cache_dict.held) == n_sites
