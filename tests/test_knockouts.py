"""Attention knock-outs: against the explicit edit of the pattern, and on what nano-moe is known to do."""

import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model

TOKENS = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(1))
SPANS = {"start": slice(0, 3), "middle": [5, 6], "last": -1}


@pytest.mark.parametrize("architecture", ["26B-A4B", "E4B"])
@pytest.mark.parametrize(
    "window, layers", [(1, {3: [3]}), (3, {0: [0, 1], 3: [2, 3, 4], 5: [4, 5, 6]}), (2, {2: [2, 3]})]
)
def test_a_cell_is_the_edit_of_the_scores_in_its_layers(architecture, window, layers):
    model = tiny_model(architecture)
    metric = gs.logit(model, 5)
    result = gs.attention_knockout(model, TOKENS, metric, SPANS, window=window)
    assert list(result.cells["edge"].unique()) == ["start -> last", "middle -> last"]
    for layer, together in layers.items():
        together = [one for one in together if one < model.cfg.n_layers]
        where = (result.cells["edge"] == "middle -> last") & (result.cells["layer"] == layer)

        def change(scores, hook):
            scores[:, :, -1, [5, 6]] = float("-inf")

        hooks = [(f"blocks.{one}.attn.hook_attn_scores", change) for one in together]
        cell = where.to_numpy().nonzero()[0][0]
        expected = metric(model.run_with_hooks(TOKENS, fwd_hooks=hooks)).detach()
        torch.testing.assert_close(result.values[cell], expected, rtol=0, atol=2e-5)


def test_head_by_head_and_without_renormalising():
    model = tiny_model("26B-A4B")
    metric = gs.logit(model, 5)
    result = gs.attention_knockout(
        model, TOKENS, metric, SPANS, [("start", "middle")], by=("layer", "head"), renormalize=False
    )

    def change(pattern, hook):
        pattern[:, 2, [5, 6], :3] = 0

    cell = result.cells.query("layer == 1 and head == 2").index[0]
    expected = metric(model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", change)])).detach()
    torch.testing.assert_close(result.values[cell], expected, rtol=0, atol=2e-5)
    assert len(result.cells) == 6 * 4 and (result.values != result.baselines["clean"]).any()


def test_names_are_found_in_each_prompt_and_the_answer_flows_from_them():
    model = gs.load("nano-moe")
    prompts = [
        "When Mary and John went to the store, John gave a book to",
        "At the store, Tom talked with Anna. Soon Tom brought a key to",
    ]
    metric = gs.logit_difference(model, [" Mary", " Anna"], [" John", " Tom"])
    runs = [
        gs.attention_knockout(
            model, prompt, gs.logit_difference(model, *answers), {"io": answers[0], "last": -1}, window=6
        )
        for prompt, answers in zip(prompts, [(" Mary", " John"), (" Anna", " Tom")], strict=True)
    ]
    together = gs.attention_knockout(
        model, prompts, metric, {"io": [-1], "last": -1}, [("last", "last")], window=6, layers=[2]
    )
    assert together.values.shape == (1, 2)
    for run in runs:  # without reading the indirect object, the model no longer knows it
        assert run.baselines["clean"].item() > 4 and run.values[2].item() < 1


def test_attention_between_spans_is_that_of_the_pattern():
    for architecture in ("26B-A4B", "E2B"):
        model = tiny_model(architecture)
        result = gs.attention_to(model, TOKENS, SPANS)
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "rot" in name)
        cell = result.cells.query("layer == 2 and head == 3 and to == 'middle' and `from` == 'start'").index[0]
        expected = cache["pattern", 2][:, 3, 5:7, :3].sum(-1).mean(-1)
        torch.testing.assert_close(result.values[cell], expected.detach())
        assert len(result.cells) == model.cfg.n_layers * 4 * 9


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(edges=[("start", "lost")]), "No span is called 'lost'; there are start, middle, last"),
        (dict(edges=[("last", "start")]), "No token of 'start' sees one of 'last'"),
        (dict(spans={"a": 30, "last": -1}), "position 30 does not exist; there are 12"),
        (dict(spans={"a": slice(5, 5), "last": -1}), "Span 'a' is empty"),
        (dict(spans={"last": -1}), "no edge to cut"),
        (dict(window=0), "window is 0"),
        (dict(by=("head",)), "by is"),
    ],
)
def test_bad_input_is_said_in_one_sentence(change, said):
    model = tiny_model("26B-A4B")
    given = dict(prompts=TOKENS, metric=gs.logit(model, 5), spans=SPANS) | change
    with pytest.raises(ValueError, match=said):
        gs.attention_knockout(model, **given)


def test_a_text_stands_once():
    model = gs.load("nano-moe")
    text = "When Mary and John went to the store, John gave a book to"
    with pytest.raises(ValueError, match="' John' stands 2 times in"):
        gs.attention_to(model, text, {"subject": " John", "last": -1})
