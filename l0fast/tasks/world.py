"""A world of facts: what can be looked up in it, what is asked about it, and how a perfect agent would answer.

    facts --split by held-out names--> train corpus, train questions (endless)
       |                               full corpus, held-out questions (a fixed row), questions of untrained chains
       '--plan(task)--> the look-ups that answer it

The training corpus, questions and answers come from the facts whose sentence holds no held-out name, as whole words in
whatever place; the full corpus, which evaluation searches, has all. Names that could mean two things (a city's in two
countries, or one that is also a country) are never asked about, but stay in the corpus as distractors. The same class
serves the real world and the invented ones; facts.py has the wording.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest

from l0fast.tasks.facts import (
    ATTRIBUTES,
    CAPITAL_BACKWARDS,
    CHAINS,
    NAME_VALUED,
    PHRASINGS,
    RELATIONS,
    TRAINED_CHAINS,
    UNTRAINED_CHAINS,
    Fact,
    words,
)
from l0fast.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One look-up: search for `query`, find `sentence`, take `value` from it."""

    entity: str
    """What is known."""
    relation: str
    """As in RELATIONS, and as the sentence words it (but for "country", told as "... is a city in ...")."""
    query: str
    sentence: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a perfect agent answers a task: `hops` in order, the last one's value being the answer."""

    hops: tuple[Hop, ...]

    @property
    def answer(self) -> str:
        return self.hops[-1].value


class Names:
    """Finds names in a text as whole-word sequences, case aside: "Niger" is in "the Niger river", not in "Nigeria"."""

    def __init__(self, names: Iterable[str]) -> None:
        self._sequences = {words(name) for name in names}
        self._lengths = sorted({len(sequence) for sequence in self._sequences})

    def occur_in(self, text: str) -> bool:
        tokens = words(text)
        return any(
            tokens[i : i + length] in self._sequences
            for length in self._lengths
            for i in range(len(tokens) - length + 1)
        )


