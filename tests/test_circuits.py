"""Edge attribution against exact edge patching, and the circuits that are made of it."""

import json
import random
import sys

import pytest
import torch

import gemmascope as gs
from gemmascope.experiments.attribution import attribution_patching
from gemmascope.experiments.circuits import edge_attribution
from gemmascope.experiments.edges import contributions, edge_patching, run_with_edges_patched
from gemmascope.metrics import logit_difference
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import gift

GENERATOR = torch.Generator().manual_seed(3)
CLEAN, CORRUPTED = (torch.randint(3, 50, (2, 9), generator=GENERATOR) for _ in range(2))


def logit_gap(logits):
    return logits[:, -1, 5] - logits[:, -1, 9]


def nearly_linear(architecture, eps=1e-8):
    """A model whose tokens 53 to 99 are tokens 3 to 49, moved by a hair: between the two it is linear."""
    model = tiny_model(architecture).double()
    with torch.no_grad():
        for table in (model.embed, model.per_layer.table if model.per_layer else model.embed):
            table.weight[53:100] = table.weight[3:50] + eps * torch.randn_like(table.weight[3:50])
    return model


@pytest.mark.parametrize(
    ("architecture", "experts", "method"),
    [("E2B", False, "eap"), ("E2B", False, "eap-ig"), ("26B-A4B", False, "eap"), ("26B-A4B", True, "eap")],
)
def test_scores_equal_exact_patching_on_a_linear_model(architecture, experts, method):
    model = nearly_linear(architecture)
    circuit = edge_attribution(model, CLEAN, CLEAN + 50, logit_gap, method, steps=2, experts=experts)
    edges = circuit.wiring.edges
    chosen = sorted(random.Random(0).sample(range(len(edges)), 40))
    chosen += [row for row, edge in enumerate(edges) if edge[0] == "signal" or edge in {("embed", "logits")}]
    with torch.no_grad():
        other = contributions(model, CLEAN + 50, experts=experts)
        base = logit_gap(model(CLEAN))
        exact = [logit_gap(run_with_edges_patched(model, CLEAN, other, [edges[row]])) - base for row in chosen]
    exact, scores = torch.stack(exact), circuit.result.values[chosen].double()
    assert (scores - exact).abs().max() / exact.abs().max() < 1e-5
    assert exact.count_nonzero() > 40


