"""Routing traces and counts: what they hold, how they join, what they refuse."""

import itertools
import signal
from dataclasses import replace

import numpy
import pandas
import pytest
import torch

import gemmascope as gs
from gemmascope.model.text import Block
from gemmascope.results import about
from gemmascope.routing.counts import MARGIN_EDGES
from gemmascope.routing.trace import likeliest
from gemmascope.testing import tiny_model

WIDTHS = (9, 4, 9, 1, 7)
LABELS = ["a", "b", "a", "c", ["b", "b", "a", "a", "c", "b", "b"]]


@pytest.fixture(scope="module")
def model():
    return tiny_model("26B-A4B")


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 30, (width,), generator=generator) for width in WIDTHS]


def count(model, texts, labels=None, **kwargs):
    return gs.count_routing(model, texts, labels, progress=False, **kwargs)


def same_counts(found, expected):
    assert found.labels == expected.labels and found.texts == expected.texts
    for name, table in expected.tables.items():
        torch.testing.assert_close(found.tables[name], table, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: name + m)
    for kind, table in expected.vocabulary.items():
        assert torch.equal(found.vocabulary[kind], table) and torch.equal(found.seen[kind], expected.seen[kind])


# Traces


def test_a_trace_is_what_a_cache_of_the_same_run_says(model):
    tokens = torch.randint(3, 101, (3, 11))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    trace = gs.trace_routing(model, tokens, attention_mask=mask, progress=False)
    assert torch.equal(trace.indices, cache.routing.indices) and torch.equal(trace.real, mask.bool())
    torch.testing.assert_close(trace.weights, cache.routing.weights)
    assert torch.equal(trace.predicted, logits.argmax(-1)) and torch.equal(trace.tokens, tokens)
    by_two = gs.trace_routing(model, tokens, attention_mask=mask, batch_size=2, progress=False)
    torch.testing.assert_close(by_two.probs, trace.probs)
    best = trace.probs.sort(-1, descending=True).values
    torch.testing.assert_close(trace.margins, best[..., 2] - best[..., 3])
    torch.testing.assert_close(trace.entropy, -(trace.probs * trace.probs.log()).sum(-1))
    assert cache.routing.about == about(model)


def test_the_table_has_a_row_for_every_choice(model, texts):
    tokens = torch.nn.utils.rnn.pad_sequence([texts[0], texts[1]], True)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    trace = gs.trace_routing(model, tokens, ["x", list("yyxy")], attention_mask=mask, progress=False)
    table = trace.table
    assert len(table) == 13 * 6 * 3 and len(table.drop_duplicates(["prompt", "pos", "layer", "rank"])) == len(table)
    for (prompt, pos), layer, rank in itertools.product(((0, 8), (1, 2)), range(6), range(3)):
        [row] = table.query(f"prompt == {prompt} and pos == {pos} and layer == {layer} and rank == {rank}").to_dict(
            "records"
        )
        assert row["expert"] == trace.indices[layer, prompt, pos, rank] and row["id"] == tokens[prompt, pos]
        assert row["label"] == "x"
        assert row["prob"] == pytest.approx(float(trace.probs[layer, prompt, pos, row["expert"]]))
        assert row["weight"] == pytest.approx(float(trace.weights[layer, prompt, pos, rank]))
        assert row["margin"] == pytest.approx(float(trace.margins[layer, prompt, pos]))
        assert row["entropy"] == pytest.approx(float(trace.entropy[layer, prompt, pos]))
    assert table.query("prompt == 1 and pos == 3")["label"].unique() == ["y"]