class Facts:
    """Facts indexed by what is asked, and which entities each kind of question can be asked about."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.sentences: tuple[str, ...] = tuple(dict.fromkeys(fact.sentence for fact in facts))
        self._facts: dict[tuple[str, str], list[Fact]] = defaultdict(list)
        self._whose_capital: dict[str, list[str]] = defaultdict(list)
        countries_of: dict[str, set[str]] = defaultdict(set)
        self.countries: set[str] = set()
        for fact in facts:
            self._facts[fact.entity, fact.relation].append(fact)
            if fact.relation == "country":
                countries_of[fact.entity].add(fact.value)
            else:
                self.countries.add(fact.entity)
            if fact.relation == "capital":
                self._whose_capital[fact.value].append(fact.entity)
                countries_of[fact.value].add(fact.entity)
        for told in self._facts.values():
            # shortest first: of several right sentences that is the one a search ranks highest (a stable sort, so
            # equally long ones stay in the corpus's order, which is how a search breaks ties)
            told.sort(key=lambda fact: len(words(fact.sentence)))
        self._clear = {
            name for name, countries in countries_of.items() if len(countries) == 1 and name not in self.countries
        }
        self.entities = self._entities()
        """Kind -> the entities it can be asked about: one meaning, a known answer, and not the answer themselves."""

    def values(self, entity: str, relation: str) -> tuple[str, ...]:
        return tuple(fact.value for fact in self._facts.get((entity, relation), ()))

    def hops(self, kind: str, entity: str) -> tuple[Hop, ...]:
        """The look-ups that answer a question of `kind` about `entity`; the last one may have other right values."""
        start, _, relation = kind.rpartition(">")
        if not start:
            return (self._hop(entity, relation),)
        if start == "city":
            first = self._hop(entity, "country")
            return (first, self._hop(first.value, relation))
        country = self._whose_capital[entity][0]
        told = Fact(country, "capital", entity).sentence
        query = CAPITAL_BACKWARDS.format(e=entity)
        first = Hop(entity=entity, relation="capital", query=query, sentence=told, value=country)
        return (first, self._hop(country, relation))

    def _hop(self, entity: str, relation: str) -> Hop:
        fact = self._facts[entity, relation][0]
        query = RELATIONS[relation].query.format(e=entity)
        return Hop(entity=entity, relation=relation, query=query, sentence=fact.sentence, value=fact.value)

    def _entities(self) -> dict[str, tuple[str, ...]]:
        told: dict[str, list[str]] = defaultdict(list)
        for entity, relation in self._facts:
            told[relation].append(entity)
        cities = {city: self.values(city, "country")[0] for city in told["country"] if city in self._clear}
        capitals = {
            name: of[0] for name, of in self._whose_capital.items() if len(of) == 1 and name not in self.countries
        }
        # kind -> what the question names, and what the answer is told of
        asked = {relation: {entity: entity for entity in told[relation]} for relation in ATTRIBUTES}
        asked["country"] = {city: city for city in cities}
        for chain in CHAINS:
            asked[chain] = cities if chain.startswith("city>") else capitals
        answers = {
            kind: {name: self.values(holder, kind.rpartition(">")[2])[:1] for name, holder in names.items()}
            for kind, names in asked.items()
        }
        return {
            kind: tuple(name for name, answer in of.items() if answer and answer[0] != name)
            for kind, of in answers.items()
        }


def hold_out(facts: Sequence[Fact], *, num_countries: int, num_cities: int) -> frozenset[str]:
    """Names kept out of training: so many countries with all their cities, and so many of the other cities.

    Those whose hash is lowest, so that the split depends on nothing else and hardly changes as the table grows. A name that
    stands inside another one ("Guinea"), or among the other values, is only held out where its country is: it would take
    too much with it.
    """
    inside: Counter[tuple[str, ...]] = Counter()
    for text in {text for fact in facts for text in (fact.entity, fact.value)}:
        tokens = words(text)
        inside.update({tokens[i:j] for i in range(len(tokens)) for j in range(i + 1, len(tokens) + 1)})

    def draw(role: str, names: set[str], num: int) -> set[str]:
        alone = [name for name in names if inside[words(name)] == 1]
        return set(sorted(alone, key=lambda name: hashlib.sha256(f"{role}:{name}".encode()).digest())[:num])

    countries = {fact.entity for fact in facts if fact.relation != "country"}
    held = draw("country", countries, num_countries)
    theirs = {fact.entity for fact in facts if fact.relation == "country" and fact.value in held}
    theirs |= {fact.value for fact in facts if fact.relation == "capital" and fact.entity in held}
    cities = {fact.entity for fact in facts if fact.relation == "country"}
    return frozenset(held | theirs | draw("city", cities - theirs - countries, num_cities))


class World:
    """Facts, their sentences, and questions about them, split by `heldout_names`."""

    def __init__(self, name: str, facts: Sequence[Fact], heldout_names: frozenset[str]) -> None:
        self.name = name
        self.heldout_names = heldout_names
        self.facts: tuple[Fact, ...] = tuple(facts)
        names = Names(heldout_names)
        assert not any(names.occur_in(p.format(e="")) for ps in PHRASINGS.values() for p in ps), "a name in the wording"
        self.train_facts: tuple[Fact, ...] = tuple(fact for fact in facts if not names.occur_in(fact.sentence))
        self._all = Facts(self.facts)
        self._train = Facts(self.train_facts)
        self.full_corpus: tuple[str, ...] = self._all.sentences
        self.train_corpus: tuple[str, ...] = self._train.sentences
        self.train_names: frozenset[str] = frozenset(
            name
            for fact in self.train_facts
            for name in ((fact.entity, fact.value) if fact.relation in NAME_VALUED else (fact.entity,))
        )
        self._heldout_entities = {
            kind: tuple(entity for entity in entities if entity in heldout_names)
            for kind, entities in self._all.entities.items()
        }

    def train_task(self, rng: random.Random, *, two_hop_share: float) -> Task:
        """A question drawn with `rng`: hops, then the kind, the name and the wording, each evenly."""
        kind = self._draw_kind(rng, self._train.entities, two_hop_share)
        entity = rng.choice(self._train.entities[kind])
        return self._task(kind, entity, rng.randrange(len(PHRASINGS[kind])))

    def heldout_tasks(self, n: int, *, two_hop_share: float) -> list[Task]:
        """The first `n` of a fixed row of different questions about held-out names, whatever the run's seed.

        Raises ValueError where the world holds fewer.
        """
        rng = random.Random(f"{self.name}/held-out")
        pools = {kind: self._pool(kind) for kind in (*RELATIONS, *TRAINED_CHAINS)}
        tasks = []
        for _ in range(n):
            left = {kind: pool for kind, pool in pools.items() if pool}
            if not any(">" in kind for kind in left) or all(">" in kind for kind in left):
                raise ValueError(f"{self.name} has no {n} held-out questions, only {len(tasks)}: ask for fewer")
            kind = self._draw_kind(rng, left, two_hop_share)
            tasks.append(self._task(kind, *pools[kind].pop()))
        return tasks

    def untrained_chain_tasks(self, n: int) -> list[Task]:
        """As `heldout_tasks`, of the two chains that are never trained on, in turn. Raises ValueError likewise."""
        pools = [[self._task(chain, *asked) for asked in self._pool(chain)[:n]] for chain in UNTRAINED_CHAINS]
        row = [task for pair in zip_longest(*pools) for task in pair if task]
        if n > len(row):
            raise ValueError(f"{self.name} has no {n} questions of untrained chains, only {len(row)}: ask for fewer")
        return row[:n]

    def plan(self, task: Task) -> Plan:
        """How a perfect agent answers `task`, which must be one of this world's; see `Plan`.

        A training task is planned with what the training corpus holds, a held-out one with everything.
        """
        world, kind, entity, _ = task.id.split("|")
        if world != self.name:
            raise ValueError(f"task {task.id!r} is not of the world {self.name!r}: ask the world that made it")
        return Plan(hops=self._facts_for(entity).hops(kind, entity))

    def _facts_for(self, entity: str) -> Facts:
        return self._all if entity in self.heldout_names else self._train

    def _draw_kind(self, rng: random.Random, kinds: Iterable[str], two_hop_share: float) -> str:
        two_hop = rng.random() < two_hop_share
        return rng.choice([kind for kind in kinds if (">" in kind) == two_hop and kind not in UNTRAINED_CHAINS])

    def _pool(self, kind: str) -> list[tuple[str, int]]:
        """Every held-out (entity, wording) of a kind, in an order of its own."""
        pool = list(product(self._heldout_entities[kind], range(len(PHRASINGS[kind]))))
        random.Random(f"{self.name}/{kind}").shuffle(pool)
        return pool

    def _task(self, kind: str, entity: str, phrasing: int) -> Task:
        facts = self._facts_for(entity)
        hops = facts.hops(kind, entity)
        last = hops[-1]
        return Task(
            id=f"{self.name}|{kind}|{entity}|{phrasing}",
            question=PHRASINGS[kind][phrasing].format(e=entity),
            answers=facts.values(last.entity, last.relation),
            kind=kind,
            hops=len(hops),
        )


def world_of(task_id: str) -> str:
    """The name of the world that made a task."""
    return task_id.partition("|")[0]
