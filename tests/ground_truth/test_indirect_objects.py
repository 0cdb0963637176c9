"""Indirect objects (Wang et al. 2022, arXiv:2211.00593): "When Mary and John went to the store, John gave a drink to".

What is known here: three names stand in the prompt, the answer is the one that is not repeated, and only the second
mention of the subject (S2) tells which. In both shipped models the last token collects both names (mover heads), reads
S2 through subject heads of its own, and the feed-forward layers after them take the one from the other. That is another
algorithm than GPT-2's, whose S-inhibition acts on the queries of the movers: paths through queries carry nothing here.
"""

import random

import pytest

import gemmascope as gs
from gemmascope.zoo.corpus import NAMES, is_held_out

PAIRS = random.Random(0).sample([(a, b) for a in NAMES for b in NAMES if a != b and is_held_out(a, b)], 8)
THIRD = [random.Random(i).choice([name for name in NAMES if name not in pair]) for i, pair in enumerate(PAIRS)]
IO, S1, PLACE, S2, LAST = 2, 4, 8, 10, 14
"""Positions in the prompts below, <bos> being 0."""


def prompt(a, b, s):
    return f"When {a} and {b} went to the store, {s} gave a drink to"


CLEAN = [prompt(io, s, s) for io, s in PAIRS]
OTHER_S2 = [prompt(io, s, io) for io, s in PAIRS]
"""S2 alone is changed, and the answer is the other name."""
OTHER_IO = [prompt(third, s, s) for (io, s), third in zip(PAIRS, THIRD, strict=True)]
ANSWER, SUBJECT, NEW = ([f" {name}" for name in names] for names in (*zip(*PAIRS, strict=True), THIRD))

SUBJECT_HEADS = {"nano-moe": ["L1H1", "L3H2"], "nano-edge": ["L6H3"]}
"""Found below by what they attend to."""


@pytest.fixture(scope="module", params=["nano-moe", "nano-edge"])
def model(request):
    return gs.load(request.param)


@pytest.fixture(scope="module")
def difference(model):
    """logit(io) - logit(s)"""
    return gs.logit_difference(model, ANSWER, SUBJECT)


def by_layer_and_pos(result):
    """What is recovered, layers x positions."""
    return result.table.pivot(index="layer", columns="pos", values="recovered").to_numpy(copy=True)


@pytest.mark.parametrize("noising", [False, True])
def test_patching_s2_flips_the_sign_until_the_last_token_has_read_it(model, difference, noising):
    result = gs.activation_patching(
        model, CLEAN, OTHER_S2, difference, direction="noising" if noising else "denoising", progress=False
    )
    clean, corrupted = (result.baselines[name] for name in ("clean", "corrupted"))
    assert (clean > 0).all() and (corrupted < 0).all()
    # How much of the source run the patch brings: in noising, that is what is lost of the clean one.
    brought = 1 - by_layer_and_pos(result) if noising else by_layer_and_pos(result)
    assert brought[0, S2] == pytest.approx(1, abs=0.1) and brought[-1, S2] == pytest.approx(0, abs=0.05)
    others = [pos for pos in range(LAST) if pos != S2]
    assert abs(brought[:, others]).max() < 0.05  # what is the same in both prompts
    # The two places of the message: together they hold all of it, layer by layer. nano-edge reads S2 in its last layer.
    if model.cfg.model_name == "nano-moe":
        assert brought[0, LAST] < 0.05 and brought[-1, LAST] == pytest.approx(1, abs=0.05)
        assert abs(brought[:, S2] + brought[:, LAST] - 1).max() < 0.05


def test_patching_the_name_of_the_indirect_object_changes_the_answer_to_it(model):
    metric = gs.logit_difference(model, ANSWER, NEW)
    result = gs.activation_patching(model, CLEAN, OTHER_IO, metric, progress=False)
    assert (result.baselines["clean"] > 0).all() and (result.baselines["corrupted"] < 0).all()
    recovered = by_layer_and_pos(result)
    assert recovered[0, IO] > 0.9 and recovered[-1, IO] < 0.1
    controls = [pos for pos in range(LAST) if pos not in (IO, PLACE, PLACE + 1)]  # the names are gathered at the comma
    assert abs(recovered[:, controls]).max() < 0.05


def test_the_nano_edge_position_that_reads_late():
    """nano-edge's keys and values come from layers 2 and 3 at the latest: S2 matters there up to layer 3, not after,
    though layer 6 is what reads it."""
    model = gs.load("nano-edge")
    difference = gs.logit_difference(model, ANSWER, SUBJECT)
    s2 = by_layer_and_pos(gs.activation_patching(model, CLEAN, OTHER_S2, difference, progress=False))[:, S2]
    assert (s2[:4] > 0.9).all() and (abs(s2[4:]) < 0.05).all()
    heads = gs.activation_patching(model, CLEAN, OTHER_S2, difference, "z", ("layer", "head"), progress=False)
    assert heads.top(1)[["layer", "head"]].to_numpy().tolist() == [[6, 3]] and heads.top(2)["recovered"].min() < 0.2


