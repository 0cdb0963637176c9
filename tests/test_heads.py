"""Head scores equal their definitions, circuits equal what the model does, and the shipped models' cards."""

import json
import random

import pytest
import torch

import gemmascope as gs
from gemmascope.readout import heads
from gemmascope.testing import tiny_model
from gemmascope.weights import ZOO
from gemmascope.zoo.corpus import BOS, Corpus
from gemmascope.zoo.evaluate import SEED, SPAN

TOKENS = torch.tensor([[2, 9, 5, 7, 9, 5, 5, 9, 30, 7, 2], [2, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]])
EXPECTED = {  # by query of the first prompt: the key that it should look at
    "previous token": {query: query - 1 for query in range(1, 11)},
    "duplicate token": {4: 1, 5: 2, 6: 5, 7: 4, 9: 3, 10: 0},
    "induction": {4: 2, 5: 3, 6: 6, 7: 5, 9: 4, 10: 1},
}


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def nano(request):
    return gs.load(request.param)


# Patterns of attention


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("architecture", ["26B-A4B", "E2B"])
def test_scores_are_mean_attention_along_the_pattern(architecture, name):
    model = tiny_model(architecture)
    found = gs.detect_heads(model, TOKENS, name)
    assert found.axes == ["layer", "head"] and found.values.shape == (4 * model.cfg.n_layers, 2)
    _, cache = model.run_with_cache(TOKENS)
    for (layer, head), value in zip(found.cells.itertuples(index=False), found.values[:, 0], strict=True):
        pattern = cache["pattern", layer][0, head]
        attention = [float(pattern[query, key]) for query, key in EXPECTED[name].items()]
        assert float(value) == pytest.approx(sum(attention) / len(attention), abs=1e-6)


def test_a_mask_is_a_pattern(nano):
    text = "When Mary and John went to the store, John gave a book to"
    n_pos = nano.to_tokens(text).shape[1]
    mask = torch.zeros(n_pos, n_pos, dtype=torch.bool)
    mask[-1, [2, 4]] = True  # from the end to both names
    found = gs.detect_heads(nano, text, mask)
    _, cache = nano.run_with_cache(text)
    expected = [cache.pattern(layer)[0, :, -1, [2, 4]].sum(-1) for layer in range(nano.cfg.n_layers)]
    torch.testing.assert_close(found.values[:, 0], torch.cat(expected))
    named = gs.detect_heads(nano, TOKENS, "induction")
    torch.testing.assert_close(gs.detect_heads(nano, TOKENS, heads.induction(TOKENS)).values, named.values)


