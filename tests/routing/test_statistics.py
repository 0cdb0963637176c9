"""Every statistic equals a computation by hand over the choices of single tokens, and finds what was planted."""

import itertools
import math
from collections import Counter

import numpy
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import normalized_mutual_info_score

import gemmascope as gs
from gemmascope.readout.activations import collect
from gemmascope.results import about
from gemmascope.routing import geometry as G
from gemmascope.routing import statistics as S
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import BOS, DOMAINS, Corpus

N_LAYERS, N_EXPERTS, K = 6, 8, 3


@pytest.fixture(scope="module")
def model():
    return tiny_model("26B-A4B")


def planted(model, logits, labels=None, names=(), tokens=None):
    """A trace of a router with these logits [layer, prompt, pos, expert]."""
    probs = logits.softmax(-1)
    best = probs.topk(K)
    scales = torch.stack([block.moe.router.per_expert_scale for block in model.blocks]).detach()
    scale = scales[torch.arange(N_LAYERS)[:, None, None, None], best.indices]
    weights = best.values / best.values.sum(-1, keepdim=True) * scale
    real = torch.ones(logits.shape[1:3], dtype=torch.bool)
    tokens = torch.randint(3, 12, real.shape) if tokens is None else tokens
    return gs.RoutingTrace(
        tuple(range(N_LAYERS)),
        best.indices,
        weights,
        probs,
        real,
        tokens,
        tokens % 7,
        labels,
        tuple(names),
        about(model),
    )


@pytest.fixture(scope="module")
def trace(model):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (12, 10), generator=generator)
    favours = torch.randn(N_LAYERS, 3, N_EXPERTS, generator=generator)
    favours[..., 7] = -50  # nobody's choice
    logits = 2 * favours[:, labels] + torch.randn(N_LAYERS, 12, 10, N_EXPERTS, generator=generator)
    return planted(model, logits, labels, "xyz", torch.randint(3, 12, (12, 10), generator=generator))


@pytest.fixture(scope="module")
def counts(model, trace):
    counts = gs.RoutingCounts(model)
    counts.add(trace)
    return counts


def choices(trace, layer, label=None):
    """The choices of each token of a label, in order of rank."""
    here = torch.ones_like(trace.real) if label is None else trace.labels == trace.label_names.index(label)
    return trace.indices[layer][here].tolist()


def close(found, expected, **kwargs):
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, **kwargs)


@pytest.mark.parametrize("label", [None, "y"])
def test_load_and_mass(counts, trace, label):
    here = torch.ones_like(trace.real) if label is None else trace.labels == 1
    n = int(here.sum())
    for layer in range(N_LAYERS):
        taken = choices(trace, layer, label)
        for e in range(N_EXPERTS):
            close(S.load(counts, label)[layer, e], sum(e in s for s in taken) / (n * K))
            close(S.first_load(counts, label)[layer, e], sum(s[0] == e for s in taken) / n)
            weights = trace.weights[layer][here][trace.indices[layer][here] == e]
            close(S.mass(counts, label)[layer, e], float(weights.double().sum()) / n)
            close(S.mean_prob(counts, label)[layer, e], float(trace.probs[layer][here][:, e].double().mean()))
    unscaled = S.mass(counts, label, scaled=False)
    close(unscaled.sum(-1), torch.ones(N_LAYERS))
    shares = trace.probs.gather(-1, trace.indices)[:, here].double()
    shares /= shares.sum(-1, keepdim=True)
    close(unscaled, torch.zeros(N_LAYERS, N_EXPERTS, dtype=torch.float64).scatter_add_(
        1, trace.indices[:, here].flatten(1), shares.flatten(1)) / n)  # fmt: skip
    ranked = trace.weights[:, here].double().mean(1)
    close(S.rank_weights(counts, label), ranked)
    close(S.rank_weights(counts, label, scaled=False).sum(-1), torch.ones(N_LAYERS))


