"""The numbers of the attribution view: parts add up to their whole, and equal what direct_logit_attribution gives."""

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.views.run import Run

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def run(request) -> Run:
    model = gs.load(request.param)
    return Run(model, PROMPT)


@pytest.fixture(scope="module")
def moe() -> Run:
    return Run(gs.load("nano-moe"), PROMPT)


def asking(view, **asked):
    return lambda question, **more: view.answers[question](**{"correct": None, "wrong": None, **asked, **more})


def close(found, expected):
    """To 1e-5 of the largest number in play."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    scale = max(1.0, float(np.nanmax(np.abs(expected))))
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("pos", [14, 3])
def test_children_add_up_to_their_parents(run, pos):
    view, cfg = gs.attribution_view(run.model, run), run.model.cfg
    ask = asking(view, pos=pos)
    found = ask("components")
    kinds = view.data["kinds"]
    by_layer = found["values"][1:].reshape(cfg.n_layers, len(kinds))
    attention, feed_forward = by_layer[:, 0], by_layer[:, 1]
    unembed = run.stored("hook_unembed")[pos]
    first, second = unembed.topk(2).indices.tolist()
    assert (found["correct"]["id"], found["wrong"]["id"]) == (first, second)
    close(found["values"].sum() + found["rest"], unembed[first] - unembed[second])
    assert abs(found["rest"]) < 1e-4
    close(found["capped"], run.logits[pos, first] - run.logits[pos, second])
    heads = ask("heads")["values"]
    close(heads.sum(1), attention)
    for layer in (0, cfg.n_layers - 1):
        for head in range(cfg.n_heads):
            sources = ask("sources", layer=layer, head=head)
            close(sources["values"].sum(), heads[layer, head])
            close(sources["attention"], run.cache.pattern(layer, heads=head, rows=[pos]).flatten())
    if cfg.n_experts:
        experts = ask("experts")["values"]
        close(np.nansum(experts, 1), feed_forward)
        assert (np.isfinite(experts[:, 1:]).sum(1) == cfg.experts_per_token).all()
        expert = int(np.isfinite(experts[2, 1:]).nonzero()[0][0])
        wholes = {None: experts[2, 0], expert: experts[2, expert + 1]}
    else:
        wholes = {None: feed_forward[2]}
    for expert, whole in wholes.items():
        neurons = ask("neurons", layer=2, expert=expert)
        close(neurons["values"].sum() + neurons["rest"], whole)
        assert len(neurons["values"]) == 24 < neurons["n"]


def test_the_numbers_are_those_of_the_read_out(moe):
    view = gs.attribution_view(moe.model, moe, " Mary", " John", pos=9)
    mary, john = view.state["correct"], view.state["wrong"]
    ask = asking(view, pos=9, correct=mary, wrong=john)
    for by, question in {"component": "components", "head": "heads", "source": "sources"}.items():
        expected = gs.direct_logit_attribution(moe.model, PROMPT, " Mary", " John", by=by, pos=9)
        if by == "source":
            expected = expected.only(layer=4, head=1)
        found = ask(question, **({"layer": 4, "head": 1} if by == "source" else {}))["values"].flatten()
        torch.testing.assert_close(torch.tensor(found), expected.mean, rtol=0, atol=1e-6)


def test_which_tokens_are_compared(moe):
    view = gs.attribution_view(moe.model, moe)
    at = {"pos": 14}
    likeliest = [one["id"] for one in view.answers["components"](**at, correct=None, wrong=None)["likeliest"]]

    def pair(correct, wrong):
        found = view.answers["components"](**at, correct=correct, wrong=wrong)
        return found["correct"]["id"], found["wrong"] and found["wrong"]["id"]

    first, second, third = likeliest[:3]
    assert pair(None, None) == (first, second)
    assert pair(None, first) == (second, first)
    assert pair(None, third) == (first, third)
    assert pair(third, None) == (third, None)
    alone = view.answers["components"](**at, correct=third, wrong=None)
    close(alone["total"], moe.stored("hook_unembed")[14, third])
    assert view.answers["token"](text=" Mary") == {"id": moe.model.to_single_token(" Mary"), "text": " Mary"}
    with pytest.raises(ValueError, match="is 2 tokens, not one"):
        view.answers["token"](text="Mary")


def test_positions_are_read_in_pages(moe, monkeypatch):
    """Of a large model only some positions are held at once: what is said of each is the same."""
    whole = gs.attribution_view(moe.model, moe)
    monkeypatch.setattr("gemmascope.views.attribution.HELD", 20_000)
    paged = gs.attribution_view(moe.model, moe)
    for pos in (14, 0, 7, 13):
        for question in ("components", "heads", "experts"):
            a, b = (asking(view, pos=pos)(question)["values"] for view in (whole, paged))
            np.testing.assert_array_equal(a, b)


def test_hooks_of_the_model_are_in_the_picture():
    model = gs.load("nano-moe")
    with model.hooks(fwd_hooks=[("blocks.3.attn.hook_z", lambda z, hook: z * 0)]):
        view = gs.attribution_view(model, PROMPT)
    found = asking(view, pos=14)("components")
    assert found["values"][1 + 3 * 2] == 0 and abs(found["rest"]) < 1e-4
    assert np.abs(asking(view, pos=14)("heads")["values"][3]).max() == 0
    with model.hooks(fwd_hooks=[("blocks.3.hook_resid_mid", lambda x, hook: x + 1)]):
        view = gs.attribution_view(model, PROMPT)
    assert abs(asking(view, pos=14)("components")["rest"]) > 0.01  # which no component wrote


def test_a_cache_is_enough_or_says_what_it_lacks():
    model = gs.load("nano-moe")
    _, cache = model.run_with_cache(PROMPT)
    view = gs.attribution_view(model, cache)
    assert view.data["tokens"][2] == " Mary"
    _, cache = model.run_with_cache(PROMPT, names_filter=["hook_logits", "ln_final.hook_scale"])
    with pytest.raises(KeyError, match=r"hook_embed was not cached.*name it in names_filter"):
        gs.attribution_view(model, cache)
    names = [
        name for name in model.sites if name.endswith(("_out", "hook_embed", "hook_logits", "scale", "resid_post"))
    ]
    _, cache = model.run_with_cache(PROMPT, names_filter=names)
    view = gs.attribution_view(model, cache)
    with pytest.raises(KeyError, match="hook_z was not cached.*names_filter"):
        asking(view, pos=14)("heads")


def test_one_token_and_what_is_refused():
    model = tiny_model("31B")
    view = gs.attribution_view(model, torch.tensor([[5]]))
    assert view.data["tokens"] == ["5"] and view.data["pos"] == 0
    close(asking(view, pos=0)("sources", layer=0, head=1)["attention"], [1])
    with pytest.raises(ValueError, match="Position 1 is out of range: the prompt has 1 tokens"):
        gs.attribution_view(model, torch.tensor([[5]]), pos=1)
    with pytest.raises(ValueError, match="names 2 tokens"):
        gs.attribution_view(model, torch.tensor([[5]]), [3, 4])
    with pytest.raises(ValueError, match="Token id 1000 is out of range"):
        gs.attribution_view(model, torch.tensor([[5]]), 1000)
    with pytest.raises(ValueError, match="form is 'bars'"):
        gs.attribution_view(model, torch.tensor([[5]]), state={"form": "bars"})
    with pytest.raises(ValueError, match="no answer to 'words'"):
        view.answer("words", {})


def test_the_still_says_the_most(moe):
    sentence, table = gs.attribution_view(moe.model, moe, " Mary", " John").still()
    assert sentence.startswith("The logit of ' Mary' minus that of ' John' after token 14, ' to', is ")
    assert list(table) == ["layer", "component", "adds"] and len(table) == 13
    assert table["adds"].abs().is_monotonic_decreasing


def test_what_an_exported_page_carries(run):
    view, cfg = gs.attribution_view(run.model, run), run.model.cfg
    questions = list(view.exported())
    for question, arguments in questions:
        assert view.answer(question, arguments)
    names = [question for question, _ in questions]
    assert names.count("sources") == cfg.n_layers * cfg.n_heads
    assert names.count("neurons") == cfg.n_layers * (1 + (cfg.experts_per_token or 0))
