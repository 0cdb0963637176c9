"""Runs with patched edges, against the same patches made by hooks."""

import pytest
import torch

from gemmascope.experiments.edges import contributions, edge_patching, run_with_edges_patched, wiring
from gemmascope.testing import tiny_model

GENERATOR = torch.Generator().manual_seed(3)
CLEAN, CORRUPTED = (torch.randint(3, 101, (2, 11), generator=GENERATOR) for _ in range(2))
MASK = torch.ones(2, 11, dtype=torch.bool)
MASK[1, :3] = False
MODELS = [("E2B", False), ("26B-A4B", False), ("26B-A4B", True), ("31B", False)]


def logit_gap(logits):
    return logits[:, -1, 5] - logits[:, -1, 9]


@pytest.mark.parametrize(("architecture", "experts"), MODELS)
@torch.no_grad()
def test_no_edge_is_the_clean_run_and_all_edges_the_corrupted_one(architecture, experts):
    model = tiny_model(architecture)
    other = contributions(model, CORRUPTED, MASK, experts)
    clean, corrupted = (model(tokens, attention_mask=MASK)[MASK] for tokens in (CLEAN, CORRUPTED))
    edges = other.wiring.edges
    torch.testing.assert_close(other.logits[MASK], corrupted, rtol=1e-4, atol=1e-4)
    for cut, expected in (
        ([], clean),
        ([edge for edge in edges if edge[1] == "logits"], corrupted),
        (edges, corrupted),
    ):
        patched = run_with_edges_patched(model, CLEAN, other, cut, MASK)
        torch.testing.assert_close(patched[MASK], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "experts"), MODELS)
@torch.no_grad()
def test_all_edges_of_a_sender_are_its_contribution_patched_in_the_stream(architecture, experts):
    model = tiny_model(architecture).double()
    other = contributions(model, CORRUPTED, experts=experts)
    moe = bool(model.cfg.n_experts)
    (_, clean_run), (_, corrupted_run) = (model.run_with_cache(tokens) for tokens in (CLEAN, CORRUPTED))

    def terms(cache, layer):
        """By node, what it added to the stream, from the cache's own decomposition."""
        found = dict(zip(*reversed(cache.decompose(layer, mlp_input=True, heads=True)), strict=True))
        later = cache._written_by(layer, heads=True, experts=moe)
        found |= dict(zip(*reversed(later), strict=True))
        if not moe:
            return {name.replace(f"{layer}_mlp_out", f"L{layer}.mlp"): x for name, x in found.items()}
        found[f"L{layer}.mlp"] = found[f"{layer}_dense"]
        slots = torch.stack([found[f"{layer}_slot{slot}"] for slot in range(model.cfg.experts_per_token)], dim=2)
        found[f"L{layer}.experts"] = slots.sum(2)
        for expert in range(model.cfg.n_experts):
            chosen = cache["moe.router.hook_indices", layer] == expert
            found[f"L{layer}E{expert}"] = (slots * chosen[..., None]).sum(2)
        return found

    layer = 3
    clean_terms, corrupted_terms = terms(clean_run, layer), terms(corrupted_run, layer)
    sites = {f"L{layer}H2": "attn", f"L{layer}.mlp": "mlp"}
    sites |= {f"L{layer}E1": "mlp"} if experts else {f"L{layer}.experts": "mlp"} if moe else {}
    for sender, out in sites.items():
        change = corrupted_terms[sender] - clean_terms[sender]
        hook = (f"blocks.{layer}.hook_{out}_out", lambda x, hook, change=change: x + change)
        cut = [edge for edge in other.wiring.edges if edge[0] == sender]
        torch.testing.assert_close(
            run_with_edges_patched(model, CLEAN, other, cut), model.run_with_hooks(CLEAN, fwd_hooks=[hook])
        )
    hooks = [("hook_embed", lambda x, hook: corrupted_run["hook_embed"])]
    if model.cfg.d_ple:
        hooks.append(("hook_ple_inputs", lambda x, hook: clean_run["hook_ple_inputs"]))
    cut = [edge for edge in other.wiring.edges if edge[0] == "embed"]
    torch.testing.assert_close(
        run_with_edges_patched(model, CLEAN, other, cut), model.run_with_hooks(CLEAN, fwd_hooks=hooks)
    )


@pytest.mark.parametrize(("architecture", "experts"), MODELS)
@torch.no_grad()
def test_all_edges_into_a_reader_give_it_the_corrupted_input(architecture, experts):
    model = tiny_model(architecture).double()
    other = contributions(model, CORRUPTED, experts=experts)
    _, cache = model.run_with_cache(CORRUPTED)
    readers = {}
    layer = 2  # global where keys and values are one projection
    for what, site in (("L2H3.q", "attn.hook_q"), ("L2KV0.k", "attn.hook_k"), ("L2KV0.v", "attn.hook_v")):
        readers[what,] = (site, ..., int(what[what.index(".") - 1]), slice(None))
    readers["L2.mlp",] = ("mlp.hook_out", ...)
    if model.cfg.n_experts:
        readers["L2.router",] = ("moe.router.hook_logits", ...)
        branch = tuple(f"L2E{e}" for e in range(model.cfg.n_experts)) if experts else ("L2.experts",)
        readers[branch] = ("moe_ln_pre.hook_normalized", ...)
    if model.cfg.d_ple:
        readers["L2.ple",] = ("ple.hook_gate", ...)
        readers["L2.signal",] = ("hook_ple_inputs", ..., layer, slice(None))
    for names, (site, *index) in readers.items():
        name = site if site in model.sites else f"blocks.{layer}.{site}"

        def put(x, hook, name=name, index=tuple(index)):
            x[index] = cache[name][index]

        cut = [edge for edge in other.wiring.edges if edge[1] in names]
        patched = run_with_edges_patched(model, CLEAN, other, cut)
        torch.testing.assert_close(patched, model.run_with_hooks(CLEAN, fwd_hooks=[(name, put)]))
        assert (patched - model(CLEAN)).abs().max() > 1e-6, names  # the patch did something


