"""Activations are those of single runs; probes find planted directions, and nothing where there is nothing."""

import random
import re

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.readout.probing import k_sparse
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import LANGUAGES, Corpus, gift

TEXTS = [
    "When Mary and John went to the store, John gave a drink to",
    "The capital of",
    "Ask about Aldric and its pet:",
]
SITES = [("resid_post", 1), ("z", 2), "blocks.0.mlp.hook_post", ("moe.hook_expert_post", 2), "hook_embed"]


@pytest.fixture(scope="module")
def nano():
    return gs.load("nano-moe")


def alone(model, tokens, site, pos):
    """One prompt's activation at one position, by a run of its own."""
    name = model.full_name(site)
    _, cache = model.run_with_cache(tokens[None], names_filter=lambda n: n == name or n.endswith("hook_indices"))
    value = cache[name][0, pos]
    if "moe" not in name:
        return value.flatten()
    by_expert = torch.zeros(model.cfg.n_experts, value.shape[-1])
    for slot, expert in enumerate(cache[name.replace("hook_expert_post", "router.hook_indices")][0, pos].tolist()):
        by_expert[expert] = value[slot]
    return by_expert.flatten()


def ids(nano, text):
    return nano.to_tokens(text)[0]


# Collecting


@pytest.mark.parametrize("positions", [-1, 0, [3, -2, 1], [[0, 2], [], [-1]]], ids=str)
def test_texts_of_different_lengths_give_what_each_gives_alone(nano, positions):
    each = [positions] * 3 if isinstance(positions, int) else positions
    wanted = [(i, p) for i, row in enumerate(each) for p in ([row] if isinstance(row, int) else row)]
    found = gs.collect(nano, TEXTS, SITES, positions=positions, batch_size=2)
    for site in SITES:
        expected = torch.stack([alone(nano, ids(nano, TEXTS[i]), site, p) for i, p in wanted])
        torch.testing.assert_close(found[site], expected, rtol=1e-4, atol=1e-5)


def test_right_padding_is_no_position(nano):
    rows = [ids(nano, text) for text in TEXTS]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    given = gs.Prompts(tokens, tokens != 0)
    site = ("resid_post", 3)
    last = torch.stack([alone(nano, row, site, -1) for row in rows])
    torch.testing.assert_close(gs.collect(nano, given, site)[site], last, rtol=1e-4, atol=1e-5)
    every = gs.collect(nano, given, site, positions=None)[site]
    assert len(every) == sum(map(len, rows))
    torch.testing.assert_close(every[len(rows[0])], alone(nano, rows[1], site, 0), rtol=1e-4, atol=1e-5)


def test_runs_end_after_the_last_layer_asked_for_and_keep_only_the_rows(nano, monkeypatch):
    def refuse(*_):
        raise AssertionError("this layer need not run")

    monkeypatch.setattr(nano.blocks[3], "forward", refuse)
    found = gs.collect(nano, TEXTS, [("resid_post", 2), "hook_embed"])
    assert all(x.untyped_storage().nbytes() == 3 * nano.cfg.d_model * 4 for x in found.values())
    assert not any(point.fwd_hooks for point in nano.hook_dict.values())
    with pytest.raises(AssertionError):
        gs.collect(nano, TEXTS, "ln_final.hook_normalized")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sites=("pattern", 1)), "no positions"),
        (dict(sites="blocks.1.moe.router.hook_indices"), "hook_weights"),
        (dict(sites=("resid_pots", 1)), "hook_resid_post"),
        (dict(sites=("resid_post", 9)), "layers 0 to 5"),
        (dict(positions=[1, 2]), "positions for 2 prompts and 3 prompts"),
        (dict(positions=40), "Prompt 0 has 15 tokens and no position 40"),
        (dict(positions=[[], [], []]), "empty"),
        (dict(prompts=gs.Prompts(torch.ones(2, 4).long(), torch.ones(2, 3).bool())), r"\[2, 3\]"),
        (dict(prompts=gs.Prompts(torch.ones(2, 4).long(), torch.tensor([[1] * 4, [0] * 4]).bool())), "all padding"),
    ],
)
def test_collect_says_what_is_wrong(nano, change, message):
    with pytest.raises((ValueError, KeyError, IndexError), match=message):
        gs.collect(nano, **dict(prompts=TEXTS, sites=("resid_post", 1)) | change)


# Probing activations whose truth is known


def planted(n=300, d=23, distance=3.0):
    """Two classes `distance` apart along one direction, where their noise is 0.5; elsewhere it is 1."""
    direction = torch.nn.functional.normalize(torch.randn(d), dim=0)
    labels = torch.randint(2, (n,))
    noise = torch.randn(n, d)
    noise -= torch.outer(noise @ direction, direction) * 0.5
    return noise + torch.outer(labels * distance, direction), labels, direction