def test_edges_into_a_reader_sum_to_the_attribution_of_its_input():
    model = tiny_model("26B-A4B").double()
    circuit = edge_attribution(model, CLEAN, CORRUPTED, logit_gap)
    last = attribution_patching(
        model, CLEAN, CORRUPTED, logit_gap, "resid_post", direction="noising", by_position=False
    ).values[-1]
    into_logits = (circuit.result.cells.receiver == "logits").to_list()
    torch.testing.assert_close(circuit.result.values[into_logits].sum(0), last, rtol=1e-4, atol=1e-6)

    # One head's queries: the gradient at hook_q, pulled back by autograd through W_Q and the norm before it.
    grads, layer, head = {}, 3, 2
    keep = lambda gradient, hook: grads.__setitem__(hook.name, gradient)  # noqa: E731
    with model.hooks(bwd_hooks=[(f"blocks.{layer}.attn.hook_q", keep)]):
        logit_gap(model(CLEAN)).sum().backward()
    with torch.no_grad():
        streams = [model.run_with_cache(tokens)[1]["resid_pre", layer] for tokens in (CLEAN, CORRUPTED)]
    input, block = streams[0].requires_grad_(), model.blocks[layer]
    block.attn._heads(block.attn.q_proj(block.ln1(input)))[:, :, head].backward(
        grads[f"blocks.{layer}.attn.hook_q"][:, :, head]
    )
    expected = ((streams[1] - streams[0]) * input.grad).sum((1, 2))
    into_q = (circuit.result.cells.receiver == f"L{layer}H{head}.q").to_list()
    torch.testing.assert_close(circuit.result.values[into_q].sum(0).double(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_eap_ig_integrates_to_the_whole_effect():
    """Over a path from corrupted to clean, the scores of the input's edges sum to the difference of the two figures."""
    model = tiny_model("E2B").double()
    near = CLEAN.clone()
    near[:, 4] = CORRUPTED[:, 4]
    circuit = edge_attribution(model, CLEAN, near, logit_gap, "eap-ig", steps=16)
    of_input = circuit.result.cells.sender.isin(["embed", "signal"]).to_list()
    whole = circuit.baselines["corrupted"] - circuit.baselines["clean"]
    torch.testing.assert_close(circuit.result.values[of_input].sum(0), whole, rtol=0.1, atol=0.02)
    one_step = edge_attribution(model, CLEAN, near, logit_gap, "eap-ig", steps=1)
    plain = edge_attribution(model, CLEAN, near, logit_gap)
    torch.testing.assert_close(one_step.result.values, plain.result.values)
    error = (plain.result.values[of_input].sum(0) - whole).abs()
    assert (error > 2 * (circuit.result.values[of_input].sum(0) - whole).abs()).all()  # one gradient does not do it


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
def test_a_pruned_circuit_is_on_paths_from_input_to_logits(architecture, greedy):
    model = tiny_model(architecture)
    circuit = edge_attribution(model, CLEAN, CORRUPTED, logit_gap)
    pruned = circuit.prune(60, greedy=greedy)
    edges = list(zip(pruned.edges.sender, pruned.edges.receiver, strict=True))
    assert 0 < len(edges) <= 60 and set(edges) <= set(circuit.wiring.edges)
    owners = circuit.wiring.owners

    def grown(start, step):
        found = set(start)
        while True:
            more = found | {node for edge in edges for node in step(edge, found)}
            if more == found:
                return found
            found = more

    from_input = grown({"embed", "signal"}, lambda edge, found: owners[edge[1]] if edge[0] in found else ())
    to_logits = grown({"logits"}, lambda edge, found: (edge[0],) if found & set(owners[edge[1]]) else ())
    for sender, reader in edges:
        assert sender in from_input and to_logits & set(owners[reader])
    assert pruned.nodes[-1] == "logits" and pruned.prune(60).nodes == pruned.nodes
    by_threshold = circuit.prune(threshold=float(circuit.top(60).score.abs().min()))
    if not greedy:
        assert by_threshold.kept == pruned.kept


def test_greedy_takes_the_strongest_edge_into_what_it_has():
    circuit = edge_attribution(tiny_model("31B"), CLEAN, CORRUPTED, logit_gap)
    table, taken, reached = circuit.edges, [], {"logits"}
    strength = {(row.sender, row.receiver): abs(row.score) for row in table.itertuples()}
    while len(taken) < 25:
        entering = [e for e in strength if e not in taken and reached & set(circuit.wiring.owners[e[1]])]
        taken.append(max(entering, key=strength.get))
        reached.add(taken[-1][0])
    assert circuit._greedily(strength, 25) == taken


@pytest.mark.parametrize("architecture", ["E2B", "26B-A4B"])
def test_faithfulness_and_completeness_are_real_patching(architecture):
    model = tiny_model(architecture)
    circuit = edge_attribution(model, CLEAN, CORRUPTED, logit_gap)
    n = len(circuit.result.cells)
    faithful, complete = circuit.faithfulness([0, 40, n]), circuit.completeness([0, n])
    torch.testing.assert_close(faithful.recovered[[0, 2]], torch.tensor([0.0, 1.0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(complete.recovered, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-4)
    pruned = circuit.prune(40)
    with torch.no_grad():
        outside = set(circuit.wiring.edges) - set(pruned.kept)
        logits = run_with_edges_patched(model, CLEAN, contributions(model, CORRUPTED), outside)
    torch.testing.assert_close(faithful.values[1], logit_gap(logits))
    assert faithful.cells.n_kept[1] == len(pruned.kept)
    torch.testing.assert_close(pruned.faithfulness().values[0], faithful.values[1])


def test_scores_rank_edges_as_patching_does_and_few_edges_suffice():
    """Indirect objects on the shipped model: 100 of 1373 edges keep nearly all of the logit difference."""
    model, rng = gs.load("nano-moe"), random.Random(0)
    drawn = [(one, [piece for piece, _ in one.priced[:-2]]) for one in (gift(rng) for _ in range(40))]
    chosen = [(one, parts) for one, parts in drawn if len(parts) == len(drawn[0][1])][:4]
    clean, corrupted = [], []
    for one, parts in chosen:
        last = max(at for at, part in enumerate(parts) if part == " " + one.subject)
        clean.append("".join(parts))
        corrupted.append("".join([*parts[:last], " " + one.io, *parts[last + 1 :]]))
    metric = logit_difference(model, *zip(*[(" " + one.io, " " + one.subject) for one, _ in chosen], strict=True))
    circuit = edge_attribution(model, clean, corrupted, metric)
    some = circuit.top(400).index[::4]
    edges = [circuit.wiring.edges[row] for row in some]
    exact = edge_patching(model, clean, corrupted, metric, edges)
    effect = exact.mean - exact.baselines["clean"].mean()
    ranks = torch.stack([circuit.result.mean[some.to_list()], effect]).argsort(-1).argsort(-1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.7
    shares = circuit.faithfulness([10, 100]).recovered
    assert shares[1] > 0.9 and shares[0] < 0.7
    assert circuit.completeness([100]).recovered.abs() < 0.1


def test_export(tmp_path):
    model = tiny_model("E2B")
    pruned = edge_attribution(model, CLEAN, CORRUPTED, logit_gap).prune(40)
    pruned.to_json(tmp_path / "graph.json", slug="gap", prompt=1)
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert {"slug", "scan", "prompt_tokens", "prompt", "schema_version"} <= graph["metadata"].keys()
    assert set(graph["qParams"]) == {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"}
    assert graph["metadata"]["prompt_tokens"] == [str(token) for token in CLEAN[1].tolist()]
    nodes = {node["node_id"]: node for node in graph["nodes"]}
    assert list(nodes) == pruned.nodes and nodes["logits"]["is_target_logit"] and nodes["embed"]["layer"] == "E"
    assert all(node["ctx_idx"] == 8 and isinstance(node["feature"], int) for node in nodes.values())
    heads = [name for name in nodes if "H" in name]
    assert all(nodes[name]["layer"] == name[1] for name in heads)
    total = pruned.edges.assign(n=[len(pruned.wiring.owners[reader]) for reader in pruned.edges.receiver])
    assert sum(link["weight"] for link in graph["links"]) == pytest.approx((total.score * total.n).sum(), abs=1e-5)
    assert len({(link["source"], link["target"]) for link in graph["links"]}) == len(graph["links"])
    assert {link["target"] for link in graph["links"]} | {link["source"] for link in graph["links"]} == set(nodes)


def test_networkx_is_optional(monkeypatch):
    pruned = edge_attribution(tiny_model("E2B"), CLEAN, CORRUPTED, logit_gap).prune(30)
    networkx = pytest.importorskip("networkx")
    graph = pruned.to_networkx()
    assert set(graph) == set(pruned.nodes) and networkx.is_directed_acyclic_graph(graph)
    edge = next(pruned.edges.itertuples())
    assert graph[edge.sender][pruned.wiring.owners[edge.receiver][0]][edge.receiver]["weight"] == edge.score
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match="to_networkx needs networkx"):
        pruned.to_networkx()


def test_bad_input_is_refused_in_one_sentence():
    model = tiny_model("26B-A4B")
    for change, message in (
        (dict(corrupted=CORRUPTED[:, 1:]), "Clean prompt 0 has 9 tokens and its corrupted version 8"),
        (dict(method="acdc"), "method is 'acdc'; it is 'eap' or 'eap-ig'"),
        (dict(steps=0), "steps is 0"),
        (dict(metric=lambda logits: logits[:, -1, :3]), r"gave \[2, 3\] for logits"),
        (dict(metric=lambda logits: logits[:, -1].argmax(-1).float()), "has no gradient"),
        (dict(metric=lambda logits: logits[:, -1, 5] * torch.nan), "gave NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            edge_attribution(model, **(dict(clean=CLEAN, corrupted=CORRUPTED, metric=logit_gap) | change))
    circuit = edge_attribution(model, CLEAN, CORRUPTED, logit_gap)
    for arguments in ({}, dict(n_edges=3, threshold=0.1)):
        with pytest.raises(ValueError, match="either n_edges or threshold"):
            circuit.prune(**arguments)
