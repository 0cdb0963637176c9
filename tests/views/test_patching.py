"""The grid of a patching sweep: its numbers are those of gs.activation_patching, to the bit, however it was run."""

import numpy as np
import pandas
import pytest
import torch

import gemmascope as gs
from gemmascope.results import Result

CLEAN = "When Mary and John went to the store, John gave a book to"
CORRUPTED = "When Mary and John went to the store, Mary gave a book to"
ANSWERS = (" Mary", " John")


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def run(grid, passes=None):
    """Asks for passes as a page does."""
    first = grid.answer("grid", settings(grid))["heard"]
    while passes is None or passes > 0:
        came = grid.answer("cells", {**settings(grid), "first": first})
        if not came["numbers"]["shape"][0]:
            return
        first += came["numbers"]["shape"][0]
        passes = None if passes is None else passes - 1


def settings(grid):
    return dict(grid.state)


def values(packed):
    return np.frombuffer(packed["data"], packed["dtype"]).reshape(packed["shape"])


SWEEPS = [
    ("resid_pre", ["layer", "pos"], "denoising", "logit difference"),
    ("z", ["layer", "head"], "noising", "log probability (nats)"),
    ("moe.hook_expert_out", ["layer", "expert"], "denoising", "KL (nats)"),
    ("mlp_out", ["layer", "pos"], "noising", "logit difference"),
]


@pytest.mark.parametrize("site, by, direction, metric", SWEEPS, ids=[f"{one[0]}-{one[2]}" for one in SWEEPS])
def test_a_grid_run_in_pieces_is_the_sweep_to_the_bit(model, site, by, direction, metric):
    state = {"direction": direction, "metric": metric}
    grid = gs.patch_grid(model, CLEAN, CORRUPTED, answers=ANSWERS, site=site, by=by, state=state)
    of = {
        "logit difference": gs.logit_difference(model, *ANSWERS),
        "log probability (nats)": gs.log_prob(model, " Mary"),
        "KL (nats)": gs.kl_divergence(model(CLEAN)),
    }[metric]
    want = gs.activation_patching(model, CLEAN, CORRUPTED, of, site, by, direction=direction, progress=False)
    run(grid, passes=2)
    part = grid.result
    assert 0 < part.done.sum() < len(part.cells) and torch.equal(part.values[part.done], want.values[part.done])
    run(grid)
    got = grid.result
    assert got.cells.equals(want.cells) and torch.equal(got.values, want.values) and got.base == want.base
    assert all(torch.equal(got.baselines[name], want.baselines[name]) for name in ("clean", "corrupted"))
    # What the page is told, and one cell run again.
    told = grid.answer("grid", settings(grid))
    assert np.array_equal(values(told["values"]), want.mean.numpy()) and told["heard"] == len(want.cells)
    number = int(want.effect.abs().argmax())
    again = grid.answer("cell", {**settings(grid), "number": number})
    assert again["value"] == pytest.approx(float(want.mean[number]), abs=2e-5)


def test_a_cell_run_again_shows_the_next_token_in_three_runs(model):
    grid = gs.patch_grid(model, CLEAN, CORRUPTED)
    cell = grid.answer("cell", {**settings(grid), "number": 4 * 15 + 14})  # layer 4, the last position
    probs = values(cell["probs"])
    clean, corrupted = (model(text)[0, -1].softmax(-1)[cell["ids"]].detach().numpy() for text in (CLEAN, CORRUPTED))
    np.testing.assert_allclose(probs[:2], [clean, corrupted], atol=1e-5)
    _, cache = model.run_with_cache(CLEAN)
    patched = model(CORRUPTED, interventions=gs.patch(("resid_pre", 4), cache, positions=14))
    np.testing.assert_allclose(probs[2], patched[0, -1].softmax(-1)[cell["ids"]].detach().numpy(), atol=1e-5)
    assert set(cell["tokens"][:2]) == {" Mary", " John"}
    # The likeliest tokens of the runs are the answers, where none were given.
    assert grid.data["offers"]["metrics"][0]["tokens"] == [" Mary", " John"]


def test_a_cell_names_no_token_that_no_run_gives_a_chance(model):
    # The last layer's stream decides alone: the three runs are sure, and the rest of each top five is noise.
    grid = gs.patch_grid(model, CLEAN, CORRUPTED)
    cell = grid.answer("cell", {**settings(grid), "number": 4 * 15 + 14})
    most = values(cell["probs"]).max(axis=0)
    assert len(most) >= 3 and (most[3:] >= 1e-3).all() and (np.diff(most) <= 0).all()
    # Where many are likely, all of the top fives stay.
    grid = gs.patch_grid(model, "When Mary and John went to the", "When John and Mary went to the")
    cell = grid.answer("cell", {**settings(grid), "number": 0})
    assert len(cell["ids"]) >= 5 and values(cell["probs"]).max(axis=0).min() >= 1e-3