def test_a_generation_is_traced_as_its_text_would_be():
    model = gs.load("nano-moe")
    prompts = ["Then Mary and John", "The capital of Norland is"]
    trace = gs.trace_routing(model, prompts, max_new_tokens=5, batch_size=1, stop_ids=[], progress=False)
    assert trace.label_names == ("prompt", "generated")
    assert trace.table.query("label == 'generated'").groupby("prompt")["pos"].nunique().tolist() == [4, 4]
    for number, prompt in enumerate(prompts):
        whole = model.generate(model.to_tokens(prompt), 5, stop_ids=[])[:, :-1]
        again = gs.trace_routing(model, whole, progress=False)
        here = trace.real[number]
        assert torch.equal(trace.tokens[number, here], whole[0])
        assert torch.equal(trace.indices[:, number, here], again.indices[:, 0])
        assert torch.equal(trace.predicted[number, here], again.predicted[0])
    shown = trace.table.query("prompt == 0 and layer == 0 and rank == 0")["token"]
    assert "".join(shown).startswith("<bos>Then Mary and John")


def test_traces_merge_and_are_kept(model, texts, tmp_path):
    parts = [gs.trace_routing(model, text, [label], progress=False) for text, label in zip(texts, LABELS, strict=True)]
    merged = gs.RoutingTrace.merge(parts)
    assert merged.label_names == ("a", "b", "c") and merged.real.sum(-1).tolist() == list(WIDTHS)
    merged.save(tmp_path)
    kept = gs.RoutingTrace.read(tmp_path)
    assert kept.table.equals(merged.table) and kept.about == merged.about and repr(kept) == repr(merged)
    tables = [part.table.assign(prompt=number) for number, part in enumerate(parts)]
    rows = sorted(itertools.chain.from_iterable(table.itertuples(index=False, name=None) for table in tables))
    assert sorted(merged.table.itertuples(index=False, name=None)) == rows
    unlabelled = gs.trace_routing(model, texts[0], progress=False)
    with pytest.raises(ValueError, match="some have none"):
        gs.RoutingTrace.merge([merged, unlabelled])
    with pytest.raises(ValueError, match="no traces"):
        gs.RoutingTrace.merge([])


# Counts


def brute_force(model, texts, labels):
    """Every sum, token by token."""
    sums = {}

    def add(name, *index, value=1):
        sums[name, *index] = sums.get((name, *index), 0) + value

    for text, label in zip(texts, labels, strict=True):
        trace = gs.trace_routing(model, text, progress=False)
        label = [label] * len(text) if isinstance(label, str) else label
        for own in set(label):
            add("prompts", own)
        for t, own in enumerate(label):
            add("tokens", own)
            bucket = next(b for b in range(20) if 2**b - 1 <= t < 2 ** (b + 1) - 1)
            add("buckets", own, bucket)
            if t:
                add("steps", own)
            for layer in range(6):
                chosen = trace.indices[layer, 0, t].tolist()
                probs = trace.probs[layer, 0, t].double()
                kth = sorted(probs.tolist())[::-1]
                add("entropy", own, layer, value=-float((probs * probs.log()).sum()))
                add("margin", own, layer, value=kth[2] - kth[3])
                below = sum(kth[2] - kth[3] >= edge for edge in MARGIN_EDGES[1:-1].tolist())
                add("margin_bins", own, layer, below)
                add("top1", own, layer, value=kth[0])
                if layer:
                    add("moves", own, layer - 1, int(trace.indices[layer - 1, 0, t, 0]), chosen[0])
                if t:
                    before = trace.indices[layer, 0, t - 1].tolist()
                    add("repeats", own, layer, 0, value=int(before[0] == chosen[0]))
                    add("repeats", own, layer, 1, value=int(bool(set(before) & set(chosen))))
                for expert in range(8):
                    add("prob", own, layer, expert, value=float(probs[expert]))
                for rank, expert in enumerate(chosen):
                    add("chosen", own, layer, rank, expert)
                    add("weight", own, layer, rank, expert, value=float(trace.weights[layer, 0, t, rank]))
                    add("positions", own, bucket, layer, expert)
                    add("input", int(text[t]), layer, expert)
                    add("predicted", int(trace.predicted[0, t]), layer, expert)
                    if t + 1 < len(text):
                        add("next", int(text[t + 1]), layer, expert)
                    for other in chosen[rank + 1 :]:
                        add("pairs", own, layer, expert, other)
    return sums


