"""Attribution patching, against exact patching through hooks and against its definition spelled out."""

import random

import pytest
import torch

import gemmascope as gs
from gemmascope import ops
from gemmascope.experiments import attribution
from gemmascope.experiments.attribution import attribution_patching
from gemmascope.metrics import Metric, logit_difference
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import gift

N_POS = 11
GENERATOR = torch.Generator().manual_seed(3)
CLEAN = torch.randint(3, 50, (2, N_POS), generator=GENERATOR)
CORRUPTED = torch.randint(3, 50, (2, N_POS), generator=GENERATOR)
NEARBY = CLEAN + 50
"""Tokens that `nearly_linear` puts next to CLEAN's."""


def logit_gap(logits):
    return logits[:, -1, 5] - logits[:, -1, 9]


def nearly_linear(architecture, eps=1e-8):
    """A model whose tokens 53 to 99 are tokens 3 to 49, moved by a hair: between the two it is linear."""
    model = tiny_model(architecture).double()
    with torch.no_grad():
        for table in (model.embed, model.per_layer.table if model.per_layer else model.embed):
            table.weight[53:100] = table.weight[3:50] + eps * torch.randn_like(table.weight[3:50])
    return model


def put(patch, index):
    """A hook that patches a part of a tensor."""

    def hook(x, hook):
        x[index] = patch[hook.name][index]

    return hook


@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
def test_equals_exact_patching_on_a_linear_model(architecture):
    model = nearly_linear(architecture)
    kinds = [kind for kind in attribution.NODES if kind not in ("ple_out", "expert") or attribution._sites(model, kind)]
    results = attribution_patching(model, CLEAN, NEARBY, logit_gap, kinds, by_position=False)
    with torch.no_grad():
        _, patch = model.run_with_cache(CLEAN)
        slots = patch["moe.hook_expert_out", 2] if model.cfg.n_experts else None
        base = logit_gap(model(NEARBY))
        _, here = model.run_with_cache(NEARBY)
        for kind in kinds:
            result = results[kind]
            at = result.cells.layer == 2
            for cell, row in list(result.cells[at].iterrows())[:6]:
                part = row.iloc[-1] if len(row) > 1 else slice(None)
                index = (..., part) if kind == "neuron" else (..., part, slice(None))
                hook = put(patch, (...,) if len(row) == 1 else index)
                if kind == "expert":
                    change = torch.zeros_like(here["moe.hook_out", 2])
                    for sign, run, outs in ((1, patch, slots), (-1, here, here["moe.hook_expert_out", 2])):
                        chosen = run["moe.router.hook_indices", 2] == part
                        change += sign * (outs * chosen[..., None]).sum(2)
                    hook = lambda x, hook, change=change: x + change  # noqa: E731
                name = f"blocks.2.{attribution.NODES[kind]}"
                exact = logit_gap(model.run_with_hooks(NEARBY, fwd_hooks=[(name, hook)])) - base
                error = (result.values[cell] - exact).abs().max() / result.values[at.to_list()].abs().max()
                assert error < 1e-5, (kind, part, error)


def test_positions_sum_to_the_whole_and_both_directions_mirror():
    model = tiny_model("26B-A4B").double()
    kinds = ["resid_mid", "head", "expert", "neuron", "k"]
    whole = attribution_patching(model, CLEAN, CORRUPTED, logit_gap, kinds, by_position=False)
    parts = attribution_patching(model, CLEAN, CORRUPTED, logit_gap, kinds, by_position=True)
    for kind in kinds:
        axes = [axis for axis in parts[kind].axes if axis != "pos"]
        table = parts[kind].table.drop(columns=["pos", "low", "high"]).groupby(axes).value.sum().reset_index()
        torch.testing.assert_close(
            torch.tensor(table.value), torch.tensor(whole[kind].table.value), rtol=1e-4, atol=1e-6
        )
    mirrored = attribution_patching(model, CORRUPTED, CLEAN, logit_gap, "head", direction="noising")
    torch.testing.assert_close(mirrored.values, whole["head"].values)
    assert attribution_patching(model, CLEAN, CORRUPTED, logit_gap, "resid_pre").axes == ["layer", "pos"]


