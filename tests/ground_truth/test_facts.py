"""Tracing facts (Meng et al. 2022, arXiv:2202.05262; Geva et al. 2023, arXiv:2304.14767): "The capital of Norland is".

What is known: the answer follows from the subject, so the clean subject must restore it, at the subject's token until
the last token has read it and at the last token from then on. GPT-2's early site, the MLPs at the last subject token,
is not there in nano-moe: the subject travels as it is, and the feed-forward layers of the last token look the fact up.
"""

import pandas
import pytest
import torch

import gemmascope as gs
from gemmascope.zoo.corpus import FACTS

CAPITALS = [fact for fact in FACTS if fact.relation == "capital"][:8]
OTHERS = CAPITALS[1:] + CAPITALS[:1]
LAST = -1
SWITCH = (3, 4)
"""Layers in which the last token reads the subject."""


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


@pytest.fixture(scope="module")
def recall(model):
    return gs.prob(model, [f" {fact.value}" for fact in CAPITALS])


@pytest.fixture(scope="module", params=[0, 3])
def prompts(model, request):
    """(clean, corrupted, position of the subject, of the relation, of a word that says nothing) where the relation
    is named before the subject, and where it is named after it."""
    clean, corrupted = ([fact.prompt(request.param) for fact in facts] for facts in (CAPITALS, OTHERS))
    tokens = model.to_str_tokens(clean[0])
    find = lambda *words: next(i for i, token in enumerate(tokens) if token.strip() in words)  # noqa: E731
    subject, relation = find(CAPITALS[0].entity), find("capital")
    return clean, corrupted, subject, relation, find("The", "about")


def restored(result):
    """layers x positions"""
    return result.table.pivot(index="layer", columns="pos", values="recovered").to_numpy(copy=True)


def check_restored(curve, subject, last):
    assert (curve[: SWITCH[0], subject] > 0.9).all() and abs(curve[: SWITCH[0], last]).max() < 0.1
    assert abs(curve[-1, subject]) < 0.05 and curve[-1, last] > 0.95
    between = curve[SWITCH[1]]
    assert between[subject] > 0.3 and between[last] > 0.05  # the switch: some of it here, some of it there
    elsewhere = [pos for pos in range(curve.shape[1]) if pos not in (subject, last)]
    assert abs(curve[:, elsewhere]).max() < 0.05


def test_another_subject_is_restored_at_the_subject_and_then_at_the_last_token(model, recall, prompts):
    clean, corrupted, subject, *_ = prompts
    result = gs.activation_patching(model, clean, corrupted, recall, progress=False)
    assert result.baselines["clean"].mean() > 0.95 and result.baselines["corrupted"].mean() < 0.01
    curve = restored(result)
    check_restored(curve, subject, curve.shape[1] - 1)


def test_a_noised_subject_is_restored_in_the_same_places(model, recall):
    """Causal tracing: the embedding of the subject with Gaussian noise of three standard deviations of embeddings."""
    clean = [fact.prompt(0) for fact in CAPITALS]
    _, cache = model.run_with_cache(clean)
    n_prompts, n_pos = cache["hook_embed"].shape[:2]
    subject = n_pos - 2
    noise = 3 * cache["hook_embed"].std() * torch.randn(n_prompts, 1, model.cfg.d_model)
    noised = gs.add("hook_embed", noise, positions=[subject])
    cells = [(layer, pos) for layer in range(model.cfg.n_layers) for pos in range(n_pos)]
    patched = [[noised, gs.patch(("resid_pre", layer), cache, positions=[pos])] for layer, pos in cells]
    table = pandas.DataFrame(cells, columns=["layer", "pos"])
    result = gs.sweep(model, clean, recall, table, patched, progress=False)
    result.baselines["corrupted"] = recall(model(clean, interventions=noised)).detach()
    assert result.baselines["corrupted"].mean() < 0.1
    check_restored(restored(result), subject, n_pos - 1)


def test_the_fact_is_looked_up_by_the_feed_forward_layers_of_the_last_token(model, recall, prompts):
    clean, corrupted, subject, *_ = prompts
    mlp, attention = (
        restored(gs.activation_patching(model, clean, corrupted, recall, site, progress=False))
        for site in ("mlp_out", "attn_out")
    )
    late = slice(SWITCH[1], None)
    assert (mlp[late, LAST] > 0.25).all()
    assert abs(mlp[:, subject]).max() < 0.05  # Meng's early site: not in this model
    assert attention[SWITCH[1], LAST] > 0.5
    mlp[late, LAST] = 0
    assert abs(mlp).max() < 0.05  # nor anywhere else


def test_cutting_the_subject_off_before_the_switch_kills_recall_and_after_it_does_not(model, recall, prompts):
    clean, _, subject, _, control = prompts
    n_layers = model.cfg.n_layers

    def without(layers, key):
        cut = gs.knockout(layers, queries=[LAST], keys=[key])
        return recall(model(clean, interventions=cut)).mean().item()

    with torch.no_grad():
        assert without(range(n_layers), subject) < 0.2
        assert without(SWITCH, subject) < 0.2  # these two layers are all there is to cut
        assert without(range(SWITCH[0]), subject) > 0.98
        assert without(range(SWITCH[1] + 1, n_layers), subject) > 0.98
        assert without(range(n_layers), control) > 0.98  # another span


def test_attention_knockouts_find_the_switch_and_where_the_relation_is_read(model, recall, prompts):
    clean, _, subject, relation, control = prompts
    spans = {"subject": subject, "relation": relation, "control": control, "last": LAST}
    table = gs.attention_knockout(model, clean, recall, spans, progress=False).table
    table = table.pivot(index="edge", columns="layer", values="value")
    assert table.loc["subject -> last"].idxmin() == SWITCH[1]
    assert table.loc["relation -> last"].idxmin() == SWITCH[0]
    assert table.loc["control -> last"].min() > 0.98


def test_the_answer_appears_in_the_lens_after_the_switch(model, prompts):
    clean = prompts[0]
    answers = [f" {fact.value}" for fact in CAPITALS]
    lens = gs.logit_lens(model, clean, answers, positions=[LAST])
    said = dict(zip(lens.log_prob.cells["layer"], lens.log_prob.mean.exp().tolist(), strict=True))
    assert max(said[layer] for layer in range(-1, SWITCH[0])) < 0.01
    assert said[SWITCH[1] + 1] > 0.9
