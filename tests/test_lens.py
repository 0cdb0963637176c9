"""Lenses: the last row is the model's own, figures equal the definition, and training a tuned lens helps."""

import json

import pytest
import torch

import gemmascope as gs
from gemmascope.readout import lens as lens_module
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import Corpus

PROMPT = "When Mary and John went to the store, John gave a book to"
TOKENS = torch.randint(3, 101, (2, 13), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def nano(request):
    return gs.load(request.param)


@pytest.fixture(scope="module")
def documents(nano):
    corpus = Corpus(nano.tokenizer.backend, 7)
    return corpus.batch(0, 16, 64).tokens, corpus.batch(1, 4, 64).tokens


# The logit lens


@torch.no_grad()
def test_last_row_is_the_models_own_output(nano):
    lens = gs.logit_lens(nano, PROMPT, " Mary")
    logits = nano(PROMPT)
    assert torch.equal(lens.logits(nano.cfg.n_layers - 1), logits)
    log_probs = logits[0].log_softmax(-1)[:, nano.to_single_token(" Mary")]
    last = lens.log_prob.table.query(f"layer == {nano.cfg.n_layers - 1}")
    assert last["value"].tolist() == log_probs.tolist()
    kl = lens.kl.table.set_index(["layer", "pos"])["value"]
    assert (kl[nano.cfg.n_layers - 1] == 0).all() and (kl[-1] > 0).all()


@pytest.mark.parametrize("architecture", ["26B-A4B", "E2B"])
@torch.no_grad()
def test_figures_equal_their_definitions(architecture):
    model = tiny_model(architecture).double()
    lens = gs.logit_lens(model, TOKENS, [7, 50], positions=[4, -1], top=3)
    _, cache = model.run_with_cache(TOKENS)
    final = model(TOKENS).log_softmax(-1)
    names = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers))]
    listed = lens.top.set_index(["prompt", "layer", "pos", "rank"]).sort_index()
    for layer, name in enumerate(names, start=-1):
        x = cache[name]
        normed = x / (x.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() * model.ln_final.weight
        now = (30 * torch.tanh(normed @ model.W_U / 30)).log_softmax(-1)
        for pos in (4, 12):
            cell = lens.rank.cells.index[(lens.rank.cells["layer"] == layer) & (lens.rank.cells["pos"] == pos)][0]
            for prompt, token in enumerate((7, 50)):
                p, q = final[prompt, pos], now[prompt, pos]
                expected = {
                    "log_prob": q[token],
                    "rank": q.argsort(descending=True).tolist().index(token),
                    "entropy": torch.distributions.Categorical(logits=q).entropy(),
                    "kl": sum(p[i].exp() * (p[i] - q[i]) for i in range(101)),
                }
                for what, value in expected.items():
                    assert float(getattr(lens, what).values[cell, prompt]) == pytest.approx(float(value), abs=1e-9)
                best = q.exp().topk(3)
                rows = listed.loc[prompt, layer, pos]
                assert rows["id"].tolist() == best.indices.tolist() == rows["token"].tolist()
                assert rows["prob"].tolist() == pytest.approx(best.values.tolist())


def test_the_default_target_is_the_models_own_choice():
    lens = gs.logit_lens(tiny_model("E4B"), TOKENS)
    last = lens.rank.cells["layer"] == 7
    assert not lens.rank.values[torch.tensor(last.to_numpy())].any()
    assert lens.rank.values.any()


def test_logits_exist_for_a_block_of_positions_of_one_layer_at_a_time(monkeypatch):
    model = tiny_model("12B")
    whole = gs.logit_lens(model, TOKENS, 7)
    monkeypatch.setattr(lens_module, "_BLOCK", 3 * 2 * 101)
    rows = []
    model.unembed.register_forward_hook(lambda module, args, out: rows.append(out.shape[1]))
    blocks = gs.logit_lens(model, TOKENS, 7)
    assert max(rows) == 3
    for what in ("log_prob", "rank", "entropy", "kl"):
        torch.testing.assert_close(getattr(blocks, what).values, getattr(whole, what).values)
    assert blocks.top["id"].equals(whole.top["id"])


def test_prompts_of_different_lengths_are_read_from_their_ends(nano):
    texts = [PROMPT, "Mary gave"]
    lens = gs.logit_lens(nano, texts, [" Mary", " a"], positions=[-2, -1])
    for number, (text, target) in enumerate(zip(texts, [" Mary", " a"], strict=True)):
        alone = gs.logit_lens(nano, text, target, positions=[-2, -1])
        torch.testing.assert_close(lens.log_prob.values[:, number], alone.log_prob.values[:, 0], rtol=1e-4, atol=1e-4)
    assert lens.log_prob.cells["pos"].unique().tolist() == [-2, -1]
    with pytest.raises(ValueError, match="different lengths, so a position is not the same place"):
        gs.logit_lens(nano, texts)
    with pytest.raises(ValueError, match="Position -12 is not in all prompts.* to -1"):
        gs.logit_lens(nano, texts, positions=-12)


def test_it_shows_itself_and_plots(nano):
    lens = gs.logit_lens(nano, PROMPT, " Mary", positions=[0, 5])
    page = lens._repr_html_()
    assert "&lt;bos&gt;" in page and "<bos>" not in page
    assert repr(lens) == f"Lens({nano.cfg.n_layers + 1} streams, 2 positions, 1 prompts)"
    assert lens.log_prob.plot().data[0].z.shape == (nano.cfg.n_layers + 1, 2)


def test_lens_refusals(nano):
    with pytest.raises(ValueError, match="tokens, not one"):
        gs.logit_lens(nano, PROMPT, "Marylebone")
    with pytest.raises(ValueError, match="Position 99 is out of range: the prompt has 15 tokens"):
        gs.logit_lens(nano, PROMPT, positions=[0, 99])
    with pytest.raises(ValueError, match="There are no positions"):
        gs.logit_lens(nano, PROMPT, positions=[])
    with pytest.raises(ValueError, match="There are 2 answers for 1 prompts"):
        gs.logit_lens(nano, PROMPT, [" Mary", " John"])
    with pytest.raises(ValueError, match="top is 0"):
        gs.logit_lens(nano, PROMPT, top=0)
    with pytest.raises(ValueError, match="Layer 99 is not in this lens"):
        gs.logit_lens(nano, PROMPT).logits(99)


# The tuned lens


def test_untrained_it_is_the_logit_lens(nano):
    tuned, plain = gs.TunedLens(nano).read(PROMPT, " Mary"), gs.logit_lens(nano, PROMPT, " Mary")
    for layer in plain.streams:
        assert torch.equal(tuned.logits(layer), plain.logits(layer))
    assert torch.equal(tuned.kl.values, plain.kl.values)


def test_training_lowers_the_kl_of_every_layer_on_held_out_text(nano, documents):
    shown, held_out = documents
    lens = gs.TunedLens(nano)
    before = lens.kl(held_out)
    state = {name: tensor.clone() for name, tensor in nano.state_dict().items()}
    assert lens.fit(shown, steps=12) is lens
    after = lens.kl(held_out)
    assert before.cells["layer"].tolist() == list(range(-1, nano.cfg.n_layers - 1))
    assert after.values.shape == (nano.cfg.n_layers, 4)
    assert (after.mean < 0.97 * before.mean).all()
    assert len(lens.losses) == 12 and len(lens.losses[0]) == nano.cfg.n_layers
    # The model is left as it was, and the last row is still its own.
    assert all(torch.equal(tensor, state[name]) for name, tensor in nano.state_dict().items())
    assert all(parameter.grad is None for parameter in nano.parameters())
    with torch.no_grad():
        assert torch.equal(lens.read(PROMPT).logits(nano.cfg.n_layers - 1), nano(PROMPT))


def test_a_seed_decides_the_training():
    model = tiny_model("E2B")
    runs = [gs.TunedLens(model).fit(TOKENS, steps=4, batch=1, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0].weights[2], runs[1].weights[2]) and runs[0].losses == runs[1].losses
    assert not torch.equal(runs[0].weights[2], runs[2].weights[2])


def test_an_interrupted_training_keeps_what_it_has(monkeypatch):
    model = tiny_model("31B")
    whole = gs.TunedLens(model).fit(TOKENS, steps=6)
    lens, original = gs.TunedLens(model), gs.TunedLens._gradients

    def third(self, tokens):
        if len(self.losses) == 3:
            raise KeyboardInterrupt
        return original(self, tokens)

    monkeypatch.setattr(gs.TunedLens, "_gradients", third)
    lens.fit(TOKENS, steps=6)
    assert lens.losses == whole.losses[:3] and lens.weights[1].any() and not lens.weights[1].requires_grad
    monkeypatch.undo()
    assert len(lens.fit(TOKENS, steps=2).losses) == 5


def test_it_is_saved_and_read_back_for_its_own_model_only(tmp_path):
    model = tiny_model("26B-A4B")
    lens = gs.TunedLens(model).fit(TOKENS, steps=2)
    lens.save(tmp_path / "lens")
    again = gs.TunedLens.load(tmp_path / "lens", model)
    assert torch.equal(again.kl(TOKENS).values, lens.kl(TOKENS).values) and again.losses == lens.losses
    assert json.loads((tmp_path / "lens" / "manifest.json").read_text())["model"] == "tiny 26B-A4B"
    with pytest.raises(
        ValueError, match="was trained on tiny 26B-A4B with the fingerprint .* train one for this model"
    ):
        gs.TunedLens.load(tmp_path / "lens", tiny_model("26B-A4B", seed=1))
    with pytest.raises(FileNotFoundError, match="holds no tuned_lens.safetensors"):
        gs.TunedLens.load(tmp_path, model)


def test_text_is_cut_into_windows_that_start_with_bos(nano):
    lens = gs.TunedLens(nano)
    text = " ".join([PROMPT] * 3)
    rows = lens._sequences([text, PROMPT], window=11)
    assert rows.shape == (5, 11) and (rows[:, 0] == 2).all()
    ids = nano.tokenizer.encode(text, add_bos=False)
    assert rows[:4, 1:].flatten().tolist() == ids[:40] and len(ids) < 50
    assert lens.kl(text, window=11).values.shape[1] == 4
    with pytest.raises(ValueError, match="No text fills a window of 128 tokens, the longest has 15"):
        lens.fit(PROMPT)
    with pytest.raises(ValueError, match="has no tokenizer"):
        gs.TunedLens(tiny_model("E2B")).fit(PROMPT)
