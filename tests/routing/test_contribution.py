"""Experts' parts add up to what the model wrote, and their logits to the model's own."""

import pytest
import torch

import gemmascope as gs
from gemmascope.readout.activations import Prompts
from gemmascope.routing import contribution as C
from gemmascope.testing import tiny_model
from gemmascope.weights import load

TOKENS = torch.randint(3, 101, (3, 11), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model():
    return tiny_model("26B-A4B").double()


def close(found, expected, rel=1e-9):
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rel, atol=rel * float(expected.abs().max()), equal_nan=True)


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_parts_sum_to_what_the_feed_forward_added(model, layer):
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    parts = C.parts_of(cache, layer)
    close(parts.dense + parts.slots.sum(-2), cache["mlp_out", layer])
    assert torch.equal(parts.experts, cache.routing.indices[layer])
    # The same terms as the decomposition of the final stream, before the later scalars.
    terms, labels = cache.decompose(experts=True)
    layer %= 6
    later = torch.cat([block.layer_scalar for block in model.blocks[layer:]]).prod()
    for slot in range(3):
        close(parts.slots[..., slot, :] * later, terms[labels.index(f"{layer}_slot{slot}")])


def test_the_branch_is_scale_invariant(model):
    def tripled(weights, hook):
        return 3 * weights

    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
        with model.hooks([("blocks.2.moe.router.hook_weights", tripled)]):
            _, scaled = model.run_with_cache(TOKENS)
    close(scaled["moe.router.hook_weights", 2], 3 * cache["moe.router.hook_weights", 2])
    close(C.parts_of(scaled, 2).slots, C.parts_of(cache, 2).slots, rel=1e-5)  # but for the eps of the norm


def test_contribution_table(model):
    table = C.contribution_table(model, TOKENS)
    assert len(table) == 3 * 11 * 6 * 4
    close(table.groupby(["prompt", "pos", "layer"])["share"].sum().to_list(), [1.0] * 3 * 11 * 6)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    parts = C.parts_of(cache, 4)
    branch, whole = parts.slots[1, 7].sum(0), cache["mlp_out", 4][1, 7]
    rows = table.query("prompt == 1 and pos == 7 and layer == 4").to_dict("records")
    assert [row["expert"] for row in rows] == ["dense", *parts.experts[1, 7].tolist()]
    for row, part in zip(rows, (parts.dense[1, 7], *parts.slots[1, 7]), strict=True):
        close(row["norm"], part.norm())
        close(row["share"], part @ whole / (whole @ whole))
        close(row["cosine"], part @ branch / (part.norm() * branch.norm()))
    close([row["weight"] for row in rows[1:]], parts.weights[1, 7])


def test_the_logit_lens_of_experts_adds_up(model):
    found = C.expert_logit_lens(model, TOKENS[:1], -2, pos=5, top=101)
    assert found["direction"].value_counts().tolist() == [404, 404]
    promoted = found[found["direction"] == "promotes"]
    ids = promoted["id"].unique().tolist()[:6]
    for id in ids:
        exact = gs.direct_logit_attribution(model, TOKENS[:1], id, by="expert", pos=5)
        table = exact.cells.assign(value=exact.values[:, 0].tolist()).query("layer == 4 and value != 0")
        by_expert = promoted[promoted["id"] == id].set_index("expert")["logit"].to_dict()
        assert by_expert == pytest.approx(table.set_index("expert")["value"].to_dict())
    for _, row in found.groupby(["expert", "direction"], sort=False):
        ordered = row["logit"].tolist()
        assert ordered == sorted(ordered, reverse=row["direction"].iloc[0] == "promotes")


def brute_profile(model, tokens, mask, layer, expert):
    """The tokens that chose an expert, one by one."""
    rows = []
    moe = model.blocks[layer].moe
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
        parts = C.parts_of(cache, layer)
        for prompt, pos in mask.nonzero().tolist():
            branch, whole = parts.slots[prompt, pos].sum(0), cache["mlp_out", layer][prompt, pos]
            for slot in (parts.experts[prompt, pos] == expert).nonzero()[:, 0].tolist():
                part = parts.slots[prompt, pos, slot]
                raw = moe.down_proj[expert] @ cache["moe.hook_expert_post", layer][prompt, pos, slot]
                rows.append((part.norm(), part @ whole / (whole @ whole),
                             torch.cosine_similarity(part, branch, dim=0), raw.abs().max(), part))  # fmt: skip
    return rows