def test_an_expert_that_only_one_run_chose_counts_with_that_runs_output():
    model = tiny_model("26B-A4B").double()
    result = attribution_patching(model, CLEAN, CORRUPTED, logit_gap, "expert")
    grads = {}
    keep = lambda gradient, hook: grads.__setitem__(hook.name, gradient)  # noqa: E731
    with model.hooks(bwd_hooks=[("blocks.3.moe.hook_out", keep)]):
        logit_gap(model(CORRUPTED)).sum().backward()
    total = 0
    with torch.no_grad():
        for sign, tokens in ((1, CLEAN), (-1, CORRUPTED)):
            _, run = model.run_with_cache(tokens)
            products = (run["moe.hook_expert_out", 3] * grads["blocks.3.moe.hook_out"][:, :, None]).sum(-1)
            chosen = run["moe.router.hook_indices", 3][..., None] == torch.arange(8)
            total = total + sign * (products[..., None] * chosen).sum((1, 2))
    torch.testing.assert_close(
        result.values[(result.cells.layer == 3).to_list()].double(), total.T, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("kind", ["q", "k"])
@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
def test_qk_fix_recomputes_the_pattern(architecture, kind, by_position):
    model = tiny_model(architecture).double()
    result = attribution_patching(model, CLEAN, CORRUPTED, logit_gap, kind, qk_fix=True, by_position=by_position)
    grads, layer, head = {}, 2, 1
    keep = lambda gradient, hook: grads.__setitem__(hook.name, gradient)  # noqa: E731
    with model.hooks(bwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)]):
        logit_gap(model(CORRUPTED)).sum().backward()
    with torch.no_grad():
        _, here = model.run_with_cache(CORRUPTED)
        _, there = model.run_with_cache(CLEAN)
        head = min(head, there[f"rot_{kind}", layer].shape[2] - 1)
        readers = [l for l, shape in enumerate(model.cfg.layers) if l == layer or shape.kv_source == layer]
        for pos in range(N_POS) if by_position else [slice(None)]:
            patched = here[f"rot_{kind}", layer].clone()
            patched[:, pos, head] = there[f"rot_{kind}", layer][:, pos, head]
            expected = 0
            for reader in [layer] if kind == "q" else readers:
                q, k = (patched, here["rot_k", layer]) if kind == "q" else (here["rot_q", reader], patched)
                visible = here._masks[model.layer(reader).kind]
                change = ops.attention_scores(q, k, visible).softmax(-1) - here["pattern", reader]
                expected = expected + (change * grads[f"blocks.{reader}.attn.hook_pattern"]).sum((1, 2, 3))
            at = (result.cells.layer == layer) & (result.cells[result.axes[-1]] == head)
            at = at & (result.cells.pos == pos) if by_position else at
            torch.testing.assert_close(result.values[at.to_list()][0].double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
def test_grad_drop_averages_over_runs_without_one_layers_gradient(architecture):
    model = tiny_model(architecture).double()
    kinds = ["head", "q", "resid_pre"]
    settings = dict(qk_fix=True)
    dropped = attribution_patching(model, CLEAN, CORRUPTED, logit_gap, kinds, grad_drop=True, **settings)
    total = dict.fromkeys(kinds, 0)
    for layer in range(model.cfg.n_layers):
        outs = [f"blocks.{layer}.hook_{out}_out" for out in ("attn", "mlp", "ple")]
        cut = [(name, lambda x, hook: x.detach()) for name in outs if name in model.sites]
        with model.hooks(fwd_hooks=cut):
            one = attribution_patching(model, CLEAN, CORRUPTED, logit_gap, kinds, **settings)
        assert layer == model.cfg.n_layers - 1 or one["resid_pre"].values.abs().max() > 0
        total = {kind: total[kind] + one[kind].values.abs() for kind in kinds}
    for kind in kinds:
        torch.testing.assert_close(dropped[kind].values, total[kind] / (model.cfg.n_layers - 1), rtol=1e-4, atol=1e-7)


def test_two_forward_passes_and_one_backward_for_all_kinds(monkeypatch):
    model = tiny_model("26B-A4B")
    runs, backward = [], []
    forward, grad = type(model).forward, attribution.gradients
    monkeypatch.setattr(type(model), "forward", lambda self, *a, **k: runs.append(1) or forward(self, *a, **k))
    monkeypatch.setattr(attribution, "gradients", lambda *a, **k: backward.append(1) or grad(*a, **k))
    attribution_patching(model, CLEAN, CORRUPTED, logit_gap, ("head", "expert", "q", "neuron"), qk_fix=True)
    assert (len(runs), len(backward)) == (2, 1)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_padding_changes_nothing():
    model = tiny_model("E2B")
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.ones(2, N_POS + 3, dtype=torch.bool)
    mask[:, :3] = False
    plain = attribution_patching(model, CLEAN, CORRUPTED, logit_gap, "head")
    padded = [torch.cat((pad, tokens), dim=1) for tokens in (CLEAN, CORRUPTED)]
    padded = attribution_patching(model, *padded, logit_gap, "head", attention_mask=mask)
    torch.testing.assert_close(plain.values, padded.values, rtol=1e-3, atol=1e-5)


def test_ranks_the_heads_of_a_trained_model_as_patching_does():
    model, rng = gs.load("nano-moe"), random.Random(0)
    drawn = [gift(rng) for _ in range(60)]
    words = [[piece for piece, _ in one.priced[:-2]] for one in drawn]
    chosen = [(one, parts) for one, parts in zip(drawn, words, strict=True) if len(parts) == len(words[0])][:6]
    clean, corrupted = [], []
    for one, parts in chosen:  # the second mention of the subject becomes one of the indirect object
        last = max(at for at, part in enumerate(parts) if part == " " + one.subject)
        clean.append("".join(parts))
        corrupted.append("".join([*parts[:last], " " + one.io, *parts[last + 1 :]]))
    metric = logit_difference(model, *zip(*[(" " + one.io, " " + one.subject) for one, _ in chosen], strict=True))
    with torch.no_grad():
        _, patch = model.run_with_cache(corrupted)
        base = metric(model(clean))

    def agreement(kind, **settings):
        """The rank correlation of estimated and exact effects."""
        result = attribution_patching(model, clean, corrupted, metric, kind, direction="noising", **settings)
        exact = []
        for layer, head in result.cells.itertuples(index=False):
            hook = (f"blocks.{layer}.{attribution.NODES[kind]}", put(patch, (..., head, slice(None))))
            with torch.no_grad():
                exact.append(metric(model.run_with_hooks(clean, fwd_hooks=[hook])) - base)
        exact = torch.stack(exact).mean(-1)
        ranks = torch.stack([result.mean, exact]).argsort(-1).argsort(-1).double()
        return torch.corrcoef(ranks)[0, 1], result.top(1).index[0] == int(exact.abs().argmax())

    ranked, same_first = agreement("head")
    assert ranked > 0.8 and same_first
    for kind in ("q", "k"):
        fixed = agreement(kind, qk_fix=True)[0]
        assert fixed > 0.8 and fixed > agreement(kind)[0] + 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(corrupted=CORRUPTED[:, 1:]), "Clean prompt 0 has 11 tokens and its corrupted version 10"),
        (dict(corrupted=CORRUPTED[:1]), "There are 2 clean prompts and 1 corrupted ones"),
        (dict(by="heads"), "no kind of node 'heads'; the nearest are head"),
        (dict(by="ple_out"), r"tiny 26B-A4B has no hook_ple_out"),
        (dict(direction="backwards"), "direction is 'backwards'"),
        (dict(qk_fix=True), "qk_fix corrects 'q' and 'k', and by is head"),
        (dict(metric=lambda logits: logits[:, -1, :3]), r"gave \[2, 3\] for logits"),
        (dict(metric=lambda logits: logits[:, -1].argmax(-1).float()), "has no gradient"),
        (dict(metric=lambda logits: logits[:, -1, 5] * torch.nan), "gave NaN"),
        (dict(metric=Metric("root", lambda logits: (logits[:, 5] * 0).sqrt())), "gradient is NaN"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, message):
    arguments = dict(clean=CLEAN, corrupted=CORRUPTED, metric=logit_gap, by="head") | change
    with pytest.raises(ValueError, match=message):
        attribution_patching(tiny_model("26B-A4B"), **arguments)


def test_a_patch_without_meaning_is_refused():
    model = tiny_model("31B")

    def break_clean_run(x, hook):
        return x * torch.nan if not torch.is_grad_enabled() else x

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", break_clean_run)]):
        with pytest.raises(ValueError, match="Effects by 'head' are NaN"):
            attribution_patching(model, CLEAN, CORRUPTED, logit_gap)
