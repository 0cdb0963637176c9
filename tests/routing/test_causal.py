"""Effects of routing: against hooks by hand, on planted experts, and on what nano-moe is known to do."""

import random

import pytest
import torch
from torch.nn import functional as F

import gemmascope as gs
from gemmascope.routing.causal import _changed, _matched, _wrong, agreement
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import LANGUAGES, Corpus

TOKENS = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(1))
MOE = "blocks.{}.moe."
QUIET = dict(progress=False)


def nats(model, tokens, hooks=(), mask=None):
    """Loss [text] and log-probabilities of a run with hooks."""
    logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks)).detach()
    logp = logits[:, :-1].log_softmax(-1)
    return -logp.gather(-1, tokens[:, 1:, None])[..., 0].mean(-1), logp


def kl(full, now):
    return F.kl_div(now, full, log_target=True, reduction="none").sum(-1).mean(-1)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("26B-A4B")


@pytest.fixture(scope="module")
def nano():
    return gs.load("nano-moe")


@pytest.fixture(scope="module")
def languages(nano):
    """Texts of the four languages, and the language of each."""
    rng, corpus = random.Random(5), Corpus(nano.tokenizer.backend)
    drawn = [(nano.tokenizer.decode(corpus.document(rng, name).ids[1:]), name) for name in LANGUAGES for _ in range(6)]
    return tuple(zip(*drawn, strict=True))


def by_hand(model, mode, layer, expert):
    """Hooks that do what a mode says, written anew."""
    chosen = {}

    def see(indices, hook):
        chosen["now"] = indices.clone()

    def silence(out, hook):
        out[chosen["now"] == expert] = 0
        return out

    def average(out, hook):
        hit = chosen["now"] == expert
        out[hit] = out[hit].mean(0)
        return out

    def ban(logits, hook):
        logits[..., expert] = -1e9
        return logits

    def force(indices, hook):
        for row in indices.view(-1, indices.shape[-1]):
            if expert not in row:
                row[-1] = expert
        return indices

    at = MOE.format(layer)
    seen = (at + "router.hook_indices", see)
    return {
        "silence": [seen, (at + "hook_expert_out", silence)],
        "mean": [seen, (at + "hook_expert_out", average)],
        "reroute": [(at + "router.hook_logits", ban)],
        "force": [(at + "router.hook_indices", force)],
    }[mode]


@pytest.mark.parametrize("mode", ["silence", "reroute", "mean", "force"])
def test_an_effect_is_that_of_hooks_by_hand(tiny, mode):
    effect = gs.expert_ablation(tiny, TOKENS, mode, layers=[1, -1], controls=False, **QUIET)
    assert effect.loss.cells.values.tolist() == [[layer, expert] for layer in (1, 5) for expert in range(8)]
    before, full = nats(tiny, TOKENS)
    torch.testing.assert_close(effect.loss.baselines["full"], before)
    for cell, (layer, expert) in enumerate(effect.loss.cells.values.tolist()):
        loss, logp = nats(tiny, TOKENS, by_hand(tiny, mode, layer, expert))
        torch.testing.assert_close(effect.loss.values[cell], loss - before, rtol=0, atol=2e-5)
        torch.testing.assert_close(effect.kl.values[cell], kl(full, logp), rtol=0, atol=2e-5)
    assert (effect.loss.values != 0).any() and not effect.controls


