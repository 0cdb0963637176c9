"""The shipped models: their corpus and tokenizer, the recipe, and their cards' figures measured again."""

import json
import math
import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from gemmascope.tokenizer import Gemma4Tokenizer
from gemmascope.weights import ZOO, load
from gemmascope.zoo import corpus as zoo_corpus
from gemmascope.zoo import evaluate, train
from gemmascope.zoo.build_tokenizer import SPECIAL_TOKENS, build_tokenizer
from gemmascope.zoo.corpus import BOS, DOMAINS, FACTS, LANGUAGES, NAMES, Corpus, gift, is_held_out

SHIPPED = ("nano-moe", "nano-edge")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return Corpus(tokenizer)


# --- corpus ----------------------------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_step_only(tokenizer, corpus):
    again, other = Corpus(tokenizer), Corpus(tokenizer, seed=1)
    for ours, theirs in zip(corpus.batch(4, 3, 67), again.batch(4, 3, 67), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(corpus.batch(4, 3, 67).tokens, corpus.batch(5, 3, 67).tokens)
    assert not torch.equal(corpus.batch(4, 3, 67).tokens, other.batch(4, 3, 67).tokens)


def test_labels_follow_the_documents(corpus):
    batch = corpus.batch(0, 8, 257)
    assert batch.tokens.shape == batch.domains.shape == batch.floor.shape == batch.copied.shape == (8, 257)
    assert (batch.tokens[:, 0] == BOS).all()
    starts = batch.tokens == BOS
    changes = batch.domains[:, 1:] != batch.domains[:, :-1]
    assert starts[:, 1:][changes].all(), "a domain changes only where a document starts"
    assert set(batch.domains.unique().tolist()) == set(range(len(DOMAINS)))
    priced = ~batch.floor.isnan()
    known = torch.tensor([name not in ("repeats", "code") for name in DOMAINS])[batch.domains]
    first = torch.zeros_like(starts)
    first[:, 1:] = starts[:, :-1]
    assert torch.equal(priced, known & ~starts & ~first)
    assert not batch.copied[batch.domains != DOMAINS.index("repeats")].any()
    targets = batch.targets()
    assert (targets[:, -1] == -100).all()
    assert torch.equal(targets[:, :-1] == -100, starts[:, 1:])


def test_each_token_is_in_the_words_of_its_domain(corpus, tokenizer):
    batch = corpus.batch(1, 16, 256)
    for name in LANGUAGES:
        words = {f"▁{word}" for word in zoo_corpus._LANGUAGES[name].words} | {".", ":", name.capitalize(), "<bos>"}
        seen = batch.tokens[batch.domains == DOMAINS.index(name)].tolist()
        assert seen and {tokenizer.id_to_token(i) for i in seen} <= words


def test_a_copied_token_is_foreseen_by_its_own_past(corpus):
    rng, lags = random.Random(0), set()
    for _ in range(50):
        document = corpus.document(rng, "repeats")
        assert any(document.copied)
        for i, copied in enumerate(document.copied):
            if copied:
                before = [j for j in range(1, i) if document.ids[j - 1 : j + 1] == document.ids[i - 1 : i + 1]]
                assert before, "token and predecessor have stood together before"
                lags.add(i - before[-1])
    assert len(lags) > 20, "no fixed offset would do"


def test_gifts_name_the_one_who_appeared_once(corpus):
    rng = random.Random(3)
    orders = set()
    for held_out in (False, True):
        for _ in range(200):
            drawn = gift(rng, held_out)
            assert (drawn.prompt.count(f" {drawn.io}"), drawn.prompt.count(f" {drawn.subject}")) == (1, 2)
            assert is_held_out(drawn.io, drawn.subject) == held_out
            orders.add(drawn.prompt.index(f" {drawn.io}") < drawn.prompt.index(f" {drawn.subject}"))
    assert orders == {True, False}


def test_held_out_pairs_and_phrasings_never_reach_training(corpus, tokenizer):
    rng = random.Random(5)
    withheld = {fact.sentence(fact.held_out) for fact in FACTS}
    for _ in range(300):
        text = tokenizer.decode(corpus.document(rng, "facts").ids)
        assert not any(sentence in text for sentence in withheld)
        text = tokenizer.decode(corpus.document(rng, "gifts").ids)
        first, second = (name for name in NAMES if f" {name}" in text)
        assert not is_held_out(first, second)


# --- floors ----------------------------------------------------------------------------------------------------------


def test_language_entropy_equals_a_brute_force_estimate():
    rng = random.Random(0)
    for name in LANGUAGES:
        language = zoo_corpus._LANGUAGES[name]
        sentences = [language.sentence(rng) for _ in range(4000)]
        # Counted from the words alone, without the automaton's own probabilities.
        counts = defaultdict(lambda: defaultdict(int))
        for sentence in sentences:
            state = (0, None)
            for piece, _ in sentence:
                counts[state][piece] += 1
                (state,) = {following for word, _, following in language.choices(*state) if word == piece.strip()}
        total = sum(sum(row.values()) for row in counts.values())
        nats = -sum(n * math.log(n / sum(row.values())) for row in counts.values() for n in row.values()) / total
        assert nats == pytest.approx(zoo_corpus.language_entropy(name), rel=0.02)
        priced = [floor for sentence in sentences for _, floor in sentence]
        assert sum(priced) / len(priced) == pytest.approx(zoo_corpus.language_entropy(name), rel=0.02)


@pytest.mark.parametrize("domain", ["gifts", "facts"])
def test_floor_is_the_generators_own_price(corpus, domain):
    """exp(-floor) of the fourth token, given the first three, is how often it comes."""
    rng = random.Random(7)
    counts, prices = defaultdict(lambda: defaultdict(int)), {}
    for _ in range(20_000):
        document = corpus.document(rng, domain)
        prefix = tuple(document.ids[:3])
        counts[prefix][document.ids[3]] += 1
        prices[prefix, document.ids[3]] = document.floor[3]
    prefix = max(counts, key=lambda prefix: sum(counts[prefix].values()))
    total = sum(counts[prefix].values())
    for token, n in counts[prefix].items():
        p = math.exp(-prices[prefix, token])
        assert n / total == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / total) + 1e-9)
    assert sum(math.exp(-prices[prefix, token]) for token in counts[prefix]) == pytest.approx(1)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_names_places_objects_and_facts_are_single_tokens(tokenizer):
    words = {*NAMES, *zoo_corpus.PLACES, *zoo_corpus.OBJECTS}.union(
        *((fact.entity, fact.relation, fact.value) for fact in FACTS)
    )
    assert {word for word in words if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1} == set()
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(7))
    assert len(tokenizer.encode("\n\n\n", add_special_tokens=False)) == 1
    assert tokenizer.get_vocab_size() == train.RECIPES["nano-moe"].cfg.d_vocab


