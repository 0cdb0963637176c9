"""Direct logit attribution adds up to the logits, whatever it is by, on every kind of model."""

import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model

PROMPT = "When Mary and John went to the store, John gave a book to"
TOKENS = torch.randint(3, 101, (3, 17), generator=torch.Generator().manual_seed(4))
CORRECT, WRONG = [7, 50, 99], [8, 9, 9]


def close(found, expected, rel=1e-9):
    torch.testing.assert_close(found, expected, rtol=rel, atol=rel * float(expected.abs().max()))


@pytest.fixture(scope="module", params=["26B-A4B", "31B", "E2B"])
def model(request):
    return tiny_model(request.param).double()


def by(model, what, **kwargs):
    return gs.direct_logit_attribution(model, TOKENS, CORRECT, WRONG, by=what, **kwargs)


def sums(result, axes):
    """The values, summed over all axes but these: [group, sample]."""
    groups = result.cells.groupby(axes, sort=True).indices
    return torch.stack([result.values[torch.from_numpy(rows)].sum(0) for rows in groups.values()])


def component(model, kind):
    found = by(model, "component")
    return found.values[torch.tensor((found.cells["component"] == kind).to_numpy())]


@pytest.mark.parametrize("pos", [-1, 9])
def test_components_sum_to_the_logit_difference(model, pos):
    _, cache = model.run_with_cache(TOKENS, names_filter="hook_unembed")
    logits = cache["hook_unembed"][:, pos]
    rows = torch.arange(3)
    found = by(model, "component", pos=pos)
    close(found.values.sum(0), logits[rows, CORRECT] - logits[rows, WRONG])
    close(found.baselines["logit difference"], logits[rows, CORRECT] - logits[rows, WRONG])
    one = gs.direct_logit_attribution(model, TOKENS, 5, pos=pos)
    close(one.values.sum(0), logits[:, 5])
    assert one.unit == "logit before the soft cap" and one.axes == ["layer", "component"]


def test_heads_sum_to_attention(model):
    close(sums(by(model, "head"), ["layer"]), component(model, "attn"))


def test_neurons_sum_to_the_feed_forward(model):
    every = by(model, "neuron", top=10**6)
    close(sums(every, ["layer"]), component(model, "mlp"))
    rest = by(model, "head").baselines["everything else"]
    close(rest, by(model, "component").values.sum(0) - component(model, "attn").sum(0))


@torch.no_grad()
def test_experts_and_their_neurons():
    model = tiny_model("26B-A4B").double()
    experts, neurons = by(model, "expert"), by(model, "neuron", top=10**6)
    close(sums(experts, ["layer"]), component(model, "mlp"))
    by_expert = {
        key: neurons.values[torch.from_numpy(rows)].sum(0)
        for key, rows in neurons.cells.groupby(["layer", "expert"], sort=False).indices.items()
    }
    assert len(by_expert) < len(experts.cells)  # experts that no prompt chose have no neurons listed
    for (layer, expert), value in zip(experts.cells.itertuples(index=False), experts.values, strict=True):
        close(by_expert.get((layer, expert), torch.zeros_like(value)) + 1, value + 1)
    _, cache = model.run_with_cache(TOKENS)
    values, labels = cache.logit_attribution(torch.tensor(CORRECT), torch.tensor(WRONG), experts=True)
    table = experts.cells.assign(row=range(len(experts.cells))).set_index(["layer", "expert"])["row"]
    for prompt in range(3):
        for slot in range(3):
            expert = int(cache.routing.indices[2, prompt, -1, slot])
            term = values[labels.index(f"2_slot{slot}"), prompt]
            close(experts.values[table[2, expert], prompt], term)
        close(experts.values[table[4, "dense"], prompt], values[labels.index("4_dense"), prompt])


