"""Sampling, and hooks and caches that stay live through generation. (Greedy parity with transformers: tests/parity.)"""

import pytest
import torch

from gemmascope.generate import sample
from gemmascope.testing import ARCHITECTURES, tiny_model

PROMPT = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(6))


def test_sample_frequencies():
    """Draws follow softmax(logits / temperature), cut to the top k and then to the nucleus."""
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])

    def drawn(**settings) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = sample(logits.expand(20000, -1), generator=generator, **settings)
        return ids.bincount(minlength=5) / 20000

    torch.testing.assert_close(drawn(temperature=0.7), (logits / 0.7).softmax(-1), rtol=0, atol=0.01)
    top2 = torch.cat(((logits[:2] / 2).softmax(-1), torch.zeros(3)))
    torch.testing.assert_close(drawn(temperature=2.0, top_k=2), top2, rtol=0, atol=0.01)
    probs = logits.softmax(-1)  # 0.56, 0.21, 0.12, 0.03, 0.08: the fewest that reach 0.8 are three
    nucleus = torch.where(torch.arange(5) < 3, probs, 0) / probs[:3].sum()
    torch.testing.assert_close(drawn(temperature=1.0, top_p=0.8), nucleus, rtol=0, atol=0.01)
    assert (drawn(temperature=1.0, top_p=0.01) == torch.tensor([1.0, 0, 0, 0, 0])).all()
    assert sample(logits[None]).item() == 0


def test_seed_makes_a_draw_repeatable():
    model = tiny_model("E2B")
    draw = lambda seed: model.generate(PROMPT, 12, temperature=1.0, top_k=20, top_p=0.95, seed=seed)  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hooks_act_at_every_step_alike_with_and_without_kv_cache(architecture):
    """An edit that depends on nothing but its tensor gives the same tokens either way; and it changes them."""
    model = tiny_model(architecture)
    steps = []

    def knock_out(z, hook):
        steps.append(z.shape[1])
        z[:, :, 1] = 0

    hooks = [(f"blocks.{layer}.attn.hook_z", knock_out) for layer in range(model.cfg.n_layers)]
    with_cache = model.generate(PROMPT, 20, fwd_hooks=hooks, stop_ids=[])
    assert steps == [9] * model.cfg.n_layers + [1] * model.cfg.n_layers * 19
    without = model.generate(PROMPT, 20, fwd_hooks=hooks, stop_ids=[], use_past_kv_cache=False)
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, model.generate(PROMPT, 20, stop_ids=[]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_returned_cache_is_that_of_one_pass_over_the_whole_text(architecture):
    model = tiny_model(architecture).double()
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    tokens, cache = model.generate(PROMPT, 15, attention_mask=mask, return_cache=True, stop_ids=[])
    whole = torch.cat((mask, torch.ones(2, 14, dtype=torch.long)), dim=1)
    _, expected = model.run_with_cache(tokens[:, :-1], attention_mask=whole)
    assert set(cache.keys()) == set(expected.keys())
    real = whole.bool()
    for name, tensor in expected.items():
        torch.testing.assert_close(cache[name][real], tensor[real], rtol=1e-8, atol=1e-8, msg=name)
    for layer in range(model.cfg.n_layers):
        rows = cache["pattern", layer].transpose(1, 2)[real]
        torch.testing.assert_close(rows, expected["pattern", layer].transpose(1, 2)[real], rtol=1e-8, atol=1e-8)


def test_returned_cache_holds_what_hooks_changed():
    model = tiny_model("12B")

    def first_key_only(pattern, hook):
        pattern.zero_()
        pattern[..., 0] = 1

    hooks = [("blocks.2.attn.hook_pattern", first_key_only)]  # layer 2 is global
    tokens, cache = model.generate(PROMPT, 6, fwd_hooks=hooks, return_cache=True, stop_ids=[])
    assert cache["pattern", 2].shape == (2, 4, 14, 14)
    assert (cache["pattern", 2][..., 0] == 1).all() and cache["pattern", 2][..., 1:].abs().max() == 0
    _, named = model.generate(PROMPT, 6, names_filter="blocks.0.attn.hook_attn_scores", return_cache=True, stop_ids=[])
    scores = named["attn_scores", 0]  # layer 0 slides over 7 keys: what a query does not see is -inf
    visible = torch.ones(14, 14).tril().bool() & ~torch.ones(14, 14).tril(-7).bool()
    assert torch.equal(scores[0, 0] > float("-inf"), visible)


def test_last_position_only_unless_somebody_looks():
    model, widths = tiny_model("31B"), []
    model.unembed.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    model.generate(PROMPT, 1)
    model.generate(PROMPT, 1, fwd_hooks=[("hook_logits", lambda t, hook: None)])
    assert widths == [1, 9]


def test_stops_and_pads():
    model = tiny_model("26B-A4B")
    free = model.generate(PROMPT, 12, stop_ids=[])
    stop = int(free[0, 11])
    cut = model.generate(PROMPT, 12, stop_ids=[stop])
    first = (free[0, 9:] == stop).nonzero()[0].item()
    assert torch.equal(cut[0, : 10 + first], free[0, : 10 + first]) and (cut[0, 10 + first :] == 0).all()
    everything = model.generate(PROMPT, 12, stop_ids=list(range(101)))
    assert everything.shape[1] == 10


def test_long_generation_shows_a_bar(capsys):
    model = tiny_model("31B", n_layers=1, layer_kinds=("global",))
    model.generate(PROMPT[:1], 64, stop_ids=[])
    assert "/64" in capsys.readouterr().err
    model.generate(PROMPT[:1], 63, stop_ids=[])
    model.generate(PROMPT[:1], 64, stop_ids=[], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=1.0, top_k=0), "top_k is 0"),
        (dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        (dict(top_k=5), "change nothing at temperature 0"),
        (dict(return_cache=True, use_past_kv_cache=False), "return_cache needs the KV cache"),
        (dict(max_new_tokens=600), "9 prompt tokens and 600 new ones do not fit the 512"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(ValueError, match=said):
        tiny_model("12B").generate(PROMPT, **settings)


def test_right_padding_is_refused():
    mask = torch.ones_like(PROMPT)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="pad on the left"):
        tiny_model("12B").generate(PROMPT, 3, attention_mask=mask)


def test_pattern_changed_in_some_steps_only_is_refused():
    model, steps = tiny_model("12B"), []

    def once(pattern, hook):
        steps.append(1)
        if len(steps) == 2:
            model.reset_hooks()
        return pattern * 0.5

    model.add_hook("blocks.2.attn.hook_pattern", once)
    _, cache = model.generate(PROMPT, 6, return_cache=True, stop_ids=[])
    with pytest.raises(KeyError, match="may have changed it"):
        cache["pattern", 2]


def test_a_failing_hook_leaves_no_hooks_behind():
    model = tiny_model("12B")

    def fail(tensor, hook):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.generate(PROMPT, 3, fwd_hooks=[("hook_embed", fail)])
    assert not model.list_hooks()