def test_dropping_is_dropping_and_renormalising_and_the_scale_of_weights_is_nothing(tiny, nano):
    for model, tokens in ((tiny, TOKENS), (nano, torch.randint(3, 1000, (2, 9)))):
        effect = gs.expert_ablation(model, tokens, "silence", layers=[2], controls=False, **QUIET)
        rerouted = gs.expert_ablation(model, tokens, "reroute", layers=[2], controls=False, **QUIET)
        _, cache = model.run_with_cache(tokens)
        expert = int(cache["moe.router.hook_indices", 2].flatten().mode().values)
        before, full = nats(model, tokens)

        def renormalised(weights, hook, cache=cache, expert=expert):
            kept = weights * (cache["moe.router.hook_indices", 2] != expert)
            return kept / kept.sum(-1, keepdim=True).clamp(min=1e-9)

        dropped, _ = nats(model, tokens, [(MOE.format(2) + "router.hook_weights", renormalised)])
        torch.testing.assert_close(effect.loss.values[expert], dropped - before, rtol=0, atol=3e-5)
        assert (effect.loss.values[expert] - rerouted.loss.values[expert]).abs().max() > 1e-4  # another intervention
        _, scaled = nats(model, tokens, [(MOE.format(2) + "router.hook_weights", lambda w, hook: 7.3 * w)])
        torch.testing.assert_close(scaled, full, rtol=0, atol=2e-4)


def test_to_force_what_was_chosen_is_nothing_and_to_keep_all_is_nothing(tiny):
    _, cache = tiny.run_with_cache(TOKENS)
    own = [gs.replace(("moe.router.hook_indices", layer), cache["moe.router.hook_indices", layer]) for layer in (0, 3)]
    assert torch.equal(tiny(TOKENS, interventions=own), tiny(TOKENS))
    effect = gs.fewer_experts(tiny, TOKENS, (1, 2, 3), layers=[0, 4], **QUIET)
    assert (effect.loss.values[effect.loss.cells["k"] == 3] == 0).all()

    def first(weights, hook):
        return weights * torch.tensor([1.0, 0, 0])

    before, _ = nats(tiny, TOKENS)
    alone, _ = nats(tiny, TOKENS, [(MOE.format(4) + "router.hook_weights", first)])
    cell = effect.loss.cells.query("layer == 4 and k == 1").index[0]
    torch.testing.assert_close(effect.loss.values[cell], alone - before, rtol=0, atol=2e-5)
    both = gs.fewer_experts(tiny, TOKENS, (1,), layers=[0, 4], by_layer=False, **QUIET)
    hooks = [(MOE.format(layer) + "router.hook_weights", first) for layer in (0, 4)]
    torch.testing.assert_close(both.loss.values[0], nats(tiny, TOKENS, hooks)[0] - before, rtol=0, atol=2e-5)


def planted(double):
    """Two experts a token; in layer 3, experts 0 and 1 are chosen everywhere and, with `double`, are one."""
    model = tiny_model("26B-A4B", experts_per_token=2)
    inputs = model.run_with_cache(TOKENS)[1]["moe.router.hook_in", 3].flatten(0, 1)
    moe = model.blocks[3].moe
    with torch.no_grad():
        for weight in (moe.gate_up_proj, moe.down_proj) if double else ():
            weight[1] = weight[0]
        moe.router.proj.weight[:2] = torch.linalg.lstsq(inputs, torch.full((len(inputs), 2), 9.0)).solution.T
    return model


def test_a_heavy_expert_with_a_double_has_load_without_effect():
    effects = {double: gs.expert_ablation(planted(double), TOKENS, layers=[3], **QUIET) for double in (True, False)}
    for effect in effects.values():
        assert effect.load.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    # Its double says the same, and the norm after the sum takes away that there is less of it.
    assert effects[True].kl.values.abs().max() < 1e-6 and effects[True].loss.values.abs().max() < 2e-5
    assert effects[False].kl.mean[:2].min() > 1e-4
    both = gs.drop_expert(3, [0, 1], reroute=False)
    changed = planted(True)(TOKENS, interventions=both).detach()[:, :-1].log_softmax(-1)
    assert kl(nats(planted(True), TOKENS)[1], changed).mean() > 1e-4