@torch.no_grad()
def test_sources_sum_to_heads_and_are_the_kernels_split_of_z(model):
    found = by(model, "source", pos=9)
    close(sums(found, ["layer", "head"]), by(model, "head", pos=9).values)
    shares = found.values.view(model.cfg.n_layers, 4, 17, 3)
    assert not shares[:, :, 10:].any()  # the future
    assert not shares[0, :, :3].any() and shares[0, :, 3:10].all()  # a window of 7
    _, cache = model.run_with_cache(TOKENS)
    unembed = model.W_U.T
    direction = (unembed[CORRECT] - unembed[WRONG]) * cache._frozen("ln_final", model.ln_final)[:, 9]
    for layer in (1, model.cfg.n_layers - 1):
        parts = cache.attention_by_source(layer, torch.arange(17), 17)[:, 9]
        post = cache._frozen(f"blocks.{layer}.ln1_post", model.blocks[layer].ln1_post)[:, 9]
        results = torch.einsum("bhse,hed->bhsd", parts, model.blocks[layer].attn.W_O)
        expected = (
            torch.einsum("bhsd,bd->hsb", results, direction * post) * cache._later_scalars(model.cfg.n_layers)[layer]
        )
        close(shares[layer], expected)


@pytest.mark.parametrize("what", ["component", "head", "neuron", "source"])
def test_a_cache_gives_what_its_prompt_gives(model, what):
    _, cache = model.run_with_cache(TOKENS)
    expected = by(model, what, pos=11)
    found = gs.direct_logit_attribution(model, cache, CORRECT, WRONG, by=what, pos=11)
    assert found.cells.equals(expected.cells)
    close(found.values, expected.values)
    _, single = model.run_with_cache(TOKENS[1], remove_batch_dim=True)
    found = gs.direct_logit_attribution(model, single, CORRECT[1], WRONG[1], by=what, pos=11, top=10**6)
    alone = gs.direct_logit_attribution(model, TOKENS[1], CORRECT[1], WRONG[1], by=what, pos=11, top=10**6)
    close(found.values, alone.values)


@pytest.mark.parametrize("name", ["nano-moe", "nano-edge"])
def test_shipped_models_in_float32(name):
    model = gs.load(name)
    texts = [PROMPT, "Yesterday Anna and Tom drove to the farm. Later Tom sold a lamp to"]  # of different lengths
    correct, wrong = [" Mary", " Anna"], [" John", " Tom"]
    whats = ["component", "head", "neuron"] + (["expert"] if model.cfg.n_experts else [])
    found = {what: gs.direct_logit_attribution(model, texts, correct, wrong, by=what, top=10**6) for what in whats}
    for number, (text, right, other) in enumerate(zip(texts, correct, wrong, strict=True)):
        _, cache = model.run_with_cache(text, names_filter="hook_unembed")
        logits = cache["hook_unembed"][0, -1]
        total = logits[model.to_single_token(right)] - logits[model.to_single_token(other)]
        assert total > 0
        torch.testing.assert_close(found["component"].values[:, number].sum(), total, rtol=1e-4, atol=0)
        torch.testing.assert_close(found["component"].baselines["logit difference"][number], total, rtol=1e-4, atol=0)
    parts = found["component"]
    for what, kind in (("head", "attn"), ("neuron", "mlp"), ("expert", "mlp")):
        if what in found:
            expected = parts.values[torch.tensor((parts.cells["component"] == kind).to_numpy())]
            close(sums(found[what], ["layer"]), expected, rel=1e-4)
    source = gs.direct_logit_attribution(model, PROMPT, " Mary", " John", by="source")
    heads = gs.direct_logit_attribution(model, PROMPT, " Mary", " John", by="head")
    close(sums(source, ["layer", "head"]), heads.values, rel=1e-4)
    assert source.about["tokens"][-1] == " to" and len(source.plot().data) == model.cfg.n_layers


def test_bfloat16_adds_up_to_its_own_precision():
    model = tiny_model("26B-A4B").bfloat16()
    for what in ("component", "head", "expert", "neuron", "source"):
        found = by(model, what)
        assert found.values.dtype == torch.float32 and found.values.isfinite().all()
    close(sums(by(model, "head"), ["layer"]), component(model, "attn"), rel=0.03)
    close(sums(by(model, "neuron", top=10**6), ["layer"]), component(model, "mlp"), rel=0.03)


def test_top_keeps_the_largest_means(model):
    every = by(model, "neuron", top=10**6)
    found = by(model, "neuron")
    assert len(found.cells) == 100
    sizes = every.mean.abs()
    torch.testing.assert_close(found.mean.abs().sort().values, sizes.sort().values[-100:])
    close(found.values.sum(0) + found.baselines["everything else"], found.baselines["logit difference"])