def test_balance(counts, trace):
    table, load = S.balance(counts), S.load(counts)
    for layer, row in enumerate(table.to_dict("records")):
        f = load[layer].tolist()
        used = [share for share in f if share]
        close(row["effective_experts"], math.exp(-sum(p * math.log(p) for p in used)))
        mean = sum(f) / N_EXPERTS
        close(row["gini"], sum(abs(a - b) for a in f for b in f) / (2 * N_EXPERTS**2 * mean))
        close(row["cv"], numpy.std(f) / numpy.mean(f))
        close(row["max_violation"], (max(f) - mean) / mean)
        close(row["switch_loss"], N_EXPERTS * sum(a * b for a, b in zip(f, S.mean_prob(counts)[layer], strict=True)))
        probs = trace.probs[layer].double().flatten(0, 1)
        close(row["entropy"], -(probs * probs.clamp(min=1e-300).log()).sum(-1).mean())
        ordered = probs.sort(-1, descending=True).values
        close(row["margin"], (ordered[:, K - 1] - ordered[:, K]).mean())
        close(row["top1"], ordered[:, 0].mean())
        assert row["dead"] == sum(share == 0 for share in f)
    dead = [(layer, e) for layer in range(N_LAYERS) for e in range(N_EXPERTS) if load[layer, e] == 0]
    assert S.dead_experts(counts) == dead and (2, 7) in dead
    even = torch.full((N_EXPERTS,), 1 / N_EXPERTS, dtype=torch.float64)
    close(S.effective_experts(even), 8), close(S.gini(even), 0), close(S.max_violation(even), 0)
    margins = S.margin_histogram(counts)
    close(margins.groupby("layer")["share"].sum().tolist(), [1] * N_LAYERS)
    row = margins.query("layer == 3").sort_values("share").iloc[-1]
    inside = ((trace.margins[3] >= row["low"]) & (trace.margins[3] < row["high"])).double().mean()
    close(row["share"], inside)


def test_domain_specialization(model, counts, trace):
    table = S.domain_specialization(counts).set_index(["label", "layer", "expert"])
    for label, layer, expert in itertools.product("xyz", (0, 4), range(N_EXPERTS)):
        row, taken = table.loc[label, layer, expert], choices(trace, layer, label)
        share = sum(expert in s for s in taken) / len(taken)
        overall = sum(expert in s for s in choices(trace, layer)) / trace.real.sum()
        close(row["share"], share), close(row["first"], sum(s[0] == expert for s in taken) / len(taken))
        assert row["low"] <= share <= row["high"] and row["uniform"] == K / N_EXPERTS
        assert not overall or row["lift"] == pytest.approx(float(share / overall))
    # Whole prompts are drawn: the interval of a share that differs only between prompts is that of their mean.
    shares = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) < 0.3
    logits = torch.zeros(N_LAYERS, 40, 10, N_EXPERTS)
    logits[..., 0] = torch.where(shares, 9.0, -9.0)
    by_prompt = gs.RoutingCounts(model)
    by_prompt.add(planted(model, logits + 1e-3 * torch.rand(logits.shape)))
    row = S.domain_specialization(by_prompt).iloc[0]
    deviation = math.sqrt(row["share"] * (1 - row["share"]) / 40)
    assert (row["high"] - row["low"]) == pytest.approx(2 * 1.96 * deviation, rel=0.25)
    with pytest.raises(ValueError, match="level is 1.5"):
        S.domain_specialization(counts, level=1.5)


