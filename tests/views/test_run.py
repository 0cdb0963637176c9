"""A run and its twin: what a view shows is the run it was made of, whatever a cell does to the model meanwhile."""

import threading

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.views.run import Run, run_of, twin

PROMPT = "When Mary and John went to the store, John gave a book to"


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def model(request):
    return gs.load(request.param)


def double(x, hook):
    return 2 * x


def test_a_twin_gives_the_same_and_shares_every_weight(model):
    other = twin(model)
    with torch.no_grad():
        torch.testing.assert_close(other(PROMPT), model(PROMPT), rtol=0, atol=0)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)


@torch.no_grad()
def test_hooks_of_one_are_not_hooks_of_the_other(model):
    plain = model(PROMPT)
    other = twin(model)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", double)]):
        hooked = model(PROMPT)
        torch.testing.assert_close(other(PROMPT), plain, rtol=0, atol=0)
        as_hooked = twin(model)
    assert not torch.equal(hooked, plain)
    torch.testing.assert_close(as_hooked(PROMPT), hooked, rtol=0, atol=0)  # those it had then, still
    with other.hooks(fwd_hooks=[("blocks.1.attn.hook_z", double)]):
        torch.testing.assert_close(other(PROMPT), hooked, rtol=0, atol=0)
        torch.testing.assert_close(model(PROMPT), plain, rtol=0, atol=0)
    with model.with_interventions([gs.zero(("z", 1))]):
        silenced = model(PROMPT)
        torch.testing.assert_close(twin(model)(PROMPT), silenced, rtol=0, atol=0)


@torch.no_grad()
def test_a_run_answers_while_a_cell_hooks_the_model(model):
    run = Run(model, PROMPT)
    plain, seen = model(PROMPT)[0], []

    def ask():
        with run.using() as own:
            seen.append(own(PROMPT)[0])

    with model.hooks(fwd_hooks=[("hook_embed", double)]):
        other = threading.Thread(target=ask)
        other.start()
        model(PROMPT)
        other.join()
    torch.testing.assert_close(seen[0], plain, rtol=0, atol=0)
    torch.testing.assert_close(run.logits, plain, rtol=0, atol=0)


def test_a_plain_torch_hook_is_refused():
    model = tiny_model("26B-A4B")
    model.blocks[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="blocks.0.mlp carries a torch hook, .* model.add_hook"):
        twin(model)


def test_a_run_of_a_cache_is_that_run(model):
    with torch.no_grad(), model.with_interventions([gs.zero(("z", 1))]):
        logits, cache = model.run_with_cache(PROMPT)
    run = run_of(model, cache)
    torch.testing.assert_close(run.logits, logits[0])
    assert run.texts == [str(text) for text in model.to_str_tokens(PROMPT)]
    assert run_of(model, run) is run


def test_what_is_copied_makes_the_run_again(model):
    for prompt in (PROMPT, model.to_tokens(PROMPT)):
        names: dict = {}
        run = Run(model, prompt)
        exec(run.setup, names)
        torch.testing.assert_close(names["model"](names["prompt"])[0], run.logits, rtol=0, atol=0)


@pytest.mark.parametrize("ids", [[2, 514, 1140], (2, 514, 1140), [[2, 514, 1140]], np.array([2, 514, 1140])])
def test_ids_come_as_any_list(model, ids):
    assert Run(model, ids).tokens.tolist() == [2, 514, 1140]


def test_bad_prompts_are_refused(model):
    with pytest.raises(ValueError, match="There are 2 prompts: a view shows one"):
        Run(model, [[2, 5], [2, 6]])
    with pytest.raises(ValueError, match="Token id 99999 is out of range"):
        Run(model, [2, 99999])
    with pytest.raises(ValueError, match="There are 2 prompts: a view shows one"):
        Run(model, ["one", "two"])
    with pytest.raises(ValueError, match="empty"):
        Run(model, "")
    _, cache = model.run_with_cache(["one", "two"])
    with pytest.raises(ValueError, match=r"give the cache of one, as cache.apply_slice_to_batch_dim\(0\)"):
        Run(model, cache)
    _, cache = model.run_with_cache(["one", "one two three"])
    with pytest.raises(ValueError, match="This prompt is padded"):
        Run(model, cache.apply_slice_to_batch_dim(0))
    assert Run(model, cache.apply_slice_to_batch_dim([1])).n == len(model.to_tokens("one two three")[0])
    _, cache = model.run_with_cache("one two", pos_slice=slice(0, 2))
    with pytest.raises(ValueError, match="leave pos_slice out"):
        Run(model, cache)
    _, cache = model.run_with_cache("one")
    with pytest.raises(ValueError, match="This cache is of another model"):
        Run(gs.load(model.cfg.model_name), cache)
    _, cache = model.run_with_cache("one", names_filter="blocks.0.hook_resid_pre")
    with pytest.raises(KeyError, match="hook_logits was not cached.*names_filter"):
        _ = Run(model, cache).logits
