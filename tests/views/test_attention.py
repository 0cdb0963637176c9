"""Attention, made when somebody looks: every answer is the model's own pattern, whole, pooled or in tiles."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.views.attention import _Attention
from gemmascope.views.run import Run
from gemmascope.widgets.arrays import LEVELS
from gemmascope.widgets.export import page

PROMPT = "When Mary and John went to the store, John gave a book to Mary. When Mary and John went to the"
CODE = 0.5 / LEVELS + 1e-6
"""What a code is off by, at most."""


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def model(request):
    return gs.load(request.param)


@pytest.fixture(scope="module")
def long():
    """A model with layers that share keys, its view of a prompt that is too long for whole maps, and all patterns."""
    model = tiny_model("E2B", n_ctx=1100)
    tokens = torch.randint(3, 100, (1, 1100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        patterns = torch.stack([cache.pattern(layer)[0] for layer in range(model.cfg.n_layers)])
    return gs.attention_view(model, cache), patterns


def ask(view, question, **arguments):
    answer = view.answers[question](**arguments)
    return answer["codes"] / LEVELS if "codes" in answer else answer


def pooled(pattern, block):
    return F.max_pool2d(pattern[None], block, ceil_mode=True)[0]


def test_maps_rows_and_columns_are_the_models(model):
    view = gs.attention_view(model, PROMPT)
    with torch.no_grad():
        _, cache = model.run_with_cache(PROMPT)
    for layer, head in ((0, 0), (3, 2), (model.cfg.n_layers - 1, 3)):
        pattern = cache.pattern(layer, heads=head)[0]
        where = {"of": 0, "layer": layer, "head": head}
        np.testing.assert_allclose(ask(view, "map", **where), pattern, rtol=0, atol=CODE)
        np.testing.assert_array_equal(ask(view, "row", **where, pos=17)["weights"], pattern[17])
        np.testing.assert_array_equal(ask(view, "column", **where, key=4)["weights"], pattern[:, 4])
        thumbs = ask(view, "thumbs", of=0, layer=layer, part=0)
        np.testing.assert_allclose(thumbs[head], pattern, rtol=0, atol=CODE)


def test_scores_are_those_of_head_table(model):
    tokens = gs.repeated_tokens(model, length=20, n=1)
    view = gs.attention_view(model, tokens)
    table = gs.head_table(model, tokens).set_index(["layer", "head"])
    names = [score["name"] for score in view.data["scores"]]
    scores = ask(view, "scores", layer=2)["scores"]
    for name in ("previous token", "duplicate token", "induction"):
        expected = table.loc[2][name.replace(" ", "_")]
        np.testing.assert_allclose(scores[:, names.index(name)], expected, rtol=1e-5, atol=1e-6)


def test_the_first_choice_looks_hardest_elsewhere(model):
    """At one key other than the first token, itself and the token before: here from whole patterns."""
    view = gs.attention_view(model, PROMPT)
    with torch.no_grad():
        _, cache = model.run_with_cache(PROMPT)
        elsewhere = torch.stack([cache.pattern(layer)[0] for layer in range(model.cfg.n_layers)]).tril(-2)[..., 1:]
    best = int(elsewhere.amax(-1).mean(-1).argmax())
    assert view.data["start"] == list(divmod(best, model.cfg.n_heads))
    sentence, table = view.still()
    assert f"layer {best // model.cfg.n_heads} head {best % model.cfg.n_heads}" in sentence
    assert table["weight"].iloc[0] == pytest.approx(float(elsewhere.flatten(0, 1)[best].max()), abs=1e-3)
    chosen = gs.attention_view(model, PROMPT, selection=gs.Selection(layer=1, head=2))
    assert chosen.data["start"] == [1, 2]


def test_another_prompt_is_asked_for_too(model):
    other = PROMPT.replace("John gave", "Mary gave")
    view = gs.attention_view(model, PROMPT, compare=other, state={"minus": "prompt"})
    with torch.no_grad():
        _, cache = model.run_with_cache(other)
    row = ask(view, "row", of=1, layer=3, head=1, pos=-1)["weights"]
    np.testing.assert_array_equal(row, cache.pattern(3, heads=1)[0, -1])
    assert view.data["other_setup"] == f"other_prompt = {other!r}"
    with pytest.raises(ValueError, match="compare two of the same number"):
        gs.attention_view(model, PROMPT, compare="Hello")


def test_a_long_prompt_comes_in_parts_and_tiles(long):
    view, patterns = long
    n, n_layers = patterns.shape[-1], len(patterns)
    assert view.data["tile"] == 256 and view.data["scores"]
    block = view.data["thumb_block"]
    for layer in range(n_layers):
        parts = [ask(view, "thumbs", layer=layer, part=part) for part in range(view.data["layers"][layer]["parts"])]
        expected = torch.stack([pooled(pattern, block) for pattern in patterns[layer]])
        np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=CODE)
    for layer in (0, 3, n_layers - 1):  # sliding, global, and one with the keys of another
        for z, x, y in ((0, 0, 0), (0, 3, 4), (0, 4, 4), (1, 1, 2), (2, 0, 1), (3, 0, 0)):
            side = 256 << z
            part = patterns[layer, 1][y * side : (y + 1) * side, x * side : (x + 1) * side]
            tile = ask(view, "tile", layer=layer, head=1, z=z, x=x, y=y)
            np.testing.assert_allclose(tile, pooled(part, 1 << z), rtol=0, atol=CODE)
        row = ask(view, "row", layer=layer, head=1, pos=n - 1)["weights"]
        np.testing.assert_allclose(row, patterns[layer, 1, n - 1], rtol=1e-4, atol=1e-6)
        column = ask(view, "column", layer=layer, head=1, key=9)["weights"]
        np.testing.assert_allclose(column, patterns[layer, 1, :, 9], rtol=1e-4, atol=1e-6)
    band = view.answers["band"](layer=0, head=2, window=7)
    distances = np.stack([np.pad(patterns[0, 2].diagonal(-back), (back, 0)) for back in range(7)], 1)
    expected = np.pad(distances, ((0, -n % band["rows"]), (0, 0))).reshape(-1, band["rows"], 7).max(1)
    np.testing.assert_allclose(band["codes"] / LEVELS, expected, rtol=0, atol=CODE)


def test_tiles_need_no_more_than_their_own_rows():
    model = tiny_model("E4B", n_ctx=4096)
    tokens = torch.randint(3, 100, (1, 4096), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ends = ("hook_rot_q", "hook_rot_k")
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(ends), return_type=None)
    attention = _Attention(Run(model, cache))
    stream = attention._stream(1)
    stream._step = 512
    with torch.no_grad():
        stream.weights(0, slice(1024, 1280), slice(0, 256))
        assert stream._read.sum() * attention.block == 512
        kept = stream.qk[0]
        for layer in (2, 3):
            attention._stream(layer).read(slice(0, 1))
    assert stream._qk is None and attention._stream(1).qk[0] is kept  # the cache's own, not a copy


def test_state_and_prompts_that_cannot_be_shown_are_refused(model):
    for state, message in {
        "scale": "scale is 'cubic'; it is one of 'linear', 'sqrt', 'log'.",
        "sort": "Heads are sorted by 'cubic'; they can be by previous token",
        "minus": "minus is 'cubic'",
    }.items():
        with pytest.raises(ValueError, match=message):
            gs.attention_view(model, PROMPT, state={state: "cubic"})
    with pytest.raises(ValueError, match="There is no other prompt to take away: give one as compare="):
        gs.attention_view(model, PROMPT, state={"minus": "prompt"})
    with pytest.raises(ValueError, match="Layer 9 head 0 is pinned; there are"):
        gs.attention_view(model, PROMPT, state={"pinned": [9, 0]})
    _, cache = model.run_with_cache(PROMPT, names_filter="hook_embed")
    with pytest.raises(KeyError, match="hook_rot_q was not cached.*names_filter"):
        gs.attention_view(model, cache)


def test_one_token_and_numbers_that_are_none(model):
    view = gs.attention_view(model, torch.tensor([[2]]))
    assert ask(view, "map", layer=0, head=0).tolist() == [[1.0]]
    assert np.isnan(ask(view, "scores", layer=0)["scores"][0, 0])
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_q", lambda x, hook: x * torch.nan)]):
        view = gs.attention_view(model, "Hello there")
    assert (view.answers["map"](layer=1, head=0)["codes"] == 255).any()
    assert (view.answers["thumbs"](layer=1, part=0)["codes"] == 255).any()


def test_what_a_view_weighs(long):
    """A saved state stays small whatever the prompt; a page of 256 tokens carries every map, a longer one its own."""
    model = gs.load("nano-moe")
    tokens = torch.randint(3, 500, (1, 256), generator=torch.Generator().manual_seed(0))
    view = gs.attention_view(model, tokens)
    assert len([question for question, _ in view.exported() if question == "map"]) == 24
    assert len(page(view)) < 2_500_000
    asked = [(question, given["z"]) for question, given in long[0].exported() if question == "tile"]
    assert asked == [("tile", 1)] * 6
