"""Copy suppression (McDougall et al. 2023, arXiv 2310.04625), in a head built by hand whose every figure is known.

The prompt is <bos>, fillers, one name, fillers, "?". Norms are live (eps 1e-6). Every token has an embedding e, all
orthogonal and of one size; a name has another direction beside it, by which heads know it as a source. The stream at
"?", in units of sqrt(d_model) and of e, is

1. after two copiers (layers 0 and 1), which attend from "?" to the name and write it: e_? + p e_name, where p is the
   sum of the gains of the norms after them (a post-norm makes a single direction as large as its gain);
2. after the suppressor (layer 2), whose query is <bos> + p name, whose keys are the tokens (QK: W_U matched with W_E)
   and which writes the negative of what it reads (OV: -W_E W_U): its query's norm makes the scores
   SCORE / sqrt(1 + p^2) and SCORE p / sqrt(1 + p^2), so the name has r = exp(SCORE (p - 1) / sqrt(1 + p^2)) times the
   attention of <bos>, and -(r e_name + e_<bos>) / sqrt(1 + r^2) is added, times the gain of the norm after it.

The final norm divides by the root mean square of that; the logit is the product with the name's embedding.
"""

import math

import pytest
import torch

import gemmascope as gs
from gemmascope.metrics import logit
from tests.ground_truth import by_hand

N_NAMES, N_FILLERS = 6, 4
BOS, ASK, FIRST_FILLER, FIRST_NAME = 2, 3, 4, 4 + N_FILLERS
NAMES = list(range(FIRST_NAME, FIRST_NAME + N_NAMES))
D_VOCAB = FIRST_NAME + N_NAMES
D_MODEL = D_VOCAB + N_NAMES
GAINS = (1.0, 0.6, 1.0)
"""Of the norms after the copiers' and the suppressor's attention."""
SCORE = 4.0
SURE = 30.0
SINK = N_NAMES
"""A head's channel besides one for each name."""


def built(matches: tuple[int, ...] = tuple(range(N_NAMES))):
    """The model. `matches` says which name's key the query for a name finds; a control mixes them up."""
    model = by_hand.blank(3, 2, D_MODEL, D_VOCAB)
    rows = torch.eye(D_VOCAB, D_MODEL, dtype=torch.float64)
    rows[NAMES, D_VOCAB:] = torch.eye(N_NAMES, dtype=torch.float64)
    unit = D_MODEL**0.5
    by_hand.embed(model, rows * unit, read=(torch.arange(D_MODEL) < D_VOCAB).double() / unit)
    said = [(name, channel, 1.0) for channel, name in enumerate(NAMES)]
    sources = [(D_VOCAB + channel, channel, 1.0) for channel in range(N_NAMES)]
    any_name = [(dim, 0, 1.0) for dim, _, _ in sources]
    others = [BOS, *range(FIRST_FILLER, FIRST_NAME), *range(D_VOCAB, D_MODEL)]
    for layer in range(2):  # "?" looks for any name, all other tokens for <bos>, whose value is 0
        find = [(ASK, 0, 1.0), *((dim, SINK, 1.0) for dim in others)]
        by_hand.head(model, layer, 0, q=find, k=[*any_name, (BOS, SINK, 1.0)], v=sources, o=said)
        model.blocks[layer].attn.q_norm.weight.data.fill_(SURE / by_hand.D_HEAD)
    bos = (BOS, SINK, 1.0)
    find = [*((name, matches[channel], 1.0) for name, channel, _ in said), (ASK, SINK, 1.0)]
    by_hand.head(
        model, 2, 0, q=find, k=[*sources, bos], v=[*sources, bos], o=[(dim, at, -1.0) for dim, at, _ in [*said, bos]]
    )
    model.blocks[2].attn.q_norm.weight.data.fill_(SCORE / by_hand.D_HEAD)
    for block, gain in zip(model.blocks, GAINS, strict=True):
        block.ln1_post.weight.data.fill_(gain)
    return model


