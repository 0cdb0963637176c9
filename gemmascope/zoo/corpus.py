"""The generated corpus of the shipped models: eight domains, every one with a known ground truth.

    gifts    indirect objects: "When Mary and John went to the store, John gave a drink to Mary."
    repeats  spans of random token ids that return after random gaps, so that only matching what came before predicts
    facts    a fixed table of 160 invented facts; each is shown in four of five phrasings, the fifth is kept for testing
    tavi, kelo, muzo, fesi
             mini-languages with disjoint words: stochastic finite automata with agreement at a distance
    code     short functions that use only the variables they have defined

A document starts with <bos> and belongs to one domain. Documents of all domains are packed one after another into
windows of `n_ctx` tokens: attention may look back across a <bos>, and a window's last document is cut off. The stream
of batches has no end and no state: each is a function of seed, step and phase of the curriculum.

Where the generator knows it (gifts, facts, mini-languages), each token carries its floor: -log p(token | domain, the
document so far) in nats, the price a perfect model pays. A document's first token has none: it depends on the mixture.
"""

import math
import random
import re
from collections import Counter
from itertools import islice, product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor

LANGUAGES = ("tavi", "kelo", "muzo", "fesi")
DOMAINS = ("gifts", "repeats", "facts", *LANGUAGES, "code")
BOS = 2


class Phase(NamedTuple):
    """A part of the curriculum."""

    weights: tuple[int, ...]
    """How often a document of each domain is drawn."""
    short_spans: bool
    """Repeated spans are mostly short and return many times; else they are longer and return one to three times."""


# Gifts and facts are learned within 1000 steps; induction is the slowest circuit to form. So repeats are at first a
# quarter of all tokens, later a half, and at last short spans make the match easier to find.
PHASES = (
    Phase((10, 3, 4, 2, 2, 2, 2, 2), short_spans=False),
    Phase((10, 9, 4, 2, 2, 2, 2, 2), short_spans=False),
    Phase((10, 9, 4, 2, 2, 2, 2, 2), short_spans=True),
)

# Corpus text is cut into pieces that are single tokens: a word, digit or operator with the space before it, a run of
# newlines, any other sign.
_PIECE = re.compile(r" ?(?:[A-Za-z]+|[0-9]|[-+*<>=]+)|\n+|.")


def pieces(text: str) -> list[str]:
    """Cuts corpus text into its single-token pieces; joined, they are the text again."""
    return _PIECE.findall(text)


# --- gifts -----------------------------------------------------------------------------------------------------------

NAMES = (
    "Mary John Tom Anna Peter Lucy Paul Emma James Sarah Mark Laura David Helen Simon Alice Robert Clara Henry Nora "
    "Oscar Julia Martin Rosa Victor Irene Felix Diana Oliver Grace Hugo Sofia Leo Marta Adam Ruth Carl Jane Brian Eva"
).split()
PLACES = (
    "store park school garden office beach station market library museum kitchen theater river restaurant hospital "
    "castle farm bridge harbor forest"
).split()
OBJECTS = (
    "drink book ball key letter ring lamp flower ticket basket hat map coin pencil cup clock guitar bottle gift kite"
).split()
# {s} repeats {a} or {b}, {io} is the other one. No two templates start with the same word, so the floor is exact.
GIFT_TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {object} to {io}.",
    "Then {a} and {b} walked to the {place}, and {s} handed a {object} to {io}.",
    "After {a} and {b} met at the {place}, {s} offered a {object} to {io}.",
    "While {a} and {b} worked at the {place}, {s} showed a {object} to {io}.",
    "Yesterday {a} and {b} drove to the {place}. Later {s} sold a {object} to {io}.",
    "Friends {a} and {b} found a {object} near the {place}, and {s} passed it to {io}.",
    "At the {place}, {a} talked with {b}. Soon {s} brought a {object} to {io}.",
    "Once {a} sat with {b} in the {place}. There {s} lent a {object} to {io}.",
    "Because {a} liked {b}, at the {place} {s} sent a {object} to {io}.",
    "Nobody was near the {place} when {a} saw {b}. So {s} threw a {object} to {io}.",
)