def test_controls_are_the_others_and_as_many_other_slots(tiny):
    effect = gs.expert_ablation(tiny, TOKENS, layers=[2], **QUIET)
    few = gs.expert_ablation(tiny, TOKENS, layers=[2], experts=[5, 3], **QUIET)
    rows = effect.loss.values
    for cell, expert in enumerate([5, 3]):
        torch.testing.assert_close(few.loss.values[cell], rows[expert])
        drawn = random.Random(f"0/2/{expert}").sample([(2, e) for e in range(8) if e != expert], 4)
        mean = rows[[other for _, other in drawn]].mean(0)
        torch.testing.assert_close(few.controls["random expert"].values[cell], mean)
    matched = effect.controls["matched load"].values
    unused = effect.load == 0
    assert (matched[unused] == 0).all() and (matched[~unused] != 0).any(-1).all()
    torch.testing.assert_close(effect.load.sum(), torch.tensor(3.0))
    again = gs.expert_ablation(tiny, TOKENS, layers=[2], **QUIET)
    assert torch.equal(again.controls["matched load"].values, matched)
    assert {"load", "loss", "kl", "random expert", "matched load"} <= set(effect.table)


def test_a_wrong_expert_takes_the_weight(tiny):
    _, cache = tiny.run_with_cache(TOKENS)
    chosen, weights = (cache[f"moe.router.hook_{part}", 2] for part in ("indices", "weights"))
    drawn = _changed("replace", 2, chosen == 4, chosen, weights, 8, {}, torch.Generator())
    _, now = tiny.run_with_cache(TOKENS, interventions=drawn)
    new = now["moe.router.hook_indices", 2]
    assert torch.equal(new != chosen, chosen == 4) and (chosen == 4).any()
    assert not (new[..., None] == chosen[..., None, :]).any(-1)[chosen == 4].any()
    torch.testing.assert_close(now["moe.router.hook_weights", 2], weights)


def test_matched_slots_are_as_many_tokens_and_never_the_expert():
    chosen = torch.rand(4, 11, 8).topk(3).indices
    real = torch.rand(4, 11) > 0.3
    for expert in range(8):
        hit = _matched(chosen, expert, real, torch.Generator().manual_seed(expert))
        assert hit.sum() == ((chosen == expert).any(-1) & real).sum() == hit.any(-1).sum()
        assert not (hit & (chosen == expert)).any() and not hit[~real].any()
    # At one expert a token, a token that chose it has no other slot: others are taken, as far as there are any.
    chosen = torch.tensor([[0, 0, 1, 2, 3], [1, 1, 1, 1, 0]])[..., None]
    for expert, n in ((0, 3), (1, 5), (4, 0)):
        hit = _matched(chosen, expert, torch.ones(2, 5, dtype=torch.bool), torch.Generator().manual_seed(0))
        assert hit.sum() == n and not (hit & (chosen == expert)).any()


def test_padding_batches_and_labels_change_nothing_but_the_table(nano, languages):
    texts, labels = languages
    texts, labels = [*texts[:2], "When Mary and John", *texts[-2:]], [*labels[:2], "gifts", *labels[-2:]]
    settings = dict(layers=[4], experts=[0, 3], controls=False, **QUIET)
    effect = gs.expert_ablation(nano, texts, labels=labels, batch_size=2, **settings)
    for text, own in enumerate(texts):
        alone = gs.expert_ablation(nano, own, **settings)
        torch.testing.assert_close(effect.loss.values[:, text], alone.loss.values[:, 0], rtol=0, atol=5e-5)
        here = torch.tensor(effect.tokens["text"].to_numpy() == text)
        torch.testing.assert_close(effect.by_token.values[:, here], alone.by_token.values, rtol=0, atol=2e-4)
    assert effect.tokens.query("text == 2")["token"].tolist() == ["<bos>", "When", " Mary", " and"]
    by_label = effect.by_label.set_index(["expert", "label"])
    rows = torch.tensor((effect.tokens["label"] == labels[0]).to_numpy())
    expected = effect.by_token.values[1, rows].mean().item()
    assert by_label.loc[(3, labels[0]), "loss"] == pytest.approx(expected)
    tokens = [list(range(len(nano.to_tokens(text)[0]))) for text in texts]
    mixed = gs.expert_ablation(nano, texts[:2], labels=[tokens[0], labels[1]], **settings).tokens["label"].tolist()
    assert mixed[: len(tokens[0]) - 1] == tokens[0][:-1] and set(mixed[len(tokens[0]) - 1 :]) == {labels[1]}
    by_place = gs.expert_ablation(nano, texts, labels=tokens, **settings)
    assert by_place.tokens["label"].tolist() == by_place.tokens["pos"].tolist()


