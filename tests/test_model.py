"""The text model by itself: arithmetic that has a known answer, arguments of forward, and what is refused."""

import math

import pytest
import torch
from gemmascope_kernels import reference

from gemmascope import ops
from gemmascope.generate import KVCache
from gemmascope.model.text import scale_as
from gemmascope.testing import ARCHITECTURES, tiny_model

TOKENS = torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(3))


def test_global_rope_turns_a_quarter_at_the_full_heads_frequencies():
    cos, sin = reference.rope_tables(torch.tensor([[1]]), 512, 1e6, 0.25, torch.float64)
    frequency = torch.atan2(sin, cos)[0, 0]
    # Golden values of Gemma 4: 64 of 256 pairs turn, with exponents over the whole width of 512.
    torch.testing.assert_close(frequency[:3], torch.tensor([1, 0.94746351, 0.89768714], dtype=torch.float64))
    assert frequency[63] == pytest.approx(0.03337625, rel=1e-6)
    assert frequency[64:256].abs().max() == 0 and torch.equal(frequency[256:], frequency[:256])


def test_rope_preserves_length_and_depends_on_distance_only():
    x = torch.randn(1, 2, 3, 16, dtype=torch.float64)
    products = []
    for shift in (0, 5):
        tables = reference.rope_tables(torch.tensor([[shift, shift + 4]]), 16, 1e4, 1.0, torch.float64)
        turned = reference.rotate(x, *tables)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
        products.append((turned[:, 0] * turned[:, 1]).sum(-1))
    torch.testing.assert_close(*products)


@pytest.mark.parametrize(("d", "bf16"), [(1536, 39.25), (2560, 50.5), (2816, 53.0), (3840, 62.0), (5376, 73.5)])
def test_embedding_scale_is_rounded_to_the_weights_dtype(d, bf16):
    assert scale_as(torch.empty(0, dtype=torch.bfloat16), d).item() == bf16
    assert scale_as(torch.empty(0), d).item() == pytest.approx(math.sqrt(d), rel=1e-7)


def test_window_edge():
    """A sliding query sees W keys, itself included: distance W - 1 yes, W no."""
    visible = ops.Mask(9, 9, torch.device("cpu"), window=4).visible[0]
    assert visible[8].tolist() == [False] * 5 + [True] * 4
    assert visible[2].tolist() == [True] * 3 + [False] * 6
    model = tiny_model("12B", n_layers=1, layer_kinds=("sliding",))  # one layer: no other way for the token to matter
    tokens = torch.randint(3, 101, (1, 12))
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] - 3 + 1) % 98 + 3
    moved = (model(tokens) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 2 + [True] * 7 + [False] * 3  # window 7


def test_mask_with_everything_against_brute_force():
    key_mask = torch.tensor([[True] * 10, [False] * 3 + [True] * 7])
    blocks = torch.full((2, 10), -1)
    blocks[0, 1:8], blocks[1, 4:6] = 0, 1
    visible = ops.Mask(6, 10, torch.device("cpu"), window=4, key_mask=key_mask, image_blocks=blocks).visible
    for b in range(2):
        for i in range(6):
            for k in range(10):
                q = i + 4
                causal = k <= q or (blocks[b, q] == blocks[b, k] != -1)
                assert visible[b, i, k] == ((causal and abs(k - q) < 4 and bool(key_mask[b, k])) or k == q), (b, q, k)


@pytest.mark.parametrize("mask", ["causal", "window", "padded"])
@pytest.mark.parametrize(("heads", "kv_heads", "d_head"), [(4, 4, 8), (6, 2, 16), (5, 1, 24)])
def test_fused_attention_equals_the_reference(heads, kv_heads, d_head, mask, monkeypatch):
    q, k, v = (torch.randn(2, 13, n, d_head).double() * 3 for n in (heads, kv_heads, kv_heads))  # large scores
    for tensor in (q, k, v):
        tensor.requires_grad_()
    key_mask = torch.ones(2, 13, dtype=torch.bool)
    key_mask[1, :4] = False
    settings = {"causal": {}, "window": {"window": 5}, "padded": {"key_mask": key_mask}}[mask]
    spec = ops.Mask(13, 13, torch.device("cpu"), **settings)
    weight, results = torch.randn(2, 13, heads, d_head).double(), []
    for choice in ("", "reference"):
        monkeypatch.setenv("GEMMASCOPE_OPS", choice)
        z, _ = ops.attention(q, k, v, spec)
        results.append((z, *torch.autograd.grad((z * weight).sum(), (q, k, v))))
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=1e-10, atol=1e-10)
    monkeypatch.setenv("GEMMASCOPE_OPS", "fastest")
    with pytest.raises(ValueError, match="'fastest' is not known; it takes triton, cpu, reference"):
        ops.attention(q, k, v, spec)


