"""Two compiled programs, whose circuits are known: do edge patching, EAP and EAP-IG find them? (After InterpBench,
Gupta et al. 2024, arXiv 2407.14494, and Tracr.)

A compiled program is flat where it works: its MLP does not change with small changes of its input. So one gradient, in
the clean run, misses edges that patching shows (EAP: AUROC 0.83 and 0.64); gradients on the way from the corrupted run
do not (EAP-IG: 1.00 and 1.00 with ten steps or more, 1.00 and 0.93 with five).
"""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score

import gemmascope as gs
from tests.ground_truth import compiled

STEPS = 20
ROUNDING = 1e-9
"""Scores that are a smaller share of the largest are rounding and count as 0, so that they are ties."""


@pytest.fixture(scope="module", params=["frac_prevs", "reverse"])
def program(request):
    torch.manual_seed(0)
    return getattr(compiled, request.param)()


def in_truth(result: gs.Result, program) -> torch.Tensor:
    edges = zip(result.cells.sender, result.cells.receiver, strict=True)
    return torch.tensor([edge in program.truth for edge in edges])


def test_frac_prevs_is_computed_exactly_at_every_position():
    program = compiled.frac_prevs()
    counted = torch.isin(program.clean - compiled.FIRST, torch.tensor([0, 2])).double().cumsum(-1)
    share = counted / torch.arange(1, program.clean.shape[1] + 1)
    torch.testing.assert_close(program.model(program.clean)[..., -1].detach(), share, rtol=0, atol=1e-12)
    torch.testing.assert_close(share[:, -1], program.answers)


def test_reverse_says_the_letters_backwards():
    program = compiled.reverse()
    logits = program.model(program.clean).detach()
    for tokens, said in zip((program.clean - compiled.FIRST).tolist(), logits, strict=True):
        start = tokens.index(compiled.START)
        letters, slots = tokens[start + 1 : start + 5], said[start + 5 :]
        right = torch.tensor(letters[::-1][: len(slots)]) + compiled.FIRST
        assert torch.equal(slots.argmax(-1), right)
        # The logit of the letter that is read is 2 (what the head writes), of the slot's own sign 1, of others 0.
        ordered = slots.sort(-1, descending=True).values
        torch.testing.assert_close(ordered[:, 0], torch.full((len(slots),), 2.0).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(ordered[:, 1], torch.ones(len(slots)).double(), rtol=0, atol=1e-9)
        assert ordered[:, 2:].abs().max() < 1e-9
    assert torch.equal(logits[:, -1].argmax(-1), program.answers)


def test_edge_patching_finds_the_circuit_and_nothing_else(program):
    exact = gs.edge_patching(program.model, program.clean, program.corrupted, program.metric)
    effect = (exact.values - exact.baselines["clean"]).abs().mean(-1)
    truth = in_truth(exact, program)
    assert truth.sum() == len(program.truth) and len(truth) > 150
    assert effect[truth].min() > 0.1 and effect[~truth].max() == 0
    assert roc_auc_score(truth, effect) == 1
    # What is outside is not silent: it says something else in the corrupted run, where nobody listens.
    runs = [program.model.run_with_cache(tokens)[1] for tokens in (program.clean, program.corrupted)]
    for part in ("attn_out", "mlp_out"):
        assert (runs[0][part, 2] - runs[1][part, 2]).abs().max() > 0.01


def test_gradients_along_the_way_find_what_one_gradient_misses(program):
    areas = {}
    for method in ("eap", "eap-ig"):
        found = gs.edge_attribution(
            program.model, program.clean, program.corrupted, program.metric, method, steps=STEPS
        )
        scores, truth = found.result.values.abs().mean(-1), in_truth(found.result, program)
        scores[scores < ROUNDING * scores.max()] = 0
        assert scores[~truth].max() == 0  # nothing outside the circuit is blamed
        areas[method] = roc_auc_score(truth, scores)
        shuffled = [roc_auc_score(truth[torch.randperm(len(truth))], scores) for _ in range(200)]
        assert abs(sum(shuffled) / 200 - 0.5) < 0.03
    assert areas["eap-ig"] == 1 and areas["eap-ig"] > areas["eap"]


def test_the_known_edges_are_faithful_and_complete(program):
    scored = gs.edge_attribution(program.model, program.clean, program.corrupted, program.metric)
    known = replace(scored, kept=tuple(program.truth))
    torch.testing.assert_close(known.faithfulness().recovered, torch.ones(1), rtol=0, atol=1e-6)
    assert known.completeness().recovered.abs() < 1e-6
    others = [edge for edge in scored.wiring.edges if edge not in program.truth]
    drawn = replace(scored, kept=tuple(others[i] for i in torch.randperm(len(others))[: len(program.truth)]))
    assert drawn.faithfulness().recovered.abs() < 1e-6
    for edge in program.truth:  # each of them is needed
        without = replace(scored, kept=tuple(program.truth - {edge}))
        assert without.faithfulness().recovered < 0.9


def test_path_patching_names_the_one_sender_of_the_reading_heads_queries():
    program = compiled.reverse()
    paths = gs.path_patching(program.model, program.clean, program.corrupted, program.metric, "L1H0.q")
    effect = (paths.values - paths.baselines["clean"]).abs().mean(-1)
    assert paths.cells.sender[int(effect.argmax())] == "L0.mlp" and effect.max() > 0.1
    assert effect.sort().values[:-1].max() == 0
