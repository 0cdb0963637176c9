"""Interchanges swap what they say, and DAS finds a planted subspace. A trained model's: `ground_truth/`."""

import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model

N_A, N_B = 5, 7  # values of two attributes; a token for each pair of them


def token(a, b):
    return 10 + N_B * a + b


@pytest.fixture(scope="module")
def built():
    """A model that says again the token it reads, whose embedding is one vector for its a plus one for its b.

    Attention and MLPs write nothing, so that logits count the attributes a token shares with the stream's. Returns it
    and an orthonormal basis of the differences between a-vectors: the only subspace that holds a and not b.
    """
    model = tiny_model("31B", n_layers=2, layer_kinds=("sliding", "global"))
    axes = torch.linalg.qr(torch.randn(48, N_A + N_B, generator=torch.Generator().manual_seed(1))).Q.T
    with torch.no_grad():
        model.embed.weight.zero_()
        for a in range(N_A):
            for b in range(N_B):
                model.embed.weight[token(a, b)] = axes[a] + axes[N_A + b]
        model.ln_final.weight.fill_(1)
        for block in model.blocks:
            block.ln1_post.weight.zero_()
            block.ln2_post.weight.zero_()
            block.layer_scalar.fill_(1)
    differences = axes[:N_A] - axes[:N_A].mean(0)
    return model, torch.linalg.svd(differences.T).U[:, : N_A - 1]


def pairs_of(n=160):
    """Base and source tokens after one that means nothing, and the base's token with the source's a."""
    a, b = torch.randint(N_A, (2, n)), torch.randint(N_B, (2, n))
    a[1] = (a[0] + torch.randint(1, N_A, (n,))) % N_A
    b[1] = (b[0] + torch.randint(1, N_B, (n,))) % N_B
    lead = torch.full((n,), 3)
    base, source = (torch.stack([lead, token(a[i], b[i])], dim=1) for i in (0, 1))
    return base, source, token(a[1], b[0])


def test_an_interchange_swaps_the_part_in_the_span(built):
    model, a_basis = built
    base, source, answers = pairs_of(50)
    site = ("resid_post", 0)
    assert torch.equal(gs.interchange(model, base, source, site, a_basis).argmax(-1), answers)
    assert torch.equal(gs.interchange(model, base, source, site, torch.eye(48)).argmax(-1), source[:, 1])
    nothing = gs.interchange(model, base, source, site, torch.zeros(48, 1))
    torch.testing.assert_close(nothing, model(base)[:, -1].detach())


def test_an_interchange_is_the_formula_at_its_own_positions():
    model, site = tiny_model("26B-A4B"), ("resid_post", 1)
    base, source = torch.randint(3, 101, (2, 9, 6))
    basis = torch.linalg.qr(torch.randn(48, 5)).Q
    here, there = torch.randint(6, (2, 9)).tolist()
    found = gs.interchange(model, base, source, site, basis, positions=here, source_positions=there, batch_size=4)
    for n in range(9):
        x = model.run_with_cache(source[n])[1][site][0, there[n]]

        def swap(tensor, hook, n=n, x=x):
            tensor[0, here[n]] += (x - tensor[0, here[n]]) @ basis @ basis.T

        by_hand = model.run_with_hooks(base[n], fwd_hooks=[(model.full_name(site), swap)])[0, -1]
        torch.testing.assert_close(found[n], by_hand.detach(), rtol=1e-4, atol=1e-4)


def test_the_planted_subspace_is_found(built):
    model, a_basis = built
    base, source, answers = pairs_of()
    found = gs.fit_das(model, base, source, answers, ("resid_post", 0), N_A - 1, steps=60, lr=0.1)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(N_A - 1), atol=1e-5, rtol=0)
    assert torch.linalg.svdvals(found.basis.T @ a_basis).min() > 0.95  # cosines of the principal angles
    learned, random_bases, shuffled = found.accuracy.mean.tolist()
    assert learned == 1 and random_bases < 0.05 and shuffled < 0.2
    assert found.accuracy.baselines["no swap"].mean() == 0 and found.accuracy.baselines["whole site"].mean() == 0
    assert len(found.losses) == 60 and found.losses[-1] < found.losses[0] / 2
    # The weights are as trainable as before, and have no gradients.
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_a_seed_gives_the_same_basis(built):
    model, _ = built
    settings = dict(site=("resid_post", 0), k=3, steps=3, control=False)
    once, again, other = (gs.fit_das(model, *PAIRS, **settings, seed=seed).basis for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.allclose(once, other)


PAIRS = pairs_of(40)


def test_interrupted_it_keeps_what_it_has_learned(built):
    model, _ = built
    calls = []

    def interrupt(tensor, hook):
        calls.append(1)
        if len(calls) == 8 and torch.is_grad_enabled():
            raise KeyboardInterrupt

    with model.hooks([("hook_embed", interrupt)]):
        found = gs.fit_das(model, *PAIRS, ("resid_post", 0), 4, steps=100)
    assert 0 < len(found.losses) < 8 and found.basis.shape == (48, 4)
    assert found.accuracy.done.tolist() == [True, True, False]
    assert found.accuracy.about["settings"]["steps"] == len(found.losses)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source=PAIRS[1][:-1]), "40 base prompts and 39 source prompts"),
        (dict(answers=PAIRS[2][:-1]), "39 answers for 40 pairs"),
        (dict(answers=7), "1 answers for 40 pairs"),
        (dict(k=49), "k is 49; blocks.0.hook_resid_post has 48 dimensions"),
        (dict(k=0), "k is 0"),
        (dict(held_out=0.0), "leaves 40 of 40 pairs"),
        (dict(positions=2), "Prompt 0 has 2 tokens and no position 2"),
        (dict(site=("attn_scores", 1)), "no positions"),
    ],
)
def test_what_cannot_be_learned_is_said(built, change, message):
    given = dict(base=PAIRS[0], source=PAIRS[1], answers=PAIRS[2], site=("resid_post", 0), k=4) | change
    with pytest.raises(ValueError, match=message):
        gs.fit_das(built[0], **given)


def test_a_basis_of_another_width_is_refused(built):
    with pytest.raises(ValueError, match="basis has 64 rows and blocks.0.hook_resid_post has 48"):
        gs.interchange(built[0], *PAIRS[:2], ("resid_post", 0), torch.eye(64))
