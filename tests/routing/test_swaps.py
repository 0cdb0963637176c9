"""Routing put in from another run, held, and chosen anew: against hooks by hand."""

from itertools import combinations

import pytest
import torch

import gemmascope as gs
from gemmascope.experiments.sweep import Baseline
from gemmascope.testing import tiny_model

TOKENS = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(3, 101, (2, 7), generator=torch.Generator().manual_seed(2))
SITES = {
    "choice": "moe.router.hook_indices",
    "weights": "moe.router.hook_weights",
    "router input": "moe.router.hook_in",
    "expert input": "moe_ln_pre.hook_normalized",
}
QUIET = dict(progress=False)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("26B-A4B")


def test_a_swap_is_a_patch_of_its_site(tiny):
    metric = gs.logit(tiny, 5)
    result = gs.swap_routing(tiny, OTHER, TOKENS, metric, layers=[1, 4], **QUIET)
    assert len(result.cells) == 8 and {"clean", "corrupted"} == set(result.baselines)
    _, cache = tiny.run_with_cache(OTHER)
    for cell, (part, layer) in enumerate(result.cells.values.tolist()):
        name = f"blocks.{layer}.{SITES[part]}"
        hooks = [(name, lambda x, hook: cache[hook.name])]
        expected = metric(tiny.run_with_hooks(TOKENS, fwd_hooks=hooks)).detach()
        torch.testing.assert_close(result.values[cell], expected, rtol=0, atol=2e-5)
    assert len(result.values.unique(dim=0)) == 8


def test_the_router_input_is_choice_and_weights_and_the_same_run_changes_nothing(tiny):
    metric = gs.logit(tiny, 5)
    whole = gs.swap_routing(tiny, OTHER, TOKENS, metric, ["router input"], by_layer=False, **QUIET)
    _, cache = tiny.run_with_cache(OTHER)
    frozen = metric(tiny(TOKENS, interventions=gs.freeze_routing(range(6), cache))).detach()
    torch.testing.assert_close(whole.values[0], frozen, rtol=0, atol=2e-5)
    same = gs.swap_routing(tiny, TOKENS, TOKENS, metric, layers=[2], **QUIET)
    torch.testing.assert_close(same.values, same.baselines["clean"].expand(4, -1), rtol=0, atol=2e-5)


def test_held_routing_is_that_of_the_run_as_it_was(tiny):
    metric = gs.logit(tiny, 5)
    _, cache = tiny.run_with_cache(TOKENS)
    changes = {"silent head": gs.zero(("z", 1), heads=2), "nothing": [], "router": gs.drop_expert(3, range(4))}
    result = gs.frozen_routing(tiny, TOKENS, metric, changes, **QUIET)
    rows = {tuple(cell): result.values[i] for i, cell in enumerate(result.cells.values.tolist())}
    free = metric(tiny(TOKENS, interventions=changes["silent head"])).detach()
    held = [changes["silent head"], gs.freeze_routing(range(6), cache)]
    torch.testing.assert_close(rows["silent head", "free"], free, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        rows["silent head", "held"], metric(tiny(TOKENS, interventions=held)).detach(), rtol=0, atol=2e-5
    )
    assert (rows["silent head", "free"] - rows["silent head", "held"]).abs().max() > 1e-4
    for cell in (("nothing", "free"), ("nothing", "held"), ("router", "held")):
        torch.testing.assert_close(rows[cell], result.baselines["clean"], rtol=0, atol=2e-5)
    assert (rows["router", "free"] - result.baselines["clean"]).abs().max() > 1e-4


def test_regret_is_the_best_of_all_sets_at_one_token(tiny):
    model = tiny_model("26B-A4B", experts_per_token=2, n_experts=4)
    sets = list(combinations(range(4), 2))
    result = gs.routing_regret(model, TOKENS, layers=[1, 5], n_sets=len(sets), batch_size=2, **QUIET)
    assert result.values.shape == (2, 12)

    def p(hooks=()):
        logits = model.run_with_hooks(TOKENS, fwd_hooks=list(hooks)).detach()[:, :-1]
        return logits.softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]

    full = p()
    torch.testing.assert_close(result.baselines["chosen"], full.flatten())
    for row, layer in enumerate([1, 5]):
        for pos in range(6):
            found = []
            for chosen in sets:

                def choose(indices, hook, chosen=chosen, pos=pos):
                    indices[:, pos] = torch.tensor(chosen)
                    return indices

                found.append(p([(f"blocks.{layer}.moe.router.hook_indices", choose)])[:, pos])
            expected = (torch.stack(found).amax(0) - full[:, pos]).clamp(min=0)
            torch.testing.assert_close(result.values[row].view(2, 6)[:, pos], expected, rtol=0, atol=1e-6)
    few = gs.routing_regret(model, TOKENS, layers=[1, 5], n_sets=2, batch_size=2, **QUIET)
    assert (few.values <= result.values + 1e-6).all() and (few.values < result.values - 1e-6).any()