def test_movers_attend_to_both_names_and_subject_heads_to_s2(model):
    spans = {"io": IO, "s1": S1, "s2": S2, "place": PLACE, "last": LAST}
    table = gs.attention_to(model, CLEAN, spans).table
    table = table[table["to"] == "last"].pivot(index=["layer", "head"], columns="from", values="value")
    movers = table[(table["io"] > 0.3) & (table["io"] + table["s1"] > 0.9)]
    assert len(movers)
    # They do not know yet which of the two is right: no head reads the one and leaves the other.
    assert abs(movers["io"] - movers["s1"]).max() < 0.35
    found = [f"L{layer}H{head}" for layer, head in table[table["s2"] > 0.9].index]
    assert found == SUBJECT_HEADS[model.cfg.model_name]


def test_cutting_the_last_token_off_a_name_does_what_the_task_says(model):
    def run(key):
        cut = gs.knockout(range(model.cfg.n_layers), queries=[LAST], keys=[key])
        logits = model(CLEAN, interventions=cut).detach()
        return [figure(logits).mean().item() for figure in (gs.prob(model, ANSWER), gs.prob(model, SUBJECT))]

    io, s = run(IO)
    assert io < 0.05 and s > 0.85  # without its name, the one that is left
    io, s = run(S1)
    assert io > 0.98 and s < 0.01  # without the other candidate it is surer still
    io, s = run(S2)
    assert io < 0.8 and s > 0.1 and io + s > 0.45  # without S2 it cannot know which of the two
    for control in (1, PLACE):
        io, s = run(control)
        assert io > 0.95 and s < 0.01


def test_knockouts_name_the_layers(model, difference):
    spans = {"io": IO, "place": PLACE, "s2": S2, "last": LAST}
    edges = [("io", "last"), ("place", "last"), ("s2", "last"), ("io", "s2")]
    result = gs.attention_knockout(model, CLEAN, difference, spans, edges, progress=False)
    table = result.table.pivot(index="edge", columns="layer", values="value")
    clean = result.baselines["clean"].mean().item()
    reads = {int(head[1]) for head in SUBJECT_HEADS[model.cfg.model_name]}
    assert set(table.columns[table.loc["s2 -> last"] < clean - 2]) == reads
    assert abs(table.loc[["place -> last", "io -> s2"]] - clean).max().max() < 0.5  # controls


def test_what_s2_says_goes_through_feed_forward_layers_and_not_through_queries(model, difference):
    senders = SUBJECT_HEADS[model.cfg.model_name]
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    own_keys = [layer for layer in layers if model.layer(layer).kv_source is None]
    parts = ("mlp", "experts", "router") if model.cfg.n_experts else ("mlp",)
    feed_forward = [f"L{layer}.{part}" for layer in layers for part in parts]
    queries = [f"L{layer}H{head}.q" for layer in layers for head in heads]
    keys = [
        f"L{layer}KV{kv}.{what}" for layer in own_keys for kv in range(model.layer(layer).n_kv_heads) for what in "kv"
    ]
    others = [f"L{layer}H{head}" for layer in layers for head in heads if f"L{layer}H{head}" not in senders]

    def edges(some, readers):
        """Those that exist: attention writes before the feed-forward of its own layer, and before later attention."""
        place = lambda name: int(name[1])  # noqa: E731
        after = lambda sender, reader: place(reader) + (reader in feed_forward) > place(sender)  # noqa: E731
        return [(sender, reader) for sender in some for reader in readers if after(sender, reader)]

    sets = [edges(senders, feed_forward), edges(others, feed_forward), edges(senders, queries), edges(senders, keys)]
    sets = [cell for cell in sets if cell]  # nothing comes after the last layer's heads
    result = gs.edge_patching(model, CLEAN, OTHER_S2, difference, sets)
    clean = result.baselines["clean"].mean().item()
    through, *controls = result.mean.tolist()
    assert through < 0
    assert min(controls) > 0.85 * clean


def test_path_patching_to_the_feed_forward_layers_finds_the_subject_heads(model, difference):
    last = [layer for layer in range(model.cfg.n_layers) if layer >= model.cfg.n_layers - 3]
    parts = ("mlp", "experts", "router") if model.cfg.n_experts else ("mlp",)
    receivers = [f"L{layer}.{part}" for layer in last for part in parts]
    table = gs.path_patching(model, CLEAN, OTHER_S2, difference, receivers).table.sort_values("value")
    senders = SUBJECT_HEADS[model.cfg.model_name]
    assert set(table["sender"][: len(senders)]) == set(senders)
    assert table["recovered"].iloc[len(senders)] > 0.9


def test_the_logit_difference_is_written_late(model, difference):
    by_part = gs.direct_logit_attribution(model, CLEAN, ANSWER, SUBJECT).table
    late = by_part["layer"] >= model.cfg.n_layers - 3
    total = by_part["value"].sum()
    assert by_part[late]["value"].sum() > 0.85 * total
    assert by_part[late & (by_part["component"] == "mlp")]["value"].sum() > 0.65 * total
    by_head = gs.direct_logit_attribution(model, CLEAN, ANSWER, SUBJECT, by="head").table
    strongest = by_head.sort_values("value", ascending=False)
    names = [f"L{layer}H{head}" for layer, head in strongest[["layer", "head"]].to_numpy()]
    senders = SUBJECT_HEADS[model.cfg.model_name]
    assert set(names[: len(senders)]) == set(senders)
    assert strongest["value"].iloc[: len(senders)].min() > 2 * strongest["value"].iloc[len(senders)]
