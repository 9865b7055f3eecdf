"""A world made anew for each seed: same relations and shapes as the real one, no name or fact from it.

For tests, for warm starts that must not learn names by heart, and as a check that a policy trained on the real world looks
things up. Names are made of syllables; none shares a word with a real place, held-out ones included, so that a made-up
name is never a leak.

    60 countries x (capital, continent, population, area, currency, calling code, internet domain, 1-2 languages,
    its neighbours), 600 cities; its own held-out names: 13 countries with their cities, 120 more cities.
"""

import random
from functools import cache

from l0fast.tasks.facts import SENTENCE_WORDS, Fact
from l0fast.tasks.geography import real_words
from l0fast.tasks.world import World, hold_out

NUM_COUNTRIES = 60
NUM_CITIES = 600
NUM_CONTINENTS = 6
NUM_CURRENCIES = 30
NUM_LANGUAGES = 50
NUM_BORDERS = 50
HELDOUT_COUNTRIES = 13
HELDOUT_CITIES = 120
"""Of the other countries' cities."""

ONSETS = "b br c ch d dr f fl g gr h j k kr l m n p pl qu r s sh st t th tr v w y z".split()
VOWELS = "a a a e e i i o o u u ai ea ia io ou".split()
CODAS = "  b d g k l l m n n n ng r r s s t th x".split(" ")


class NameMaker:
    """Makes names that differ from each other and share no word with a real name or with our own wording."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken = {*real_words(), *SENTENCE_WORDS}
        # as "San" and "New" do, a few words begin many names
        self._openers = [self.word(1) for _ in range(8)]

    def word(self, num_syllables: int) -> str:
        """A new capitalised word."""
        rng = self._rng
        while True:
            syllables = (rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(num_syllables))
            word = "".join(syllables) + rng.choice(CODAS)
            if word not in self._taken:
                self._taken.add(word)
                return word.capitalize()

    def place(self) -> str:
        """A new name of a place: mostly one word, sometimes two or a hyphenated pair."""
        name = self.word(self._rng.choice((2, 2, 2, 3, 3, 4)))
        shape = self._rng.random()
        if shape < 0.12:
            return f"{self._rng.choice(self._openers)} {name}"
        if shape < 0.2:
            return f"{name} {self.word(2)}"
        if shape < 0.25:
            return f"{name}-{self.word(2)}"
        return name


@cache
def invented_world(seed: int) -> World:
    """The invented world of `seed`; the same seed gives the same world."""
    rng = random.Random(f"invented/{seed}")
    names = NameMaker(rng)
    countries = [names.place() for _ in range(NUM_COUNTRIES)]
    continents = [names.word(2) for _ in range(NUM_CONTINENTS)]
    currencies = [names.word(2) for _ in range(NUM_CURRENCIES)]
    languages = [names.word(3) for _ in range(NUM_LANGUAGES)]
    cities = [(names.place(), rng.choice(countries)) for _ in range(NUM_CITIES)]
    calling_codes = rng.sample(range(20, 1000), NUM_COUNTRIES)
    letters = "abcdefghijklmnopqrstuvwxyz"
    domains = [f".{a}{b}" for a in letters for b in letters if f"{a}{b}" not in SENTENCE_WORDS]
    domains = rng.sample(domains, NUM_COUNTRIES)
    borders = {frozenset(rng.sample(countries, 2)) for _ in range(NUM_BORDERS)}
    facts = []
    for country, code, domain in zip(countries, calling_codes, domains, strict=True):
        home = [city for city, where in cities if where == country]
        facts += [
            Fact(country, "capital", rng.choice(home) if home else names.place()),
            Fact(country, "continent", rng.choice(continents)),
            Fact(country, "population", str(_log_uniform(rng, 1e3, 2e8))),
            Fact(country, "area", str(_log_uniform(rng, 1e2, 1e7))),
            Fact(country, "currency", rng.choice(currencies)),
            Fact(country, "calling code", f"+{code}"),
            Fact(country, "internet domain", domain),
            *(Fact(country, "language", language) for language in rng.sample(languages, rng.randint(1, 2))),
            *(Fact(country, "neighbour", other) for other in countries if frozenset((country, other)) in borders),
        ]
    facts += [Fact(city, "country", country) for city, country in cities]
    heldout = hold_out(facts, num_countries=HELDOUT_COUNTRIES, num_cities=HELDOUT_CITIES)
    return World(f"invented-{seed}", facts, heldout)


def _log_uniform(rng: random.Random, low: float, high: float) -> int:
    """A whole number as likely to be small as large, in its digits."""
    return round(low * (high / low) ** rng.random())
