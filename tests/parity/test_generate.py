"""Greedy generation against transformers, past the window, with and without a KV cache."""

import pytest
import torch

from gemmascope.testing import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_64_greedy_tokens(architecture, transformers_twin):
    model = tiny_model(architecture)
    prompt = torch.randint(3, 101, (2, 9))
    settings = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = transformers_twin(model).generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    for use_past_kv_cache in (True, False):
        ours = model.generate(prompt, 64, stop_ids=[], use_past_kv_cache=use_past_kv_cache, progress=False)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
@torch.no_grad()
def test_left_padded_batch_with_stop_ids(architecture, transformers_twin):
    model = tiny_model(architecture)
    prompt, mask = torch.randint(3, 101, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    prompt[0, :7], mask[0, :7] = 0, 0
    free = model.generate(prompt, 20, attention_mask=mask, stop_ids=[])
    stop = [int(free[0, 15]), int(free[1, 20])]  # ids that do come up
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=stop, pad_token_id=0)
    theirs = transformers_twin(model).generate(prompt, attention_mask=mask, **settings)
    ours = model.generate(prompt, 20, attention_mask=mask, stop_ids=stop)
    assert torch.equal(ours, theirs) and ours.shape[1] <= free.shape[1]
    alone = model.generate(prompt[:1, 7:], 20, stop_ids=[])
    assert torch.equal(alone[0, 5:], free[0, 12:])  # padding changes nothing