def prompts(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 7 tokens with a name somewhere, and the names."""
    tokens = torch.randint(FIRST_FILLER, FIRST_NAME, (n, 7))
    names = torch.randint(FIRST_NAME, D_VOCAB, (n,))
    tokens[torch.arange(n), torch.randint(1, 6, (n,))] = names
    tokens[:, 0], tokens[:, -1] = BOS, ASK
    return tokens, names


class Expected:
    """What the module's docstring says of a name written with strength p."""

    def __init__(self, p: float):
        self.ratio = math.exp(SCORE * (p - 1) / math.hypot(1, p))
        self.suppressed, bos = (GAINS[2] * share / math.hypot(1, self.ratio) for share in (self.ratio, 1))
        self.to_logits = math.sqrt(D_MODEL) / math.hypot(1, p - self.suppressed, bos)
        """A unit of e_name in the stream, as the final norm of this run lets it through, in logits."""
        self.logit = (p - self.suppressed) * self.to_logits


@pytest.fixture(scope="module")
def model():
    return built()


def test_circuits_tell_copiers_from_the_suppressor(model):
    copying = gs.copying_score(model, NAMES, blocks=0).table.set_index(["layer", "head"]).value
    assert copying[0, 0] == copying[1, 0] == 1 and copying[2, 0] == 0
    for layer, sign in ((0, 1), (1, 1), (2, -1)):
        ov = gs.ov_scores(model, layer, 0, NAMES, blocks=0).mean.view(N_NAMES, N_NAMES)
        assert (ov.diagonal() * sign > 0).all()
        assert torch.equal(ov, torch.diag(ov.diagonal()))
        torch.testing.assert_close(ov.diagonal(), ov[0, 0].expand(N_NAMES))
    qk = gs.qk_scores(model, 2, 0, NAMES, distance=3, blocks=0).mean.view(N_NAMES, N_NAMES)
    expected = SCORE * torch.eye(N_NAMES, dtype=qk.dtype)  # each name finds itself, at any distance
    torch.testing.assert_close(qk, expected, rtol=1e-4, atol=0)
    # The copiers look for any name and say nothing of which.
    assert gs.qk_scores(model, 0, 0, NAMES, blocks=0).mean.abs().max() == 0


def test_attention_and_logits_are_the_analytic_ones(model):
    tokens, names = prompts()
    _, cache = model.run_with_cache(tokens)
    expected = Expected(GAINS[0] + GAINS[1])
    at = (tokens == names[:, None]).double().argmax(-1)
    row = cache["pattern", 2][:, 0, -1]
    ratio = row[torch.arange(len(names)), at] / row[:, 0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, expected.ratio), rtol=1e-5, atol=0)

    said = cache["hook_logits"][:, -1].gather(-1, names[:, None])[:, 0]
    torch.testing.assert_close(said, torch.full_like(said, expected.logit), rtol=1e-5, atol=0)
    by_head = gs.direct_logit_attribution(model, tokens, names.tolist(), by="head")
    found = {(row.layer, row.head): row.value for row in by_head.table.itertuples()}
    assert found[2, 0] == pytest.approx(-expected.suppressed * expected.to_logits, rel=1e-5)
    assert found[0, 0] == pytest.approx(GAINS[0] * expected.to_logits, rel=1e-5)
    assert found[1, 0] == pytest.approx(GAINS[1] * expected.to_logits, rel=1e-5)
    assert all(found[layer, 1] == 0 for layer in range(3))
    # Without the suppressor nothing holds the name down, and it is said most.
    free = model(tokens, interventions=gs.zero(("z", 2), heads=0))[:, -1].detach()
    p = GAINS[0] + GAINS[1]
    torch.testing.assert_close(
        free.gather(-1, names[:, None])[:, 0], torch.full((24,), math.sqrt(D_MODEL) * p / math.hypot(1, p)).double(),
        rtol=1e-5, atol=0,
    )  # fmt: skip


def effects(model, tokens, names, *, held=()):
    """Loss of the name's logit when the copier of layer 0 is ablated, in all and through the suppressor, with the final
    norm held at the clean run's."""
    metric = logit(model, names.tolist())
    _, cache = model.run_with_cache(tokens)
    norm = gs.patch("ln_final.hook_scale", cache)
    clean = metric(model(tokens, interventions=norm).detach())
    held = [gs.patch(name, cache) for name in held]
    off = gs.zero(("z", 0), heads=0)
    logits, after = model.run_with_cache(tokens, interventions=[off, norm, *held])
    own, now = (c["attn_out", 2][:, -1].gather(-1, names[:, None])[:, 0] for c in (cache, after))
    relieved = (now - own) / cache["ln_final.hook_scale"][:, -1, 0]
    return (clean - metric(logits.detach())).mean(), relieved.mean()


def test_ablating_a_copier_relieves_what_it_set_off(model):
    """Self-repair: the suppressor makes good most of what the copier's ablation takes away."""
    tokens, names = prompts()
    whole, without = Expected(GAINS[0] + GAINS[1]), Expected(GAINS[1])
    direct = GAINS[0] * whole.to_logits  # what direct logit attribution says the copier is worth
    repaired = (whole.suppressed - without.suppressed) * whole.to_logits
    total, by_suppressor = effects(model, tokens, names)
    assert by_suppressor.item() == pytest.approx(repaired, rel=1e-4)
    assert total.item() == pytest.approx(direct - repaired, rel=1e-4)
    share = 1 - total.item() / direct
    assert share == pytest.approx(0.72, abs=0.01)
    # With the suppressor's attention held, it suppresses as before and nothing is repaired.
    total, by_suppressor = effects(model, tokens, names, held=["blocks.2.attn.hook_pattern"])
    assert total.item() == pytest.approx(direct, rel=1e-4) and abs(by_suppressor.item()) < 1e-5


def test_a_head_whose_keys_do_not_match_repairs_nothing():
    """The control: queries find the key of the next name, which the prompt does not hold."""
    model = built(matches=(*range(1, N_NAMES), 0))
    tokens, names = prompts()
    total, by_suppressor = effects(model, tokens, names)
    by_head = gs.direct_logit_attribution(model, tokens, names.tolist(), by="head").table
    direct = by_head.set_index(["layer", "head"]).value[0, 0]
    assert abs(by_suppressor) < 0.1 * direct and total > 0.9 * direct
    # Nor does an ablation of a head that says nothing.
    assert torch.equal(model(tokens, interventions=gs.zero(("z", 0), heads=1)), model(tokens))