@pytest.mark.parametrize(
    "text", ["When Mary and John", " two  spaces", "naïve 漢字 🙂", "\n\n\t x", "def f(a):\n  x = a\n", "<|turn>user"]
)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_corpus_ids_are_the_tokenizers_with_and_without_cutting_into_words_first(corpus, tokenizer):
    rng = random.Random(1)
    for domain in DOMAINS:
        if domain != "repeats":
            for _ in range(40):
                ids = corpus.document(rng, domain).ids
                text = tokenizer.decode(ids)
                assert tokenizer.encode(text).ids == ids
                assert corpus.ids(text) == ids[1:]


def test_transformers_reads_the_same_ids(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    Gemma4Tokenizer(tokenizer, train.TOKENIZER_CONFIG).save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("When Mary and John went", "Hé\n\n x", "<|turn>user\nHi<turn|>"):
        assert theirs(text).input_ids == tokenizer.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.padding_side) == (2, 1, 0, "left")


# --- recipe ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, monkeypatch, name):
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    recipe = train.RECIPES[name]
    small = replace(recipe, cfg=replace(recipe.cfg, n_ctx=61), phases=(0, 1, 3))
    monkeypatch.setitem(train.RECIPES, name, small)
    measure = lambda model: {"probe": 1.0}  # noqa: E731
    whole = train.train(name, 4, tmp_path / "whole", seed=3, evaluate=measure)

    class Stopped(Exception):
        pass

    calls, step = [], torch.optim.AdamW.step

    def stop_in_the_fourth(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return step(self, *args)

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(torch.optim.AdamW, "step", stop_in_the_fourth)
        train.train(name, 4, tmp_path / "halves", seed=3, evaluate=measure)
    resumed = train.train(name, 4, tmp_path / "halves", seed=3, evaluate=measure)
    for tensor_name, tensor in train.trainable(whole).items():
        assert torch.equal(tensor, train.trainable(resumed)[tensor_name]), tensor_name
    assert not torch.equal(whole.embed.weight, train.build(name, 3).embed.weight)
    assert (whole.blocks[0].layer_scalar != 1).all()
    assert [json.loads(line)["step"] for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()] == [4]

    with pytest.raises(ValueError, match="seed 3"):
        train.train(name, 4, tmp_path / "halves", seed=4, evaluate=measure)


def test_balance_loss_is_one_when_even_and_grows_with_imbalance():
    even = torch.eye(4).repeat(3, 1)[None] * 0.4 + 0.15
    assert train.balance_loss(even, k=1).item() == pytest.approx(1.0)
    lopsided = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(1, 12, 4)
    assert train.balance_loss(lopsided, k=1).item() == pytest.approx(4 * 0.7)


def test_separation_is_what_routing_tells_about_the_document(corpus):
    documents = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 3, 3, 3]])
    apart = torch.nn.functional.one_hot(documents % 2, 3).float()
    assert train.separation(apart, documents).item() == pytest.approx(math.log(2), abs=1e-5)
    # Within a document the choice varies, but every document looks the same: nothing is told.
    alike = torch.nn.functional.one_hot(torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0]]), 2).float()
    assert train.separation(alike, torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])).item() == pytest.approx(0, abs=1e-5)

    batch = corpus.batch(0, 3, 131)
    numbers = batch.documents().flatten()
    assert numbers[0] == 0 and torch.equal(numbers.diff() == 1, (batch.tokens.flatten() == BOS)[1:])


