"""Results: their table, their intervals, their files, their pictures."""

import json
from dataclasses import replace

import pandas
import pytest
import torch

import gemmascope as gs
from gemmascope.results import Result, about, fingerprint
from gemmascope.testing import tiny_model


def result(n_samples: int = 5, axes: tuple[str, ...] = ("layer", "pos")) -> Result:
    cells = pandas.DataFrame([(a, b) for a in range(3) for b in range(4)], columns=list(axes))
    values = torch.randn(12, n_samples)
    baselines = {"clean": torch.ones(n_samples), "corrupted": torch.full((n_samples,), -1.0)}
    return Result(
        "test <b>", cells, values, "nats", baselines, {"tokens": ["<bos>", "<script>", "\n", " a"]}, "corrupted"
    )


def test_the_table_says_what_was_recovered():
    r = result()
    table = r.table
    assert list(table) == ["layer", "pos", "value", "low", "high", "recovered"]
    torch.testing.assert_close(torch.tensor(table["recovered"]).float(), (r.values.mean(-1) + 1) / 2)
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert list(r.top(3)["recovered"].abs()) == sorted(table["recovered"].abs(), reverse=True)[:3]


def test_effects_are_changes_of_the_base_run():
    """In noising most cells leave the metric as it is: those are not the largest."""
    cells = pandas.DataFrame({"layer": [0, 0, 1], "head": [0, 1, 0]})
    runs = {"clean": torch.tensor([2.0]), "corrupted": torch.tensor([-2.0])}
    noising = Result("noising", cells, torch.tensor([[2.1], [0.5], [2.0]]), "x", runs, base="clean")
    assert noising.top(1).index == [1] and replace(noising, base="corrupted").top(1).index == [0]
    torch.testing.assert_close(noising.effect, torch.tensor([0.1, -1.5, 0.0]))
    colours = noising.plot().layout.coloraxis
    assert (colours.cmin + colours.cmax) / 2 == 1
    colours = noising.plot("value").layout.coloraxis
    assert (colours.cmin + colours.cmax) / 2 == 2
    with pytest.raises(ValueError, match="base is 'unsteered'; the baselines are clean, corrupted"):
        replace(noising, base="unsteered")


def test_some_cells_can_be_taken():
    r = result()
    some = r.only(layer=[0, 2], pos=3)
    assert some.cells.values.tolist() == [[0, 3], [2, 3]] and torch.equal(some.values, r.values[[3, 11]])
    torch.testing.assert_close(some.recovered, r.recovered[[3, 11]])
    with pytest.raises(ValueError, match="has no axis 'head'; its axes are layer, pos"):
        r.only(head=1)
    with pytest.raises(ValueError, match="No cell of this test <b> has {'layer': 7}"):
        r.only(layer=7)


def test_intervals_cover_the_mean_as_often_as_they_say():
    cells = pandas.DataFrame({"draw": range(400)})
    low, high = Result("coverage", cells, torch.randn(400, 40), "x").interval(0.9)
    assert 0.84 < ((low < 0) & (high > 0)).double().mean() < 0.95


def test_files_bring_everything_back(tmp_path):
    r = result()
    r.about |= about(tiny_model("E2B"), seed=3)
    r.save(tmp_path / "a" / "b")
    back = Result.load(tmp_path / "a" / "b")
    assert back.table.equals(r.table) and back.about == r.about and (back.unit, back.base) == (r.unit, r.base)
    assert all(torch.equal(back.baselines[name], r.baselines[name]) for name in r.baselines)
    assert json.loads((tmp_path / "a" / "b" / "manifest.json").read_text())["about"]["settings"] == {"seed": 3}
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        Result.load(tmp_path)


def test_a_fingerprint_changes_with_any_weight():
    model = tiny_model("26B-A4B")
    first = fingerprint(model)
    assert first == fingerprint(tiny_model("26B-A4B")) != fingerprint(tiny_model("26B-A4B", seed=1))
    model.blocks[3].layer_scalar.data += 1e-3
    assert fingerprint(model) != first