def test_texts_of_other_lengths_have_the_regret_they_have_alone():
    nano = gs.load("nano-moe")
    texts = ["The capital of Norland is", "Tavi: nivi viti"]
    both = gs.routing_regret(nano, texts, layers=[4], n_sets=28, batch_size=2, **QUIET)
    alone = [gs.routing_regret(nano, text, layers=[4], n_sets=28, **QUIET) for text in texts]
    torch.testing.assert_close(both.values, torch.cat([one.values for one in alone], 1), rtol=0, atol=1e-5)


def interrupt(monkeypatch, method: str, number: int) -> None:
    """Ctrl-C in one call of a method of Baseline."""
    run, calls = getattr(Baseline, method), []

    def stop(self, *args):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(Baseline, method, stop)


@pytest.mark.parametrize("name", ["swap_routing", "frozen_routing"])
def test_an_interrupted_sweep_goes_on(name, tiny, capsys, monkeypatch):
    if name == "swap_routing":
        given = OTHER, TOKENS, gs.logit(tiny, 5), ["choice", "weights"], [1, 4]
    else:
        changes = {"head": gs.zero(("z", 1), heads=[2]), "early": gs.zero(("attn_out", 0))}
        given = TOKENS, gs.logit(tiny, 5), changes
    whole = getattr(gs, name)(tiny, *given, **QUIET)
    interrupt(monkeypatch, "values", 2)
    part = getattr(gs, name)(tiny, *given, **QUIET)
    assert "cells to go; pass this result as resume= to go on" in capsys.readouterr().out
    assert 0 < part.done.sum() < len(part.cells)
    rest = getattr(gs, name)(tiny, *given, resume=part, **QUIET)
    assert torch.equal(rest.values, whole.values) and torch.equal(part.values[part.done], whole.values[part.done])


def test_interrupted_regret_keeps_the_tokens_that_are_done(tiny, capsys, monkeypatch):
    whole = gs.routing_regret(tiny, TOKENS, layers=[1, 5], n_sets=2, **QUIET)
    interrupt(monkeypatch, "logits", 6)  # two layers a token: in the third token
    part = gs.routing_regret(tiny, TOKENS, layers=[1, 5], n_sets=2, **QUIET)
    assert "Interrupted: 2 of 12 tokens are done, and kept." in capsys.readouterr().out
    assert torch.equal(part.values, whole.values[:, :2])
    assert torch.equal(part.baselines["chosen"], whole.baselines["chosen"][:2])
    interrupt(monkeypatch, "logits", 1)
    with pytest.raises(KeyboardInterrupt, match="nothing to keep"):
        gs.routing_regret(tiny, TOKENS, layers=[1, 5], n_sets=2, **QUIET)


def test_bad_input_is_refused(tiny):
    metric, dense = gs.logit(tiny, 5), tiny_model("E2B")
    with pytest.raises(ValueError, match="tiny E2B is dense"):
        gs.swap_routing(dense, TOKENS, OTHER, metric)
    with pytest.raises(ValueError, match="tiny E2B is dense"):
        gs.frozen_routing(dense, TOKENS, metric, {})
    with pytest.raises(ValueError, match="Clean prompt 0 has 7 tokens and its corrupted version 6"):
        gs.swap_routing(tiny, TOKENS, OTHER[:, :6], metric)
    with pytest.raises(ValueError, match="parts names 'gate'; there are choice, weights"):
        gs.swap_routing(tiny, TOKENS, OTHER, metric, ["gate"])
    with pytest.raises(ValueError, match="n_sets is 0"):
        gs.routing_regret(tiny, TOKENS, n_sets=0)
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        gs.routing_regret(tiny, TOKENS, layers=[9])