def test_grouped_linear_equals_one_product_a_row():
    x, weight = torch.randn(23, 10), torch.randn(5, 7, 10)
    expert = torch.randint(0, 4, (23,))  # expert 4 gets nothing
    expected = torch.stack([weight[e] @ row for row, e in zip(x, expert, strict=True)])
    torch.testing.assert_close(reference.grouped_linear(x, expert, weight), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_kv_cache_in_pieces_equals_one_pass(architecture):
    model = tiny_model(architecture)
    tokens = torch.randint(3, 101, (2, 40))
    whole, past, pieces = model(tokens), KVCache(model.cfg), []
    for piece in tokens.split([1, 9, 2, 1, 20, 7], dim=1):
        pieces.append(model(piece, past_kv_cache=past))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-4)
    assert past.length == 40


@pytest.mark.parametrize("architecture", ["26B-A4B", "31B"])
@torch.no_grad()
def test_shared_keys_and_values(architecture):
    """The K = V form: the same numbers, fewer of them kept, and an edit of keys in mid-generation still acts."""
    model = tiny_model(architecture).double()
    tokens = torch.randint(3, 101, (2, 30))
    whole, held = model(tokens), {}
    edit = ("blocks.3.attn.hook_rot_k", lambda t, hook: t * 1.5)  # layer 3 is global
    for shared in (False, True):
        model.shared_kv = shared
        past, pieces = KVCache(model.cfg), []
        for piece in tokens.split([1, 9, 2, 18], dim=1):
            pieces.append(model(piece, past_kv_cache=past))
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-9)
        held[shared] = past.nbytes
        past, edited = KVCache(model.cfg), [model(tokens[:, :20], past_kv_cache=past)]
        edited.append(model.run_with_hooks(tokens[:, 20:25], past_kv_cache=past, fwd_hooks=[edit]))
        edited.append(model(tokens[:, 25:], past_kv_cache=past))
        held[f"edited {shared}"] = torch.cat(edited, dim=1)
    assert held[True] < held[False]
    torch.testing.assert_close(held["edited True"], held["edited False"], rtol=0, atol=1e-9)
    assert (held["edited True"] - whole).abs().max() > 1e-3
    pattern = [("blocks.3.attn.hook_pattern", lambda t, hook: t.roll(1, 1))]
    rolled = model.run_with_hooks(tokens, fwd_hooks=pattern)
    model.shared_kv = False
    torch.testing.assert_close(rolled, model.run_with_hooks(tokens, fwd_hooks=pattern), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="no layer whose keys and values are one"):
        tiny_model("E2B").shared_kv = True


def test_kv_cache_of_sliding_layers_keeps_the_window_and_no_more():
    model = tiny_model("12B", n_ctx=4096)
    for chunks in ([1000], [1] * 50, [5, 300, 1, 20]):
        cache = KVCache(model.cfg)
        for n in chunks:
            k = torch.rand(1, n, 2, 8)
            kept, _ = cache.append(0, k, k)  # layer 0 slides over 7 keys
            cache.advance(n)
        assert cache.nbytes == 2 * 6 * 2 * 8 * 4  # what the next query sees besides itself
        assert torch.equal(kept[:, -n:], k)
    with pytest.raises(ValueError, match="holds no gradients"):
        cache.append(0, k.requires_grad_(), k)


