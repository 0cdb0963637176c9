"""The experts of a prompt as a view: the model's own numbers, and the model with its routing changed."""

import json

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.views.run import Run
from gemmascope.widgets.router_view import RouterView, Routing

PROMPT = "When Mary and John went to the store, John gave a drink to"
OFF = {"layer": 2, "expert": 1, "how": "reroute", "pos": None}
SILENT = {"layer": 1, "expert": 2, "how": "silence", "pos": 13}
FORCED = {"layer": 4, "expert": 3, "how": "force", "pos": 14}


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


@pytest.fixture(scope="module")
def view(model):
    return gs.router_view(model, PROMPT)


def asked(view, question, **arguments):
    return view.answers[question](**arguments)


def test_the_grid_is_the_cache_s(model, view):
    _, cache = model.run_with_cache(PROMPT)
    trace = cache.routing
    window = asked(view, "window", first=0)
    assert window["experts"].dtype == np.uint8
    torch.testing.assert_close(torch.tensor(window["experts"]).long(), trace.indices[:, 0], rtol=0, atol=0)
    for name, of_trace in {"weights": trace.weights, "margins": trace.margins, "entropy": trace.entropy}.items():
        torch.testing.assert_close(torch.tensor(window[name]), of_trace[:, 0], rtol=0, atol=0)
    layer = asked(view, "layer", layer=2)
    assert (layer["experts"] == window["experts"][2]).all() and (layer["weights"] == window["weights"][2]).all()
    load = np.frombuffer(view.data["counts"]["data"], np.int32).reshape(6, 8) / (window["experts"].shape[1] * 2)
    torch.testing.assert_close(torch.tensor(load).float(), trace.load())
    sentence, table = view.still()
    assert (
        sentence.startswith("15 tokens through 6 layers of 8 experts, 2 a token")
        and table.margin.is_monotonic_increasing
    )


def test_a_commit_is_the_model_with_these_interventions(model, view):
    changes = [OFF, SILENT, FORCED]
    effect = asked(view, "effect", changes=changes)
    made = {"gs": gs}
    exec("\n".join(effect["code"]), made)
    before = model(PROMPT)[0].detach()
    after, cache = model.run_with_cache(PROMPT, interventions=made["interventions"])
    assert torch.equal(model(PROMPT, interventions=made["interventions"]), after)
    logs = [logits.log_softmax(-1) for logits in (before, after[0].detach())]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    torch.testing.assert_close(torch.tensor(effect["kl"]), kl, rtol=1e-5, atol=1e-6)
    tokens = model.to_tokens(PROMPT)[0, 1:, None]
    losses = [-float(log[:-1].gather(-1, tokens).mean()) for log in logs]
    assert effect["loss"] == pytest.approx(losses, abs=1e-5)

    trace, plain = cache.routing, model.run_with_cache(PROMPT)[1].routing
    flipped = (trace.indices.sort(-1).values != plain.indices.sort(-1).values).any(-1)[:, 0]
    assert effect["flips"].tolist() == flipped.sum(-1).tolist()
    window = asked(view, "window_after", changes=changes, first=0)
    assert (window["experts"] == trace.indices[:, 0].numpy()).all()
    assert (window["differs"] == flipped.numpy()).all()
    assert effect["counts"][2, 1] == 0 and 3 in window["experts"][4, 14]
    silenced = window["experts"][1, 13] == 2
    assert silenced.any() and (window["weights"][1, 13][silenced] == 0).all()

    top = asked(view, "next", changes=changes, pos=14)
    named = top["ids"][0] >= 0
    ids = top["ids"][0][named]
    assert ids[0] == before[14].argmax() and len(set(ids)) == len(ids)
    torch.testing.assert_close(torch.tensor(top["p"][1, 0][named]), after[0, 14].softmax(-1)[ids], rtol=0, atol=0)
    assert top["texts"][int(ids[0])] == " Mary"


def test_what_a_cell_hooks_is_not_in_the_picture(model, view):
    expected = asked(view, "effect", changes=[OFF])["kl"]
    asked(view, "effect", changes=[SILENT])
    with model.with_interventions([gs.zero("blocks.0.hook_attn_out")]):
        assert (asked(view, "effect", changes=[OFF])["kl"] == expected).all()


def test_two_prompts(model):
    other = PROMPT.replace("Mary", "Anna")
    window = asked(gs.router_view(model, PROMPT, compare=other), "window_other", first=0)
    ours, theirs = (model.run_with_cache(one)[1].routing.indices[:, 0] for one in (PROMPT, other))
    assert (window["experts"] == theirs.numpy()).all()
    assert (window["differs"] == (ours.sort(-1).values != theirs.sort(-1).values).any(-1).numpy()).all()
    shorter = gs.router_view(model, PROMPT, compare=Run(model, "The cat sat"))
    assert "window_other" not in shorter.answers and shorter.data["other"]["differs"] is None