def test_padding_is_no_part_of_a_pattern(nano):
    texts = ["Mary gave a ring to Mary and Mary", "Then John and John"]
    both = gs.detect_heads(nano, texts, "duplicate token")
    for number, text in enumerate(texts):
        alone = gs.detect_heads(nano, text, "duplicate token").values[:, 0]
        torch.testing.assert_close(both.values[:, number], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_induction_scores_are_those_of_the_models_card(nano):
    """On the card's own prompts; their spans may repeat a token, so the card's fixed offset is given as a mask."""
    corpus, rng = Corpus(nano.tokenizer.backend), random.Random(SEED)
    spans = [rng.choices(corpus.random_ids, k=SPAN) for _ in range(16)]
    tokens = torch.tensor([[BOS, *span, *span] for span in spans])
    offset = torch.zeros(2 * SPAN + 1, 2 * SPAN + 1, dtype=torch.bool)
    for query in range(SPAN + 1, 2 * SPAN + 1):
        offset[query, query - SPAN + 1] = True
    card = json.loads((ZOO / nano.cfg.model_name / "evaluation.json").read_text())
    found = gs.detect_heads(nano, tokens, offset).mean.view(nano.cfg.n_layers, 4)
    torch.testing.assert_close(found, torch.tensor(card["induction_scores"]), rtol=0, atol=1e-4)
    table = gs.head_table(nano).set_index(["layer", "head"])
    assert list(table["induction"].idxmax()) == card["induction_head"]
    assert table["induction"].max() == pytest.approx(card["induction_score"], abs=0.02)


def test_repeated_tokens():
    model = tiny_model("E2B")
    tokens = gs.repeated_tokens(model, length=20, n=3)
    assert tokens.shape == (3, 41) and (tokens[:, 0] == 2).all()
    assert torch.equal(tokens[:, 1:21], tokens[:, 21:])
    assert all(len(set(row.tolist())) == 20 for row in tokens[:, 1:21])
    assert torch.equal(tokens, gs.repeated_tokens(model, length=20, n=3))
    assert gs.repeated_tokens(model).shape[1] <= model.cfg.n_ctx
    with pytest.raises(ValueError, match="length is 1000: .* so give 1 to"):
        gs.repeated_tokens(model, length=1000)
    nano = gs.load("nano-moe")
    special = set(nano.tokenizer.backend.get_added_tokens_decoder())
    assert not special & set(gs.repeated_tokens(nano, n=30)[:, 1:].flatten().tolist())


# The table, on models whose heads are known


def test_table_names_the_known_heads():
    table = gs.head_table(gs.load("nano-moe")).set_index(["layer", "head"])
    assert len(table) == 24
    top = table["induction"].sort_values(ascending=False).index[:4]
    assert set(top) == {(2, 0), (2, 1), (2, 2), (2, 3)} and top[0] == (2, 2)
    assert table["induction"].drop(2, level="layer").max() < 0.1
    assert table["previous_token"].idxmax() == (1, 1) and table["previous_token"][1, 1] > 0.9
    # What induction needs: its heads copy, and no other does.
    assert table["copying"][2].min() > 0.8 and table["copying"].drop(2, level="layer").max() < 0.3
    assert table["kind"].unique().tolist() == ["sliding", "global"] and table["kv_source"].isna().all()


def test_table_knows_shared_keys_and_values():
    table = gs.head_table(gs.load("nano-edge")).set_index(["layer", "head"])
    assert table["kv_source"].dropna().groupby(level="layer").first().to_dict() == {4: 2, 5: 2, 6: 3}
    assert table["induction"].idxmax() == (6, 2)
    assert table["copying"][6].min() > 0.8


# Circuits


@pytest.mark.parametrize("architecture", ["26B-A4B", "31B", "E2B"])
@torch.no_grad()
def test_circuits_of_whole_streams_are_what_the_model_does(architecture):
    """A token's own stream is that of <bos> token, where its score for itself and what its value writes can be read."""
    model = tiny_model(architecture).double()
    ids = [7, 50, 99]
    _, cache = model.run_with_cache(torch.tensor([[2, token] for token in ids]))
    for layer in range(model.cfg.n_layers):
        geometry = model.layer(layer)
        source = layer if geometry.kv_source is None else geometry.kv_source
        scores, values = cache.attn_scores(layer)[:, :, 1, 1], cache["attn.hook_v_normed", source][:, 1]
        for head in (0, 3):
            qk = gs.qk_scores(model, layer, head, ids, blocks=model.cfg.n_layers).values.view(3, 3)
            torch.testing.assert_close(qk.diagonal(), scores[:, head])
            ov = gs.ov_scores(model, layer, head, ids, blocks=model.cfg.n_layers).values.view(3, 3)
            wrote = values[:, head // (4 // geometry.n_kv_heads)] @ model.blocks[layer].attn.W_O[head]
            gains = model.blocks[layer].ln1_post.weight * model.ln_final.weight
            torch.testing.assert_close(ov, (wrote * gains) @ model.W_U[:, ids])


@pytest.mark.parametrize("distance", [0, 1, 4])
@torch.no_grad()
def test_qk_of_bare_embeddings_turns_with_distance(distance):
    model = tiny_model("26B-A4B").double()
    ids = [7, 50]
    found = gs.qk_scores(model, 0, 2, ids, distance=distance, blocks=0)
    assert found.axes == ["query", "key"]
    for query in range(2):
        for key in range(2):
            if distance or query == key:
                tokens = torch.tensor([[3, ids[key], *[3] * (distance - 1), ids[query]][: distance + 2]])
                _, cache = model.run_with_cache(tokens if distance else tokens[:, :2])
                expected = cache.attn_scores(0, heads=2)[0, 1 + distance, 1]
                torch.testing.assert_close(found.values.view(2, 2)[query, key], expected)


@torch.no_grad()
def test_copying_is_the_share_of_tokens_among_the_five_largest(monkeypatch):
    from gemmascope.readout import circuits

    model = tiny_model("E4B").double()
    ids = list(range(3, 60))
    monkeypatch.setattr(circuits, "_VOCABULARY_PART", 30)  # 101 tokens in four parts
    found = gs.copying_score(model, ids)
    every = list(range(101))
    for layer, head in ((0, 1), (3, 3), (7, 0)):
        logits = gs.ov_scores(model, layer, head, every).values.view(101, 101)[ids]
        copied = [token in row.topk(5).indices.tolist() for token, row in zip(ids, logits, strict=True)]
        assert found.values[4 * layer + head].bool().tolist() == copied
    assert 0 < found.values.mean() < 1


@torch.no_grad()
def test_a_head_turned_around_no_longer_copies():
    model = gs.load("nano-moe")
    names = [" Mary", " John", " Anna", " Tom"]
    before = gs.copying_score(model, names).mean.view(6, 4)
    model.blocks[2].attn.W_O[2].neg_()
    after = gs.copying_score(model, names).mean.view(6, 4)
    assert before[2, 2] > 0.7 and after[2, 2] == 0
    before[2, 2] = after[2, 2]
    assert torch.equal(before, after)


def test_circuits_plot_with_their_tokens(nano):
    found = gs.ov_scores(nano, 2, 2, [" Mary", " John"])
    assert found.plot().data[0].x == (" Mary", " John")


def test_refusals(nano):
    with pytest.raises(ValueError, match="no pattern 'inductoin': did you mean 'induction'"):
        gs.detect_heads(nano, TOKENS, "inductoin")
    with pytest.raises(ValueError, match=r"shape \[4, 4\]; 2 prompts of 11 tokens take \[11, 11\] or \[2, 11, 11\]"):
        gs.detect_heads(nano, TOKENS, torch.ones(4, 4))
    with pytest.raises(ValueError, match="Prompt 1 has no query that induction marks: it is too short"):
        gs.detect_heads(nano, torch.tensor([[2, 5, 5], [2, 5, 6]]), "induction")
    with pytest.raises(ValueError, match="Prompt 0 has no query that previous token marks"):
        gs.head_table(nano, torch.tensor([[2]]))
    with pytest.raises(ValueError, match="Head 4 does not exist: the layers of nano-.* have 0 to 3"):
        gs.ov_scores(nano, 0, 4, [" Mary"])
    with pytest.raises(ValueError, match="Layer 9 does not exist"):
        gs.qk_scores(nano, 9, 0, [" Mary"])
    with pytest.raises(ValueError, match="tokens, not one"):
        gs.ov_scores(nano, 0, 0, ["Marylebone"])
    with pytest.raises(ValueError, match="distance is 16; a query of layer 0 sees 0 to 15 positions back"):
        gs.qk_scores(nano, 0, 0, [" Mary"], distance=16)
    with pytest.raises(ValueError, match="blocks is -1"):
        gs.qk_scores(nano, 0, 0, [" Mary"], blocks=-1)