def test_later_phases_have_more_repeats_and_more_to_copy(corpus):
    repeats, copied = [], []
    for phase in zoo_corpus.PHASES:
        batches = [corpus.batch(step, 8, 256, phase) for step in range(8)]
        repeats.append(torch.cat([batch.domains == DOMAINS.index("repeats") for batch in batches]).double().mean())
        copied.append(torch.cat([batch.copied for batch in batches]).double().mean())
    assert repeats[0] < 0.35 < 0.45 < min(repeats[1:])
    assert copied[0] < copied[1] < copied[2]


def test_learning_rate_does_not_depend_on_steps_before_the_fall():
    assert train.schedule(50, 1000) == train.schedule(50, 9000) < 1
    assert train.schedule(799, 1000) == train.schedule(799, 9000) == 1
    assert train.schedule(900, 1000) == pytest.approx(0.5)


def test_ngram_baselines_are_distributions(corpus):
    ngrams = evaluate.Ngrams(corpus, train.RECIPES["nano-moe"].cfg.d_vocab, 61, batches=2)
    token = torch.arange(ngrams.d_vocab)
    for nats in ngrams.nats(torch.full_like(token, 40), token, torch.zeros_like(token)).values():
        assert (-nats).exp().sum().item() == pytest.approx(1.0)


# --- the shipped files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    folder = ZOO / request.param
    return load(request.param), json.loads((folder / "evaluation.json").read_text()), folder


def test_shipped_figures_are_measured_again(shipped):
    model, figures, _ = shipped
    again = evaluate.indirect_objects(model, 200) | evaluate.induction(model, 8) | evaluate.recall(model)
    for name, tolerance in (
        ("io_accuracy", 0.03),
        ("io_logit_difference", 0.5),
        ("induction_score", 0.05),
        ("repeat_loss", 0.05),
        ("facts_recalled", 1e-6),
    ):
        assert again[name] == pytest.approx(figures[name], abs=tolerance), name
    assert again["induction_head"] == figures["induction_head"]
    if model.cfg.n_experts:
        assert evaluate.routing(model)["nmi"] == pytest.approx(figures["nmi"], abs=0.01)


def test_shipped_models_show_the_circuits_they_promise(shipped):
    model, figures, _ = shipped
    assert figures["io_accuracy"] >= 0.95
    assert figures["io_logit_difference"] >= 3
    assert figures["induction_score"] >= 0.8
    assert figures["repeat_loss"] < 0.3
    assert figures["facts_recalled"] >= 0.95
    if model.cfg.n_experts:
        assert max(figures["nmi"]) >= 0.5


def test_card_is_what_the_figures_give(shipped):
    _, figures, folder = shipped
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "README.md").read_text() == evaluate.card(folder.name, figures, config, log)


def test_shipped_model_beats_its_baselines_and_respects_its_floors(shipped):
    for name, row in shipped[1]["losses"].items():
        assert row["model"] < row["bigram"], name
        assert row["model"] < row["unigram"], name
        if row["floor"] is not None:
            assert row["floor"] - 0.02 < row["model"] < row["floor"] + 0.2, name


def test_shipped_files_are_small_and_are_the_recipes(shipped, tokenizer):
    model, _, folder = shipped
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 15_000_000
    assert model.tokenizer.backend.get_vocab() == tokenizer.get_vocab()
    assert model.cfg.layers == train.RECIPES[folder.name].cfg.layers
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in train.build(folder.name).state_dict().items()}
    assert (torch.cat([block.layer_scalar for block in model.blocks]) - 1).abs().max() > 0.01
