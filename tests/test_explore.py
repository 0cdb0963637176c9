"""The explore page: its arrays are the run's, and the file is safe, small and alone."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from gemmascope import explore as explore_module
from gemmascope.explore import Exploration, explore, write_page
from gemmascope.model.text import HookedGemma4
from gemmascope.testing import tiny_model
from gemmascope.tokenizer import Gemma4Tokenizer
from gemmascope.widgets.explore import most_structured_head, page

PROMPT = "When Mary and John went to town,\nJohn gave milk to Zoë"  # ë is two bytes
SPECIAL = ["<pad>", "<eos>", "<bos>"]
PIECES = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *map(chr, range(33, 127))]


def small_model(architecture: str, **changes) -> HookedGemma4:
    """A tiny model that reads letters; what no letter spells falls back to bytes, as in Gemma's tokenizer."""
    backend = Tokenizer(BPE({piece: i for i, piece in enumerate(PIECES)}, [], byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabularies = ("d_vocab", "d_vocab_ple") if architecture.startswith("E") else ("d_vocab",)
    model = tiny_model(architecture, **dict.fromkeys(vocabularies, len(PIECES)), **changes)
    model.tokenizer = Gemma4Tokenizer(backend)
    return model


@pytest.fixture(scope="module", params=["26B-A4B", "E2B"])
def explored(request) -> tuple[HookedGemma4, Exploration]:
    model = small_model(request.param)
    return model, explore(model, PROMPT, top_k=7)


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def array_of(packed: dict) -> np.ndarray:
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(raw, np.dtype(packed["dtype"]).newbyteorder("<")).reshape(packed["shape"])


# ---- The arrays


@torch.no_grad()
def test_patterns_dequantise_to_the_cache(explored):
    model, ex = explored
    _, cache = model.run_with_cache(PROMPT)
    assert ex.block == 1 and ex.patterns.shape[-1] == len(ex.ids)
    for layer, pattern in enumerate(ex.patterns):
        exact = cache["pattern", layer][0].numpy()
        assert np.abs(pattern / 255 - exact).max() <= 0.5 / 255 + 1e-6
        assert pattern.max() > 100  # a map of zeros would be near an even one


@torch.no_grad()
def test_lens_rows_are_the_stream_read_out(explored):
    model, ex = explored
    logits, cache = model.run_with_cache(PROMPT)
    rows = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(model.cfg.n_layers))]
    exact = torch.stack([model.softcap(model.unembed(model.ln_final(x)))[0].softmax(-1) for x in rows], dim=1)
    torch.testing.assert_close(exact[:, -1], logits[0].softmax(-1))  # the last row is what the model says
    ids = torch.tensor(ex.lens_ids).long()
    torch.testing.assert_close(ids, exact.topk(7).indices)
    own = torch.einsum("prir->pri", torch.tensor(ex.lens_probs))
    torch.testing.assert_close(own, exact.topk(7).values)
    course = torch.stack([exact[5, row, ids[5, 2, 3]] for row in range(len(rows))])
    torch.testing.assert_close(torch.tensor(ex.lens_probs[5, 2, 3]), course)
    assert all(ex.lens_tokens[i] == model.to_str_tokens([i])[0] for i in ids.unique().tolist())


def test_lens_does_not_depend_on_how_many_positions_are_read_at_once(explored, monkeypatch):
    model, ex = explored
    monkeypatch.setattr(explore_module, "LENS_ELEMENTS", 3 * (model.cfg.n_layers + 1) * model.cfg.d_vocab)
    again = explore(model, PROMPT, top_k=7)
    np.testing.assert_array_equal(again.lens_ids, ex.lens_ids)
    np.testing.assert_allclose(again.lens_probs, ex.lens_probs, rtol=1e-5)


@torch.no_grad()
def test_surprise_is_the_models_own_loss(explored):
    model, ex = explored
    loss = model(PROMPT, return_type="loss", loss_per_token=True)[0]
    np.testing.assert_allclose(ex.surprise[1:], loss.numpy(), rtol=1e-5)
    assert np.isnan(ex.surprise[0])


def test_tokens_show_bytes_and_bos_is_the_tokenizers_choice(explored):
    model, ex = explored
    assert ex.tokens[-2:] == ("<0xC3>", "<0xAB>") and len(ex.tokens) == len(ex.ids)
    assert (ex.tokens[0] == "<bos>") == model.tokenizer.add_bos


@torch.no_grad()
def test_layers_and_experts(explored):
    model, ex = explored
    assert ex.kv_sources == tuple(model.layer(layer).kv_source for layer in range(model.cfg.n_layers))
    if not model.cfg.n_experts:
        assert ex.n_experts is ex.expert_indices is ex.expert_weights is None
        return
    routing = model.run_with_cache(PROMPT)[1].routing
    np.testing.assert_array_equal(ex.expert_indices, routing.indices[:, 0])
    np.testing.assert_allclose(ex.expert_weights, routing.weights[:, 0], rtol=1e-6)