def test_sweeps_looked_at_before_go_on_where_they_stopped(model):
    grid = gs.patch_grid(model, CLEAN, CORRUPTED, answers=ANSWERS)
    first = settings(grid)
    run(grid, passes=3)
    done = int(grid.result.done.sum())
    grid.state = {**first, "site": "z", "by": ["layer", "head", "pos"]}
    assert grid.answer("grid", settings(grid))["cell"]["shape"] == [6, 4, 15] and not grid.result.done.any()
    grid.state = first
    assert int(grid.result.done.sum()) == done
    # Another page that shows the view hears what ran, without running it again.
    told = grid.answer("cells", {**first, "first": 0})
    assert told["numbers"]["shape"] == [done] and int(grid.result.done.sum()) == done
    run(grid)
    whole = gs.activation_patching(model, CLEAN, CORRUPTED, gs.logit_difference(model, *ANSWERS), progress=False)
    assert torch.equal(grid.result.values, whole.values)


def test_python_that_is_copied_has_its_prompts_and_metric(model):
    ids = model.to_tokens(CORRUPTED)
    grid = gs.patch_grid(model, CLEAN, ids, answers=(" Mary", int(ids[0, 4])))
    names: dict = {}
    exec(grid.data["setup"], names)
    assert torch.equal(names["corrupted"], ids) and names["clean"] == CLEAN
    for metric in grid.data["offers"]["metrics"]:
        assert eval(metric["python"], names).name == metric["name"]


def test_a_metric_of_ones_own_comes_first(model):
    def entropy(logits):
        log_probs = logits[:, -1].log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    grid = gs.patch_grid(model, CLEAN, CORRUPTED, entropy, site="attn_out")
    assert grid.state["metric"] == "entropy" and len(grid.data["offers"]["metrics"]) == 4
    run(grid, passes=1)
    assert grid.result.unit == "entropy" and grid.result.done.any()


def test_prompts_of_different_lengths_are_patched_where_they_agree(model):
    longer = CLEAN.replace("went to the store", "went to to the store")
    assert len(model.to_tokens(longer)[0]) == 16
    grid = gs.patch_grid(model, longer, CORRUPTED, answers=ANSWERS)
    pairs = gs.aligned(model, longer, CORRUPTED)
    columns = [tuple(pair) for pair in grid.data["prompts"]["columns"]]
    assert [pair for pair in columns if pair in pairs] == pairs and sum(-1 in pair for pair in columns) == 1
    assert all("pos" in by for site in grid.data["offers"]["sites"] for by in site["by"])
    run(grid)
    metric = gs.logit_difference(model, *ANSWERS)
    want = gs.activation_patching(model, longer, CORRUPTED, metric, positions=pairs, progress=False)
    assert torch.equal(grid.result.values, want.values)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(corrupted=CLEAN), "are the same tokens"),
        (dict(clean=torch.tensor([5, 6]), corrupted=torch.tensor([7, 8, 9])), "no token in common"),
        (dict(site="z", by=("layer", "expert")), "has no expert"),
        (dict(answers=(" Mary", "two words")), "token"),
        (dict(state={"metric": "charm"}), "no metric 'charm'; it has logit difference"),
        (dict(state={"direction": "up"}), "direction is 'up'"),
        (dict(state={"colour": 1}), "has no 'colour'"),
        (dict(clean=""), "empty"),
    ],
)
def test_bad_input_is_said_in_one_sentence(model, change, said):
    with pytest.raises(ValueError, match=said):
        gs.patch_grid(model, **(dict(clean=CLEAN, corrupted=CORRUPTED, answers=ANSWERS) | change))


def test_any_result_of_three_axes_or_fewer_has_a_view():
    cells = pandas.MultiIndex.from_product([["a", "b"], [2, 3], range(4)], names=["kind", "layer", "pos"]).to_frame(
        index=False
    )
    figures = torch.arange(32.0).view(16, 2)
    figures[3] = torch.nan
    result = Result("made up", cells, figures, "nats", {"clean": torch.ones(2)}, {"tokens": list("wxyz")}, "clean")
    view = result.view()
    assert view.result is result and view.still()[0].startswith("made up: Result(")
    told = view.answer("grid", {})
    assert told["cell"]["shape"] == [2, 2, 4] and told["nothing"] == 1 and not told["shares"]
    assert [axis["name"] for axis in told["axes"]] == ["kind", "layer", "pos"]
    assert told["axes"][2]["tokens"] == list("wxyz") and told["interval"]["shape"] == [16, 2]
    assert [axis["of"] for axis in told["axes"]] == [None, None, "the first of 2 clean prompts"]
    one = result.only(kind="a", layer=2).view()
    assert one.answer("grid", {})["cell"]["shape"] == [1, 1, 4]
    four = pandas.MultiIndex.from_product([range(2)] * 4, names=list("abcd")).to_frame(index=False)
    with pytest.raises(ValueError, match="three axes at most"):
        Result("x", four, torch.rand(16, 1), "y").view()