def test_every_table_is_a_sum_over_tokens(model, texts):
    counts, sums = count(model, texts, LABELS), brute_force(model, texts, LABELS)
    for name, table in (counts.tables | counts.vocabulary).items():
        if name.startswith("draw"):
            continue
        expected = torch.zeros(table.shape, dtype=torch.float64)
        for (of, *index), value in sums.items():
            if of == name:
                index = index if name in counts.vocabulary else [counts.labels.index(index[0]), *index[1:]]
                expected[tuple(index)] = value
        assert expected.any()
        torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert counts.seen["next"].sum() == sum(WIDTHS) - len(WIDTHS)


def test_shards_that_are_merged_equal_one_count(model, texts, tmp_path):
    whole = count(model, texts, LABELS)
    shards = [count(model, texts[:2], LABELS[:2]), count(model, texts[2:], LABELS[2:])]
    same_counts(shards[0].merge(shards[1]), whole)
    backwards = shards[1].merge(shards[0])
    assert backwards.labels != whole.labels
    assert torch.equal(backwards.total("draws", "b"), whole.total("draws", "b"))
    same_counts(count(model, iter(texts[2:]), iter(LABELS[2:]), into=shards[0]), whole)
    whole.save(tmp_path)
    kept = gs.RoutingCounts.read(tmp_path)
    same_counts(kept, whole)
    assert kept.about == whole.about and repr(kept) == repr(whole)
    same_counts(kept.merge(shards[1]), whole.merge(shards[1]))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padding_is_never_counted(model, texts, batch_size):
    found = count(model, texts, LABELS, batch_size=batch_size)
    same_counts(found, count(model, texts, LABELS, batch_size=3))
    assert found.n_tokens == sum(WIDTHS)


def test_resamples_draw_whole_prompts(model, texts):
    counts = count(model, texts, LABELS)
    drawn = counts.tables["draws"].sum(-1)  # [label, draw, layer]
    assert torch.equal(drawn, 3 * counts.tables["draw_tokens"][..., None].expand_as(drawn))
    only_c = counts.tables["draw_tokens"][counts.labels.index("c")]  # one token in each of two prompts
    one, two = (count(model, [text]).tables["draw_tokens"][0] / len(text) for text in texts[3:])
    assert torch.equal(only_c, (one + two).long())
    mean, variance = float(one.mean()), float(one.var())
    assert abs(mean - 1) < 0.25 and abs(variance - 1) < 0.4  # Poisson(1)


def test_counts_do_not_grow_with_the_corpus(model, texts):
    def size(counts):
        held = (*counts.tables.values(), *counts.vocabulary.values(), *counts.seen.values())
        return sum(table.nbytes for table in held)

    once = count(model, texts, LABELS)
    stream = itertools.chain.from_iterable(itertools.repeat(texts, 9))
    often = count(model, stream, itertools.chain.from_iterable(itertools.repeat(LABELS, 9)))
    assert often.n_tokens == 9 * once.n_tokens and size(often) == size(once)
    assert torch.equal(often.tables["chosen"], 9 * once.tables["chosen"])


def test_a_long_text_is_cut_and_tokens_can_be_left_out(model, texts):
    found = count(model, [texts[0]], [list("aabbaabba")], window=4)
    same_counts(found, count(model, texts[0].split(4), [list("aabb"), list("aabb"), "a"]))
    text = torch.tensor([2, 5, 6, 2, 7])
    found, whole = count(model, [text], leave_out=[2]), gs.trace_routing(model, text, progress=False)
    assert found.n_tokens == 3 and found.tables["steps"].tolist() == [1] and not found.seen["input"][2]
    assert found.seen["next"].nonzero()[:, 0].tolist() == [6]
    chosen = whole.indices[0, 0, [1, 2, 4]].flatten().bincount(minlength=8)
    assert torch.equal(found.total("chosen")[0].sum(0), chosen)


