"""Patching sweeps: every cell against a whole run with a hook written by hand."""

import weakref

import pandas
import pytest
import torch
from transformer_lens import patching

import gemmascope as gs
from gemmascope.experiments import patching as patching_module
from gemmascope.experiments import sweep
from gemmascope.testing import tiny_model

CLEAN, CORRUPTED = torch.randint(3, 101, (2, 3, 11), generator=torch.Generator().manual_seed(1)).unbind()


@pytest.fixture(scope="module", params=["26B-A4B", "E2B"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def moe():
    return tiny_model("26B-A4B")


def by_hand(model, prompts, name, change, metric):
    with torch.no_grad():
        return metric(model.run_with_hooks(prompts, fwd_hooks=[(name, lambda x, hook: (change(x), x)[1])]))


SWEEPS = [
    ("resid_pre", ("layer", "pos")),
    ("resid_post", ("layer", "pos")),
    ("z", ("layer", "head")),
    ("z", ("layer", "head", "pos")),
    ("attn.hook_k", ("layer", "head")),
    ("attn.hook_v_normed", ("layer", "pos")),
    ("pattern", ("layer", "head")),
    ("mlp_out", ("layer", "pos")),
    ("mlp.hook_post", ("layer", "neuron")),
    ("ln1_post.hook_scale", ("layer", "pos")),
]


@pytest.mark.parametrize("reads", ["last position", "all positions"])
@pytest.mark.parametrize("site, by", SWEEPS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_every_cell_is_what_a_hook_gives(model, site, by, reads):
    metric = gs.logit_difference(model, 5, [6, 7, 8]) if reads == "last position" else (lambda x: x[..., 3].mean(-1))
    direction = "noising" if site == "mlp_out" else "denoising"
    result = gs.activation_patching(model, CLEAN, CORRUPTED, metric, site, by, direction=direction, rows=9)
    source, base = (CORRUPTED, CLEAN) if direction == "noising" else (CLEAN, CORRUPTED)
    _, cache = model.run_with_cache(source, names_filter=lambda name: True)
    assert result.done.all() and set(result.axes) == set(by)
    for number in torch.randperm(len(result.cells))[:7].tolist():
        cell = result.cells.iloc[number]
        name = model.full_name((site, int(cell["layer"])))

        def change(x, cell=cell, name=name):
            axes = model.sites[name].axes.split()
            wanted = {"head": ("head", "kv_head"), "pos": ("pos",), "neuron": ("d_mlp",)}
            index = tuple(
                next((int(cell[axis]) for axis in by if axis in wanted and of in wanted[axis]), slice(None))
                for of in axes
            )
            x[index] = cache[name][index]

        torch.testing.assert_close(
            result.values[number], by_hand(model, base, name, change, metric), rtol=0, atol=3e-5, msg=f"{cell}"
        )
    torch.testing.assert_close(result.baselines["corrupted"], metric(model(CORRUPTED)).detach(), rtol=0, atol=2e-5)


def test_it_agrees_with_transformer_lens(model):
    def metric(logits):
        return logits[:, -1, 5] - logits[:, -1, 6]

    _, cache = model.run_with_cache(CLEAN)
    for theirs, site, by in (
        (patching.get_act_patch_resid_pre, "resid_pre", ("layer", "pos")),
        (patching.get_act_patch_attn_out, "attn_out", ("layer", "pos")),
        (patching.get_act_patch_attn_head_out_all_pos, "z", ("layer", "head")),
    ):
        with torch.no_grad():
            expected = theirs(model, CORRUPTED, cache, lambda logits: metric(logits).mean())
        ours = gs.activation_patching(model, CLEAN, CORRUPTED, metric, site, by)
        torch.testing.assert_close(ours.mean.view_as(expected), expected, rtol=0, atol=2e-5)


def test_an_expert_is_what_it_adds_wherever_it_was_chosen(moe):
    metric = gs.logit(moe, 5)
    result = gs.activation_patching(moe, CLEAN, CORRUPTED, metric, "moe.hook_expert_out", ("layer", "expert"))
    runs = [moe.run_with_cache(tokens, names_filter=lambda name: "moe" in name)[1] for tokens in (CLEAN, CORRUPTED)]
    assert len(result.cells) == 6 * 8
    for layer, expert in ((1, 2), (4, 7)):
        said = [
            (run["moe.hook_expert_out", layer] * (run["moe.router.hook_indices", layer] == expert)[..., None]).sum(-2)
            for run in runs
        ]
        want = by_hand(moe, CORRUPTED, f"blocks.{layer}.moe.hook_out", lambda x: x.add_(said[0] - said[1]), metric)  # noqa: B023
        cell = (result.cells.layer == layer) & (result.cells.expert == expert)
        torch.testing.assert_close(result.values[torch.tensor(cell.to_numpy())][0], want, rtol=0, atol=2e-5)


def test_several_sites_and_any_cells(moe):
    cells = pandas.DataFrame(
        {"site": ["z", "z", "resid_mid"], "layer": [1, 4, 2], "pos": [3, 10, 0], "head": [0, 2, 1]}
    )
    with pytest.raises(ValueError, match="blocks.2.hook_resid_mid has no heads"):
        gs.activation_patching(moe, CLEAN, CORRUPTED, gs.logit(moe, 5), ["z", "resid_mid"], cells=cells)
    metric, sites = gs.logit(moe, 5), ["resid_pre", "attn_out", "mlp_out"]
    whole = gs.activation_patching(moe, CLEAN, CORRUPTED, metric, sites)
    assert len(whole.cells) == 3 * 6 * 11 and list(whole.cells["site"].unique()) == sites
    some = whole.cells.iloc[[100, 3, 57]]
    part = gs.activation_patching(moe, CLEAN, CORRUPTED, metric, sites, cells=some)
    torch.testing.assert_close(part.values, whole.values[[100, 3, 57]], rtol=0, atol=2e-5)


def test_patching_everything_gives_the_other_run_and_nothing_comes_from_the_future(model):
    result = gs.activation_patching(model, CLEAN, CORRUPTED, gs.logit(model, 5), "resid_post", ("layer",))
    assert result.recovered[-1] == pytest.approx(1, abs=1e-4)
    early = gs.logit(model, 5, pos=4)
    late = gs.activation_patching(model, CLEAN, CORRUPTED, early, "resid_pre", positions=[7, 8])
    torch.testing.assert_close(
        late.values, early(model(CORRUPTED)).detach().expand(len(late.cells), -1), rtol=0, atol=2e-5
    )


def test_an_interrupted_sweep_keeps_what_it_has_and_goes_on(moe, capsys, monkeypatch):
    metric = gs.logit(moe, 5)
    whole = gs.activation_patching(moe, CLEAN, CORRUPTED, metric)
    run, calls = sweep.Baseline.values, []

    def stop_at_the_fourth(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(sweep.Baseline, "values", stop_at_the_fourth)
    part = gs.activation_patching(moe, CLEAN, CORRUPTED, metric)
    assert "Interrupted: 55 of 66 cells to go" in capsys.readouterr().out
    assert part.done.sum() == 11 and torch.equal(part.values[part.done], whole.values[part.done])
    assert "55 not run" in repr(part)
    rest = gs.activation_patching(moe, CLEAN, CORRUPTED, metric, resume=part)
    assert torch.equal(rest.values, whole.values) and len(calls) == 4 + 15
    with pytest.raises(ValueError, match="resume holds 66 cells by layer, pos, not the 24"):
        gs.activation_patching(moe, CLEAN, CORRUPTED, metric, "z", ("layer", "head"), resume=part)


def test_prompts_of_different_lengths_are_patched_by_pairs_of_positions(moe):
    long = torch.cat((CLEAN[:1, :4], torch.tensor([[50, 60]]), CLEAN[:1, 4:]), dim=1)
    pairs = gs.aligned(moe, long, CLEAN[:1])
    assert pairs == [(i, i) for i in range(4)] + [(i + 2, i) for i in range(4, 11)]
    metric = gs.logit(moe, 5)
    with pytest.raises(ValueError, match=r"13 tokens and the corrupted one 11.*gs\.aligned"):
        gs.activation_patching(moe, long, CLEAN[:1], metric)
    result = gs.activation_patching(moe, long, CLEAN[:1], metric, positions=pairs)
    _, cache = moe.run_with_cache(long)

    def replaced(x):
        x[:, 6] = cache["resid_pre", 3][:, 8]

    want = by_hand(moe, CLEAN[:1], "blocks.3.hook_resid_pre", replaced, metric)
    cell = result.cells.query("layer == 3 and pos == 6").index[0]
    torch.testing.assert_close(result.values[cell], want, rtol=0, atol=2e-5)


def test_padded_texts_are_prompts_too():
    model = gs.load("nano-moe")
    clean = [
        "When Mary and John went to the store, John gave a book to",
        "At the store, Tom talked with Anna. Soon Tom brought a key to",
    ]
    bad = [text.replace(" John gave", " Mary gave").replace(" Soon Tom", " Soon Anna") for text in clean]
    metric = gs.logit_difference(model, [" Mary", " Anna"], [" John", " Tom"])
    together = gs.activation_patching(model, clean, bad, metric, "z", ("layer", "head"))
    for row, (a, b) in enumerate(zip(clean, bad, strict=True)):
        one = gs.logit_difference(model, *((" Mary", " John"), (" Anna", " Tom"))[row])
        alone = gs.activation_patching(model, a, b, one, "z", ("layer", "head"))
        torch.testing.assert_close(together.values[:, row], alone.values[:, 0], rtol=0, atol=1e-3)
    assert together.baselines["clean"].min() > 2 and together.baselines["corrupted"].max() < -2


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(corrupted=CORRUPTED[:2]), "3 clean prompts and 2 corrupted"),
        (dict(metric=lambda logits: logits[:, -1]), r"gave \[3, 101\].*a metric returns one figure a prompt, \[3\]"),
        (dict(metric=lambda logits: logits[:, -1, 0] * float("nan")), "gave NaN"),
        (dict(positions=[11]), "Position 11 does not exist: the clean prompt has 11 tokens"),
        (dict(by=("layer", "head")), "blocks.0.hook_resid_pre has no head; a sweep there goes by layer, pos"),
        (dict(by=("layer", "token")), "by names 'token'; axes are layer, pos"),
        (dict(by=("pos",)), 'by needs "layer"'),
        (
            dict(cells=pandas.DataFrame({"layer": [1], "position": [2]})),
            "cells has a column 'position'; columns are site",
        ),
        (dict(cells=pandas.DataFrame({"pos": [2]})), "cells has no column 'layer'"),
        (dict(direction="sideways"), "direction is 'sideways'"),
        (dict(layers=[6]), "Layer 6 does not exist"),
        (dict(site="z", cells=pandas.DataFrame({"layer": [1], "head": [4]})), "heads 4 does not exist; there are 4"),
    ],
)
def test_bad_input_is_said_in_one_sentence(moe, change, said):
    given = dict(clean=CLEAN, corrupted=CORRUPTED, metric=gs.logit(moe, 5)) | change
    with pytest.raises(ValueError, match=said):
        gs.activation_patching(moe, **given)


def test_an_answer_is_one_token_and_a_site_exists(moe):
    with pytest.raises(ValueError, match="token"):
        gs.logit_difference(gs.load("nano-moe"), "hello world", " John")
    with pytest.raises(KeyError, match="the nearest are"):
        gs.activation_patching(moe, CLEAN, CORRUPTED, gs.logit(moe, 5), "resid_pree")


def test_memory_does_not_grow_with_the_cells(moe, monkeypatch):
    seen = []
    forward = moe.forward
    monkeypatch.setattr(moe, "forward", lambda run, **kw: (seen.append(len(run.tokens)), forward(run, **kw))[1])
    gs.activation_patching(moe, CLEAN, CORRUPTED, gs.logit(moe, 5), "mlp.hook_post", ("layer", "neuron"), rows=12)
    assert len(seen) == 2 + 6 * 10 and max(seen) == 12


def test_a_hook_that_counts_positions_sees_all_of_them(moe):
    """Without one, a cell is run from its own position on."""
    metric, name = gs.logit(moe, 5), "blocks.4.hook_resid_pre"

    def push(x, hook):
        x[:, 2] += 1.0

    with moe.hooks(fwd_hooks=[(name, push)]):
        result = gs.activation_patching(moe, CLEAN, CORRUPTED, metric, layers=[1], positions=[6])
        _, cache = moe.run_with_cache(CLEAN, names_filter="blocks.1.hook_resid_pre")
        patched = gs.patch(("resid_pre", 1), cache, positions=6)
        expected = metric(moe(CORRUPTED, interventions=patched)).detach()
    torch.testing.assert_close(result.values[0], expected, rtol=0, atol=2e-5)
    bare = gs.activation_patching(moe, CLEAN, CORRUPTED, metric, layers=[1], positions=[6])
    assert (bare.values[0] - expected).abs().max() > 1e-3


def test_what_experts_add_is_held_while_their_cells_run(moe, monkeypatch):
    made, told = [], patching_module._said_by
    monkeypatch.setattr(patching_module, "_said_by", lambda *args: (made.append(weakref.ref(x := told(*args))), x)[1])
    run, alive = sweep.Baseline.values, []

    def counting(self, *args):
        alive.append(sum(ref() is not None for ref in made))
        return run(self, *args)

    monkeypatch.setattr(sweep.Baseline, "values", counting)
    gs.activation_patching(moe, CLEAN, CORRUPTED, gs.logit(moe, 5), "moe.hook_expert_out", ("layer", "expert"), rows=6)
    assert len(alive) == 6 * 4 and max(alive) <= 2  # one cell's, while it is made