def test_a_profile_is_the_mean_over_the_tokens_that_chose_an_expert(model):
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    mask[1, :6] = False
    profile = C.profile_experts(model, Prompts(TOKENS, mask), batch_size=2, progress=False)
    later = [torch.cat([block.layer_scalar for block in model.blocks[layer:]]).prod() for layer in range(6)]
    for layer, expert in ((0, 2), (3, 5), (5, 0)):
        rows = brute_profile(model, TOKENS, mask, layer, expert)
        assert rows
        found = profile.experts.query(f"layer == {layer} and expert == {expert}").iloc[0]
        norm, share, cosine, largest, part = (torch.stack(column) for column in zip(*rows, strict=True))
        assert found["tokens"] == len(rows)
        close(found[["norm", "share", "cosine"]].to_list(), [norm.mean(), share.mean(), cosine.mean()])
        close(found["max_output"], largest.max(), rel=1e-5)
        close(profile.written[layer, expert], part.mean(0) * later[layer], rel=1e-5)
    layers = profile.layers
    close((layers["dense_share"] + layers["routed_share"]).to_list(), [1.0] * 6)
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    parts = C.parts_of(cache, 2)
    close(layers["dense_norm"][2], parts.dense[mask].norm(dim=-1).mean())
    close(layers["routed_norm"][2], parts.slots[mask].sum(-2).norm(dim=-1).mean())
    first = torch.cosine_similarity(parts.slots[mask][:, 0], parts.slots[mask].sum(-2), dim=-1)
    close(layers["top1_cosine"][2], first.mean())


def test_a_planted_super_expert_is_found():
    model = tiny_model("26B-A4B")
    with torch.no_grad():
        model.blocks[1].moe.down_proj[6] *= 300
    profile = C.profile_experts(model, torch.randint(3, 101, (4, 20)), progress=False)
    assert profile.super_experts()[["layer", "expert"]].values.tolist() == [[1, 6]]


def test_an_expert_s_words_are_found():
    model = load("nano-moe")
    texts = ["Kelo: re koke lore kolo.", "def add(a, b):\n  return a\nprint(add(1, 2))\n"]
    trace = gs.trace_routing(model, texts, progress=False)
    table = C.exciting_tokens(trace, 4, 3, top=500, context=2)
    assert len(table) == trace.real.sum() and table["prob"].is_monotonic_decreasing
    assert table["prob"][0] == pytest.approx(float(trace.probs[4, ..., 3][trace.real].max()))
    row = table.query("prompt == 0 and pos == 3").iloc[0]
    shown = model.to_str_tokens(texts[0])
    assert row["token"] == shown[3] and row["context"] == "".join(shown[1:4])
    chosen = table.query("rank >= 0")
    assert len(chosen) == (trace.indices[4][trace.real] == 3).sum()

    profile = C.profile_experts(model, texts, progress=False)
    written = profile.written_tokens(5, 6, top=3)
    with torch.no_grad():
        vector = profile.written[5, 6]
        normed = vector / vector.square().mean().add(model.cfg.eps).sqrt() * model.ln_final.weight
        logits = normed @ model.W_U
    assert written["id"].tolist() == logits.topk(3).indices.tolist()
    close(written["logit"].tolist(), logits.topk(3).values, rel=1e-4)
    assert written["token"].tolist() == model.to_str_tokens(written["id"].tolist())


@torch.no_grad()
def test_what_is_refused(model):
    dense = tiny_model("E2B")
    for call in (C.contribution_table, C.profile_experts, lambda m, p: C.expert_logit_lens(m, p, 0)):
        with pytest.raises(ValueError, match="tiny E2B is dense .* Models that route: nano-moe"):
            call(dense, TOKENS)
    with pytest.raises(ValueError, match="is dense"):
        C.parts_of(dense.run_with_cache(TOKENS)[1], 0)
    with pytest.raises(ValueError, match="Layer 6 does not exist: there are layers 0 to 5"):
        C.expert_logit_lens(model, TOKENS[:1], 6)
    with pytest.raises(ValueError, match="reads one prompt, and 3 came"):
        C.expert_logit_lens(model, TOKENS, 0)
    with pytest.raises(ValueError, match="Position 11 is out of range"):
        C.expert_logit_lens(model, TOKENS[:1], 0, pos=11)
    with pytest.raises(ValueError, match="top is 0"):
        C.expert_logit_lens(model, TOKENS[:1], 0, top=0)
    trace = gs.trace_routing(model, TOKENS, progress=False)
    with pytest.raises(ValueError, match="Expert 8 does not exist"):
        C.exciting_tokens(trace, 0, 8)
    with pytest.raises(ValueError, match="does not know its tokens"):
        C.exciting_tokens(model.run_with_cache(TOKENS)[1].routing, 0, 1)
    with pytest.raises(ValueError, match="Expert 9 does not exist"):
        C.profile_experts(model, TOKENS, progress=False).written_tokens(0, 9)
