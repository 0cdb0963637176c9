"""The ablation bench's figures are those of model(prompt, interventions=...)."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.widgets.export import page

TEXT = "When Mary and John went to the park, John gave a ball to"
OTHERS = [
    "When Anna and Paul went to the park, Paul gave a ball to",
    "When Jane and Mark went to the park, Mark gave a ball to",
]
BASE = {"kind": "zero", "experts": "reroute", "donor": 0, "block": 0}


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def unpacked(answer, name: str) -> torch.Tensor:
    packed = answer[name]
    return torch.from_numpy(np.frombuffer(packed["data"], packed["dtype"]).reshape(packed["shape"]).copy())


def answer_of(bench, on, **changes):
    return bench.answer("effect", BASE | {"on": on} | changes)


@torch.no_grad()
def check(model, answer, interventions) -> None:
    """Everything that an answer tells, from the model itself."""
    before, after = model(TEXT)[0], model(TEXT, interventions=interventions)[0]
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    torch.testing.assert_close(unpacked(answer, "kl"), (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=1e-5)
    targets = model.to_tokens(TEXT)[0, 1:]
    losses = [F.cross_entropy(x[:-1], targets).item() for x in (before, after)]
    assert answer["loss"] == pytest.approx(losses, abs=1e-6)
    ids = unpacked(answer, "ids").long()
    for run, x in enumerate((before, after)):
        there = ids >= 0
        logits = x.gather(-1, ids.clamp(min=0))
        assert torch.equal(unpacked(answer, "logit")[run][there], logits[there])
        torch.testing.assert_close(
            unpacked(answer, "p")[run][there], x.softmax(-1).gather(-1, ids.clamp(min=0))[there], atol=1e-6, rtol=0
        )
        assert (x.topk(8).indices[:, :, None] == ids[:, None]).any(-1).all()
    right, wrong = model.to_single_token(" Mary"), model.to_single_token(" John")
    difference = torch.stack([x[:, right] - x[:, wrong] for x in (before, after)])
    assert torch.equal(unpacked(answer, "difference"), difference)


def test_zero_ablations_and_experts_equal_the_models_own(model):
    bench = gs.ablation_bench(model, TEXT, answers=(" Mary", " John"))
    check(model, answer_of(bench, []), [])
    on = [["head", 2, 2], ["head", 2, 0], ["mlp", 1, None], ["moe", 4, None], ["neuron", 3, 17], ["expert", 5, 1]]
    bench.state = {**bench.state, "on": on}
    wanted = [
        gs.zero("blocks.1.hook_mlp_out"),
        gs.zero("blocks.2.attn.hook_z", heads=[0, 2]),
        gs.zero("blocks.3.mlp.hook_post", neurons=17),
        gs.zero("blocks.4.hook_moe_out"),
        *gs.drop_expert(5, 1),
    ]
    assert bench.interventions == wanted
    answer = answer_of(bench, on)
    check(model, answer, wanted)
    made = {}
    exec(f"import gemmascope as gs\n{answer['python'].partition('logits =')[0]}", made)
    assert made["interventions"] == wanted
    check(model, answer_of(bench, on[-1:], experts="silence"), gs.drop_expert(5, 1, reroute=False))


def test_mean_and_resample_take_from_the_reference(model):
    bench = gs.ablation_bench(model, TEXT, reference=OTHERS, answers=(" Mary", " John"))
    _, reference = model.run_with_cache(OTHERS)
    site, mlp = "blocks.2.attn.hook_z", "blocks.4.hook_mlp_out"
    on = [["head", 2, 2], ["mlp", 4, None]]
    check(model, answer_of(bench, on, kind="mean"), [gs.mean(site, reference, heads=2), gs.mean(mlp, reference)])
    drawn = [gs.patch(site, reference[site][1:2], heads=2), gs.patch(mlp, reference[mlp][1:2])]
    answer = answer_of(bench, on, kind="resample", donor=1)
    check(model, answer, drawn)
    made = {"model": model, "prompt": TEXT, "gs": gs}
    exec(answer["python"], made)
    assert made["interventions"] == drawn
    again = gs.ablation_bench(model, TEXT, reference=reference, answers=(" Mary", " John"))
    check(model, answer_of(again, on, kind="resample", donor=1), drawn)


def test_what_cannot_be_had_says_what_to_pass(model):
    bench = gs.ablation_bench(model, TEXT)
    assert "reference=" in bench.data["kinds"]["mean"]
    with pytest.raises(ValueError, match="reference="):
        answer_of(bench, [["head", 0, 0]], kind="mean")
    shorter = gs.ablation_bench(model, TEXT, reference=["When Anna"])
    assert shorter.data["kinds"]["mean"] == "" and "as long" in shorter.data["kinds"]["resample"]
    with pytest.raises(ValueError, match="several lengths"):
        gs.ablation_bench(model, TEXT, reference=["When Anna", "When"])
    with pytest.raises(ValueError, match="two tokens"):
        gs.ablation_bench(model, TEXT, answers=" Mary")
    with pytest.raises(ValueError, match="which this model does not have"):
        gs.ablation_bench(model, TEXT, state={"on": [["head", 2, 4]]})
    with pytest.raises(ValueError, match="none is left"):
        answer_of(bench, [["expert", 1, i] for i in range(8)])
    with pytest.raises(ValueError, match="empty"):
        gs.ablation_bench(model, "")


def test_a_dense_model_with_per_layer_embeddings_and_one_token():
    model = tiny_model("E2B")
    bench = gs.ablation_bench(model, torch.tensor([5]))
    assert bench.data["experts"] == 0 and "ple" in bench.data["parts"]
    answer = answer_of(bench, [["ple", 1, None], ["attn", 2, None]])
    assert answer["loss"] == [None, None] and len(unpacked(answer, "kl")) == 1
    assert 'gs.zero("blocks.1.hook_ple_out")' in answer["python"]


def test_the_log_is_a_table_and_a_dashboard_page_stays_small(model):
    entry = {**{key: BASE[key] for key in ("kind", "experts", "donor")}, "on": [["head", 2, 2]], "pos": 3, "kl": 0.5}
    entry |= {"loss": [1.0, 2.0], "difference": None, "first": [{"text": "a", "p": 0.9}, {"text": "b", "p": 0.2}]}
    bench = gs.ablation_bench(model, torch.randint(4, 1300, (256,)), state={"log": [entry], "at": 0, "on": entry["on"]})
    assert (
        bench.commits.to_dict("records")[0] | {"off": "layer 2 head 2", "token_after": "b"}
        == bench.commits.to_dict("records")[0]
    )
    assert "layer 2 head 2" in bench.still()[0]
    assert list(gs.ablation_bench(model, TEXT).commits.columns)
    assert len(page(bench)) < 300_000
