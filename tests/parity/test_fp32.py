"""Our numbers against transformers', float32, eager attention, every gain and scalar away from 1."""

import pytest
import torch

from gemmascope.testing import ARCHITECTURES, tiny_model

N_POS = 29  # four windows of 7, and one more


def _padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, padded at one side, and their mask."""
    tokens = torch.randint(3, 101, (3, N_POS))
    mask = torch.ones_like(tokens)
    for row, length in enumerate((N_POS, 20, 5)):
        padding = slice(0, N_POS - length) if side == "left" else slice(length, N_POS)
        tokens[row, padding], mask[row, padding] = 0, 0
    return tokens, mask


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < relative, f"relative error {error:.2e}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_logits_and_every_stream(architecture, transformers_twin):
    model = tiny_model(architecture)
    twin, tokens = transformers_twin(model), torch.randint(3, 101, (2, N_POS))
    streams = []
    for layer in twin.model.layers:
        layer.register_forward_hook(lambda _, args, output: streams.append((args[0].clone(), output.clone())))
    theirs = twin(tokens, attention_mask=torch.ones_like(tokens)).logits
    ours, cache = model.run_with_cache(tokens)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    for layer, (before, after) in enumerate(streams):
        _assert_close(cache["resid_pre", layer], before, 1e-5)
        _assert_close(cache["resid_post", layer], after, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_padded_batch(architecture, side, transformers_twin):
    model = tiny_model(architecture)
    tokens, mask = _padded(side)
    theirs = transformers_twin(model)(tokens, attention_mask=mask).logits
    ours = model(tokens, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-4)
    assert torch.equal(ours[real].argmax(-1), theirs[real].argmax(-1))
    assert ours.isfinite().all()
    for row, length in enumerate((N_POS, 20, 5)):  # and padding changes nothing
        alone = model(tokens[row][real[row]][None])
        torch.testing.assert_close(ours[row][real[row]], alone[0], rtol=0, atol=2e-5)
        assert alone.shape[1] == length


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_arbitrary_positions(architecture, transformers_twin):
    model = tiny_model(architecture)
    tokens = torch.randint(3, 101, (2, N_POS))
    positions = torch.randint(0, 300, (2, N_POS))
    # A mask of ones keeps transformers from reading jumps in the positions as several packed sequences.
    theirs = transformers_twin(model)(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits
    torch.testing.assert_close(model(tokens, position_ids=positions), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["12B", "26B-A4B", "31B"])
@torch.no_grad()
def test_image_blocks(architecture, transformers_twin):
    """Tokens of one image see each other in sliding layers; global layers stay causal.

    For an image longer than the window transformers 5.23 lifts the window inside it, and we do not (docs/decisions.md).
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    model = tiny_model(architecture)
    twin, tokens = transformers_twin(model), torch.randint(3, 101, (2, N_POS))
    blocks = torch.full((2, N_POS), -1)
    blocks[:, 3:8], blocks[:, 12:19], blocks[1, 19:23] = 0, 1, 2  # as long as the window at most; two adjacent
    shared = dict(
        config=twin.config,
        inputs_embeds=twin.model.embed_tokens(tokens),
        attention_mask=torch.ones_like(tokens),
        past_key_values=None,
        position_ids=torch.arange(N_POS)[None],
    )
    masks = {
        "full_attention": create_causal_mask(**shared),
        "sliding_attention": create_sliding_window_causal_mask(**shared, block_sequence_ids=blocks),
    }
    theirs = twin(tokens, attention_mask=masks).logits
    ours = model(tokens, image_blocks=blocks)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - model(tokens)).abs().max() > 1e-2  # the blocks do something


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients(architecture, transformers_twin):
    """Training works: the loss and its gradient in every weight are transformers'."""
    model = tiny_model(architecture).train()
    twin, tokens = transformers_twin(model).train(), torch.randint(3, 101, (2, N_POS))
    ours = model(tokens, return_type="loss")
    theirs = twin(tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    from gemmascope.weights import hf_name

    grads = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        theirs_grad = grads[f"model.{hf_name(name)}"].grad
        error = (weight.grad - theirs_grad).abs().max() / theirs_grad.abs().max().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: {error:.1e}"
