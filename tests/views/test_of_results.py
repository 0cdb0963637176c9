"""Every result shows itself: `view()` has its cells and figures."""

import pandas
import pytest
import torch

import gemmascope as gs
from gemmascope.experiments.das import DAS
from gemmascope.experiments.steering import SteerSweep
from gemmascope.results import Result
from gemmascope.routing.steering import Localisation
from gemmascope.testing import tiny_model


def result(axes: dict, values: torch.Tensor, **more) -> Result:
    return Result("test", pandas.DataFrame(axes), values, "nats", **more)


GRID = result({"layer": [0, 0, 1, 1], "expert": [0, 1, 0, 1]}, torch.arange(8.0).view(4, 2))


def shown(view) -> list[float]:
    """The figures a grid carries, in the order of its cells."""
    return [cell for row in view.still()[1].to_numpy().tolist() for cell in row]


def test_what_holds_a_result_shows_it():
    strengths = result({"strength": [-1.0, 1.0]}, torch.tensor([[1.0], [3.0]]))
    bases = result({"basis": ["learned", "random"]}, torch.tensor([[0.9], [0.1]]))
    found = {
        "localisation": (Localisation(GRID, torch.ones(4), GRID), GRID),
        "sweep": (SteerSweep(strengths, strengths), strengths),
        "das": (DAS("resid_post", torch.eye(3)[:, :1], bases, torch.ones(2), torch.ones(1, dtype=torch.long)), bases),
    }
    for holder, held in found.values():
        assert shown(holder.view()) == shown(held.view())


@torch.no_grad()
def test_an_effect_of_routing_shows_the_change_of_loss():
    model = tiny_model("26B-A4B")
    tokens = torch.randint(3, 90, (2, 7))
    effect = gs.expert_ablation(model, tokens, layers=[1, 2], experts=[0, 3], progress=False)
    assert shown(effect.view()) == shown(effect.loss.view())
    selection = gs.Selection()
    assert effect.view(selection=selection).selection is selection


def test_a_circuit_shows_the_edges_that_it_keeps():
    model = tiny_model("E2B")
    clean, corrupted = (torch.randint(3, 50, (1, 6)) for _ in range(2))
    circuit = gs.edge_attribution(model, clean, corrupted, lambda logits: logits[:, -1, 5] - logits[:, -1, 9])
    small = circuit.prune(5, greedy=True)
    table = small.view().still()[1]
    kept = set(zip(small.edges["sender"], small.edges["receiver"], strict=True))
    assert set(zip(table["sender"], table["receiver"], strict=True)) == kept and 0 < len(kept) <= 5


def test_a_cache_is_a_dashboard():
    model = gs.load("nano-edge")
    _, cache = model.run_with_cache("When Mary and John went")
    board = cache.view(views=["token_strip", "lens_view"])
    assert list(board.views) == ["TokenStrip", "LensView"]
    assert board.data["facts"][-1] == "6 tokens"
    assert len({id(view.selection) for view in (*board.children, board)}) == 1


def test_a_dashboard_takes_views_and_results():
    strip = gs.token_strip(gs.load("nano-edge"), "When Mary")
    board = gs.dashboard(strip, GRID, title="two")
    assert list(board.views) == ["TokenStrip", "PatchGrid"] and board.data["title"] == "two"
    with pytest.raises(ValueError, match="A dict has no view: give views, results, or a model and a prompt"):
        gs.dashboard({})
    with pytest.raises(ValueError, match="A prompt has no view 'lens'; its views are token_strip, lens_view"):
        gs.dashboard(gs.load("nano-edge"), "When", views=["lens"])
    with pytest.raises(ValueError, match="give one at least"):
        gs.dashboard()
