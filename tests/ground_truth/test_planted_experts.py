"""Planted experts: a tiny 26B-A4B whose routing is written by hand, trained on four mini-languages of disjoint words.

Every token goes to the expert of its language and to one that serves all languages. That one has a twin, the same
weights, which is next in line. So it is known what each expert is worth: its language, and nothing for the busiest of
all as long as its twin is there.
"""

import random

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from torch.nn import functional as F

import gemmascope as gs
from gemmascope.zoo.corpus import _LANGUAGES
from tests.ground_truth.training import fit, untrained

pytestmark = pytest.mark.slow

N, WORDS, LENGTH = len(_LANGUAGES), 32, 32
FIRST = 3  # the ids before it are special
SHARED, TWIN = N, N + 1
LAYERS = range(2)


def sentences(rng, n):
    """[n, LENGTH] tokens, row i in language i modulo N; no two languages share a token, the full stop included."""
    rows = []
    for i in range(n):
        language, row = list(_LANGUAGES.values())[i % N], []
        ids = {word: FIRST + (i % N) * WORDS + j for j, word in enumerate([*language.words, "."])}
        while len(row) < LENGTH:
            row += [ids[piece.strip()] for piece, _ in language.sentence(rng)]
        rows.append(row[:LENGTH])
    return torch.tensor(rows)


@torch.no_grad()
def plant(model):
    """A dimension of the stream for each language, and one for all, to which no block may write; routers read these."""
    planted, width = slice(0, N + 1), 2 * model.cfg.d_model**-0.5
    model.W_E[:, planted] = 0
    model.W_E[:, N] = width
    for language in range(N):
        model.W_E[FIRST + language * WORDS :][:WORDS, language] = width
    for block in model.blocks:
        block.ln1_post.weight[planted] = 0
        block.ln2_post.weight[planted] = 0
        router = block.moe.router
        router.scale.fill_(1)
        router.per_expert_scale.fill_(1)[N:] = 2
        router.proj.weight.zero_()
        router.proj.weight[range(N), range(N)] = 8
        router.proj.weight[[SHARED, TWIN], N] = torch.tensor([7.0, 7.0 - 1e-3])
        for weights in (block.moe.gate_up_proj, block.moe.down_proj):
            weights[TWIN] = weights[SHARED]


@pytest.fixture(scope="module")
def model():
    model = untrained(
        "26B-A4B",
        n_layers=2,
        layer_kinds=("sliding", "global"),
        d_vocab=FIRST + N * WORDS,
        n_experts=N + 2,
        experts_per_token=2,
        d_expert=16,
        d_mlp_narrow=4,
        window=16,
    )
    plant(model)
    rng = random.Random(0)

    def loss(step):
        tokens = sentences(rng, 32)
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    fit(model, loss, steps=120, lr=8e-3, after=lambda: plant(model))
    return model


TOKENS = sentences(random.Random(1), 32)
LANGUAGE = torch.arange(len(TOKENS)) % N


@pytest.fixture(scope="module")
def clean(model):
    return losses(model)


def losses(model, *interventions):
    """Nats a token in each language; the first tokens, which tell the language, are left out."""
    log_probs = model(TOKENS, interventions=list(interventions))[:, :-1].log_softmax(-1)
    nats = -log_probs.gather(-1, TOKENS[:, 1:, None])[:, 4:, 0].mean(-1)
    return torch.stack([nats[LANGUAGE == language].mean() for language in range(N)])


def test_the_languages_are_learned(clean):
    assert clean.max() < 2.1  # their entropies are 1.6 to 1.75, and a uniform guess among a language's words costs 3.5