@pytest.mark.parametrize("of", ["input", "next", "predicted"])
def test_vocabulary_specialization(counts, trace, of):
    n, routed = Counter(), Counter()
    layer = 2
    for prompt, pos in itertools.product(range(12), range(10)):
        if of == "next" and pos == 9:
            continue
        id = {"input": trace.tokens, "next": trace.tokens.roll(-1, 1), "predicted": trace.predicted}[of][prompt, pos]
        n[int(id)] += 1
        for expert in trace.indices[layer, prompt, pos].tolist():
            routed[int(id), expert] += 1
    often = [id for id in n if n[id] >= 12]
    assert 0 < len(often) < len(n)
    found = S.vocabulary_specialization(counts, of, min_count=12)[layer]
    for expert in range(7):
        mean = sum(routed[id, expert] ** 2 / n[id] for id in often) / sum(routed[id, expert] for id in often)
        close(found[expert], mean)
    assert found[7].isnan()
    table = S.expert_vocabulary(counts, layer - N_LAYERS, 3, of, top=4, min_count=12)
    best = sorted(often, key=lambda id: (-routed[id, 3] / n[id], -n[id]))[:4]
    assert table["share"].tolist() == pytest.approx([routed[id, 3] / n[id] for id in best])
    assert table["count"].tolist() == [n[id] for id in table["id"]]
    assert (table["low"] < table["share"]).all() and (table["share"] < table["high"]).all()
    close(table["overall"], [sum(3 in s for s in choices(trace, layer)) / 120] * 4)


def test_an_interval_over_tokens_is_the_bootstrap_s():
    low, high = S.share_interval(torch.tensor([30]), torch.tensor([100]))
    drawn = numpy.random.default_rng(0).choice([1] * 30 + [0] * 70, (4000, 100)).mean(1)
    assert (float(low), float(high)) == pytest.approx(tuple(numpy.quantile(drawn, [0.025, 0.975])), abs=0.011)


def test_position_specialization(counts, trace):
    table = S.position_specialization(counts).set_index(["first", "layer", "expert"])
    assert sorted(set(table.index.get_level_values(0))) == [0, 1, 3, 7]
    for first, last in ((0, 0), (1, 2), (3, 6), (7, 9)):
        for layer, expert in itertools.product((1, 5), range(N_EXPERTS)):
            share = (trace.indices[layer][:, first : last + 1] == expert).any(-1).double().mean()
            close(table.loc[(first, layer, expert), "share"], share)


def test_nmi_and_what_one_layer_tells_of_the_next(counts, trace):
    label = trace.labels.flatten()
    for layer in range(N_LAYERS):
        first = trace.indices[layer, ..., 0].flatten()
        close(S.nmi(counts)[layer], normalized_mutual_info_score(label, first))
        if layer:
            before = trace.indices[layer - 1, ..., 0].flatten()
            row = S.transition_information(counts).iloc[layer - 1]
            close(row["normalised"], normalized_mutual_info_score(before, first))
            moves = S.transitions(counts)[layer - 1]
            for i, j in itertools.product(range(7), repeat=2):
                close(moves[i, j], (first[before == i] == j).double().mean(), equal_nan=True)


def test_domain_similarity(counts):
    js, cosine, jaccard = (S.domain_similarity(counts, by) for by in ("js", "cosine", "jaccard"))
    for layer, a, b in itertools.product(range(N_LAYERS), range(3), range(3)):
        p, q = (S.load(counts, counts.labels[x])[layer] for x in (a, b))
        mixed = (p + q) / 2
        kl = lambda x, m=mixed: sum(float(u * (u / v).log2()) for u, v in zip(x, m, strict=True) if u)  # noqa: E731
        close(js[layer, a, b], (kl(p) + kl(q)) / 2)
        close(cosine[layer, a, b], p @ q / (p.norm() * q.norm()))
        top = [set(x.topk(K).indices.tolist()) for x in (p, q)]
        close(jaccard[layer, a, b], len(top[0] & top[1]) / len(top[0] | top[1]))
    with pytest.raises(ValueError, match="by is 'kl'"):
        S.domain_similarity(counts, "kl")
    with pytest.raises(ValueError, match="top is 9"):
        S.domain_similarity(counts, "jaccard", top=9)


