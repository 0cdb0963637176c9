"""Directions do what adding them does, by hand; the sweep and the causal check say so."""

import random

import pandas
import pytest
import torch

import gemmascope as gs
from gemmascope.zoo.corpus import FACTS, gift

SITE = ("resid_post", 3)
NEUTRAL = [fact.sentence(n % 5) for n, fact in enumerate(FACTS[:10])]  # of different lengths


@pytest.fixture(scope="module")
def nano():
    return gs.load("nano-moe")


@pytest.fixture(scope="module")
def prompts():
    """Whose indirect object is Mary, John, and anyone."""
    rng = random.Random(0)
    gifts = [gift(rng) for _ in range(1200)]
    mary, john = ([g.prompt for g in gifts if g.io == name][:20] for name in ("Mary", "John"))
    return mary, john, [g.prompt for g in gifts if not {g.io, g.subject} & {"Mary", "John"}][:12]


@pytest.fixture(scope="module")
def direction(nano, prompts):
    return gs.contrast_direction(nano, *prompts[:2], SITE, normalise=True)


def test_a_contrast_is_the_difference_of_means(nano, prompts):
    ends = []
    for side in prompts[:2]:
        runs = [nano.run_with_cache(text, names_filter=nano.full_name(SITE))[1] for text in side]
        ends.append(torch.stack([cache[SITE][0, -1] for cache in runs]))
    difference = ends[0].mean(0) - ends[1].mean(0)
    plain = gs.contrast_direction(nano, *prompts[:2], SITE)
    torch.testing.assert_close(plain, difference, rtol=1e-3, atol=1e-5)
    scaled = gs.contrast_direction(nano, *prompts[:2], SITE, normalise=True)
    assert float(scaled.norm()) == pytest.approx(float(torch.cat(ends).norm(dim=-1).mean()), rel=1e-4)
    assert torch.cosine_similarity(plain, scaled, dim=0) == pytest.approx(1)
    with pytest.raises(ValueError, match="both sides have the same mean"):
        gs.contrast_direction(nano, prompts[0], prompts[0], SITE)


def test_steering_moves_the_metric_by_strength_and_little_else(nano, prompts, direction):
    metric = gs.logit_difference(nano, " Mary", " John")
    strengths = [-0.5, -0.25, 0, 0.25, 0.5]
    sweep = gs.steer_sweep(nano, prompts[2], direction, SITE, strengths, metric, neutral=NEUTRAL)
    effect, kl = sweep.effect, sweep.side_effects
    assert (effect.mean.diff() > 1).all() and effect.mean[-1] > 8 > -8 > effect.mean[0]
    torch.testing.assert_close(effect.values[2], effect.baselines["unsteered"])
    assert kl.mean[2] == 0 and (kl.values[[0, 1, 3, 4]] > 0).all()
    assert kl.mean[4] < 0.1 and kl.mean[3] < kl.mean[4]
    # Random directions of the same norm do less, and not in one direction.
    noise = torch.randn_like(direction)
    noise *= direction.norm() / noise.norm()
    other = gs.steer_sweep(nano, prompts[2], noise, SITE, [-0.5, 0.5], metric, neutral=NEUTRAL[:2]).effect
    assert (other.mean - effect.mean[2]).abs().max() < 3
    assert list(sweep.table["measure"].unique()) == ["logit difference", "KL (nats/token)"]
    assert len(sweep.plot().data) == 2


def test_the_sweep_agrees_with_plain_hooks_on_single_prompts(nano, prompts, direction):
    def add(tensor, hook):
        return tensor + 0.7 * direction

    hooks = [(nano.full_name(SITE), add)]
    metric = gs.log_prob(nano, " Mary")
    sweep = gs.steer_sweep(nano, prompts[2][:3], direction, SITE, [0.7], metric, neutral=NEUTRAL, batch_size=4)
    for number, text in enumerate(prompts[2][:3]):
        by_hand = metric(nano.run_with_hooks(text, fwd_hooks=hooks))
        torch.testing.assert_close(sweep.effect.values[0, number], by_hand[0].detach(), rtol=1e-4, atol=1e-4)
    for number, text in enumerate(NEUTRAL):
        before, after = (run.log_softmax(-1) for run in (nano(text), nano.run_with_hooks(text, fwd_hooks=hooks)))
        kl = (before.exp() * (before - after)).sum(-1).mean().detach()
        torch.testing.assert_close(sweep.side_effects.values[0, number], kl, rtol=1e-3, atol=1e-5)


