"""`search(query)`: the sentences of a fixed corpus that match best, by BM25 (k1 1.2, b 0.75).

    score(sentence) = sum over the query's words of  idf(word) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length))
    idf(word)       = log((N - n + 0.5) / (n + 0.5)), at least 1e-6;   n of the N sentences have the word

    query -> its words, without accents and case -> those the corpus knows, less the commonest -> scores
          -> equals: first the sentence that says the query's words in a row, then corpus order -> best k, in corpus order

Every string is a query: nothing in it is an operator. What a word adds to a sentence's score depends on the corpus alone,
so it is computed once; a call then adds up arrays in some 0.05 ms over 7,000 sentences and may run on the event loop.
(SQLite's FTS5 has the same formula, and the tests compare with it, but computes it row by row: 1 to 3 ms a call.)
Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; the floor of idf is FTS5's.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice

import numpy as np

from l0fast.errors import ToolError
from l0fast.sandbox.base import ToolSpec

K1 = 1.2
"""How slowly a word's repetitions stop counting."""
B = 0.75
"""How much long sentences are discounted, 0 to 1."""
COMMON_SHARE = 0.15
"""A word in more than this share of the sentences is dropped from a query, unless nothing else is left of it."""
MAX_QUERY_WORDS = 32
"""Different words of a query that count [words]."""
MAX_RESULTS = 50
"""Largest k [sentences]."""
MAX_TIES = 256
"""Equally good sentences among which one with the query's words in a row is looked for [sentences]."""
CACHE_SIZE = 8192
"""Queries whose results are kept [queries]."""
SAME = 1e-9
"""Scores this close are equal: they are the same sums, taken in different orders."""


def words(text: str) -> list[str]:
    """The words of `text` without accents and case: runs of letters and digits."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W_]+", "".join(c for c in decomposed if not unicodedata.combining(c)))


class LocalSearch:
    """An index over `corpus`, which may hold a sentence twice."""

    def __init__(self, corpus: Sequence[str]) -> None:
        self._corpus = tuple(corpus)
        self._words = [words(sentence) for sentence in self._corpus]
        lengths = np.array([len(sentence) for sentence in self._words], dtype=np.float64)
        discount = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0)) if len(lengths) else lengths
        counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, sentence in enumerate(self._words):
            for word, count in Counter(sentence).items():
                counts[word].append((i, count))
        self._postings = {}
        for word, told in counts.items():
            rows, tf = np.array(told).T
            idf = max(np.log((len(lengths) - len(rows) + 0.5) / (len(rows) + 0.5)), 1e-6)
            self._postings[word] = (rows, idf * tf * (K1 + 1) / (tf + discount[rows]))
        most = COMMON_SHARE * len(self._corpus)
        self._common = {word for word, (rows, _) in self._postings.items() if len(rows) > most}
        self._cached_search = lru_cache(CACHE_SIZE)(self._search)

    def search(self, query: str, k: int = 3) -> list[str]:
        """The at most `k` best sentences for `query`, in the order of the corpus; [] where no word of it occurs.

        Raises ToolError for a query that is no string and a k that is no whole number from 1 to 50.
        """
        if not isinstance(query, str):
            raise ToolError(f"search takes a string, not {type(query).__name__}: call search('some words')")
        if not isinstance(k, int) or not 1 <= k <= MAX_RESULTS:
            raise ToolError(f"search returns 1 to {MAX_RESULTS} sentences, not {k!r}: leave k out")
        return [self._corpus[i] for i in self._cached_search(query, k)]

    def _search(self, query: str, k: int) -> list[int]:
        """Indices into the corpus, rising."""
        known = [word for word in dict.fromkeys(words(query)) if word in self._postings][:MAX_QUERY_WORDS]
        terms = [word for word in known if word not in self._common] or known
        scores = np.zeros(len(self._corpus))
        num_terms = np.zeros(len(self._corpus), dtype=np.int64)
        for term in terms:
            rows, weights = self._postings[term]
            scores[rows] += weights
            num_terms[rows] += 1
        found = num_terms.nonzero()[0]
        if len(found) <= k:
            return found.tolist()
        kth = np.partition(scores[found], -k)[-k]
        best = found[scores[found] > kth + SAME].tolist()
        ties = found[abs(scores[found] - kth) <= SAME]
        whole = ties[num_terms[ties] == len(terms)][:MAX_TIES].tolist()
        in_a_row = list(islice((i for i in whole if self._in_a_row(terms, i)), k - len(best)))
        best += in_a_row
        best += [i for i in ties[: 2 * k].tolist() if i not in in_a_row][: k - len(best)]
        return sorted(best)

    def _in_a_row(self, terms: list[str], i: int) -> bool:
        """Whether sentence `i` has the terms one after the other, common words between them not counting."""
        telling = [word for word in self._words[i] if word in terms or word not in self._common]
        return any(telling[j : j + len(terms)] == terms for j in range(len(telling) - len(terms) + 1))


def search_tool(index: LocalSearch, num_results: int) -> ToolSpec:
    """What agents call: `search(query)`, answered with the best `num_results` sentences."""

    async def search(query: str) -> list[str]:
        return index.search(query, num_results)

    return ToolSpec(
        name="search",
        signature="(query: str) -> list[str]",
        doc=f"The {num_results} sentences that match best.",
        call=search,
    )
