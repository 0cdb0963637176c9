"""Induction (Olsson et al. 2022, arXiv:2209.11895): a head that finds the last occurrence of a token by what stood
before each key, and copies what followed.

On <bos> S S, S random, the second S can be told only in this way. In both shipped models previous-token heads write
into the keys of the induction heads (of nano-edge's layer 6, which reads the keys of layer 3)."""

import math
import random

import pandas
import pytest
import torch

import gemmascope as gs

SPAN, N = 50, 8
SECOND = range(SPAN + 1, 2 * SPAN)
"""Positions of the second S whose next token follows from the first."""


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def model(request):
    return gs.load(request.param)


@pytest.fixture(scope="module")
def tokens(model):
    return gs.repeated_tokens(model, SPAN, N)


@pytest.fixture(scope="module")
def chance(model):
    return math.log(model.cfg.d_vocab)


@pytest.fixture(scope="module")
def heads(model, tokens):
    """(layer, head) pairs, found by their attention and not named: "induction", "previous", and "others"."""
    table = gs.head_table(model, tokens)
    of = lambda rows: [(int(layer), int(head)) for layer, head in rows[["layer", "head"]].to_numpy()]  # noqa: E731
    found = {"induction": of(table[table["induction"] > 0.5]), "previous": of(table[table["previous_token"] > 0.5])}
    first = min(layer for layer, _ in found["induction"])
    reads = keys_of(model, first)
    found["previous"] = [(layer, head) for layer, head in found["previous"] if layer < reads]  # those it can read
    taken = found["induction"] + found["previous"]
    return found | {"others": [pair for pair in of(table) if pair not in taken]}


def keys_of(model, layer):
    """The layer whose keys and values a layer reads."""
    source = model.layer(layer).kv_source
    return layer if source is None else source