@pytest.mark.parametrize("kind", ["logistic", "mass-mean", "ridge"])
def test_a_planted_direction_is_found_and_the_control_is_at_chance(kind):
    x, y, direction = planted()
    found = gs.probe(x, y, kind)
    assert torch.cosine_similarity(found.direction, direction, dim=0) > 0.95
    if kind == "ridge":
        assert found.scores.mean() > 0.8 and abs(found.chance.mean()) < 0.1 and found.control.mean() < 0.1
    else:
        assert found.scores.mean() > 0.95
        assert abs(found.control.mean() - 0.5) < 0.1
        assert found.selectivity == pytest.approx(float(found.scores.mean() - found.control.mean()))
        assert np.mean(np.array(found.predict(x)) == y.numpy()) > 0.95


def test_mass_mean_is_the_difference_of_means():
    x, y, *_ = planted(n=101)
    found = gs.probe(x, [("no", "yes")[i] for i in y.tolist()], "mass-mean")
    difference = x[y == 1].mean(0) - x[y == 0].mean(0)
    torch.testing.assert_close(found.direction, difference)
    middle = (x[y == 1].mean(0) + x[y == 0].mean(0)) / 2
    assert found.predict(torch.stack([middle + difference, middle - difference])) == ["yes", "no"]


def test_directions_are_in_activation_space_however_wide_its_axes():
    x, y, _ = planted()
    wide = torch.logspace(0, 1.5, x.shape[1])
    narrow, scaled = gs.probe(x, y, control=False), gs.probe(x * wide + 7, y, control=False)
    torch.testing.assert_close(scaled.directions * wide, narrow.directions, rtol=1e-3, atol=1e-4)
    assert scaled.predict(x * wide + 7) == narrow.predict(x)


def test_several_classes_have_a_direction_each():
    y = torch.arange(4).repeat(40)
    x = 4.0 * torch.nn.functional.one_hot(y, 9) + torch.randn(160, 9)
    found = gs.probe(x, y)
    assert found.directions.shape == (4, 9)
    assert found.directions.argmax(1).tolist() == [0, 1, 2, 3]
    assert found.scores.mean() > 0.95 and found.chance.mean() == pytest.approx(0.25)
    with pytest.raises(ValueError, match="4 classes has a direction each"):
        _ = found.direction


def test_groups_are_never_on_both_sides():
    group = torch.arange(30).repeat_interleave(8)
    x = 5.0 * torch.nn.functional.one_hot(group, 30) + 0.1 * torch.randn(240, 30)
    y = torch.randint(2, (30,))[group]
    assert gs.probe(x, y, control=False).scores.mean() > 0.95  # groups learned by heart
    assert gs.probe(x, y, groups=group, control=False).scores.mean() < 0.75


def test_types_learned_by_heart_are_not_selective():
    kind = torch.arange(30).repeat_interleave(8)
    x = 5.0 * torch.nn.functional.one_hot(kind, 30) + 0.1 * torch.randn(240, 30)
    y = torch.randint(2, (30,))[kind]
    assert abs(gs.probe(x, y, types=kind).selectivity) < 0.05
    assert gs.probe(x, y).selectivity > 0.3


def test_k_sparse_finds_the_planted_neurons():
    y = torch.randint(2, (200,))
    x = torch.randn(200, 50)
    x[:, 7] += 4 * y
    x[:, 19] -= 3 * y
    scores, chosen, chance = k_sparse(x, y, [1, 2, 5])
    assert chosen[2] == [7, 19] and chosen[1] == [7] and chosen[5][:2] == [7, 19]
    assert scores[0, 1].mean() > 0.98 > scores[0, 0].mean() > 0.9
    assert scores[1, 0].median() < 0.6 and abs(chance.mean() - 0.5) < 0.1


GOOD = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
HALVES = [0] * 10 + [1] * 10