def test_a_metric_is_measured_beside_the_loss(nano):
    prompts = ["When Mary and John went to the store, John gave a book to", "Once Tom sat with Anna in the park. There"]
    metric = gs.logit(nano, [" Mary", " Tom"])
    effect = gs.expert_ablation(nano, prompts, layers=[3], experts=[5, 7], metric=metric, controls=False, **QUIET)
    for cell, expert in enumerate([5, 7]):
        change = gs.drop_expert(3, expert, reroute=False)
        expected = metric(nano(prompts, interventions=change)) - metric(nano(prompts))
        torch.testing.assert_close(effect.metric.values[cell], expected.detach(), rtol=0, atol=1e-4)
    assert "change of logit" in effect.table


def test_an_expert_of_a_language_matters_to_that_language_and_to_no_other(nano, languages):
    texts, labels = languages
    _, cache = nano.run_with_cache(list(texts), names_filter=lambda name: name.endswith("hook_indices"))
    effect = gs.expert_ablation(nano, texts, layers=[3, 4], experts=[0, 4], labels=labels, controls=False, **QUIET)
    harm = effect.by_label.pivot(index=["layer", "expert"], columns="label", values="kl")
    # The card of the model: in layer 3 expert 4 is tavi's, in layer 4 expert 0 is muzo's first choice.
    others = [name for name in LANGUAGES if name != "tavi"]
    assert harm.loc[(3, 4), "tavi"] > 20 * harm.loc[(3, 4), others].max()
    assert harm.loc[(4, 0)].idxmax() == "muzo"
    loss = effect.by_label.pivot(index=["layer", "expert"], columns="label", values="loss")
    assert loss.loc[(3, 4), "tavi"] > 0.003 and loss.loc[(3, 4), others].abs().max() < 1e-3


def test_no_experts_and_wrong_experts_are_those_by_hand(tiny):
    effect = gs.branch_ablation(tiny, TOKENS, layers=[4], **QUIET)
    before, _ = nats(tiny, TOKENS)
    none, _ = nats(tiny, TOKENS, [("blocks.4.hook_moe_out", lambda x, hook: x * 0)])
    assert effect.loss.cells.values.tolist() == [[4, "none"], [4, "wrong"]]
    torch.testing.assert_close(effect.loss.values[0], none - before, rtol=0, atol=2e-5)
    chosen = tiny.run_with_cache(TOKENS)[1]["moe.router.hook_indices", 4]
    wrong = _wrong(chosen, 8, torch.Generator().manual_seed(0))
    assert not (wrong[..., None] == chosen[..., None, :]).any() and (wrong.sort(-1).values.diff(dim=-1) > 0).all()
    _, cache = tiny.run_with_cache(TOKENS)
    weights = gs.patch(("moe.router.hook_weights", 4), cache)
    with tiny.with_interventions([gs.patch(("moe.router.hook_indices", 4), wrong), weights]):
        by_hand = nats(tiny, TOKENS)[0]
    torch.testing.assert_close(effect.loss.values[1], by_hand - before, rtol=0, atol=2e-5)


def test_wrong_experts_hurt_more_than_none(nano, languages):
    texts, labels = languages
    effect = gs.branch_ablation(nano, texts, by_layer=False, labels=labels, **QUIET)
    loss = effect.by_label.pivot(index="experts", columns="label", values="loss")
    assert (loss.loc["wrong"] > 3 * loss.loc["none"].clip(lower=0.03)).all()