def test_pictures_escape_what_tokens_hold():
    figure = result().plot().to_json()
    assert "<script>" not in figure and "&lt;script&gt;" in figure and "test &lt;b&gt;" in figure
    assert result().plot("value").data[0].z.shape == (3, 4)
    long = result()
    long.about["tokens"][3] = "a" * 99
    assert long.plot().data[0].x[3] == "3 " + "a" * 19 + "…"


def test_one_two_and_three_axes_have_pictures_and_four_do_not():
    assert result().plot().data[0].type == "heatmap"
    line = Result("line", pandas.DataFrame({"layer": [0, 1], "head": [2, 2]}), torch.randn(2, 1), "x").plot()
    assert line.data[0].type == "scatter" and len(line.data[0].y) == 2
    of_names = pandas.DataFrame({"sender": ["embed", "L0H1"]})
    bars = Result("bars", of_names, torch.randn(2, 5), "x", {"chance": torch.ones(5)}).plot()
    assert bars.data[0].type == "bar" and len(bars.data[0].error_y.array) == 2
    assert bars.layout.annotations[0].text == "chance"
    asked = pandas.DataFrame({"n_edges": [5, 9, 12], "n_kept": [4, 9, 9]})  # the second follows from the first
    assert list(Result("curve", asked, torch.randn(3, 1), "x").plot().data[0].x) == [5, 9, 12]
    cells = pandas.MultiIndex.from_product([range(2)] * 3, names=["layer", "head", "pos"]).to_frame(index=False)
    assert len(Result("three", cells, torch.randn(8, 1), "x").plot().data) == 2
    cells = pandas.MultiIndex.from_product([range(2)] * 4, names=list("abcd")).to_frame(index=False)
    with pytest.raises(ValueError, match="varies a, b, c, d: take a part"):
        Result("four", cells, torch.randn(16, 1), "x").plot()
    assert len(Result("four", cells, torch.randn(16, 1), "x").only(b=1).plot().data) == 2
    with pytest.raises(
        ValueError, match="'recoverd' is no figure of this test <b>; it has value, low, high, recovered"
    ):
        result().plot("recoverd")


def test_a_notebook_shows_the_table_escaped():
    r = result()
    r.cells["pos"] = ["<img>"] * 12
    assert "<img>" not in r._repr_html_() and "&lt;img&gt;" in r._repr_html_()
    assert repr(r) == "Result(test <b>: 12 cells by layer, pos, 5 samples)"


def test_what_cannot_be_compared_is_said():
    r = result()
    with pytest.raises(ValueError, match="12 cells came with figures for 3"):
        Result("x", r.cells, torch.zeros(3, 1), "x")
    with pytest.raises(ValueError, match="no clean and corrupted run"):
        _ = Result("x", r.cells, r.values, "x").recovered
    r.baselines["clean"] = r.baselines["corrupted"]
    with pytest.raises(ValueError, match="nothing to recover"):
        _ = r.recovered
    with pytest.raises(ValueError, match="two samples at least"):
        result(1).interval()


def test_metrics_are_what_they_are_called():
    model = tiny_model("26B-A4B")
    logits, reference = torch.randn(2, 3, 5, 101).unbind()
    rows = torch.arange(3)
    ids = torch.tensor([4, 8, 9])
    assert torch.equal(gs.logit_difference(model, ids, 7)(logits), logits[rows, -1, ids] - logits[:, -1, 7])
    assert torch.equal(gs.log_prob(model, [4, 8, 9], pos=2)(logits), logits[:, 2].log_softmax(-1)[rows, ids])
    torch.testing.assert_close(gs.prob(model, 7)(logits), logits[:, -1].softmax(-1)[:, 7])
    p, q = reference[:, -1].softmax(-1), logits[:, -1].softmax(-1)
    torch.testing.assert_close(gs.kl_divergence(reference)(logits), (p * (p / q).log()).sum(-1))
    with pytest.raises(ValueError, match="2 answers for 3 prompts"):
        gs.logit(model, [1, 2])(logits)
    with pytest.raises(ValueError, match="101 is out of range"):
        gs.logit(model, 101)
