"""The shipped table: what it holds, that the script makes it, and what a broken one says."""

import gzip
import json
import sys

import pytest

from l0fast.errors import UsageError
from l0fast.tasks import build_geography
from l0fast.tasks.facts import ATTRIBUTES
from l0fast.tasks.geography import TABLE, geography, read_table


def test_the_script_makes_the_shipped_table(tmp_path, monkeypatch):
    file = tmp_path / "table.json.gz"
    monkeypatch.setattr(sys, "argv", ["build_geography", str(file)])
    build_geography.main()
    assert read_table(file) == read_table(TABLE)


def test_the_table_is_compact_and_credits_its_source():
    assert TABLE.stat().st_size <= 60_000
    table = read_table(TABLE)
    assert "GeoNames" in table["source"]
    assert "CC BY 4.0" in table["source"]
    assert "MIT" in table["packaged_by"]


def test_the_table_has_the_countries_and_the_largest_cities():
    countries = {country["name"]: country for country in read_table(TABLE)["countries"]}
    assert 238 <= len(countries) <= 250
    assert sum(len(country["cities"]) for country in countries.values()) == 4000
    assert max(len(country["cities"]) for country in countries.values()) == 60
    france = countries["France"]
    assert france["capital"] == ["Paris"]
    assert france["internet domain"] == [".fr"]
    assert france["calling code"] == ["+33"]
    assert france["language"][0] == "French"
    assert "Spain" in france["neighbour"]
    assert "Lyon" in france["cities"]
    assert countries["Dominican Republic"]["calling code"] == ["+1-809", "+1-829"]
    assert not {"Serbia and Montenegro", "Netherlands Antilles", "The Netherlands"} & countries.keys()


def test_almost_every_attribute_of_every_country_is_known():
    countries = read_table(TABLE)["countries"]
    for relation in ATTRIBUTES:
        known = sum(bool(country[relation]) for country in countries)
        assert known > (0.6 if relation == "neighbour" else 0.95) * len(countries)


def test_neighbours_are_countries_of_the_table_and_neighbours_in_turn():
    countries = {country["name"]: country for country in read_table(TABLE)["countries"]}
    for name, country in countries.items():
        for neighbour in country["neighbour"]:
            assert name in countries[neighbour]["neighbour"]


@pytest.mark.parametrize(
    ("name", "ascii_name"),
    [
        ("São Paulo", "Sao Paulo"),
        ("Łódź", "Lodz"),
        ("Port-au-Prince", "Port-au-Prince"),
        ("Xi’an", "Xi'an"),
        ("Ağrı", "Agri"),
        ("les Escaldes", "Les Escaldes"),
        (" Willemstad", "Willemstad"),
    ],
)
def test_names_become_ascii_and_keep_hyphens_apostrophes_and_several_words(name, ascii_name):
    assert build_geography.ascii_name(name) == ascii_name


def test_an_unknown_language_code_stops_the_script():
    assert build_geography.language_names("fr-FR,fr,br") == ["French", "Breton"]
    with pytest.raises(KeyError, match="qqq"):
        build_geography.language_names("fr,qqq")


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not gzip",
        TABLE.read_bytes()[:20_000],
        gzip.compress(b"{"),
        gzip.compress(b"\xff\xfe"),
        gzip.compress(b"[]"),
        gzip.compress(b'{"countries": [{"name": "Atlantis"}]}'),
        gzip.compress(json.dumps({"countries": [{"name": 5, "cities": []} | dict.fromkeys(ATTRIBUTES, ())]}).encode()),
    ],
    ids=["missing", "empty", "no gzip", "cut off", "no JSON", "no text", "no object", "no attributes", "no name"],
)
def test_a_missing_or_broken_table_is_told_in_one_sentence_with_the_way_out(tmp_path, content):
    file = tmp_path / "broken.json.gz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match="build_geography") as caught:
        geography(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
