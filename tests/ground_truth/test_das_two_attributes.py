"""Two attributes of one name (RAVEL: Huang et al. 2024, arXiv 2402.17700), in subspaces that DAS finds.

Each of nano-moe's people has a home and a job. Swapping a subspace of the stream at the name gives a person another's
home (cause) and leaves the job (isolate), or the other way round. `tests/test_das.py` proves the method where the
answer is known exactly; here it is a trained model's.
"""

import random

import pytest
import torch

import gemmascope as gs
from gemmascope.model.text import HookedGemma4
from gemmascope.zoo.corpus import FACTS, PEOPLE

NAME = 2
"""The name's position in "For Aldric, the home is", before what is asked of it."""
SITE = ("resid_post", 2)
FACT = {(fact.entity, fact.relation): fact for fact in FACTS}


def pairs_for(attribute: str, other: str, n: int):
    """Base and source prompts, the right answers, and whether a pair is to cause (or isolate)."""
    pairs = []
    for a in PEOPLE:
        for b in PEOPLE:
            asked, rest = ([FACT[who, what] for who in (a, b)] for what in (attribute, other))
            if asked[0].value != asked[1].value and rest[0].value != rest[1].value:
                pairs.append((asked[0].prompt(1), asked[1].prompt(1), " " + asked[1].value, True))
                pairs.append((rest[0].prompt(1), asked[1].prompt(1), " " + rest[0].value, False))
    random.Random(0).shuffle(pairs)
    base, source, answers, cause = map(list, zip(*pairs[:n], strict=True))
    return base, source, answers, torch.tensor(cause)


def by_kind(found, cause: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy on held-out pairs by basis, of cause and of isolate."""
    here = cause[found.held_out]
    named = dict(zip(found.accuracy.cells.iloc[:, 0], found.accuracy.values, strict=True)) | found.accuracy.baselines
    return tuple({name: row[part].mean().item() for name, row in named.items()} for part in (here, ~here))


@pytest.mark.slow
@pytest.mark.parametrize(("attribute", "other", "shuffled"), [("home", "job", True), ("job", "home", False)])
def test_each_attribute_has_a_subspace_of_its_own(attribute, other, shuffled):
    """The control of shuffled answers is learned for one of the two: it takes as long as the basis itself."""
    base, source, answers, causes = pairs_for(attribute, other, 600)
    settings = dict(positions=NAME, steps=80, lr=0.08, control=shuffled)
    found = gs.fit_das(gs.load("nano-moe"), base, source, answers, SITE, 32, **settings)
    cause, isolate = by_kind(found, causes)
    assert cause["learned"] > 0.9 and isolate["learned"] > 0.9
    assert cause["random"] < 0.1 and isolate["random"] > 0.9  # a random basis changes nothing
    assert cause["whole site"] > 0.95 and isolate["whole site"] < 0.1  # the whole site swaps both attributes
    assert cause["no swap"] < 0.05 and isolate["no swap"] > 0.95
    if shuffled:
        assert cause["shuffled answers"] < 0.1


@pytest.mark.slow
def test_an_untrained_model_has_no_such_subspace():
    shipped = gs.load("nano-moe")
    model = HookedGemma4(shipped.cfg, shipped.tokenizer).eval()
    base, source, answers, causes = pairs_for("home", "job", 300)
    found = gs.fit_das(model, base, source, answers, SITE, 32, positions=NAME, steps=40, control=False)
    cause, isolate = by_kind(found, causes)
    assert cause["learned"] < 0.2 and isolate["learned"] < 0.2
    assert cause["whole site"] < 0.1