@torch.no_grad()
def test_a_long_prompt_is_pooled_by_the_largest_weight(monkeypatch):
    monkeypatch.setattr(explore_module, "MAX_SIDE", 10)  # 46 tokens: blocks of 5, the last one short
    model = small_model("26B-A4B")
    ex = explore(model, PROMPT[:46])
    assert ex.block == 5 and ex.patterns.shape[-2:] == (10, 10)
    pattern = model.run_with_cache(PROMPT[:46])[1]["pattern", 2][0]
    for q, k in [(0, 0), (4, 1), (9, 9), (9, 0), (2, 7)]:
        block = pattern[:, 5 * q : 5 * q + 5, 5 * k : 5 * k + 5]
        np.testing.assert_array_equal(ex.patterns[2][:, q, k], (block.amax((1, 2)) * 255).round().numpy())


def test_hooks_on_the_model_are_part_of_what_is_explored():
    model = small_model("E2B")

    def first_token_only(pattern, hook):
        pattern[:, 1] = 0
        pattern[:, 1, :, 0] = 1

    with model.hooks([("blocks.1.attn.hook_pattern", first_token_only)]):
        ex = explore(model, PROMPT)
    assert (ex.patterns[1, 1, :, 0] == 255).all() and (ex.patterns[1, 1, :, 1:] == 0).all()
    assert np.abs(ex.lens_probs - explore(model, PROMPT).lens_probs).max() > 1e-4


# ---- The page


@pytest.fixture(scope="module")
def html(explored, tmp_path_factory) -> str:
    model, _ = explored
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert write_page(model, PROMPT[:32], path) == path
    return path.read_text(encoding="utf-8")


def test_page_carries_the_arrays(explored):
    _, ex = explored
    data = data_of(page(**vars(ex)))
    carried = {name: array_of(packed) for name, packed in data["arrays"].items()}
    fields = {"surprise": ex.surprise, "lensIds": ex.lens_ids, "lensProbs": ex.lens_probs, "patterns": ex.patterns}
    if ex.n_experts:
        fields |= {"expertIndices": ex.expert_indices, "expertWeights": ex.expert_weights}
    assert carried.keys() == fields.keys()
    for name, field in fields.items():
        np.testing.assert_array_equal(carried[name], field)
    assert data["tokens"] == list(ex.tokens) and data["ids"] == ex.ids.tolist() and data["nExperts"] == ex.n_experts
    windows = [ex.window if kind == "sliding" else None for kind in ex.layer_kinds]
    assert [layer["window"] for layer in data["layers"]] == windows


def test_page_is_small_and_asks_for_nothing(html):
    assert len(html.encode()) < 500_000
    asking = r"https?:|url\(|@import|\bsrc=|\bhref=|fetch\("
    assert not re.search(asking, html.replace("http://www.w3.org/2000/svg", ""))  # a name that no browser fetches
    assert "default-src 'none'" in html


def test_no_string_becomes_markup():
    model = small_model("26B-A4B", model_name='</title></script><script>alert("model")</script>')
    prompt = '</script><b>"& <!-- <script>alert(1)</script> \u2028'
    html = page(**vars(explore(model, prompt)))
    assert data_of(html)["prompt"] == prompt and data_of(html)["model"] == model.cfg.model_name
    assert html.count("<script") == html.count("</script") == 2 and "<b>" not in html and "<!--" not in html
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html


def test_the_page_opens_on_the_head_that_looks_somewhere():
    patterns = np.zeros((3, 2, 6, 6), np.uint8)
    patterns[:, :, :, 0] = 200  # the first token, which every head rests on
    patterns[0, 1, range(1, 6), range(5)] = 255  # the token before
    patterns[1] += np.eye(6, dtype=np.uint8) * 55  # itself
    patterns[2, 1, 4, 2] = 40
    assert most_structured_head(patterns) == (2, 1)
    assert most_structured_head(np.full((2, 2, 1, 1), 255, np.uint8)) == (0, 0)


# ---- Bad input


def test_an_empty_prompt_is_refused_before_a_file_is_made(tmp_path):
    with pytest.raises(ValueError, match="^There is nothing to explore in '': give one prompt"):
        write_page(small_model("26B-A4B"), "", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("top_k", [0, len(PIECES) + 1])
def test_top_k_beyond_the_vocabulary_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}; .* 1 to {len(PIECES)}"):
        explore(small_model("26B-A4B"), PROMPT, top_k=top_k)


def test_one_token_is_enough(tmp_path):
    html = write_page(small_model("26B-A4B"), "x", tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(data_of(html)["tokens"]) == 1