def test_standing_committee(model, counts):
    table = S.standing_committee(counts, top=4)
    for layer, row in enumerate(table.to_dict("records")):
        masses = [S.mass(counts, label, scaled=False)[layer] for label in counts.labels]
        tops = [set(m.topk(4).indices.tolist()) for m in masses]
        always = sorted(set.intersection(*tops))
        assert row["committee"] == tuple(always)
        close(row["share"], sum(float(m[always].sum()) for m in masses) / 3)
        close(row["uniform"], len(always) / N_EXPERTS)
        pairs = list(itertools.combinations(tops, 2))
        close(row["jaccard"], sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs))
    # Planted: experts 2 and 5 take everything in every domain, the third place goes by domain.
    labels = torch.arange(12)[:, None].expand(12, 10) % 3
    logits = torch.nn.functional.one_hot(labels + 5, N_EXPERTS) * 3.0 + torch.randn(N_LAYERS, 12, 10, N_EXPERTS) * 0.1
    logits[..., [2, 4]] += 5
    fixed = gs.RoutingCounts(model)
    fixed.add(planted(model, logits, labels, "xyz"))
    found = S.standing_committee(fixed)
    assert found["committee"].tolist() == [(2, 4)] * N_LAYERS and (found["share"] > 0.9).all()


def test_coactivation_is_over_all_pairs(counts, trace):
    found = S.coactivation(counts)
    for layer, i, j in itertools.product((0, 3), range(7), range(7)):
        taken = choices(trace, layer)
        both, one, other = (sum(set(e) <= set(s) for s in taken) for e in ((i, j), (i,), (j,)))
        if not one * other:
            assert found.lift[layer, i, j].isnan()
            continue
        close(found.conditional[layer, i, j], both / one)
        if i != j:
            close(found.lift[layer, i, j], both * len(taken) / (one * other))
            assert both == 0 or float(found.pmi[layer, i, j]) == pytest.approx(math.log2(both * 120 / (one * other)))
    assert found.conditional[0, 7].isnan().all() and found.lift[:, range(8), range(8)].isnan().all()
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    shuffled = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    order = S.cluster_order(blocks[shuffled][:, shuffled])
    assert {frozenset(shuffled[order[:4]].tolist()), frozenset(shuffled[order[4:]].tolist())} == {
        frozenset(range(4)),
        frozenset(range(4, 8)),
    }


def test_temporal_locality(counts, trace):
    table = S.temporal_locality(counts)
    for layer, row in enumerate(table.to_dict("records")):
        pairs = [(trace.indices[layer, p, t].tolist(), trace.indices[layer, p, t + 1].tolist())
                 for p in range(12) for t in range(9)]  # fmt: skip
        close(row["same_first"], sum(a[0] == b[0] for a, b in pairs) / len(pairs))
        close(row["any_common"], sum(bool(set(a) & set(b)) for a, b in pairs) / len(pairs))
        first = Counter(s[0] for s in choices(trace, layer))
        close(row["chance_load"], sum((n / 120) ** 2 for n in first.values()))
    subsets = list(itertools.combinations(range(N_EXPERTS), K))
    chance = sum(bool(set(subsets[0]) & set(s)) for s in subsets) / len(subsets)
    close(table["chance_common"], [chance] * N_LAYERS)
    assert (table["chance_first"] == 1 / 8).all()


def test_paths_and_their_purity(trace):
    table = S.paths(trace, length=2, start=3)
    taken, purity = Counter(), {}
    for p, t in itertools.product(range(12), range(10)):
        path = tuple(int(trace.indices[layer, p, t, 0]) for layer in (3, 4))
        taken[path] += 1
        purity.setdefault(path, Counter())["xyz"[trace.labels[p, t]]] += 1
    assert dict(zip(table["path"], table["count"], strict=True)) == taken
    assert table["count"].is_monotonic_decreasing and table["share"].sum() == pytest.approx(1)
    for row in table.to_dict("records"):
        assert row["purity"] == pytest.approx(max(purity[row["path"]].values()) / row["count"])
        assert purity[row["path"]][row["label"]] == max(purity[row["path"]].values())
    assert S.purity_baseline(trace) == pytest.approx(max(Counter(trace.labels.flatten().tolist()).values()) / 120)
    whole = S.paths(trace._mapped(lambda name, x: x))
    assert all(len(path) == N_LAYERS for path in whole["path"])
    with pytest.raises(ValueError, match="length is 4: from layer 3 on there are 3"):
        S.paths(trace, 4, 3)


