"""A unit's figures are the model's own."""

import numpy as np
import pytest
import torch

import gemmascope as gs
from gemmascope.testing import tiny_model
from gemmascope.widgets.export import page

NAMES = ("Mary", "Anna", "John", "Tom")
TEXTS = [f"When {a} and {b} went to the store, {b} gave a book to {a}." for a in NAMES for b in NAMES if a != b]
UNITS = {
    "neuron": ("blocks.3.mlp.hook_post", dict(neuron=17)),
    "head": (("z", 2), dict(head=2)),
    "expert": (("moe.hook_expert_out", 4), dict(expert=1)),
    "expert neuron": (("moe.hook_expert_post", 4), dict(expert=1, neuron=3)),
    "direction": (("resid_post", 3), dict(direction=torch.linspace(-1, 1, 128))),
}


@pytest.fixture(scope="module")
def model():
    return gs.load("nano-moe")


def unpacked(packed) -> np.ndarray:
    return np.frombuffer(packed["data"], packed["dtype"]).reshape(packed["shape"])


def run_python(text: str) -> dict:
    made = {}
    exec(text, made)
    return made


@pytest.mark.parametrize("kind", UNITS)
def test_activations_and_edits_are_those_of_the_copied_python(model, kind, capsys):
    site, which = UNITS[kind]
    view = gs.unit_view(model, site, TEXTS, **which)
    own = view.answer("own", {"text": TEXTS[0]})
    values = unpacked(own["values"])
    pos = int(np.abs(values[1:]).argmax()) + 1
    wrote = view.answer("wrote", {"text": 0, "pos": pos})
    assert wrote["value"] == pytest.approx(values[pos], rel=1e-5)
    made = run_python(wrote["setup"] + wrote["python"])
    assert capsys.readouterr().out.strip() == f"{wrote['value']:.4f}"
    assert made["prompt"] == TEXTS[0]
    for mode in view.data["modes"]:
        steered = view.answer("steer", {"text": 0, "pos": pos, "mode": mode, "strength": 2})
        made = run_python(wrote["setup"] + steered["python"])
        ids = unpacked(steered["ids"])[0]
        for run, logits in enumerate((made["before"], made["logits"])):
            there = ids >= 0
            wanted = logits[0, pos, ids[there]].detach()
            torch.testing.assert_close(
                torch.tensor(unpacked(steered["logit"])[run, 0][there]), wanted, atol=1e-5, rtol=0
            )


@torch.no_grad()
def test_what_a_unit_writes_is_its_direct_logit_attribution(model):
    _, cache = model.run_with_cache(TEXTS[0])
    pos = 14
    cases = [("head", 2, "head", 2), ("neuron", 3, "neuron", 17), ("expert", 4, "expert", None)]
    for kind, layer, by, index in cases:
        site, which = UNITS[kind]
        if kind == "expert":
            index = int(cache["moe.router.hook_indices", layer][0, pos, 0])
            which = dict(expert=index)
        wrote = gs.unit_view(model, site, TEXTS, **which).answer("wrote", {"text": 0, "pos": pos})
        for one in (wrote["most"][0], wrote["least"][0]):
            shares = gs.direct_logit_attribution(model, cache, one["id"], by=by, pos=pos, top=10_000)
            of = shares.cells
            row = (of["layer"] == layer) & (of[by] == index)
            if kind == "neuron":
                row &= of["expert"] == "dense"
            assert one["value"] == pytest.approx(float(shares.mean[row.to_numpy().nonzero()[0][0]]), abs=2e-5)


def test_all_texts_are_read_some_at_a_time_and_the_most_active_come_first(model):
    texts = TEXTS * 20
    view = gs.unit_view(model, "blocks.3.mlp.hook_post", texts, neuron=17)
    done, asked = 0, 0
    while done < len(texts):
        found = view.answer("read", {"start": done})
        done, asked = found["texts"], asked + 1
    assert asked > 1 and found == view.answer("found", {})
    _, cache = model.run_with_cache(TEXTS)
    values = cache["blocks.3.mlp.hook_post"][:, 1:, 17]
    assert found["high"] == pytest.approx(values.max().item(), abs=1e-5)
    assert found["top"][0]["at"] == int(values.max(0).values.argmax()) + 1
    assert unpacked(found["counts"]).sum() == values.numel() * 20
    assert view.examples["activation"].is_monotonic_decreasing


def test_tokens_by_id_padding_and_one_token(model):
    view = gs.unit_view(model, ("z", 1), ["When Mary and John", "Later"], head=0)
    alone = [view.answer("own", {"text": text})["values"] for text in ("When Mary and John", "Later")]
    rows = view.answer("read", {"start": 0})["top"]
    for row in rows:
        np.testing.assert_allclose(unpacked(row["values"]), unpacked(alone[row["text"]]), atol=1e-4)
    ids = gs.unit_view(tiny_model("E2B"), ("resid_mid", 2), torch.tensor([[5], [6]]), direction=torch.ones(48))
    assert ids.answer("wrote", {"text": 0, "pos": 0})["most"][0]["text"].isdigit()


def test_bad_input_says_what_to_give(model):
    cases = {
        "is no unit": dict(site=("z", 2), neuron=1),
        "no 4": dict(site=("z", 2), head=4),
        "direction has shape": dict(site=("resid_post", 2), direction=torch.ones(3)),
        "no texts": dict(site=("z", 2), head=1, texts=[]),
        "Text 1 is empty": dict(site=("z", 2), head=1, texts=["a", ""]),
        "changed by scale": dict(site=("z", 2), head=1, state={"mode": "add"}),
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            gs.unit_view(model, given.pop("site"), given.pop("texts", TEXTS), **given)


def test_an_exported_page_stays_small(model):
    assert len(page(gs.unit_view(model, ("z", 2), TEXTS * 10, head=2))) < 200_000