@torch.no_grad()
def test_padding_stays_padding_in_a_kv_cache():
    model, past = tiny_model("E2B"), None
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    whole = model(TOKENS, attention_mask=mask)
    past = KVCache(model.cfg)
    model(TOKENS[:, :10], attention_mask=mask[:, :10], past_kv_cache=past)
    torch.testing.assert_close(model(TOKENS[:, 10:], past_kv_cache=past), whole[:, 10:], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="holds 2 sequences and 1 came"):
        model(TOKENS[:1, 10:], past_kv_cache=past)


@torch.no_grad()
def test_image_in_a_kv_cache_comes_whole():
    model = tiny_model("12B")
    blocks = torch.full((2, 17), -1)
    blocks[:, 4:9] = 0
    whole = model(TOKENS, image_blocks=blocks)
    past = KVCache(model.cfg)
    model(TOKENS[:, :9], image_blocks=blocks[:, :9], past_kv_cache=past)
    rest = model(TOKENS[:, 9:], image_blocks=blocks, past_kv_cache=past)
    torch.testing.assert_close(rest, whole[:, 9:], rtol=0, atol=1e-4)
    past = KVCache(model.cfg)
    model(TOKENS[:, :6], image_blocks=blocks[:, :6], past_kv_cache=past)
    with pytest.raises(ValueError, match="An image lies partly in past_kv_cache"):
        model(TOKENS[:, 6:], image_blocks=blocks, past_kv_cache=past)


def test_only_shared_keys_are_kept_through_the_pass():
    model, held = tiny_model("E4B"), []
    model.blocks[-1].register_forward_hook(lambda module, args, output: held.append(set(args[1].kv)))
    model(TOKENS)
    assert held == [{layer.kv_source for layer in model.cfg.layers} - {None}]


def test_loss():
    model = tiny_model("E2B")
    logits, loss = model(TOKENS, return_type="both")
    per_token = -logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
    torch.testing.assert_close(loss, per_token.mean())
    torch.testing.assert_close(model(TOKENS, return_type="loss", loss_per_token=True), per_token)
    mask = torch.ones_like(TOKENS)
    mask[1, :6] = 0
    masked = model(TOKENS, attention_mask=mask, return_type="loss", loss_per_token=True)
    assert masked[1, :6].abs().max() == 0  # nothing is predicted from padding, nor is padding predicted
    mean = masked.sum() / (masked != 0).sum()
    torch.testing.assert_close(model(TOKENS, attention_mask=mask, return_type="loss"), mean)
    assert model(TOKENS, return_type=None) is None


@pytest.mark.parametrize("stop", [0, 3, -1, -6, 6])
def test_stop_at_layer(stop):
    model = tiny_model("26B-A4B")
    _, cache = model.run_with_cache(TOKENS)
    layer = stop if stop >= 0 else stop + 6  # as in TransformerLens: -1 is before the last layer
    expected = cache["resid_post", 5] if layer == 6 else cache["resid_pre", layer]
    assert torch.equal(model(TOKENS, stop_at_layer=stop), expected)
    _, partial = model.run_with_cache(TOKENS, stop_at_layer=stop)
    assert all(int(name.split(".")[1]) < layer for name in partial.keys() if name.startswith("blocks."))


def test_float64_settles_arguments():
    """In float64 the two lines and the two attention paths agree to its own precision: nothing rounds in between."""
    model = tiny_model("26B-A4B").double()
    assert model.cfg.dtype == torch.float64
    plain = model(TOKENS)
    explicit = model.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: name.endswith("pattern"), lambda t, hook: t)])
    torch.testing.assert_close(explicit, plain, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.float()(TOKENS), plain.float(), rtol=0, atol=1e-4)