@torch.no_grad()
def test_one_edge_changes_one_reader_only():
    model = tiny_model("26B-A4B").double()
    other, clean = contributions(model, CORRUPTED), contributions(model, CLEAN)
    change = sum((other.written[1, "attn"] - clean.written[1, "attn"])[:, 2:3].unbind(1))
    scale = model.blocks[1].layer_scalar * model.blocks[2].layer_scalar
    block, (_, cache) = model.blocks[3], model.run_with_cache(CLEAN)
    input = block.ln2(cache["resid_mid", 3] + change * scale)

    def put(x, hook):
        return block.mlp(input)

    torch.testing.assert_close(
        run_with_edges_patched(model, CLEAN, other, [("L1H2", "L3.mlp")]),
        model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.3.mlp.hook_out", put)]),
    )


@torch.no_grad()
def test_a_bfloat16_model_stays_as_near_as_its_rounding():
    for architecture in ("E2B", "26B-A4B"):
        exact, model = tiny_model(architecture), tiny_model(architecture).bfloat16()
        other = contributions(model, CORRUPTED)
        patched = run_with_edges_patched(
            model, CLEAN, other, [edge for edge in other.wiring.edges if edge[1] == "logits"]
        )
        assert patched.dtype == torch.bfloat16
        rounding = (model(CORRUPTED).float() - exact(CORRUPTED)).abs().mean()
        assert (patched.float() - model(CORRUPTED).float()).abs().mean() < 2 * rounding


@torch.no_grad()
def test_each_prompt_may_have_its_own_edges():
    model = tiny_model("26B-A4B").double()
    other = contributions(model, CORRUPTED)
    sets = [{("embed", "L1H0.q"), ("L0H1", "logits")}, {("L2.experts", "L3.router")}]
    together = run_with_edges_patched(model, CLEAN, other, sets)
    for row, edges in enumerate(sets):
        torch.testing.assert_close(together[row], run_with_edges_patched(model, CLEAN, other, edges)[row])


def test_edge_patching_is_every_edge_alone():
    model = tiny_model("E2B").double()
    edges = wiring(model).edges[::97]
    result = edge_patching(model, CLEAN, CORRUPTED, logit_gap, edges, attention_mask=MASK, cells_per_forward=5)
    assert list(zip(result.cells.sender, result.cells.receiver, strict=True)) == edges
    with torch.no_grad():
        other = contributions(model, CORRUPTED, MASK)
        one = [logit_gap(run_with_edges_patched(model, CLEAN, other, [edge], MASK)) for edge in edges]
    torch.testing.assert_close(result.values.double(), torch.stack(one), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.baselines["corrupted"].double(), logit_gap(other.logits), rtol=1e-5, atol=1e-6)


def test_kv_readers_belong_to_the_source_layer_and_reach_every_layer_that_shares():
    wires = wiring(tiny_model("E2B"))  # 8 layers, the last 4 read the keys and values of layers 2 and 3
    assert "L6KV0.k" not in wires.readers and "L6H0.q" in wires.readers
    assert wires.owners["L2KV0.v"] == tuple(f"L{l}H{h}" for l in (2, 4, 6) for h in range(4))
    assert ("L3.ple", "L4H0.q") in wires.edges and ("signal", "L3.signal") in wires.edges
    assert not any(sender == "signal" and not reader.endswith(".signal") for sender, reader in wires.edges)


def test_bad_edges_are_refused():
    model = tiny_model("26B-A4B")
    other = contributions(model, CORRUPTED)
    with pytest.raises(ValueError, match="no sender 'L1H9'; the nearest are L1H"):
        run_with_edges_patched(model, CLEAN, other, [("L1H9", "logits")])
    with pytest.raises(ValueError, match=r"no reader 'L1\.routr'; the nearest are L1\.router"):
        run_with_edges_patched(model, CLEAN, other, [("embed", "L1.routr")])
    with pytest.raises(ValueError, match=r"no edge from L3H0 to L2\.mlp"):
        run_with_edges_patched(model, CLEAN, other, [("L3H0", "L2.mlp")])
    with pytest.raises(ValueError, match="2 prompts of 11 tokens and this one has 2 of 10"):
        run_with_edges_patched(model, CLEAN[:, 1:], other, [])
    with pytest.raises(ValueError, match="3 sets of edges for 2 prompts"):
        run_with_edges_patched(model, CLEAN, other, [set(), set(), set()])
    with model.hooks(fwd_hooks=[("blocks.1.mlp.hook_out", lambda x, hook: x * 0)]):
        with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.hook_out has a hook"):
            run_with_edges_patched(model, CLEAN, other, [])
    with pytest.raises(ValueError, match="Clean prompt 0 has 11 tokens and its corrupted version 10"):
        edge_patching(model, CLEAN, CORRUPTED[:, 1:], logit_gap)
    with pytest.raises(ValueError, match="2 clean prompts and 1 corrupted"):
        edge_patching(model, CLEAN, CORRUPTED[:1], logit_gap)
