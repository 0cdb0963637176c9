"""Probes as a view: figures are the probes', scores of text are theirs, and bad input says what is wrong."""

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.widgets.probe_view import ProbeView

PLACES = ("store", "park", "farm", "office", "garden", "school")
GIFTS = [
    f"{one} and {two} went to the {place}. {two} gave a book to"
    for one, two in (("Mary", "John"), ("John", "Mary"))
    for place in PLACES
]
NAMES = ["Mary"] * 6 + ["John"] * 6


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


@pytest.fixture(scope="module")
def probes(model):
    return gs.probe_layers(model, GIFTS, NAMES, layers=[0, 3, 5], folds=3, progress=False)


def test_the_figures_are_the_probes(probes):
    view = probes.view()
    table = probes.table
    sentence, still = view.still()
    assert "logistic probe of resid_post" in sentence and len(still) == 3
    still = still.sort_values("layer")
    for ours, theirs in {"accuracy": "value", "low": "low", "high": "high", "control": "control"}.items():
        np.testing.assert_allclose(still[ours], table[theirs], atol=1e-6)
    for place, one in enumerate(probes.probes.values()):
        counts = view.answers["held_out"](place=place)["counts"]
        assert counts.sum() == 12 and counts.sum(1).tolist() == [6, 6]
        wrong = sum(a != b for a, b in zip(one.labels, one.held_out, strict=True))
        assert 12 - np.trace(counts) == wrong
        listed = view.answers["examples"](place=place, cell=None)
        assert [a != b for a, b in zip(listed["labels"], listed["said"], strict=True)] == [True] * wrong + [False] * (
            12 - wrong
        )


def test_text_is_scored_at_every_layer(model, probes):
    view = probes.view(model=model, prompts=GIFTS)
    text = "When Mary and John went to the store, John gave a book to"
    answer = view.answers["project"](text=text)
    assert len(answer["texts"]) == 15
    for place, layer in enumerate(probes.probes):
        found = gs.collect(model, text, ("resid_post", layer), positions=None)["resid_post", layer]
        expected = probes.probes[layer].score(found)
        torch.testing.assert_close(torch.from_numpy(answer["scores"][place]), expected, atol=1e-5, rtol=1e-5)
    example = view.answers["tokens"](example=4)
    assert example["pos"] == len(example["texts"]) - 1
    assert "garden" in "".join(example["texts"])


def test_padding_is_no_token_of_an_example(model):
    texts = ["Mary gave John a", "The", "John gave", "A book to"]
    labels, positions = [0, 1] * 8, [0, 1]
    probe = gs.probe_layers(model, texts * 2, labels, layers=[1], positions=[positions] * 8, folds=2, progress=False)
    view = probe.view(model=model, prompts=texts * 2, positions=[positions] * 8)
    for example, text in ((3, "The"), (1, "Mary gave John a")):
        tokens = view.answers["tokens"](example=example)
        assert tokens["texts"] == model.to_str_tokens(model.to_tokens(text)[0]) and tokens["pos"] == 1


def test_a_ridge_and_a_single_probe(model):
    x = gs.collect(model, GIFTS, ("resid_post", 2), positions=-1)["resid_post", 2]
    probe = gs.probe(x, [float(i) for i in range(12)], "ridge", folds=3, control=False)
    view = probe.view(model=model, site=("resid_post", 2))
    assert view.data["control"] is None and view.data["span"] == [0.0, 11.0]
    found = view.answers["held_out"](place=0)
    np.testing.assert_allclose(found["said"], probe.held_out)
    answer = view.answers["project"](text="Mary gave")
    assert answer["scores"].shape == (1, len(answer["texts"]), 1)
    with pytest.raises(ValueError, match="does not know its site"):
        probe.view(model=model)


def test_neurons_of_sparse_probes(model):
    view = gs.sparse_probe(model, GIFTS, NAMES, 2, experts=True, ks=(1, 2), folds=3, progress=False).view()
    assert view.data["axis"] == "k" and view.data["versus"] == "random neurons"
    assert [len(each) for each in view.data["neurons"]] == [1, 2]
    assert view.data["neurons"][0][0]["layer"] == 2 and view.data["neurons"][0][0]["expert"] is not None


def test_bad_input_is_said(model, probes):
    view = probes.view(model=model)
    for text, message in {" ": "no text to read", "a " * 2000: "can be read here"}.items():
        answer, _ = view.ask({"question": "project", "arguments": {"text": text}}, [])
        assert message in answer["error"]
    with pytest.raises(ValueError, match="give the model that was probed"):
        probes.view(model=gs.load("nano-edge"))
    with pytest.raises(ValueError, match="2 examples at these positions, and the probes 12"):
        probes.view(model=model, prompts=GIFTS[:2])
    with pytest.raises(ValueError, match="give it as model="):
        probes.view(prompts=GIFTS)
    with pytest.raises(ValueError, match="There is no view of a list"):
        gs.probe_view([])
    with pytest.raises(ValueError, match="There are 2 places and scores for"):
        ProbeView("layer", [0, 1], "accuracy", np.ones((3, 1)), np.ones(1), None, folds=2)


def test_an_exported_page_is_bounded(model, probes, tmp_path):
    view = probes.view(model=model, prompts=GIFTS, state={"text": "Mary gave John a"})
    questions = [question for question, _ in view.exported()]
    assert questions.count("project") == 1 and questions.count("tokens") == 12
    assert view.to_html(tmp_path / "probe.html").stat().st_size < 200_000
