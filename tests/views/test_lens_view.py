"""The lens as a view: its answers are the lens's figures, at every site, and bad input says what is wrong."""

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.views import lens as lens_module

PROMPT = "When Mary and John went to the store, John gave a book to"


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def nano(request):
    return gs.load(request.param)


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def asked(view, **more) -> dict:
    return {"lens": view.state["lens"], "site": view.state["site"], **more}


@pytest.mark.parametrize("lens", ["logit", "tuned"])
def test_table_and_courses_are_the_lenss_figures(nano, lens):
    tuned = gs.TunedLens(nano)
    torch.manual_seed(0)
    tuned.biases = [bias + 0.3 * torch.randn_like(bias) for bias in tuned.biases]
    read = gs.logit_lens(nano, PROMPT, 7) if lens == "logit" else tuned.read(PROMPT, 7)
    view = gs.lens_view(nano, PROMPT, tuned=tuned, state={"lens": lens})
    table = view.answers["table"](**asked(view, block=0))
    n_pos, n_rows, _ = table["ids"].shape

    def by_pos(result) -> torch.Tensor:
        return result.values[:, 0].view(n_rows, n_pos).T

    close = dict(atol=1e-5, rtol=1e-5, check_dtype=False)
    listed = torch.tensor(read.top["prob"]).view(n_rows, n_pos, 5).transpose(0, 1)
    torch.testing.assert_close(torch.from_numpy(table["probs"]), listed, **close)
    torch.testing.assert_close(torch.from_numpy(table["entropy"]), by_pos(read.entropy), **close)
    torch.testing.assert_close(torch.from_numpy(table["kl"]), by_pos(read.kl), **close)
    for pos in (0, n_pos - 1):
        course = view.answers["course"](**asked(view, pos=pos, ids=[7]))
        assert set(table["ids"][pos].ravel()) <= set(course["ids"])
        torch.testing.assert_close(torch.from_numpy(course["probs"][-1]), by_pos(read.log_prob)[pos].exp(), **close)
        assert course["ranks"][-1].tolist() == by_pos(read.rank)[pos].tolist()
        assert course["texts"]["7"] == nano.to_str_tokens(torch.tensor([7]))[0]


@pytest.mark.parametrize("site", ["resid_mid", "resid_mlp"])
@torch.no_grad()
def test_inside_a_layer_the_stream_there_is_read(nano, site):
    view = gs.lens_view(nano, PROMPT, state={"site": site})
    table = view.answers["table"](**asked(view, block=0))
    logits, cache = nano.run_with_cache(PROMPT)
    final = logits[0].log_softmax(-1)
    for row in range(nano.cfg.n_layers + 1):
        stream = cache["hook_embed"] if row == 0 else cache[site, row - 1]
        now = nano.softcap(nano.unembed(nano.ln_final(stream)))[0].log_softmax(-1)
        best = torch.from_numpy(table["probs"][:, row, 0])
        torch.testing.assert_close(best, now.exp().amax(-1), atol=1e-5, rtol=1e-5)
        kl = (final.exp() * (final - now)).sum(-1)
        torch.testing.assert_close(torch.from_numpy(table["kl"][:, row]), kl, atol=1e-5, rtol=1e-4)


def test_a_block_is_the_same_wherever_it_is_cut(model, monkeypatch):
    whole = gs.lens_view(model, PROMPT)
    monkeypatch.setattr(lens_module, "LOGITS", 1)
    cut = gs.lens_view(model, PROMPT)
    assert cut.data["size"] == 8
    first, rest = (cut.answers["table"](**asked(cut, block=block)) for block in (0, 1))
    table = whole.answers["table"](**asked(whole, block=0))
    assert [*first["ids"].tolist(), *rest["ids"].tolist()] == table["ids"].tolist()


def test_a_lens_of_one_prompt_has_a_view(model):
    assert gs.logit_lens(model, PROMPT).view().state["lens"] == "logit"
    view = gs.TunedLens(model).read(PROMPT, positions=[3]).view()
    assert view.state["lens"] == "tuned" and view.selection.pos == 3
    with pytest.raises(ValueError, match="2 prompts"):
        gs.logit_lens(model, [PROMPT, PROMPT]).view()
    with model.hooks([("blocks.0.hook_resid_post", lambda x, hook: x * 2)]):
        lens = gs.logit_lens(model, PROMPT)
        lens.view()
    with pytest.raises(ValueError, match="otherwise than when this lens was read"):
        lens.view()


def test_an_exported_page_carries_what_is_listed_and_pinned(model, monkeypatch):
    view = gs.lens_view(model, PROMPT, state={"pins": [1200, 4]})
    questions = list(view.exported())
    assert [name for name, _ in questions] == ["table"] + ["course"] * 15
    assert all(set(given["ids"]) <= {4, 1200} for name, given in questions if name == "course")
    monkeypatch.setattr(lens_module, "EXPORTED", {"table": 70, "course": 21})
    view = gs.lens_view(model, PROMPT)
    assert view.data["carried"] == {"table": 0, "course": 12}
    assert sum(name == "course" for name, _ in view.exported()) == 3


def test_a_page_of_256_tokens_stays_small(tmp_path):
    model = gs.load("nano-edge")
    tokens = torch.randint(3, model.cfg.d_vocab, (256,), generator=torch.Generator().manual_seed(0))
    page = gs.lens_view(model, tokens).to_html(tmp_path / "lens.html")
    assert page.stat().st_size < 2**20


def test_a_still_says_what_the_output_would_say(model):
    sentence, table = gs.lens_view(model, PROMPT).still()
    assert "15 positions" in sentence
    assert table["says next"].iloc[0] == " Mary"


def test_bad_input_is_said_at_once(model):
    with pytest.raises(ValueError, match="site of a lens cannot be 'resid'"):
        gs.lens_view(model, PROMPT, state={"site": "resid"})
    with pytest.raises(ValueError, match="no tuned lens to show"):
        gs.lens_view(model, PROMPT, state={"lens": "tuned"})
    with pytest.raises(ValueError, match="ids of tokens, 0 to 1327, and -1"):
        gs.lens_view(model, PROMPT, state={"pins": [-1]})
    with pytest.raises(ValueError, match="tuned lens is of"):
        gs.lens_view(model, PROMPT, tuned=gs.TunedLens(tiny_model("E2B")))
    with pytest.raises(KeyError, match="names_filter"):
        gs.lens_view(model, model.run_with_cache(PROMPT, names_filter="blocks.0.hook_resid_pre")[1])
    answer, _ = gs.lens_view(model, PROMPT).ask(
        {"question": "table", "arguments": {"lens": "tuned", "site": "resid_post", "block": 0}}, []
    )
    assert "given as tuned=" in answer["error"]


def test_one_token_and_what_is_no_number():
    model = tiny_model("26B-A4B")
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x * torch.nan)
    view = gs.lens_view(model, torch.tensor([5]))
    table = view.answers["table"](**asked(view, block=0))
    assert table["ids"].shape[:2] == (1, model.cfg.n_layers + 1)
    assert torch.from_numpy(table["probs"])[0, 1:].isnan().all()


def test_what_is_no_number_has_no_rank():
    model = tiny_model("26B-A4B")
    with torch.no_grad():
        model.blocks[0].mlp.W_out[0, 0] = torch.nan
    view = gs.lens_view(model, torch.arange(3, 8))
    course = view.answers["course"](**asked(view, pos=4, ids=[7]))
    assert np.isnan(course["ranks"][:, 1:]).all() and np.isfinite(course["ranks"][:, 0]).all()
