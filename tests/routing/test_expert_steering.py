"""Experts found by contrast, and steered with: against counting by hand, and with a planted expert."""

import math
import random

import pytest
import torch

import gemmascope as gs
from gemmascope.experiments.sweep import Baseline
from gemmascope.routing.steering import npmi, permutation_test
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import FACTS, LANGUAGES, Corpus

TOKENS = torch.randint(3, 101, (4, 7), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(2))
INDICES = "moe.router.hook_indices"


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("26B-A4B")


@pytest.fixture(scope="module")
def nano():
    return gs.load("nano-moe")


def test_the_risk_difference_is_a_difference_of_counts(tiny):
    result = gs.risk_difference(tiny, TOKENS, OTHER, layers=[2], positions=None)
    caches = [tiny.run_with_cache(tokens)[1][INDICES, 2].flatten(0, 1).tolist() for tokens in (TOKENS, OTHER)]
    for expert in range(8):
        share = [sum(expert in chosen for chosen in tokens) / len(tokens) for tokens in caches]
        assert result.values[expert, 0] == pytest.approx(share[0] - share[1], abs=1e-6)
    last = gs.risk_difference(tiny, TOKENS, OTHER, layers=[2], positions=-1)
    assert last.about["settings"]["tokens"] == [4, 3]


def test_the_expert_of_a_language_is_found_and_steered(nano):
    rng, corpus = random.Random(5), Corpus(nano.tokenizer.backend)
    tavi, rest = (
        [nano.tokenizer.decode(corpus.document(rng, name).ids[1:]) for name in names for _ in range(4)]
        for names in (["tavi"], [name for name in LANGUAGES if name != "tavi"])
    )
    found = gs.risk_difference(nano, tavi, rest, layers=[3])
    assert found.values.argmax() == 4 and found.values.max() > 0.9

    def share(texts, hooks):
        with nano.hooks(fwd_hooks=hooks):
            _, cache = nano.run_with_cache(texts, names_filter=f"blocks.3.{INDICES}")
        return (cache[INDICES, 3] == 4).any(-1).float().mean().item()

    assert share(tavi[0], gs.steering_hooks(nano, suppress=[(3, 4)])) == 0
    assert share(rest[0], gs.steering_hooks(nano, promote=[(3, 4)])) == 1


def test_promoted_and_suppressed_scores(tiny):
    hooks = gs.steering_hooks(tiny, promote=[(2, 6)], suppress=[(-4, 1), (3, 0)], eps=0.5)
    _, before = tiny.run_with_cache(TOKENS)
    with tiny.hooks(fwd_hooks=hooks):
        _, after = tiny.run_with_cache(TOKENS)
    scores = before["moe.router.hook_logits", 2].log_softmax(-1)
    expected = scores.clone()
    expected[..., 6], expected[..., 1] = scores.amax(-1) + 0.5, scores.amin(-1) - 0.5
    torch.testing.assert_close(after["moe.router.hook_logits", 2], expected)
    assert (after[INDICES, 2][..., 0] == 6).all() and not (after[INDICES, 3] == 0).any()


def test_reweighting_is_relative(tiny):
    _, cache = tiny.run_with_cache(TOKENS)
    weights, chosen = cache["moe.router.hook_weights", 2], cache[INDICES, 2]
    expert = int(chosen.flatten().mode().values)
    _, now = tiny.run_with_cache(TOKENS, interventions=gs.reweight_experts(tiny, [(2, expert)], 3.0))
    factor = torch.where(chosen == expert, 3.0, 1.0)
    torch.testing.assert_close(now["moe.router.hook_weights", 2], weights * factor)
    everyone = gs.reweight_experts(tiny, [(2, e) for e in range(8)], 3.0)
    torch.testing.assert_close(tiny(TOKENS, interventions=everyone), tiny(TOKENS), rtol=0, atol=1e-4)


def test_npmi_by_counting(tiny):
    result = gs.expert_npmi(tiny, TOKENS, [int(TOKENS[0, 0]), int(TOKENS[1, 3])], layers=[1])
    chosen = tiny.run_with_cache(TOKENS)[1][INDICES, 1].flatten(0, 1).tolist()
    read = TOKENS.flatten().tolist()
    for sample, token in enumerate((read[0], read[10])):
        for expert in range(8):
            both = sum(x == token and expert in e for x, e in zip(read, chosen, strict=True)) / 28
            p_x, p_e = read.count(token) / 28, sum(expert in e for e in chosen) / 28
            expected = math.log2(both / (p_x * p_e)) / -math.log2(both) if both else -1
            assert result.values[expert, sample] == pytest.approx(expected, abs=1e-6)
    p = torch.tensor([0.25, 0.0, 1.0, 0.25])
    torch.testing.assert_close(
        npmi(p, torch.tensor([0.25, 0.5, 1, 0.5]), torch.tensor([0.25, 0.5, 1, 0.5])), torch.tensor([1.0, -1, 1, 0])
    )