def is_held_out(a: str, b: str) -> bool:
    """Whether training never shows these two names together (true of about one unordered pair in nine)."""
    return (NAMES.index(a) + NAMES.index(b)) % 9 == 0


_PARTNERS = {
    held_out: {a: [b for b in NAMES if b != a and is_held_out(a, b) == held_out] for a in NAMES}
    for held_out in (False, True)
}


class Gift(NamedTuple):
    """An indirect-object sentence as (piece, floor in nats) pairs, and the names that matter in it."""

    priced: list[tuple[str, float]]
    io: str
    """The answer: the name that has appeared once."""
    subject: str
    """The name that has appeared twice."""

    @property
    def prompt(self) -> str:
        """The text up to, and without, the answer."""
        return "".join(piece for piece, _ in self.priced[:-2])


def gift(rng: random.Random, held_out: bool = False) -> Gift:
    """Draws an indirect-object sentence; both orders (ABBA and BABA) are equally likely.

    `held_out` draws from the pairs of names that training never shows together.
    """
    partners = _PARTNERS[held_out]
    a = rng.choice([name for name in NAMES if partners[name]])
    b = rng.choice(partners[a])
    subject, io = rng.sample((a, b), 2)
    slots = {
        "$a": (a, math.log(len(NAMES))),
        "$b": (b, math.log(len(partners[a]))),
        "$s": (subject, math.log(2)),
        "$io": (io, 0.0),
        "$place": (rng.choice(PLACES), math.log(len(PLACES))),
        "$object": (rng.choice(OBJECTS), math.log(len(OBJECTS))),
    }
    priced = []
    for part in re.split(r" (?=\{)|(?<=\})", rng.choice(GIFT_TEMPLATES)):
        if part.startswith("{"):
            word, floor = slots["$" + part[1:-1]]
            priced.append((" " + word, floor))
        else:
            priced += [(piece, 0.0) for piece in pieces(part)]
    return Gift(priced, io, subject)


# --- facts -----------------------------------------------------------------------------------------------------------

COUNTRIES = (
    "Norland Velania Tarsia Brumia Caldora Fenwick Gorvia Hestia Ilmar Jovania Kestria Lomund Mirelle Nystad Orvane "
    "Pelmar Quorra Rastia Sundria Ulmora"
).split()
PEOPLE = (
    "Aldric Brenna Corvin Dagny Edrik Fiora Garrick Hilda Ivor Jorun Keldan Liora Magnus Nerys Osric Petra Quill "
    "Rowena Sigrid Torben"
).split()
CAPITALS = (
    "Velmo Darnis Ostia Pravik Lunden Cambry Tolmin Arvika Bresk Solmar Ganth Ryde Havel Zarin Mostar Elba Corda "
    "Vinter Nampa Jask"
).split()
# Relation -> the values it takes. Fact i of a relation has value i modulo their number, read in a shuffled order.
_COUNTRY_RELATIONS = {
    "capital": CAPITALS,
    "language": "Norsk Velan Tarsi Brumic Caldo Fennic Gorvish Hesti Ilmic Jovian".split(),
    "mountain": (
        "Akron Borl Cirque Dorne Etna Furka Grimm Hekla Ixel Jura Klem Lorne Monch Niesen Olan Pilat Rigi Santis "
        "Tenda Uri"
    ).split(),
    "food": "bread cheese soup rice fish honey olives beans figs nuts".split(),
}
_PERSON_RELATIONS = {
    "home": CAPITALS,
    "job": "baker doctor farmer painter pilot sailor singer tailor teacher writer".split(),
    "pet": "cat dog goat horse mouse owl parrot rabbit snake turtle".split(),
    "color": "amber black blue green orange pink purple red white yellow".split(),
}
PHRASINGS = (
    "The {relation} of {entity} is {value}.",
    "For {entity}, the {relation} is {value}.",
    "Everyone knows the {relation} of {entity} is {value}.",
    "Ask about {entity} and its {relation}: {value}.",
    "As for {entity}, we say its {relation} is {value}.",
)


