"""bfloat16: as near to transformers' bfloat16 as rounding allows, and no further from float32 than it is."""

import pytest
import torch
from torch import Tensor

import gemmascope as gs
from gemmascope.testing import ARCHITECTURES, tiny_model
from gemmascope.zoo.corpus import Corpus

TOKENS = torch.randint(3, 101, (8, 64), generator=torch.Generator().manual_seed(5))


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) of next-token distributions, in nats, from logits."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _compared(architecture: str, transformers_twin) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of our bfloat16, of transformers' bfloat16 and of float32, all of the same (bfloat16) weights."""
    model = tiny_model(architecture).bfloat16()
    twin = transformers_twin(model, torch.bfloat16)
    theirs = twin(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    exact = tiny_model(architecture)
    exact.load_state_dict(model.state_dict())
    return model(TOKENS), theirs, exact(TOKENS)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "26B-A4B"])
@torch.no_grad()
def test_dense_and_edge(architecture, transformers_twin):
    ours, theirs, exact = _compared(architecture, transformers_twin)
    assert kl(theirs, ours) <= 1e-3
    assert kl(exact, ours) <= 1.05 * kl(exact, theirs)  # two roundings of one sum: equal up to a twentieth


def _router_runs(twin) -> list:
    """What each router of transformers' model saw and chose: (stream [batch, pos, d], probs, indices sorted by id)."""
    seen = []

    def keep(_, args, output):
        probs, _, indices = output
        seen.append([tensor.view(*TOKENS.shape, -1) for tensor in (args[0], probs, indices)])

    for layer in twin.model.layers:
        layer.router.register_forward_hook(keep)
    return seen


def _sets_agree(a: Tensor, b: Tensor) -> Tensor:
    return (a.sort(-1).values == b.sort(-1).values).all(-1)


@torch.no_grad()
def test_moe_choices(transformers_twin):
    """Given the same stream, both routers choose the same experts, or there was a near-tie."""
    model = tiny_model("26B-A4B").bfloat16()
    twin = transformers_twin(model, torch.bfloat16)
    seen = _router_runs(twin)
    twin(TOKENS, attention_mask=torch.ones_like(TOKENS))
    agree = []
    for block, (stream, probs, indices) in zip(model.blocks, seen, strict=True):
        same = _sets_agree(block.moe.router(stream)[0], indices)
        ordered = probs.sort(-1, descending=True).values
        assert ((ordered[..., 2] - ordered[..., 3]) / ordered[..., 2])[~same].lt(0.01).all()
        agree.append(same.float().mean())
    assert torch.stack(agree).mean() >= 0.99


@torch.no_grad()
def test_moe_where_the_chosen_sets_agree(transformers_twin):
    model = tiny_model("26B-A4B").bfloat16()
    twin = transformers_twin(model, torch.bfloat16)
    seen = _router_runs(twin)
    theirs = twin(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    exact = tiny_model("26B-A4B")
    exact.load_state_dict(model.state_dict())
    # A near-tie that flips at one token changes every later one: the choices are held equal by the hooks made for it.
    names = [f"blocks.{layer}.moe.router.hook_indices" for layer in range(len(seen))]
    same_choice = [(n, lambda t, hook, i=i: i) for n, (_, _, i) in zip(names, seen, strict=True)]
    ours = model.run_with_hooks(TOKENS, fwd_hooks=same_choice)
    reference = exact.run_with_hooks(TOKENS, fwd_hooks=same_choice)
    assert kl(theirs, ours) <= 1e-3
    assert kl(reference, ours) <= 1.05 * kl(reference, theirs)


@pytest.mark.parametrize("name", ["nano-moe", "nano-edge"])
@torch.no_grad()
def test_trained_models_end_to_end(name, transformers_twin):
    """Free-running, on the corpus they were trained for: choices differ where an earlier rounding tipped a near-tie."""
    model = gs.load(name, dtype="bfloat16")
    twin = transformers_twin(model, torch.bfloat16)
    tokens = Corpus(model.tokenizer.backend, seed=7).batch(0, 8, 256).tokens
    chosen = []
    if model.cfg.n_experts:
        for layer in twin.model.layers:
            layer.router.register_forward_hook(lambda _, args, output: chosen.append(output[2].view(*tokens.shape, -1)))
    theirs = twin(tokens, attention_mask=torch.ones_like(tokens)).logits
    ours, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith(("hook_indices", "hook_embed")))
    exact = gs.load(name)
    exact.load_state_dict(model.state_dict())
    reference = exact(tokens)
    assert kl(theirs, ours) <= 1e-3
    assert kl(reference, ours) <= 1.05 * kl(reference, theirs)
    same = [_sets_agree(cache["moe.router.hook_indices", n], theirs_) for n, theirs_ in enumerate(chosen)]
    assert not same or torch.stack(same).float().mean() >= 0.99