def test_a_result_says_what_was_patched(model):
    metric = gs.logit_difference(model, *ANSWERS)

    def said(site, by=("layer",), **more):
        sweep = gs.activation_patching(model, CLEAN, CORRUPTED, metric, site, by, layers=[1, 2], progress=False, **more)
        return [result.view().data for result in (sweep, sweep.only(layer=2))]

    streams, _ = said("resid_pre")
    assert streams["title"] == "activation patching of resid_pre, denoising, nano-moe"
    assert streams["note"] == (
        "Each cell is one layer: resid_pre there, taken from the clean run and put into the corrupted run."
    )
    heads, one_layer = said("z", ("layer", "head"), direction="noising")
    assert heads["title"] == "activation patching (noising) of z, nano-moe"
    assert one_layer["title"] == "activation patching (noising) of z, layer 2, nano-moe"
    assert heads["note"].startswith("Each cell is one layer and head: z there, taken from the corrupted run")
    both, _ = said(["attn_out", "mlp_out"])
    assert "of attn_out and mlp_out, denoising" in both["title"] and "one site and layer" in both["note"]
    many = gs.activation_patching(model, [CLEAN, CORRUPTED], [CORRUPTED, CLEAN], metric, layers=[0], progress=False)
    view = many.view()
    assert "Figures are means over 2 prompts." in view.data["note"]
    assert view.answer("grid", {})["axes"][-1]["of"] == "the first of 2 corrupted prompts"


def test_settings_that_tell_results_apart_are_said():
    cells = pandas.DataFrame({"layer": [0, 1]})

    def said(experiment, base=None, **settings):
        about = {"model": "m", "settings": settings}
        view = Result(experiment, cells, torch.rand(2, 1), "nats", {"clean": torch.ones(1)}, about, base).view()
        return view.data["title"], view.data["note"]

    assert said("attribution patching", by="neuron", direction="denoising", prompts=1)[0] == (
        "attribution patching of neuron, denoising, m"
    )
    assert said("direct logit attribution by head", by="head")[0] == "direct logit attribution by head, m"
    assert said("edge attribution", method="eap-ig")[0] == "edge attribution, eap-ig, m"
    assert said("path patching", "clean", receivers=["L3H2.q", "L3H1.q"])[0] == (
        "path patching into L3H2.q and L3H1.q, m"
    )
    title, note = said("steering at blocks.1.hook_z", site="blocks.1.hook_z", norm=2.0, seed=None, ids=[1, 2])
    assert title == "steering at blocks.1.hook_z, m"
    assert note == "Each cell is one layer; its colour says what was measured there (nats). Settings: norm 2."
    _, note = said("attention knockout", "clean", window=3, renormalize=True, answer=" Mary")
    assert note == (
        "Each cell is one layer; its colour says what was measured in the clean run with that changed (nats). "
        "Settings: window 3, renormalize, answer ' Mary'."
    )


def test_the_facet_of_three_axes_is_state(model):
    cells = pandas.MultiIndex.from_product([["a", "b"], [2, 3], range(4)], names=["kind", "layer", "pos"])
    result = Result("x", cells.to_frame(index=False), torch.rand(16, 1), "nats")
    assert result.view(state={"facet": "b"}).state["facet"] == "b" and result.view().state["facet"] is None
    for state, said in [
        ({"facet": "c"}, "facet is 'c'; it is an entry of kind: a, b"),
        ({"site": "z"}, "has no 'site'; it has facet"),
    ]:
        with pytest.raises(ValueError, match=said):
            result.view(state=state)
    with pytest.raises(ValueError, match="layer, pos has no facets: they need three axes"):
        result.only(kind="a").view(state={"facet": "a"})
    grid = gs.patch_grid(model, CLEAN, CORRUPTED, site="z", by=("layer", "head", "pos"), state={"facet": np.int64(3)})
    assert type(grid.state["facet"]) is int
    with pytest.raises(ValueError, match="facet is 6; it is an entry of layer: 0, 1"):
        gs.patch_grid(model, CLEAN, CORRUPTED, site="z", by=("layer", "head", "pos"), state={"facet": 6})