def test_one_token_has_no_loss(model):
    effect = gs.router_view(model, torch.tensor([5])).answer("effect", {"changes": [{**OFF, "pos": 0}]})
    assert effect["loss"] == [None, None] and effect["kl"]["shape"] == [1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({**OFF, "layer": 6}, "Layer 6 does not exist: there are layers 0 to 5."),
        ({**OFF, "expert": 8}, "Expert 8 does not exist: a layer has experts 0 to 7."),
        ({**OFF, "pos": 15}, "Position 15 does not exist: the prompt has positions 0 to 14."),
        ({**OFF, "how": "mean"}, "A change is a layer, an expert, and how: reroute, silence, force"),
        ({}, "A change is a layer, an expert, and how: reroute, silence, force"),
    ],
)
def test_a_change_that_cannot_be(model, view, change, said):
    with pytest.raises(ValueError, match=said):
        gs.router_view(model, PROMPT, state={"changes": [change]})
    assert said in view.ask({"question": "effect", "arguments": {"changes": [change]}}, [])[0]["error"]


def test_as_many_experts_are_left_as_a_token_needs(view):
    changes = [{**OFF, "expert": expert} for expert in range(6)]
    asked(view, "effect", changes=changes)
    with pytest.raises(ValueError, match="Layer 2 chooses 2 of 8 experts, so at most 6 of them can be switched off"):
        asked(view, "effect", changes=[*changes, {**OFF, "expert": 7, "pos": 3}])


def test_a_dense_model_and_a_cache_without_the_routers(model):
    with pytest.raises(ValueError, match="nano-edge is dense and has no experts.*nano-moe"):
        gs.router_view(gs.load("nano-edge"), PROMPT)
    _, cache = model.run_with_cache(PROMPT, names_filter=["hook_embed"])
    with pytest.raises(KeyError, match=r"moe\.router\.hook_indices.*names_filter"):
        gs.router_view(model, cache)
    with pytest.raises(ValueError, match="show is 'load'"):
        gs.router_view(model, PROMPT, state={"show": "load"})
    with pytest.raises(ValueError, match="only is 6; it is one of None, 0, 1"):
        gs.router_view(model, PROMPT, state={"only": 6})


def test_a_trace_without_a_model(model):
    trace = gs.trace_routing(model, [PROMPT, "The cat sat on"])
    view = trace.view(1)
    assert view.data["tokens"] == model.to_str_tokens("The cat sat on")  # its padding is left out
    assert "effect" not in view.answers and not view.data["live"]
    made: dict = {}
    exec(view.data["setup"], made)
    _, cache = made["model"].run_with_cache(made["prompt"])
    assert (asked(view, "window", first=0)["experts"] == cache.routing.indices[:, 0].numpy()).all()
    assert gs.trace_routing(model, "The cat").view().data["tokens"][0] == "<bos>"
    assert cache.routing.view().data["tokens"][0] == "–"  # which knows no tokens
    with pytest.raises(ValueError, match="There is no prompt 2: the trace holds prompts 0 to 1"):
        trace.view(2)


def test_a_trace_s_view_is_linked_and_keeps_its_state(model):
    trace, selection = gs.trace_routing(model, PROMPT), gs.Selection(pos=3, layer=2)
    view = trace.view(selection=selection, state={"show": "margin"})
    assert view.selection is selection and view.state["show"] == "margin"
    with pytest.raises(ValueError, match="no model here to run changes"):
        trace.view(state={"committed": [OFF]})


def test_a_page_carries_what_was_committed(model):
    view = gs.router_view(model, PROMPT, state={"changes": [OFF], "committed": [OFF]})
    questions = [json.dumps(question) for question in view.exported()]
    assert len(questions) == len(set(questions)) == 1 + 6 + 1 + 1 + 6 + 15
    assert {question for question, _ in gs.router_view(model, PROMPT).exported()} == {"window", "layer"}


def test_long_prompts_are_answered_by_windows():
    view = gs.router_view(tiny_model("26B-A4B"), 2 + torch.arange(400) % 99)
    assert asked(view, "window", first=192)["experts"].shape == (6, 208, 3)
    assert asked(view, "layer", layer=0)["weights"].shape == (400, 3)
    assert list(view.exported()) == []


def test_arrays_that_do_not_fit():
    indices, floats = np.zeros((2, 3, 1), np.int32), np.zeros((2, 3), np.float32)
    good = Routing(indices, floats[..., None], floats, floats, 4)
    with pytest.raises((ValueError, TypeCheckError)):  # whichever looks first
        Routing(indices, floats[..., None], floats[:1], floats, 4)
    with pytest.raises(ValueError, match="Experts 0 to 9 were chosen of 4"):
        Routing(indices + np.array([0, 9, 0])[:, None], floats[..., None], floats, floats, 4)
    with pytest.raises(ValueError, match="The prompt has 2 tokens and the routing of 3"):
        RouterView(["a", "b"], good)
    with pytest.raises(ValueError, match="other layers or experts"):
        RouterView(["a"] * 3, good, other=(["a"] * 3, Routing(indices, floats[..., None], floats, floats, 5)))