@torch.no_grad()
def test_what_a_hook_adds_is_everything_else():
    model = tiny_model("E2B").double()
    push = torch.randn(48, dtype=torch.float64)
    with model.hooks(fwd_hooks=[("blocks.7.hook_resid_post", lambda t, hook: t + push)]):
        _, cache = model.run_with_cache(TOKENS)
    found = gs.direct_logit_attribution(model, cache, 5)
    gain = cache._frozen("ln_final", model.ln_final)[:, -1]
    close(found.baselines["everything else"], (push * gain * model.W_U[:, 5]).sum(-1))


@pytest.mark.parametrize("site", ["moe.hook_expert_out", "attn.hook_result", "attn.hook_pattern"])
def test_what_a_hook_changed_is_attributed_as_it_was_changed(site):
    model = tiny_model("26B-A4B").double()

    def halve_first(tensor, hook):
        tensor.select(1 if "pattern" in site else 2, 0).mul_(0.5)  # the first head, or slot

    with model.hooks(fwd_hooks=[(f"blocks.1.{site}", halve_first)]):
        if "moe" in site:
            close(sums(by(model, "expert"), ["layer"]), component(model, "mlp"))
        else:
            close(sums(by(model, "head"), ["layer"]), component(model, "attn"))
        if "pattern" in site:
            close(sums(by(model, "source"), ["layer", "head"]), by(model, "head").values)


def test_refusals():
    model = tiny_model("26B-A4B")
    nano = gs.load("nano-edge")
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(ValueError, match=r"by is 'heads'; it is one of component, .* \('head'\?\)"):
        gs.direct_logit_attribution(model, TOKENS, 5, by="heads")
    with pytest.raises(ValueError, match="nano-edge has no experts: its neurons are by='neuron'"):
        gs.direct_logit_attribution(nano, PROMPT, " Mary", by="expert")
    with pytest.raises(ValueError, match="'Marylebone' is .* tokens, not one"):
        gs.direct_logit_attribution(nano, PROMPT, "Marylebone")
    for prompt in (TOKENS, cache):
        with pytest.raises(ValueError, match="Position 17 is out of range: the .* has 17 "):
            gs.direct_logit_attribution(model, prompt, 5, pos=17)
    with pytest.raises(ValueError, match="There are 2 answers for 3 prompts"):
        gs.direct_logit_attribution(model, TOKENS, [5, 6])
    with pytest.raises(ValueError, match="Token id 101 is out of range"):
        gs.direct_logit_attribution(model, TOKENS, 5, torch.tensor([1, 2, 101]))
    with pytest.raises(ValueError, match="top is 0: it is a number of cells"):
        gs.direct_logit_attribution(model, TOKENS, 5, top=0)
    with pytest.raises(ValueError, match="This cache is of another model, tiny 26B-A4B"):
        gs.direct_logit_attribution(nano, cache, 5)
    with pytest.raises(ValueError, match="different lengths, so a source position"):
        gs.direct_logit_attribution(nano, [PROMPT, "Mary gave"], " Mary", by="source")
    with pytest.raises(ValueError, match="Position 3 is not in all prompts"):
        gs.direct_logit_attribution(nano, [PROMPT, "Mary gave"], " Mary", pos=3)
    _, part = model.run_with_cache(TOKENS, names_filter=["ln_final.hook_scale"])
    with pytest.raises(KeyError, match="was not cached"):
        gs.direct_logit_attribution(model, part, 5)
    with model.hooks(fwd_hooks=[("blocks.1.moe.hook_expert_out", lambda t, hook: t * 2)]):
        _, changed = model.run_with_cache(TOKENS, names_filter=lambda name: "expert_out" not in name)
    with pytest.raises(KeyError, match="blocks.1.moe.hook_expert_out had a hook"):
        gs.direct_logit_attribution(model, changed, 5, by="expert")
    with pytest.raises(ValueError, match="A hook may have changed blocks.1.moe.hook_expert_out, so expert neurons"):
        gs.direct_logit_attribution(model, changed, 5, by="neuron")