def test_model_can_be_copied_and_moved():
    import copy

    model = tiny_model("12B")
    twin = copy.deepcopy(model)
    twin.add_hook("blocks.1.hook_attn_out", lambda t, hook: t * 0)
    assert not torch.equal(twin(TOKENS), model(TOKENS))
    assert not model.blocks[1].watched and twin.blocks[1].watched
    assert twin.to(torch.bfloat16).cfg.dtype == torch.bfloat16 and model.cfg.dtype == torch.float32


def test_weights_by_transformer_lens_names():
    model = tiny_model("E4B")
    attn, geometry = model.blocks[1].attn, model.layer(1)
    assert attn.W_Q.shape == (4, 48, geometry.d_head) and attn.W_O.shape == (4, geometry.d_head, 48)
    assert attn.W_K.shape == attn.W_V.shape == (geometry.n_kv_heads, 48, geometry.d_head)
    x = torch.randn(5, 48)
    torch.testing.assert_close(torch.einsum("pd,hde->phe", x, attn.W_Q).flatten(1), attn.q_proj(x))
    assert model.W_E.shape == (101, 48) and model.W_U.shape == (48, 101) and model.b_U.abs().max() == 0
    moe = tiny_model("26B-A4B")
    assert torch.equal(moe.blocks[2].attn.W_V, moe.blocks[2].attn.W_K)  # global: one projection


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: m(torch.zeros(1, 0, dtype=torch.long)), ValueError, "prompt is empty"),
        (lambda m: m(torch.tensor([[3, 101]])), ValueError, "Token id 101 is out of range.*ids 0 to 100"),
        (lambda m: m(torch.tensor([[-1, 5]])), ValueError, "Token id -1 is out of range"),
        (lambda m: m(torch.ones(1, 513, dtype=torch.long)), ValueError, "513 tokens.*at most 512"),
        (lambda m: m(torch.ones(1, 4)), ValueError, "integers of shape"),
        (lambda m: m([[3, 4]]), TypeError, "not a list"),
        (lambda m: m("hello"), ValueError, "has no tokenizer"),
        (lambda m: m(TOKENS, return_type="logit"), ValueError, "'logits', 'loss', 'both' or None"),
        (lambda m: m(TOKENS, attention_mask=torch.ones(2, 5)), ValueError, r"attention_mask has shape \[2, 5\]"),
        (lambda m: m(TOKENS, image_blocks=torch.zeros(2, 17).long()), ValueError, "reads images causally"),
        (lambda m: m(TOKENS, stop_at_layer=9), ValueError, "stop_at_layer is 9; .* layers 0 to 7"),
        (lambda m: m(TOKENS[:, :1], return_type="loss"), ValueError, "needs two tokens"),
        (lambda m: m(TOKENS, position_ids=torch.zeros(1, 1).long()), ValueError, r"position_ids has shape \[1, 1\]"),
        (lambda m: m(torch.tensor([[5, 6], [0, 6]])), ValueError, "Row 1 .* starts or ends with padding"),
        (lambda m: m(TOKENS, stop_at_layer=2, past_kv_cache=KVCache(m.cfg)), ValueError, "drop one of the two"),
        (lambda m: m.run_with_cache(TOKENS, incl_bwd=True), ValueError, 'pass return_type="loss"'),
        (lambda m: m.run_with_cache(TOKENS, pos_slice=slice(50, 60)), ValueError, "none of the 17 positions"),
        (lambda m: m.layer(8), ValueError, "Layer 8 does not exist: .* layers 0 to 7"),
        (lambda m: m.run_with_cache(TOKENS, remove_batch_dim=True), ValueError, "there are 2"),
    ],
)
def test_bad_input(call, error, said):
    with pytest.raises(error, match=said):
        call(tiny_model("E2B"))
