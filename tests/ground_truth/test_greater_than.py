"""Greater-than (Hanna et al. 2023, arXiv:2305.00586): "The war lasted from 17 YY to 17" goes on with a year after YY.

A tiny four-layer 31B is trained on it. What is known: only YY matters; attention must bring it to the end (here some of
it by way of "to", which stands in between), before the last layers' feed-forward turns it into years greater than YY.
"""

import pytest
import torch
from torch.nn import functional as F

import gemmascope as gs
from tests.ground_truth.training import fit, untrained

pytestmark = pytest.mark.slow

YEARS, FIRST_YEAR = 20, 10
NOUN, FROM, CENTURY, YEAR, TO, LAST = range(1, 7)
"""Positions: <bos> noun from century year to century."""


def prompts(nouns):
    return torch.tensor(
        [
            [2, 60 + noun, 3, 5 + noun % 3, FIRST_YEAR + year, 4, 5 + noun % 3]
            for noun in nouns
            for year in range(1, YEARS - 1)
        ]
    )


def later(tokens):
    """Which years come after the prompt's: bool [prompt, year]."""
    return torch.arange(YEARS) > (tokens[:, YEAR, None] - FIRST_YEAR)


def years(logits):
    """The probability of each year at the end: [prompt, year]."""
    return logits[:, -1].softmax(-1)[:, FIRST_YEAR : FIRST_YEAR + YEARS]


@pytest.fixture(scope="module")
def model():
    model = untrained("31B", n_layers=4, layer_kinds=("sliding", "global") * 2, d_vocab=80)
    tokens = prompts(range(12))
    right = later(tokens).float()
    right = F.pad(right / right.sum(-1, keepdim=True), (FIRST_YEAR, 80 - FIRST_YEAR - YEARS))
    # The mean over all draws of a later year: cross-entropy with all of them, equally likely.
    fit(model, lambda step: F.cross_entropy(model(tokens)[:, -1], right), steps=150, lr=3e-3)
    return model


TOKENS = prompts(range(12, 14))  # with nouns that training does not show
LOW = TOKENS.clone()
LOW[:, YEAR] = FIRST_YEAR  # Hanna's "01": every other year comes after it


def difference(logits):
    """p(years after YY) - p(the others), YY being that of TOKENS."""
    p, right = years(logits), later(TOKENS).repeat(len(logits) // len(TOKENS), 1)
    return (p * right).sum(-1) - (p * ~right).sum(-1)


difference.last_only = True


def recovered_by_layer_and_pos(model, site):
    result = gs.activation_patching(model, TOKENS, LOW, difference, site, progress=False)
    return result.table.pivot(index="layer", columns="pos", values="recovered").to_numpy()


def test_the_probability_difference_is_above_nine_tenths(model):
    with torch.no_grad():
        assert difference(model(TOKENS)).mean() > 0.95
        p = years(model(TOKENS))
        assert p.sum(-1).min() > 0.98
        # The untrained control knows nothing.
        assert abs(difference(untrained("31B", d_vocab=80)(TOKENS)).mean()) < 0.1


def test_the_lens_is_upper_triangular_in_the_last_layers_and_not_before(model):
    below, lens = [], gs.logit_lens(model, TOKENS, positions=[LAST])
    for layer in range(-1, model.cfg.n_layers):
        p = years(lens.logits(layer))
        below.append(float((p * ~later(TOKENS)).sum() / p.sum()))
    assert below[0] > 0.3 and max(below[-2:]) < 0.05
    # The rows of the last layer, year by year: uniform over what is later, nothing before.
    with torch.no_grad():
        rows = years(model(TOKENS[: YEARS - 2]))
    assert rows[:, 0].max() < 0.02
    expected = later(TOKENS[: YEARS - 2]).float()
    torch.testing.assert_close(rows, expected / expected.sum(-1, keepdim=True), rtol=0, atol=0.12)


def test_the_year_is_carried_from_its_token_to_the_end(model):
    curve = recovered_by_layer_and_pos(model, "resid_pre")
    assert curve[0, YEAR] > 0.95 and abs(curve[-1, YEAR]) < 0.1
    assert curve[0, LAST] < 0.05 and curve[-1, LAST] > 0.95
    assert abs(curve[:, : CENTURY + 1]).max() < 0.01  # what comes before the year cannot know it


def test_attention_moves_it(model):
    attention = gs.attention_to(model, TOKENS, {"noun": NOUN, "year": YEAR, "last": LAST}).table
    to_end = attention[attention["to"] == "last"].pivot(index=["layer", "head"], columns="from", values="value")
    assert to_end["year"].max() > 0.3
    spans = {"noun": NOUN, "from": FROM, "century": CENTURY, "year": YEAR, "after": [TO, LAST]}
    everywhere = dict(layers=[model.cfg.n_layers // 2], window=2 * model.cfg.n_layers, progress=False)
    cut = gs.attention_knockout(model, TOKENS, difference, spans, **everywhere).table.set_index("edge")["value"]
    # Blind to the year it says the same years to all: hardly better than for the wrong year.
    assert cut["year -> after"] < 0.75
    assert cut.drop("year -> after").min() > 0.95
    without = gs.knockout(range(model.cfg.n_layers), queries=[TO, LAST], keys=[YEAR])
    with torch.no_grad():
        said = years(model(TOKENS[: YEARS - 2], interventions=without))
    assert said.std(0).max() < 1e-5  # the very same, whatever the year


def test_late_feed_forward_layers_at_the_end_recover_it_and_early_ones_do_not(model):
    _, clean = model.run_with_cache(TOKENS)

    def recovered(site, layers):
        there = [gs.patch((site, layer), clean, positions=[LAST]) for layer in layers]
        with torch.no_grad():
            low, now, high = (
                difference(logits).mean() for logits in (model(LOW), model(LOW, interventions=there), model(TOKENS))
            )
        return float((now - low) / (high - low))

    assert recovered("mlp_out", [2, 3]) > 0.6
    assert recovered("mlp_out", [0, 1]) < 0.4
    one_by_one = recovered_by_layer_and_pos(model, "mlp_out")
    assert one_by_one[:, LAST].argmax() >= 2 and abs(one_by_one[0, LAST]) < 0.1
