"""Path patching: against runs put together by hand, and on the circuit that nano-moe is known to have."""

import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model

CLEAN, CORRUPTED = torch.randint(3, 101, (2, 2, 9), generator=torch.Generator().manual_seed(1)).unbind()


@pytest.mark.parametrize("architecture", ["26B-A4B", "E2B"])
def test_a_head_tells_another_through_its_queries(architecture):
    """By hand: take the sender's change from the stream, project it to one head's queries, and put those into a run."""
    model = tiny_model(architecture)
    metric = gs.logit(model, 5)
    with torch.no_grad():
        result = gs.path_patching(model, CLEAN, CORRUPTED, metric, "L3H2.q", ["L1H0", "L2.mlp"])
        clean, other = (model.run_with_cache(tokens)[1] for tokens in (CLEAN, CORRUPTED))
        for row, sender in enumerate(["L1H0", "L2_mlp"]):
            terms, labels = zip(*(cache.decompose(3, heads=True) for cache in (clean, other)), strict=True)
            index = labels[0].index(sender if sender == "L1H0" else "2_mlp_out")
            if sender != "L1H0" and model.cfg.n_experts:  # the dense branch alone
                terms, labels = zip(*(cache.decompose(3, experts=True) for cache in (clean, other)), strict=True)
                index = labels[0].index("2_dense")
            x = clean["resid_pre", 3] - terms[0][index] + terms[1][index]
            block = model.blocks[3]
            q = torch.einsum("bpd,de->bpe", block.ln1(x), block.attn.W_Q[2])

            def put(whole, hook, q=q):
                whole[:, :, 2] = q

            expected = metric(model.run_with_hooks(CLEAN, fwd_hooks=[("blocks.3.attn.hook_q", put)]))
            torch.testing.assert_close(result.values[row], expected, rtol=0, atol=3e-5)


def test_what_senders_tell_the_logits_adds_up_with_frozen_norms():
    model = tiny_model("26B-A4B").double()
    metric = gs.logit(model, 5)
    together = gs.path_patching(model, CLEAN, CORRUPTED, metric, "logits", norms="frozen")
    live = gs.path_patching(model, CLEAN, CORRUPTED, metric, "logits")
    assert together.about["settings"]["norms"] == "frozen" and live.about["settings"]["norms"] == "live"
    # With the final scale frozen, what senders tell the logits directly is linear, but for the soft cap.
    effect = (together.values - together.baselines["clean"]).sum(0)
    clean, corrupted = (model.run_with_cache(tokens)[1] for tokens in (CLEAN, CORRUPTED))
    scale = clean["ln_final.hook_scale"]
    moved = (corrupted["resid_post", 5] - clean["resid_post", 5])[:, -1] / scale[:, -1] * model.ln_final.weight
    linear = moved @ model.W_U[:, 5]
    uncapped = clean["hook_unembed"][:, -1, 5]
    slope = 1 - (model.softcap(uncapped) / model.cfg.final_softcap) ** 2
    assert (effect - linear * slope).abs().max() < 0.1 * linear.abs().max()


def test_the_names_move_through_the_queries_of_later_heads():
    model = gs.load("nano-moe")
    clean = "When Mary and John went to the store, John gave a book to"
    corrupted = "When Mary and John went to the store, Mary gave a book to"
    metric = gs.logit_difference(model, " Mary", " John")
    result = gs.path_patching(model, clean, corrupted, metric, [f"L3H{head}.q" for head in range(4)])
    assert list(result.axes) == ["sender"] and "recovered" in result.table
    assert set(result.cells["sender"]) >= {"embed", "L0H0", "L2.mlp", "L2.experts"}
    assert not any(name.startswith(("L3", "L4", "L5")) for name in result.cells["sender"])


@pytest.mark.parametrize(
    "receivers, senders, said",
    [
        ("L3H9.q", None, "no reader 'L3H9.q'; the nearest are"),
        ("L3H2.q", ["L4H0"], "There is no edge from L4H0 to L3H2.q"),
        ("L3H2.q", ["L1X0"], "no sender 'L1X0'; the nearest are"),
    ],
)
def test_parts_that_are_not_there_are_said(receivers, senders, said):
    model = tiny_model("26B-A4B")
    with pytest.raises(ValueError, match=said):
        gs.path_patching(model, CLEAN, CORRUPTED, gs.logit(model, 5), receivers, senders)
    with pytest.raises(ValueError, match="norms is 'warm'"):
        gs.path_patching(model, CLEAN, CORRUPTED, gs.logit(model, 5), "logits", norms="warm")