def test_saturation(model, trace):
    tokens = torch.randint(3, 101, (4, 9))
    mask = torch.ones_like(tokens)
    mask[2, :5] = 0
    one, other = (
        gs.trace_routing(m, tokens, attention_mask=mask, progress=False) for m in (model, tiny_model("26B-A4B", seed=1))
    )
    found = S.saturation(one, other)
    for layer in range(N_LAYERS):
        common = [
            len(set(one.indices[layer, p, t].tolist()) & set(other.indices[layer, p, t].tolist())) / K
            for p, t in mask.nonzero().tolist()
        ]
        close(found[layer], sum(common) / len(common))
    close(S.saturation(one, one), [1] * N_LAYERS)
    with pytest.raises(ValueError, match="do not cover the same places"):
        S.saturation(one, trace)


def test_planted_domains_are_found(model):
    labels = torch.arange(N_EXPERTS)[:, None].expand(N_EXPERTS, 5)
    logits = torch.randn(N_LAYERS, N_EXPERTS, 5, N_EXPERTS)
    logits[0] += 20 * torch.nn.functional.one_hot(labels, N_EXPERTS)
    counts = gs.RoutingCounts(model)
    counts.add(planted(model, logits, labels, "abcdefgh"))
    nmi = S.nmi(counts)
    close(nmi[0], 1)
    assert (nmi[1:] < 0.7).all()
    first = S.domain_specialization(counts).query("layer == 0 and first > 0")
    assert first["expert"].tolist() == list(range(8)) and (first["first"] == 1).all()


def test_nmi_agrees_with_the_card_of_nano_moe():
    import json

    from gemmascope.weights import ZOO

    model = gs.load("nano-moe")
    card = json.loads((ZOO / "nano-moe" / "evaluation.json").read_text())["nmi"]
    corpus = Corpus(model.tokenizer.backend, seed=1_000_003)  # held out, as in zoo/evaluate.py
    batch = corpus.batch(0, 16, 256)
    names = [[DOMAINS[number] for number in row] for row in batch.domains.tolist()]
    counts = gs.count_routing(model, batch.tokens, names, leave_out=[BOS], progress=False)
    inside = batch.tokens != BOS
    _, cache = model.run_with_cache(batch.tokens, names_filter=lambda name: "hook_indices" in name)
    for layer, value in enumerate(S.nmi(counts).tolist()):
        first = cache["moe.router.hook_indices", layer][..., 0][inside]
        assert value == pytest.approx(normalized_mutual_info_score(batch.domains[inside], first), abs=1e-6)
        assert value == pytest.approx(card[layer], abs=0.05)  # the card's is of four times as much text


def test_one_domain_has_nothing_to_compare(model):
    counts = gs.count_routing(model, torch.randint(3, 101, (2, 6)), progress=False)
    for statistic in (S.nmi, S.domain_similarity, S.standing_committee):
        with pytest.raises(ValueError, match=r"there is one label \(all\)"):
            statistic(counts)
    for layer, expert, said in ((6, 0, "Layer 6 does not exist: .* 0 to 5"), (0, 8, "Expert 8 .* 0 to 7")):
        with pytest.raises(ValueError, match=said):
            S.expert_vocabulary(counts, layer, expert)
    with pytest.raises(ValueError, match="No token occurs 99 times"):
        S.vocabulary_specialization(counts, min_count=99)
    with pytest.raises(ValueError, match="of is 'output'"):
        S.vocabulary_specialization(counts, "output")
    with pytest.raises(ValueError, match="no vocabulary"):
        S.vocabulary_specialization(
            gs.count_routing(model, torch.tensor([[3, 4]]), vocabulary=False, progress=False), min_count=1
        )
    with pytest.raises(ValueError, match="none has neighbours"):
        S.temporal_locality(gs.count_routing(model, torch.tensor([[3]]), progress=False))
    with pytest.raises(ValueError, match="two labels"):
        S.purity_baseline(gs.trace_routing(model, torch.tensor([3, 4]), progress=False))