def nats(tokens, positions=SECOND):
    """The loss at some positions, each prompt's mean."""

    def metric(logits):
        log_probs = logits[:, :-1].log_softmax(-1)
        targets = tokens.repeat(len(logits) // len(tokens), 1)[:, 1:, None]
        return -log_probs.gather(-1, targets)[:, list(positions), 0].mean(-1)

    return metric


def swept(model, tokens, cells):
    """The loss on the second S under each list of interventions, the mean over prompts."""
    frame = pandas.DataFrame({"cell": range(len(cells))})
    return gs.sweep(model, tokens, nats(tokens), frame, cells, progress=False).mean.tolist()


def zeroed(heads):
    return [gs.zero(("z", layer), heads=head) for layer, head in heads]


@torch.no_grad()
def test_the_second_span_is_known_and_the_first_is_not(model, tokens, chance):
    logits = model(tokens)
    first, second = nats(tokens, range(1, SPAN))(logits), nats(tokens)(logits)
    assert first.mean() == pytest.approx(chance, abs=0.6)
    assert second.mean() < 0.1


def test_one_layer_of_induction_heads_reads_an_earlier_layer_of_previous_token_heads(model, tokens, heads):
    layers = {layer for layer, _ in heads["induction"]}
    assert len(layers) == 1 and heads["previous"]
    assert max(layer for layer, _ in heads["previous"]) < keys_of(model, *layers)
    scores = gs.detect_heads(model, tokens, "induction").table.set_index(["layer", "head"])["value"]
    assert scores[heads["induction"]].max() > 0.9 and scores[heads["others"]].max() < 0.1
    # They copy: their own token is the one whose logit they raise most. The others do not.
    copying = gs.head_table(model, tokens).set_index(["layer", "head"])["copying"]
    assert copying[heads["induction"]].min() > 0.8 and copying[heads["others"]].max() < 0.6


def test_without_the_induction_or_the_previous_token_heads_the_loss_is_at_chance(model, tokens, heads, chance):
    rng, n = random.Random(0), len(heads["induction"])
    controls = [rng.sample(heads["others"], n) for _ in range(12)]
    without, blind, *others = swept(
        model, tokens, [zeroed(heads["induction"]), zeroed(heads["previous"]), *map(zeroed, controls)]
    )
    assert without > 0.9 * chance and blind > 0.9 * chance
    assert max(others) < 0.3


def test_cutting_the_edge_to_the_token_after_the_last_occurrence_restores_chance(model, tokens, heads, chance):
    def cut(offset):
        """Every query of the second S loses one key of the first: its own token there is at offset 0."""
        return [
            gs.knockout(layer, queries=[query], keys=[query - SPAN + offset], heads=head)
            for layer, head in heads["induction"]
            for query in SECOND
        ]

    after, *controls = swept(model, tokens, [cut(offset) for offset in (1, -1, 0, 2)])
    assert after > 0.9 * chance
    assert max(controls) < 0.1


@pytest.fixture(scope="module")
def broken(model, tokens):
    """Runs in which every other token of the first S is another one. At the tokens that stay, what stood before is
    wrong (it is in keys), and what is there is right (it is in values); the second S, the queries, is the same."""
    changed = slice(1, SPAN, 2)
    other = tokens.clone()
    other[:, changed] = gs.repeated_tokens(model, SPAN, N, seed=1)[:, changed]
    return other


@pytest.fixture(scope="module")
def asked(tokens):
    """The loss where the token that stays is to be said: after the second occurrence of one that was changed."""
    return nats(tokens, range(SPAN + 1, 2 * SPAN, 2))


def test_keys_of_a_run_that_does_not_repeat_kill_it_and_its_queries_and_values_do_not(
    model, tokens, broken, asked, heads, chance
):
    (layer,) = {layer for layer, _ in heads["induction"]}
    cells = [("attn.hook_rot_q", layer)] + [
        (site, keys_of(model, layer)) for site in ("attn.hook_rot_k", "attn.hook_v_normed")
    ]
    result = gs.activation_patching(
        model,
        tokens,
        broken,
        asked,
        ["attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v_normed"],
        cells=pandas.DataFrame(cells, columns=["site", "layer"]),
        direction="noising",
        progress=False,
    )
    queries, keys, values = result.mean.tolist()
    assert result.baselines["clean"].mean() < 0.1 and result.baselines["corrupted"].mean() > 0.9 * chance
    assert keys > 0.9 * chance
    assert queries < 0.1 and values < 0.2


def test_the_path_runs_from_the_previous_token_heads_through_keys_only(model, tokens, broken, asked, heads, chance):
    (layer,) = {layer for layer, _ in heads["induction"]}
    source = keys_of(model, layer)
    kv_heads = range(model.layer(source).n_kv_heads)
    earlier = [pair for pair in heads["others"] if pair[0] < source]

    def edges(senders, receivers):
        return [(f"L{layer}H{head}", receiver) for layer, head in senders for receiver in receivers]

    keys, values = ([f"L{source}KV{kv}.{what}" for kv in kv_heads] for what in "kv")
    queries = [f"L{layer}H{head}.q" for layer, head in heads["induction"]]
    sets = [edges(heads["previous"], to) for to in (keys, values, queries)] + [edges(earlier, keys)]
    by_keys, by_values, by_queries, by_others = gs.edge_patching(model, tokens, broken, asked, sets).mean.tolist()
    assert by_keys > 0.9 * chance
    assert max(by_values, by_queries, by_others) < 0.3


def test_path_patching_finds_the_one_sender_of_nano_moe():
    model = gs.load("nano-moe")
    tokens = gs.repeated_tokens(model, SPAN, N)
    broken = tokens.clone()
    broken[:, 1:SPAN:2] = gs.repeated_tokens(model, SPAN, N, seed=1)[:, 1:SPAN:2]
    metric = nats(tokens, range(SPAN + 1, 2 * SPAN, 2))
    table = gs.path_patching(model, tokens, broken, metric, ["L2KV0.k", "L2KV1.k"]).table.set_index("sender")["value"]
    assert table.idxmax() == "L1H1" and table["L1H1"] > 7
    assert table.drop("L1H1").max() < 0.25