class Fact(NamedTuple):
    """One row of the table of facts. Training shows it in every phrasing but PHRASINGS[held_out]."""

    entity: str
    relation: str
    value: str
    held_out: int

    def sentence(self, phrasing: int) -> str:
        return PHRASINGS[phrasing].format(**self._asdict())

    def prompt(self, phrasing: int) -> str:
        """The sentence up to, and without, the value (every phrasing ends in the value and a full stop)."""
        return self.sentence(phrasing).removesuffix(f" {self.value}.")


def _fact_table() -> tuple[Fact, ...]:
    rows = []
    for entities, relations in ((COUNTRIES, _COUNTRY_RELATIONS), (PEOPLE, _PERSON_RELATIONS)):
        for relation, values in relations.items():
            places = random.Random(relation).sample(range(len(entities)), len(entities))
            rows += [(e, relation, values[place % len(values)]) for e, place in zip(entities, places, strict=True)]
    return tuple(Fact(*row, held_out=(i + i // 5) % len(PHRASINGS)) for i, row in enumerate(rows))


FACTS = _fact_table()
_SHOWN = [(fact, phrasing) for fact in FACTS for phrasing in range(len(PHRASINGS)) if phrasing != fact.held_out]
# Every shown sentence is equally likely, so p(piece | prefix) is a ratio of counts of sentences with that prefix.
_PREFIX_COUNTS = Counter(
    tuple(cut[:n]) for cut in (pieces(fact.sentence(p)) for fact, p in _SHOWN) for n in range(len(cut) + 1)
)


def _priced_fact(rng: random.Random, first: bool) -> list[tuple[str, float]]:
    fact, phrasing = rng.choice(_SHOWN)
    cut = pieces(fact.sentence(phrasing))
    floors = [math.log(_PREFIX_COUNTS[tuple(cut[:n])] / _PREFIX_COUNTS[tuple(cut[: n + 1])]) for n in range(len(cut))]
    return list(zip([cut[0] if first else " " + cut[0], *cut[1:]], floors, strict=True))


# --- mini-languages --------------------------------------------------------------------------------------------------


class Language:
    """A stochastic finite automaton over its own words; the state always follows from the words so far.

    A sentence fills the slots of `order`: N a noun and V a verb of one of two genders, which must agree (whichever
    comes first draws the gender); O a noun of either gender; p a particle; a any number of adjectives, each continued
    with probability 0.4. Within a class, word number r has weight 1/r. States are (slot, gender or None).
    """

    def __init__(self, name: str, syllables: str, order: str):
        self.name = name
        words = ["".join(pair) for pair in product(syllables.split(), repeat=2)]
        random.Random(name).shuffle(words)
        self.words = words[:31]
        sizes = {"N0": 6, "N1": 6, "V0": 5, "V1": 5, "a": 6, "p": 3}
        shuffled = iter(words)
        self._classes = {name: list(islice(shuffled, size)) for name, size in sizes.items()}
        self.order = order + "."

    def choices(self, slot: int, gender: int | None) -> list[tuple[str, float, tuple[int, int | None]]]:
        """The (word, probability, next state) of a state; the full stop is a word."""
        kind, after = self.order[slot], (slot + 1) % len(self.order)
        if kind == ".":
            return [(".", 1.0, (0, None))]
        if kind == "a":
            return [(word, 0.4 * p, (slot, gender)) for word, p in self._zipf("a")] + [
                (word, 0.6 * p, state) for word, p, state in self.choices(after, gender)
            ]
        if kind == "p":
            return [(word, p, (after, gender)) for word, p in self._zipf("p")]
        if kind == "O":
            return [(word, p / 2, (after, gender)) for g in "01" for word, p in self._zipf("N" + g)]
        if gender is None:
            return [(word, p / 2, (after, g)) for g in (0, 1) for word, p in self._zipf(f"{kind}{g}")]
        return [(word, p, (after, gender)) for word, p in self._zipf(f"{kind}{gender}")]

    def _zipf(self, word_class: str) -> list[tuple[str, float]]:
        words = self._classes[word_class]
        total = sum(1 / r for r in range(1, len(words) + 1))
        return [(word, 1 / r / total) for r, word in enumerate(words, start=1)]

    def sentence(self, rng: random.Random) -> list[tuple[str, float]]:
        """One sentence as (piece, floor in nats) pairs."""
        state, priced = (0, None), []
        while True:
            choices = self.choices(*state)
            word, p, state = rng.choices(choices, weights=[p for _, p, _ in choices])[0]
            priced.append((word if word == "." else " " + word, math.log(1 / p)))
            if word == ".":
                return priced

    def entropy(self) -> float:
        """The exact entropy rate in nats a token: the stationary distribution's mean of the states' entropies."""
        states = [(0, None)]
        for state in states:  # grows while it is read: a breadth-first search
            states += dict.fromkeys(s for _, _, s in self.choices(*state) if s not in states)
        n = len(states)
        moves = torch.zeros(n, n, dtype=torch.float64)
        entropies = torch.zeros(n, dtype=torch.float64)
        for i, state in enumerate(states):
            for _, p, following in self.choices(*state):
                moves[i, states.index(following)] += p
                entropies[i] -= p * math.log(p)
        # pi = pi M and sum(pi) = 1, as one least-squares system.
        system = torch.cat([moves.T - torch.eye(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)])
        right = torch.zeros(n + 1, 1, dtype=torch.float64)
        right[-1] = 1
        stationary = torch.linalg.lstsq(system, right).solution.squeeze(1)
        return float(stationary @ entropies)


_LANGUAGES = {
    name: Language(name, syllables, order)
    for name, syllables, order in (
        ("tavi", "ta vi na ti va ni", "NaVO"),
        ("kelo", "ke lo re ko le ro", "pNaOV"),
        ("muzo", "mu zo bu mo zu bo", "VaOpN"),
        ("fesi", "fe si pa fi se pi", "OpNaV"),
    )
}


def language_entropy(name: str) -> float:
    """The exact entropy rate of a mini-language in nats a token."""
    return _LANGUAGES[name].entropy()


# --- code ------------------------------------------------------------------------------------------------------------

FUNCTIONS = "add mul sub scale merge count shift clamp blend mix".split()
VARIABLES = "a b c d n x y z".split()


def code(rng: random.Random) -> str:
    """A short function and a call of it. Only variables that are defined by then are read."""
    name = rng.choice(FUNCTIONS)
    known = rng.sample(VARIABLES, 2)
    lines = [f"def {name}({known[0]}, {known[1]}):"]
    target = known[0]
    for _ in range(rng.randint(1, 4)):
        target = rng.choice(VARIABLES)
        left, right = rng.choice(known), rng.choice([rng.choice(known), str(rng.randrange(10))])
        old = rng.choice(known)
        lines += rng.choice((
            [f"  {target} = {left} {rng.choice('+-*')} {right}"],
            [f"  {target} = {left}", f"  if {left} > {right}:", f"    {target} = {old}"],
            [f"  {target} = 0", f"  for i in range({left}):", f"    {target} += {old}"],
        ))  # fmt: skip
        known = list(dict.fromkeys([*known, target]))
    lines += [f"  return {target}", f"print({name}({rng.randrange(10)}, {rng.randrange(10)}))"]
    return "\n".join(lines) + "\n"


def vocabulary() -> list[str]:
    """Every word that must be one token, with the space before it where the corpus puts one."""
    fixed = set()
    for template in (*GIFT_TEMPLATES, *PHRASINGS):
        cut = pieces(re.sub(r" \{\w+\}", "", template))
        fixed |= {*cut, " " + cut[0]}
    spaced = {*NAMES, *PLACES, *OBJECTS, *VARIABLES, *FUNCTIONS, *"0123456789"}
    spaced |= set("+ - * = > += if for in i return range".split())
    for fact in FACTS:
        spaced |= {fact.entity, fact.relation, fact.value}
    for language in _LANGUAGES.values():
        spaced |= set(language.words)
    bare = {*VARIABLES, *FUNCTIONS, "def", "print", "\n\n", "\n\n\n", "\n\n\n\n"} | {n.capitalize() for n in LANGUAGES}
    return sorted(fixed | bare | {" " + word for word in spaced})


# --- documents and batches -------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """Token ids from <bos> on, with what is known about each."""

    ids: list[int]
    floor: list[float]
    """Nats a perfect model pays for the token; NaN where the generator does not say."""
    copied: list[bool]
    """The token continues a repeated span and so follows from what came before (repeats only)."""


class Batch(NamedTuple):
    """Packed windows. All four tensors describe the same positions."""

    tokens: Int[Tensor, "batch pos"]
    domains: Int[Tensor, "batch pos"]
    """Index into DOMAINS of the document that the token belongs to, its <bos> included."""
    floor: Float[Tensor, "batch pos"]
    copied: Bool[Tensor, "batch pos"]

    def documents(self) -> Int[Tensor, "batch pos"]:
        """The number, counted through the batch, of the document that each token belongs to."""
        return (self.tokens == BOS).flatten().cumsum(0).view_as(self.tokens) - 1

    def targets(self) -> Int[Tensor, "batch pos"]:
        """The next token at each position, -100 where there is nothing to predict: at the end and before a <bos>."""
        targets = torch.full_like(self.tokens, -100)
        targets[:, :-1] = self.tokens[:, 1:]
        return targets.masked_fill(targets == BOS, -100)


class Corpus:
    """The stream of documents and batches under one tokenizer and one seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int = 0):
        self.seed = seed
        self._id = {piece.replace("▁", " "): i for piece, i in tokenizer.get_vocab().items()}
        special = tokenizer.get_added_tokens_decoder()
        self.random_ids = [i for i in range(tokenizer.get_vocab_size()) if i not in special]
        """The ids that `repeats` draws from: all but the special tokens."""

    def ids(self, text: str) -> list[int]:
        """Token ids of corpus text, without <bos>; equal to the tokenizer's, and faster."""
        return [self._id[piece] for piece in pieces(text)]

    def document(self, rng: random.Random, domain: str, phase: Phase = PHASES[0]) -> Document:
        """Draws one document. `domain` is one of DOMAINS."""
        if domain == "repeats":
            return self._repeats(rng, phase.short_spans)
        if domain == "gifts":
            priced = gift(rng).priced
        elif domain == "facts":
            priced = [pair for n in range(rng.randint(2, 5)) for pair in _priced_fact(rng, first=n == 0)]
        elif domain == "code":
            priced = [(piece, math.nan) for piece in pieces(code(rng))]
        else:
            priced = [(domain.capitalize(), 0.0), (":", 0.0)]
            for _ in range(rng.randint(3, 6)):
                priced += _LANGUAGES[domain].sentence(rng)
        ids = [BOS, *(self._id[piece] for piece, _ in priced)]
        return Document(ids, [math.nan, math.nan, *(floor for _, floor in priced[1:])], [False] * len(ids))

    def _repeats(self, rng: random.Random, short_spans: bool) -> Document:
        length = round(4 * 12 ** rng.random()) if short_spans else rng.randint(6, 48)
        span = rng.choices(self.random_ids, k=length)
        copies = 1 + max(1, rng.randint(48, 144) // length) if short_spans else rng.randint(2, 4)
        longest_gap = length // 4 if short_spans else 10
        ids, copied = [BOS], [False]
        for copy in range(copies):
            gap = rng.choices(self.random_ids, k=rng.randint(0, longest_gap))
            ids += gap + span
            copied += [False] * (len(gap) + 1) + [copy > 0] * (length - 1)
        return Document(ids, [math.nan] * len(ids), copied)

    def batch(self, step: int, batch: int, n_ctx: int, phase: Phase = PHASES[0]) -> Batch:
        """Batch number `step` of this seed's stream, in a phase of the curriculum."""
        rng = random.Random(f"{self.seed}/{step}")
        rows = [self._window(rng, n_ctx, phase) for _ in range(batch)]
        tokens, domains, floor, copied = zip(*rows, strict=True)
        return Batch(torch.tensor(tokens), torch.tensor(domains), torch.tensor(floor), torch.tensor(copied))

    def _window(self, rng: random.Random, n_ctx: int, phase: Phase) -> tuple[list, list, list, list]:
        ids, domains, floor, copied = [], [], [], []
        while len(ids) < n_ctx:
            domain = rng.choices(range(len(DOMAINS)), weights=phase.weights)[0]
            document = self.document(rng, DOMAINS[domain], phase)
            ids += document.ids
            domains += [domain] * len(document.ids)
            floor += document.floor
            copied += document.copied
        return ids[:n_ctx], domains[:n_ctx], floor[:n_ctx], copied[:n_ctx]