@pytest.mark.parametrize(
    ("activations", "labels", "settings", "message"),
    [
        (GOOD, [1] * 20, {}, "All labels are 1"),
        (GOOD, HALVES[:-1], {}, "20 activations came with labels of shape"),
        (GOOD, [0] * 17 + [1] * 3, {}, "Class 1 has 3 examples, fewer than the 5 folds"),
        (GOOD, HALVES, dict(folds=21), "21 folds cannot be made of 20 examples"),
        (GOOD, HALVES, dict(groups=[0, 1] * 10), "5 folds cannot be made of 2 groups"),
        (GOOD, HALVES, dict(groups=[0, 1]), "groups for 2 examples"),
        (GOOD, HALVES, dict(types=[0, 1]), "types for 2 examples"),
        (GOOD, HALVES, dict(types=[0] * 20), "1 types are too few"),
        (GOOD.clone().index_fill_(0, torch.tensor([4]), torch.nan), HALVES, {}, "example 4 are not all finite"),
        (GOOD, HALVES, dict(kind="lasso"), "no probe 'lasso'"),
        (GOOD, [0, 1, 2, 3] * 5, dict(kind="mass-mean"), "two classes apart, and the labels have 4"),
        (GOOD, ["a", "b"] * 10, dict(kind="ridge"), "needs finite numbers"),
    ],
)
def test_probe_says_what_is_wrong(activations, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        gs.probe(activations, labels, **settings)


# Probing a model whose truth is known


def test_the_indirect_object_becomes_readable_before_it_is_said(nano):
    rng = random.Random(0)
    prompts, answers = [], []
    for answer, subject in [("Mary", "John"), ("John", "Mary")] * 60:
        drawn = gift(rng)
        renamed = {drawn.io: answer, drawn.subject: subject}
        prompts.append(re.sub("|".join(renamed), lambda name, to=renamed: to[name[0]], drawn.prompt))
        answers.append(answer)
    found = gs.probe_layers(nano, prompts, answers, folds=3)
    table = found.table.set_index("layer")
    assert list(table.index) == list(range(6))
    assert table["value"][0] < 0.9 and table["value"][1:].min() > 0.99
    assert table["control"].between(0.35, 0.65).all()
    assert found.directions[5].shape == (1, nano.cfg.d_model)
    torch.testing.assert_close(found.scores.baselines["chance"], torch.full((3,), 0.5))
    assert [trace.name for trace in found.plot().data] == ["probe", "control task"]
    # Before the first layer the last token knows nothing of the others.
    before = gs.probe_layers(nano, prompts, answers, "resid_pre", [0], folds=3)
    assert float(before.scores.mean) == pytest.approx(0.5, abs=0.05)


def test_languages_are_readable_and_expert_neurons_tell_them_apart(nano):
    rng, corpus = random.Random(0), Corpus(nano.tokenizer.backend)
    which = [LANGUAGES[i % 4] for i in range(120)]
    # The document without its heading, which would name the language.
    tokens = torch.tensor([corpus.document(rng, language).ids[3:15] for language in which])
    settings = dict(positions=[rng.randrange(12) for _ in which], folds=3)
    found = gs.probe_layers(nano, tokens, which, layers=[2, -1], **settings)
    assert (found.scores.mean > 0.98).all() and (found.control.mean < 0.4).all()
    tavi = [language == "tavi" for language in which]
    experts = gs.sparse_probe(nano, tokens, tavi, 2, experts=True, ks=(1, 4), **settings)
    table = experts.scores.table.set_index(["neurons", "k"])["value"]
    assert table["chosen", 4] > 0.9 > 0.8 > table["random", 4]
    expert, neuron = experts.neurons[1][0]
    assert 0 <= expert < nano.cfg.n_experts and 0 <= neuron < nano.cfg.d_expert
    dense = gs.sparse_probe(nano, tokens, tavi, 2, ks=(1, 4), **settings)
    assert all(isinstance(neuron, int) for neuron in dense.neurons[4])


def test_probe_layers_takes_the_layers_that_have_the_site(tmp_path):
    model = tiny_model("E2B")  # its last four layers read the keys and values of others
    tokens = torch.randint(3, 101, (30, 6))
    found = gs.probe_layers(model, tokens, [0, 1] * 15, "v", folds=3, control=False)
    assert list(found.probes) == [0, 1, 2, 3] and found.control is None
    found.scores.save(tmp_path)
    assert torch.equal(gs.Result.load(tmp_path).values, found.scores.values)
    with pytest.raises(KeyError, match="moe.hook_out"):
        gs.probe_layers(model, tokens, [0, 1] * 15, "moe.hook_out")


def test_labels_that_cannot_be_probed_are_said_before_anything_runs(nano, monkeypatch):
    monkeypatch.setattr(nano, "forward", None)
    for labels, message in (([1, 0], "3 activations came with labels of shape"), ([1, 0, 0], "Class 1 has 1 examples")):
        with pytest.raises(ValueError, match=message):
            gs.probe_layers(nano, TEXTS, labels, folds=2)


def test_bfloat16_activations_are_collected_as_they_are_and_probed():
    model = tiny_model("26B-A4B").bfloat16()
    tokens = torch.randint(3, 101, (30, 6))
    site = ("resid_post", 2)
    found = gs.collect(model, tokens, site)[site]
    _, cache = model.run_with_cache(tokens, names_filter=model.full_name(site))
    assert found.dtype == torch.bfloat16 and torch.equal(found, cache[site][:, -1])
    probe = gs.probe(found, tokens[:, -1] > 50)
    assert len(probe.predict(found)) == 30
    check = gs.causal_check(model, tokens, site, probe.direction, gs.logit(model, 7), n_random=1)
    assert check.done.all() and (check.values[0] - check.baselines["unedited"]).abs().max() > 0


def test_what_is_said_of_held_out_examples_gives_the_scores():
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)), ["a", "b", "c"] * 20
    probe = gs.probe(x, y, folds=4)
    assert probe.labels == y and set(probe.held_out) <= {"a", "b", "c"}
    right = sum(said == label for said, label in zip(probe.held_out, y, strict=True)) / 60
    assert right == pytest.approx(float(probe.scores.mean()), abs=1e-6)
    assert probe.predict(x) != probe.held_out  # the probe itself has seen them
    torch.testing.assert_close(probe.score(x), x @ probe.directions.T + probe.bias)
    numbers = gs.probe(x, list(range(60)), "ridge")
    assert len(numbers.held_out) == 60 and all(isinstance(one, float) for one in numbers.held_out)