def test_right_padded_ids_are_steered_and_measured_at_their_own_last_token(nano, prompts, direction):
    rows = [nano.to_tokens(text)[0] for text in prompts[2][:5]]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert (tokens[:, -1] == 0).any()
    settings = dict(site=SITE, direction=direction, metric=gs.log_prob(nano, " Mary"), n_random=1)
    texts = gs.causal_check(nano, prompts[2][:5], **settings)
    padded = gs.causal_check(nano, gs.Prompts(tokens, tokens != 0), **settings)
    torch.testing.assert_close(texts.values, padded.values, rtol=1e-3, atol=1e-3)


def test_a_used_direction_is_told_from_random_ones(nano, prompts, direction):
    mary, john = prompts[:2]
    answers, others = [" Mary"] * len(mary) + [" John"] * len(john), [" John"] * len(mary) + [" Mary"] * len(john)
    metric = gs.logit_difference(nano, answers, others)
    result = gs.causal_check(nano, mary + john, SITE, direction, metric, n_random=4)
    table, unedited = result.table.set_index(["edit", "direction"])["value"], result.baselines["unedited"].mean()
    assert unedited > 12
    assert table["project out", "given"] < 2
    assert all(table["project out", f"random {n}"] > unedited - 1 for n in range(4))
    assert result.axes == ["edit", "direction"] and len(result.cells) == 10
    # Added, it lifts Mary: up where she is the answer, down where she is not.
    added = result.values[5] - result.baselines["unedited"]
    assert added[: len(mary)].mean() > added[len(mary) :].mean() + 5


def test_any_function_of_all_logits_is_a_metric(nano, prompts, direction):
    def next_token_entropy(logits):
        p = logits[:, -1].log_softmax(-1)
        return -(p.exp() * p).sum(-1)

    result = gs.causal_check(nano, prompts[2], SITE, direction, next_token_entropy, n_random=1, batch_size=5)
    plain = next_token_entropy(nano(prompts[2])).detach()
    torch.testing.assert_close(result.baselines["unedited"], plain, rtol=1e-3, atol=1e-4)
    assert (result.values[2] - plain).abs().min() > 1e-4


def test_an_interrupted_sweep_keeps_what_it_has(nano, prompts, direction):
    calls = []

    def metric(logits):
        calls.append(1)
        if len(calls) == 4:  # unsteered, two strengths, and then
            raise KeyboardInterrupt
        return logits[:, -1, 5]

    sweep = gs.steer_sweep(nano, prompts[2], direction, SITE, [1, 2, 3, 4], metric, neutral=NEUTRAL)
    assert sweep.effect.done.tolist() == sweep.side_effects.done.tolist() == [True, True, False, False]
    assert not any(point.fwd_hooks for point in nano.hook_dict.values())
    assert isinstance(sweep.table, pandas.DataFrame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(direction=torch.ones(64)), "has 64 entries and blocks.3.hook_resid_post has 128"),
        (dict(direction=torch.zeros(128)), "zero or not finite"),
        (dict(direction=torch.full((128,), torch.nan)), "zero or not finite"),
        (dict(site=("pattern", 3)), "no positions"),
        (dict(site=("moe.hook_expert_post", 3)), "by slot"),
        (dict(metric=lambda logits: logits), "one figure a prompt"),
        (dict(positions=99), "no position 99"),
    ],
)
def test_what_cannot_be_steered_is_said(nano, prompts, direction, change, message):
    given = dict(prompts=prompts[2], site=SITE, direction=direction, metric=gs.logit(nano, " Mary")) | change
    with pytest.raises(ValueError, match=message):
        gs.steer_sweep(nano, **given, strengths=[1.0], neutral=NEUTRAL)
    with pytest.raises(ValueError, match=message):
        gs.causal_check(nano, **given)