def test_labels_come_in_any_holder(model, texts):
    expected = count(model, texts[:2], ["1", "0"])
    for labels in ([1, 0], torch.tensor([1, 0]), numpy.array([1, 0]), pandas.Series([1, 0]), iter("10")):
        same_counts(count(model, texts[:2], labels), expected)
    each = [["0"] * 4 + ["1"] * 5, "x"]
    expected = count(model, texts[:2], each, window=4)
    for first in (torch.tensor([0] * 4 + [1] * 5), numpy.array(each[0]), tuple(each[0]), pandas.Series(each[0])):
        same_counts(count(model, texts[:2], [first, "x"], window=4), expected)
    assert gs.trace_routing(model, texts[0], [torch.tensor([0] * 4 + [1] * 5)], progress=False).label_names == (
        "0",
        "1",
    )
    assert count(model, texts[:1], "one label").labels == ["one label"]


def test_only_routers_are_watched(model, texts, monkeypatch):
    watched = []
    hooks = model.hooks
    monkeypatch.setattr(model, "hooks", lambda fwd: (watched.extend(name for name, _ in fwd), hooks(fwd))[1])
    count(model, texts)
    assert len(watched) == 18 and all("moe.router.hook_" in name for name in watched)


def test_a_watched_router_leaves_the_rest_fused_and_equal(model, monkeypatch):
    tokens = torch.randint(3, 101, (2, 9))
    plain, seen = model(tokens), []
    monkeypatch.setattr(Block, "with_sites", lambda *_: pytest.fail("A block ran step by step."))
    for part in ("in", "logits", "probs", "indices", "weights"):
        name = f"blocks.2.moe.router.hook_{part}"
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: seen.append(x))]), plain)
    assert len(seen) == 5
    first = [("blocks.2.moe.router.hook_weights", lambda x, hook: x * torch.tensor([1.0, 0, 0]))]
    changed = model.run_with_hooks(tokens, fwd_hooks=first)
    monkeypatch.undo()
    both = [*first, ("blocks.2.hook_resid_mid", lambda x, hook: seen.append(x))]
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=both), changed) and not torch.equal(changed, plain)
    with pytest.raises(ValueError, match="blocks.2.moe.router.hook_weights would never run"):
        model.run_with_hooks(tokens, fwd_hooks=first, stop_at_layer=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_likeliest_token_is_the_argmax(dtype):
    logits = torch.randn(2, 5, 40).to(dtype)
    found = likeliest(logits)
    assert found.shape == (2, 5) and torch.equal(logits.gather(-1, found[..., None])[..., 0], logits.amax(-1))


def test_counts_from_a_folder_learn_the_texts_of_new_tokens(tmp_path):
    nano = gs.load("nano-moe")
    count(nano, ["When Mary and John"]).save(tmp_path)
    kept = gs.RoutingCounts.read(tmp_path)
    count(nano, ["The capital of Norland is"], into=kept)
    assert {" Mary", " Norland"} <= set(kept.texts.values())
    assert set(kept.texts) == set(torch.stack([*kept.seen.values()]).any(0).nonzero()[:, 0].tolist())


def test_what_is_refused(model, texts, tmp_path):
    dense, other = tiny_model("31B"), tiny_model("26B-A4B", seed=1)
    for call in (gs.trace_routing, count):
        with pytest.raises(ValueError, match="tiny 31B is dense .* that route: nano-moe, google/gemma-4-26B-A4B"):
            call(dense, texts[0][None])
    counts = count(model, texts[:1])
    with pytest.raises(ValueError, match="different models, tiny 26B-A4B"):
        counts.merge(count(other, texts[:1]))
    with pytest.raises(ValueError, match="different models"):
        counts.add(gs.trace_routing(other, texts[0], progress=False))
    with pytest.raises(ValueError, match="different models"):
        count(other, texts, into=counts)
    with pytest.raises(ValueError, match="different models"):
        gs.RoutingTrace.merge([gs.trace_routing(m, texts[0], progress=False) for m in (model, other)])
    with pytest.raises(ValueError, match="does not know its tokens"):
        counts.add(model.run_with_cache(texts[0])[1].routing)
    with pytest.raises(ValueError, match="some have none"):
        counts.merge(count(model, texts[:1], vocabulary=False))
    with pytest.raises(ValueError, match="2 labels for 1 prompts"):
        gs.trace_routing(model, texts[0], ["a", "b"], progress=False)
    with pytest.raises(ValueError, match="9 tokens and 2 labels"):
        gs.trace_routing(model, texts[0], [["a", "b"]], progress=False)
    with pytest.raises(ValueError, match="2 labels for 5 texts"):
        count(model, texts, ["a", "b"])
    with pytest.raises(ValueError, match="labels for 2 texts, and more"):
        count(model, iter(texts), iter(["a", "b"]))
    with pytest.raises(ValueError, match="more labels than texts, of which there were 2"):
        count(model, iter(texts[:2]), iter("abc"))
    with pytest.raises(ValueError, match="Text 1 has 4 tokens and 3 labels"):
        count(model, texts[:2], ["a", ["b"] * 3])
    with pytest.raises(ValueError, match="There are 1 labels for 2 texts"):
        count(model, texts[:2], "ab")
    for wrong, said in ((None, "NoneType"), ([5, 6], "list"), (texts[0][None], r"a tensor of shape \[1, 9\]")):
        with pytest.raises(ValueError, match=f"Text 1 is {said}: give text, or a tensor of token ids"):
            count(model, iter([texts[0], wrong]))  # as a stream: annotations, checked in tests, refuse a list
    trace = gs.trace_routing(model, texts[0], progress=False)
    some = replace(trace, layers=(1, 2), indices=trace.indices[1:3], weights=trace.weights[1:3], probs=trace.probs[1:3])
    with pytest.raises(ValueError, match="of layers 1, 2; counts are of all 6"):
        counts.add(some)
    with pytest.raises(ValueError, match="of layers 1, 2 and some of 2, 3"):
        gs.RoutingTrace.merge([some, replace(some, layers=(2, 3))])
    with pytest.raises(ValueError, match="corpus is empty"):
        count(model, [])
    with pytest.raises(ValueError, match="window is 0"):
        count(model, texts, window=0)
    with pytest.raises(ValueError, match="No label 'al' was counted; the nearest are all"):
        counts.total("tokens", "al")
    with pytest.raises(ValueError, match="Nothing was counted"):
        gs.RoutingCounts(model).total("tokens")
    with pytest.raises(FileNotFoundError, match="no routing counts"):
        gs.RoutingCounts.read(tmp_path)
    with pytest.raises(ValueError, match="temperature is for a generation"):
        gs.trace_routing(model, texts[0], temperature=1.0)


def test_ctrl_c_waits_until_a_batch_is_counted(model, texts, monkeypatch):
    counts, add_steps = gs.RoutingCounts(model), gs.RoutingCounts._add_steps
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells ignore it

    def pressed(self, *args):
        signal.raise_signal(signal.SIGINT)
        add_steps(self, *args)

    monkeypatch.setattr(gs.RoutingCounts, "_add_steps", pressed)
    with pytest.raises(KeyboardInterrupt):
        count(model, texts, LABELS, batch_size=2, into=counts)
    monkeypatch.undo()
    assert counts.n_tokens == sum(WIDTHS[:2])
    same_counts(counts, count(model, texts[:2], LABELS[:2]))
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_what_was_counted_before_a_bad_text_stays(model, texts):
    counts = gs.RoutingCounts(model)
    with pytest.raises(ValueError, match="Text 2 is empty"):
        count(model, [*texts[:2], torch.zeros(0, dtype=torch.long)], batch_size=1, into=counts)
    same_counts(counts, count(model, texts[:2]))