# Geometry


@torch.no_grad()
def test_the_router_reads_its_rows_and_nothing_else(model):
    model = tiny_model("26B-A4B").double()
    _, cache = model.run_with_cache(torch.randint(3, 101, (2, 9)))
    x = cache["resid_mid", 4]
    normed = x / (x.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
    close(normed @ G.router_rows(model, 4).T, cache["moe.router.hook_logits", 4])
    basis = G.control_basis(model, 4)
    assert basis.shape == (8, 48)
    control = normed @ basis.T @ basis
    close(control @ G.router_rows(model, 4).T, cache["moe.router.hook_logits", 4])
    close(G.router_similarity(model, 4)[2, 5], torch.cosine_similarity(*G.router_rows(model, 4)[[2, 5]], dim=0))


@torch.no_grad()
def test_control_share_and_similarity_of_streams(model):
    tokens = torch.randint(3, 101, (3, 7))
    found = G.control_content(model, tokens, batch_size=2, progress=False)
    pairs = G.similarity_and_overlap(model, tokens, progress=False)
    streams = collect(model, tokens, [("resid_mid", layer) for layer in range(6)], positions=None, progress=False)
    trace = gs.trace_routing(model, tokens, progress=False)
    for layer in range(N_LAYERS):
        stream = streams["resid_mid", layer].double()
        rows = G.router_rows(model, layer).double()
        inside = stream @ torch.linalg.pinv(rows) @ rows
        close(found["control"][layer], (inside.square().sum(-1) / stream.square().sum(-1)).mean())
        sets, where = [set(s) for s in choices(trace, layer)], list(itertools.combinations(range(21), 2))
        cosines = [float(torch.cosine_similarity(stream[a], stream[b], dim=0)) for a, b in where]
        overlaps = [len(sets[a] & sets[b]) / K for a, b in where]
        assert pairs["correlation"][layer] == pytest.approx(pearsonr(cosines, overlaps).statistic, abs=1e-4)
    assert found["rank"].tolist() == [8] * 6 and found["uniform"][0] == 8 / 48 and pairs["pairs"][0] == len(where)


@torch.no_grad()
def test_weights_of_experts(model):
    moe = model.blocks[1].moe
    gate, up = moe.gate_up_proj.chunk(2, dim=1)
    for of, weights in (("gate", gate), ("in", up), ("out", moe.down_proj)):
        found, spectra = G.expert_similarity(model, 1, of), G.expert_spectra(model, 1, of)
        close(found[3, 6], torch.cosine_similarity(weights[3].flatten(), weights[6].flatten(), dim=0))
        close(found.diagonal(), torch.ones(8))
        squares = torch.linalg.eigvalsh((weights[5] @ weights[5].T).double()).flip(0)
        close(spectra[5].square(), squares[: spectra.shape[1]])
    close(G.effective_rank(torch.tensor([[1.0, 1, 1, 0], [5, 0, 0, 0]])), [3, 1])
    with pytest.raises(ValueError, match="of is 'up'"):
        G.expert_similarity(model, 1, "up")
    with pytest.raises(ValueError, match="Layer 6 does not exist"):
        G.router_rows(model, 6)
    with pytest.raises(ValueError, match="is dense"):
        G.router_rows(tiny_model("31B"), 0)