def test_the_trace_tells_the_plan(model):
    _, cache = model.run_with_cache(TOKENS)
    trace = cache.routing
    language = LANGUAGE[:, None].expand(TOKENS.shape)
    for layer in LAYERS:
        first = trace.indices[layer][..., 0]
        first = torch.where(first == SHARED, trace.indices[layer][..., 1], first)
        assert normalized_mutual_info_score(language.flatten(), first.flatten()) == pytest.approx(1)
        shuffled = language.flatten()[torch.randperm(language.numel(), generator=torch.Generator().manual_seed(0))]
        assert normalized_mutual_info_score(shuffled, first.flatten()) < 0.02
        # Risk difference (SteerMoE, arXiv:2509.09660): how much oftener an expert is active in one language.
        active = (trace.indices[layer][..., None] == torch.arange(N + 2)).any(-2).float()
        for one in range(N):
            difference = active[language == one].mean(0) - active[language != one].mean(0)
            assert difference.argmax() == one and difference[one] == 1 and difference[SHARED] == 0
    assert torch.equal(trace.load()[0], torch.tensor([0.125] * N + [0.5, 0]))


@pytest.mark.parametrize("reroute", [True, False])
def test_dropping_an_expert_hurts_its_language_only(model, clean, reroute):
    hurt = torch.stack([losses(model, gs.drop_expert(LAYERS, expert, reroute)) - clean for expert in range(N)])
    assert hurt.diagonal().min() > 0.1
    assert (hurt - hurt.diagonal().diag()).abs().max() < 1e-3


def test_forcing_a_wrong_expert_hurts_more_than_dropping_the_right_one(model, clean):
    def forced(expert):
        """The expert becomes everybody's first choice."""
        return [gs.replace(("moe.router.hook_logits", layer), 8.0, experts=[expert]) for layer in LAYERS]

    dropped = torch.stack([losses(model, gs.drop_expert(LAYERS, expert)) - clean for expert in range(N)]).diagonal()
    to = torch.stack([losses(model, forced(expert)) - clean for expert in range(N)])  # [expert, language]
    wrong = to.masked_fill(torch.eye(N, dtype=torch.bool), torch.inf).amin(0)  # the least harm, language by language
    assert (wrong > 2 * dropped).all() and wrong.min() > 0.5
    assert to.diagonal().max() < 0.5  # the right expert, given all the weight


def test_the_busiest_expert_has_no_effect_while_its_twin_is_there(model, clean):
    load = model.run_with_cache(TOKENS)[1].routing.load()
    assert (load.argmax(-1) == SHARED).all()
    alone, both = (losses(model, gs.drop_expert(LAYERS, experts)) - clean for experts in (SHARED, [SHARED, TWIN]))
    assert alone.abs().max() < 2e-3
    assert both.mean() > 20 * alone.abs().max() and both.mean() > 0.03
    # The twin takes all of its tokens.
    dropped = gs.drop_expert(LAYERS, SHARED)
    _, cache = model.run_with_cache(TOKENS, interventions=dropped)
    assert torch.equal(cache.routing.load()[:, TWIN], load[:, SHARED])


def test_a_norm_follows_so_that_only_relative_weights_count(model):
    weights = [("moe.router.hook_weights", layer) for layer in LAYERS]
    logits = model(TOKENS)
    close = dict(rtol=0, atol=1e-3)
    torch.testing.assert_close(model(TOKENS, interventions=[gs.scale(w, 3.7) for w in weights]), logits, **close)
    # Dropping with the rest of the weights renormalised is dropping.
    drop = gs.drop_expert(LAYERS, 0, reroute=False)
    silent, cache = model.run_with_cache(TOKENS, interventions=drop)
    left = [cache[weight] for weight in weights]
    assert all(left[layer][LANGUAGE == 0].sum(-1).max() < 0.9 for layer in LAYERS)
    whole = [gs.patch(w, kept / kept.sum(-1, keepdim=True)) for w, kept in zip(weights, left, strict=True)]
    torch.testing.assert_close(model(TOKENS, interventions=whole), silent, **close)
    assert (silent - logits)[LANGUAGE == 0].abs().max() > 1  # and it is not nothing