def test_the_permutation_test_keeps_its_level_and_finds_what_is_there():
    group = torch.arange(40) < 20
    false = 0
    for seed in range(40):
        x = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
        difference, p = permutation_test(x, group, draws=200, seed=seed)
        false += int((p <= 0.05).any())
    torch.testing.assert_close(difference, x[:20].mean(0) - x[20:].mean(0))
    assert false <= 6  # 2 are expected, 7 or more have a probability of 0.003
    x[:20, 7] += 2
    _, p = permutation_test(x, group, draws=200)
    assert p[7] == pytest.approx(1 / 201) and (p[torch.arange(30) != 7] > 0.05).all()


def test_a_planted_expert_of_success_is_found_and_checked(tiny):
    """Success is where a token is read that layer 2 sends to an expert."""
    tokens = torch.randint(3, 101, (60, 6), generator=torch.Generator().manual_seed(3))
    chosen = tiny.run_with_cache(tokens)[1][INDICES, 2][:, -1]
    success = (chosen == 5).any(-1)
    answers = tiny(tokens)[:, -1].argmax(-1)
    found = gs.localise(tiny, tokens, answers, success, layers=[2, 3], positions=-1, draws=500, progress=False)
    cell = found.contrast.cells.query("layer == 2 and expert == 5").index[0]
    assert found.contrast.values[cell, 0] == 1 and found.p.argmin() == cell and found.p[cell] < 0.01
    row = found.table.iloc[0]
    assert (row["layer"], row["expert"], row["role"]) == (2, 5, "found")
    roles = found.check.cells["role"].tolist()
    assert roles.count("random") == roles.count("found") >= 1
    own = tokens[success]
    change = gs.drop_expert(2, 5, reroute=False)
    logp = [tiny(own, interventions=by)[:, -1].log_softmax(-1) for by in ([change], [])]
    expected = (logp[0] - logp[1]).gather(-1, answers[success][:, None])[:, 0].detach()
    torch.testing.assert_close(found.check.values[0], expected, rtol=0, atol=2e-5)


def test_interrupted_check_keeps_what_was_found(tiny, capsys, monkeypatch):
    tokens = torch.randint(3, 101, (60, 6), generator=torch.Generator().manual_seed(3))
    success = (tiny.run_with_cache(tokens)[1][INDICES, 2][:, -1] == 5).any(-1)
    given = dict(success=success, layers=[2], positions=-1, draws=500, batch_size=4, progress=False)
    whole = gs.localise(tiny, tokens, 5, **given)
    run, seen = Baseline.values, []

    def stop(self, *args):
        seen.append(self)
        if len(set(map(id, seen))) == 3:  # in the third batch
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(Baseline, "values", stop)
    part = gs.localise(tiny, tokens, 5, **given)
    said = capsys.readouterr().out
    assert "to go; what was found stays." in said and said.count("Interrupted") == 1
    assert torch.equal(part.p, whole.p) and torch.equal(part.check.values, whole.check.values[:, :8])


def test_success_is_the_likeliest_token(nano):
    facts = FACTS[::5]
    prompts, answers = [fact.prompt(0) for fact in facts], [" " + fact.value for fact in facts]
    answers[:6] = [" " + fact.value for fact in facts[6:12]]
    found = gs.localise(nano, prompts, answers, draws=100, progress=False)
    right = [int(nano(p)[0, -1].argmax()) == nano.to_single_token(a) for p, a in zip(prompts, answers, strict=True)]
    assert found.contrast.about["settings"]["successes"] == sum(right) and 0 < sum(right) < len(right)
    assert found.check.values.shape[1] == sum(right)


def test_bad_input_is_refused(tiny):
    dense = tiny_model("12B")
    for ask in (
        lambda: gs.localise(dense, TOKENS, 5),
        lambda: gs.risk_difference(dense, TOKENS, OTHER),
        lambda: gs.steering_hooks(dense, promote=[(0, 0)]),
        lambda: gs.expert_npmi(dense, TOKENS, 5),
        lambda: gs.reweight_experts(dense, [(0, 0)], 2.0),
    ):
        with pytest.raises(ValueError, match="tiny 12B is dense and has no router"):
            ask()
    with pytest.raises(ValueError, match="Layer 6 does not exist"):
        gs.steering_hooks(tiny, promote=[(6, 0)])
    with pytest.raises(ValueError, match="Expert 8 does not exist"):
        gs.reweight_experts(tiny, [(0, 8)], 2.0)
    with pytest.raises(ValueError, match="Expert 1 of layer 2 is both promoted and suppressed"):
        gs.steering_hooks(tiny, promote=[(2, 1)], suppress=[(-4, 1)])
    with pytest.raises(ValueError, match="success has 2 entries for 4 prompts"):
        gs.localise(tiny, TOKENS, 5, [True, False])
    with pytest.raises(ValueError, match="Every one of the 4 prompts is a success"):
        gs.localise(tiny, TOKENS, 5, [True] * 4)
    missing = next(token for token in range(3, 101) if token not in TOKENS)
    with pytest.raises(ValueError, match=f"do not hold token {missing}"):
        gs.expert_npmi(tiny, TOKENS, missing)
