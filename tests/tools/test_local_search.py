"""The search tool: its ranking against the formula, its order and ties, and queries of every kind."""

import math
import os
import random
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.errors import ToolError
from l0fast.tasks.geography import geography
from l0fast.tools.local_search import LocalSearch, words

FRANCE = (
    "The capital of France is Paris.",
    "A neighbour of Spain is France.",
    "A neighbour of France is Spain.",
    "Lyon is a city in France.",
    "The capital of Spain is Madrid.",
)


@pytest.fixture(scope="module")
def corpus():
    return geography().full_corpus


@pytest.fixture(scope="module")
def index(corpus):
    return LocalSearch(corpus)


def padded(sentences):
    """With enough other sentences that the words of these are rare."""
    return (*sentences, *(f"Filler number{i} of row{i}." for i in range(50)))


def bm25(query: list[str], corpus: list[list[str]]) -> list[float]:
    """The formula, word by word (k1 1.2, b 0.75, idf = ln(1 + (N - n + 0.5) / (n + 0.5)))."""
    mean = sum(map(len, corpus)) / len(corpus)
    scores = [0.0] * len(corpus)
    for word in query:
        n = sum(word in sentence for sentence in corpus)
        idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
        for i, sentence in enumerate(corpus):
            tf = sentence.count(word)
            scores[i] += idf * tf / (tf + 1.2 * (0.25 + 0.75 * len(sentence) / mean))
    return scores


def test_the_best_sentences_are_those_that_the_formula_ranks_best(corpus, index):
    rng = random.Random(0)
    told = [words(sentence) for sentence in corpus]
    rare = [word for sentence in told for word in sentence if len(word) > 3 and word not in ("city", "that")]
    for _ in range(30):
        query = list(dict.fromkeys(rng.choice(rare) for _ in range(rng.randint(1, 4))))
        scores = bm25(query, told)
        found = [corpus.index(sentence) for sentence in index.search(" ".join(query))]
        best = sorted((score for score in scores if score > 0), reverse=True)[:3]
        assert sorted((scores[i] for i in found), reverse=True) == pytest.approx(best, abs=1e-4)


def test_results_come_in_the_order_of_the_corpus(corpus, index):
    results = index.search("currency of Denmark", k=10)
    assert len(results) == 10
    assert results == sorted(results, key=corpus.index)
    assert "The currency of Denmark is Krone." in results


def test_among_equals_the_sentence_with_the_words_in_a_row_wins():
    index = LocalSearch(padded(FRANCE))
    assert index.search("neighbour of France", k=1) == ["A neighbour of France is Spain."]
    assert index.search("neighbour of Spain", k=1) == ["A neighbour of Spain is France."]
    assert index.search("neighbour France", k=1) == ["A neighbour of France is Spain."]
    assert index.search("France neighbour", k=1) == ["A neighbour of Spain is France."]


def test_among_other_equals_the_first_in_the_corpus_wins():
    index = LocalSearch(padded(["Red one.", "Red two.", "Red three."]))
    assert index.search("red", k=2) == ["Red one.", "Red two."]


def test_words_that_are_everywhere_do_not_count_unless_nothing_else_is_left():
    corpus = [f"Thing{i} of here." for i in range(50)]
    index = LocalSearch(corpus)
    assert index.search("thing7 of here") == ["Thing7 of here."]
    assert index.search("of here") == corpus[:3]


def test_case_accents_and_punctuation_of_a_query_do_not_count():
    index = LocalSearch(padded(["São Tomé is a city in Nowhere.", "N'Djamena is a city in Chad."]))
    assert index.search("SAO TOME?") == ["São Tomé is a city in Nowhere."]
    assert index.search('"n\'djaména" AND (NOT *') == ["N'Djamena is a city in Chad."]


def test_a_query_without_a_known_word_finds_nothing(index):
    assert index.search("") == index.search("xyzzy qwrtp") == index.search("?!") == []


def test_an_empty_corpus_and_one_without_words_find_nothing():
    assert LocalSearch([]).search("France") == []
    assert LocalSearch(["...", ""]).search("France") == []


@pytest.mark.parametrize("query", [None, 5, ["France"], b"France"])
def test_a_query_that_is_no_string_is_refused_in_one_sentence(index, query):
    with pytest.raises(ToolError, match=type(query).__name__):
        index.search(query)


@pytest.mark.parametrize("k", [0, -1, 51, 2.5, "3", None])
def test_a_number_of_results_out_of_range_is_refused(index, k):
    with pytest.raises(ToolError, match="1 to 50"):
        index.search("France", k)


def test_changing_a_result_does_not_change_the_next_one(index):
    first = index.search("capital of France")
    first.clear()
    assert "The capital of France is Paris." in index.search("capital of France")


@given(st.text(), st.integers(1, 50))
def test_every_string_is_a_query(query, k):
    index = LocalSearch(FRANCE)
    results = index.search(query, k)
    assert len(results) <= k
    assert results == [sentence for sentence in FRANCE if sentence in results]
    assert results == LocalSearch(FRANCE).search(query, k)


@given(
    st.lists(
        st.sampled_from(["capital", "of", "in", "city", "is", "Paris", "San", "Republic", "+33", "zz"]), max_size=60
    )
)
def test_words_of_the_corpus_in_any_order_find_at_most_k_of_its_sentences(terms):
    index = LocalSearch(geography().train_corpus[:400])
    results = index.search(" ".join(terms), 4)
    assert len(results) == len(set(results)) <= 4


def test_a_search_is_fast_enough_for_the_event_loop(index):
    names = sorted(geography().train_names)[:300]
    start = time.process_time()
    for name in names:
        index.search(f"population of {name}")
    # 0.1 ms on a quiet core; ten times that would be felt by others on the loop
    assert (time.process_time() - start) / len(names) < 1e-3


@pytest.mark.parametrize("used_already", [False, True])
def test_jax_computes_nothing_where_it_is_installed(used_already, tmp_path):
    """It would take three quarters of a GPU's memory for the driver. Who has it imported keeps it."""
    lax = tmp_path / "jax" / "lax"
    lax.mkdir(parents=True)
    (lax.parent / "__init__.py").write_text("")
    (lax / "__init__.py").write_text("def top_k(*_): raise SystemExit('JAX computes')")
    first = "import jax.lax; jax.lax.mine = 1; " if used_already else ""
    program = (
        f"{first}from l0fast.tools.local_search import LocalSearch; import sys\n"
        "print(LocalSearch(['Paris lies in France.', 'Oslo lies in Norway.']).search('Oslo'))\n"
        "print(*sorted(name for name in sys.modules if name.partition('.')[0] == 'jax'))\n"
        "import jax.lax; print(hasattr(jax.lax, 'mine'))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == [
        "['Oslo lies in Norway.']",
        "jax jax.lax" if used_already else "",
        str(used_already),
    ], done.stderr