def test_the_estimate_orders_the_silencings(nano, languages):
    texts = [
        *languages[0],
        "The capital of Norland is",
        "When Mary and John went to the store, John gave a book to Mary.",
    ]
    exact = gs.expert_ablation(nano, texts, controls=False, **QUIET)
    estimate = gs.silencing_estimate(nano, texts)
    figures = agreement(estimate, exact.loss)
    assert figures["sign"] >= 0.9 and figures["spearman"] > 0.85
    assert (estimate.values[exact.kl.values == 0] == 0).all()
    assert agreement(exact.loss, exact.loss)["spearman"] == pytest.approx(1)


def test_the_estimate_is_exact_where_what_follows_is_linear(tiny):
    """At the last layer, in a metric that is linear in the stream: the norm of the end held, no cap."""
    model = tiny_model("26B-A4B", final_softcap=None)
    metric = gs.logit(model, 7)
    _, cache = model.run_with_cache(TOKENS)
    with model.with_interventions(gs.freeze_norms(model, cache, layers=[])):
        estimate = gs.silencing_estimate(model, TOKENS, metric, layers=[-1])
    for expert in range(8):
        change = [gs.drop_expert(5, expert, reroute=False), gs.freeze_norms(model, cache, layers=[])]
        exact = metric(model(TOKENS, interventions=change)) - metric(model(TOKENS))
        torch.testing.assert_close(estimate.values[expert], exact.detach(), rtol=0, atol=2e-5)


def test_bad_input_is_refused(tiny):
    dense = tiny_model("31B")
    with pytest.raises(ValueError, match="tiny 31B is dense .* google/gemma-4-26B-A4B, nano-moe"):
        gs.expert_ablation(dense, TOKENS)
    with pytest.raises(ValueError, match="Layer 6 does not exist"):
        gs.expert_ablation(tiny, TOKENS, layers=[6])
    with pytest.raises(ValueError, match="Expert 8 does not exist: a layer of tiny 26B-A4B has experts 0 to 7"):
        gs.expert_ablation(tiny, TOKENS, experts=[8])
    with pytest.raises(ValueError, match="mode is 'drop'; it is one of silence, reroute, mean, replace, force"):
        gs.expert_ablation(tiny, TOKENS, "drop")
    for labels, n in ((["a", "b"], 2), ("abc", 1)):
        with pytest.raises(ValueError, match=f"labels for {n} texts and 3 texts"):
            gs.expert_ablation(tiny, TOKENS, labels=labels)
    with pytest.raises(ValueError, match=r"Text 1 has 9 tokens \(BOS is one\) and labels for 8"):
        gs.expert_ablation(tiny, TOKENS, labels=[[0] * 9, [0] * 8, [0] * 9])
    with pytest.raises(ValueError, match="Text 0 has one token"):
        gs.expert_ablation(tiny, TOKENS[:, :1])
    with pytest.raises(ValueError, match="There are no labels"):
        _ = gs.fewer_experts(tiny, TOKENS, layers=[0], **QUIET).by_label
    with pytest.raises(ValueError, match="k is 4; .* chooses 3 experts a token, so k is 1 to 3"):
        gs.fewer_experts(tiny, TOKENS, (4,))
    with pytest.raises(ValueError, match="chooses 3 of 5 experts a token: 3 wrong ones are not left"):
        gs.branch_ablation(tiny_model("26B-A4B", n_experts=5), TOKENS)
    with pytest.raises(ValueError, match="3 wrong ones are not left"):
        gs.expert_ablation(tiny_model("26B-A4B", n_experts=5), TOKENS, "replace")
    with pytest.raises(ValueError, match="has no gradient"):
        gs.silencing_estimate(tiny, TOKENS, lambda logits: logits.argmax(-1)[:, -1].float())
    one, two = (gs.silencing_estimate(tiny, TOKENS, layers=[layer]) for layer in (0, 1))
    with pytest.raises(ValueError, match="The estimate has 8 cells of 3 samples"):
        agreement(one, two)
