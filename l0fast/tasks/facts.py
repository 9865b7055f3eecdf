"""How facts are told, looked up and asked about: the wording that every world shares.

    Fact("France", "capital", "Paris") -> "The capital of France is Paris."                     one sentence of the corpus
                                       -> "What is the capital of France?"                      one look-up
    Fact("Lyon", "country", "France")  -> "What is the capital of the country where Lyon lies?" two

Ten relations, each asked in two ways; 17 chains of two look-ups, (a city | a capital) > its country > an attribute, each
asked in four ways. Two of the chains are never trained on: they measure whether the skill carries over.

Sentences are short and alike, with the value last, so that a very small policy can learn to copy it. A fact with several
values is several sentences, each with a right answer.
"""

import re
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact: how it is told, looked up and asked."""

    sentence: str
    query: str
    """What to search for, given the entity."""
    phrasings: tuple[str, ...]


RELATIONS = {
    "capital": Relation(
        "The capital of {e} is {v}.",
        "capital of {e}",
        ("What is the capital of {e}?", "Which city is the capital of {e}?"),
    ),
    "continent": Relation(
        "The continent of {e} is {v}.",
        "continent of {e}",
        ("What is the continent of {e}?", "On which continent is {e}?"),
    ),
    "population": Relation(
        "The population of {e} is {v}.",
        "population of {e}",
        ("What is the population of {e}?", "How many people live in {e}?"),
    ),
    "area": Relation(
        "The area of {e} in km2 is {v}.",
        "area of {e}",
        ("What is the area of {e} in km2?", "How many km2 does {e} cover?"),
    ),
    "currency": Relation(
        "The currency of {e} is {v}.",
        "currency of {e}",
        ("What is the currency of {e}?", "Which currency is used in {e}?"),
    ),
    "calling code": Relation(
        "The calling code of {e} is {v}.",
        "calling code of {e}",
        ("What is the calling code of {e}?", "Which calling code reaches {e}?"),
    ),
    "internet domain": Relation(
        "The internet domain of {e} is {v}.",
        "internet domain of {e}",
        ("What is the internet domain of {e}?", "Which internet domain belongs to {e}?"),
    ),
    "language": Relation(
        "A language of {e} is {v}.",
        "language of {e}",
        ("Name a language of {e}.", "Which language is spoken in {e}?"),
    ),
    "neighbour": Relation(
        "A neighbour of {e} is {v}.",
        "neighbour of {e}",
        ("Name a neighbour of {e}.", "Which country is a neighbour of {e}?"),
    ),
    "country": Relation(
        "{e} is a city in {v}.",
        "city {e}",
        ("In which country is {e}?", "Which country is the city {e} in?"),
    ),
}
"""`{e}` is the entity, `{v}` the value. Every entity is a country, but for "country", which is told of cities."""

ATTRIBUTES = tuple(name for name in RELATIONS if name != "country")
NAME_VALUED = ("capital", "neighbour", "country")
"""Relations whose values are names of places: these are split, respelled and made anew; the others are plain values."""

STARTS = {
    "city": ("the country where {e} lies", "the country of the city {e}"),
    "capital": ("the country whose capital is {e}", "the country with the capital {e}"),
}
"""How the first hop of a chain names a country."""
CAPITAL_BACKWARDS = "capital {e}"
"""What to search for to learn whose capital `{e}` is."""

CHAINS = tuple(
    f"{start}>{relation}" for start in STARTS for relation in ATTRIBUTES if not start == relation == "capital"
)
UNTRAINED_CHAINS = ("city>calling code", "capital>currency")
"""Both their halves are trained, in other chains."""
TRAINED_CHAINS = tuple(chain for chain in CHAINS if chain not in UNTRAINED_CHAINS)

PHRASINGS: dict[str, tuple[str, ...]] = {name: relation.phrasings for name, relation in RELATIONS.items()} | {
    chain: tuple(
        phrasing.format(e=start)
        for start, phrasing in product(STARTS[chain.partition(">")[0]], RELATIONS[chain.partition(">")[2]].phrasings)
    )
    for chain in CHAINS
}
"""The questions of each kind, `{e}` standing for the only entity they name."""


def words(text: str) -> tuple[str, ...]:
    """The words of `text` without case: runs of letters and digits."""
    return tuple(re.findall(r"[^\W_]+", text.casefold()))


SENTENCE_WORDS = frozenset(
    word
    for template in [relation.sentence for relation in RELATIONS.values()]
    + [p for ps in PHRASINGS.values() for p in ps]
    for word in words(template.format(e="", v=""))
)
"""The words of our own wording. A place of that name could not be held out."""


@dataclass(frozen=True, slots=True)
class Fact:
    entity: str
    relation: str
    value: str

    @property
    def sentence(self) -> str:
        return RELATIONS[self.relation].sentence.format(e=self.entity, v=self.value)
