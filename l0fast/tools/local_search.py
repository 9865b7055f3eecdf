"""`search(query)`: the sentences of a fixed corpus that match best, by BM25 (k1 1.2, b 0.75).

    query -> its words, without accents and case -> those the corpus knows, less the commonest -> scores (bm25s)
          -> equals: first the sentence that says the query's words in a row, then corpus order -> best k, in corpus order

Every string is a query: nothing in it is an operator. bm25s computes what a word adds to a sentence's score once, so a call
takes some 0.1 ms over 7,000 sentences and may run on the event loop (SQLite's FTS5, which computes it row by row: 1 to
3 ms). Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from hashlib import blake2b
from itertools import islice
from typing import Any

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
SAME = 1e-5
"""Scores this close are equal: they are the same fp32 sums, taken in different orders."""


@cache
def _bm25s() -> Any:
    """The package bm25s, without JAX: where that is installed, it would compute something when it is imported, and then JAX takes
    three quarters of the first GPU's memory for this process (https://docs.jax.dev/en/latest/gpu_memory_allocation.html).
    """
    jax = sys.modules.get("jax")
    # an import of it is an ImportError
    sys.modules["jax"] = None  # pyright: ignore[reportArgumentType]
    try:
        import bm25s
    finally:
        del sys.modules["jax"]
        if jax is not None:
            sys.modules["jax"] = jax
    return bm25s


def words(text: str) -> list[str]:
    """The words of `text` without accents and case: runs of letters and digits."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W_]+", "".join(c for c in decomposed if not unicodedata.combining(c)))


class LocalSearch:
    """An index over `corpus`, which may hold a sentence twice."""

    def __init__(self, corpus: Sequence[str]) -> None:
        self._corpus = tuple(corpus)
        digest = blake2b(digest_size=8)
        for sentence in self._corpus:
            digest.update(f"{len(sentence)} {sentence}".encode())
        self.digest = digest.hexdigest()
        """Of the corpus."""
        self._words = [words(sentence) for sentence in self._corpus]
        self._num_sentences_with = Counter(word for sentence in self._words for word in set(sentence))
        self._bm25 = _bm25s().BM25(k1=K1, b=B, method="lucene")
        if self._num_sentences_with:
            self._bm25.index(self._words, show_progress=False)
        most = COMMON_SHARE * len(self._corpus)
        self._common = {word for word, n in self._num_sentences_with.items() if n > most}

    def search(self, query: str, k: int = 3) -> list[str]:
        """The at most `k` best sentences for `query`, in the order of the corpus; [] where no word of it occurs.

        Raises ToolError for a query that is no string and a k that is no whole number from 1 to 50.
        """
        if not isinstance(query, str):
            raise ToolError(f"search takes a string, not {type(query).__name__}: call search('some words')")
        if not isinstance(k, int) or not 1 <= k <= MAX_RESULTS:
            raise ToolError(f"search returns 1 to {MAX_RESULTS} sentences, not {k!r}: leave k out")
        return [self._corpus[i] for i in self._search(query, k)]

    def _search(self, query: str, k: int) -> list[int]:
        """Indices into the corpus, rising."""
        known = [word for word in dict.fromkeys(words(query)) if word in self._num_sentences_with][:MAX_QUERY_WORDS]
        terms = [word for word in known if word not in self._common] or known
        if not terms:
            return []
        scores = self._bm25.get_scores(terms)
        k = min(k, len(scores))
        found = np.flatnonzero(scores > 0)
        if len(found) <= k:
            return found.tolist()
        kth = np.partition(scores[found], -k)[-k]
        best = found[scores[found] > kth + SAME].tolist()
        ties = found[abs(scores[found] - kth) <= SAME].tolist()
        in_a_row = list(islice((i for i in ties[:MAX_TIES] if self._in_a_row(terms, i)), k - len(best)))
        best += in_a_row
        best += [i for i in ties[: 2 * k] if i not in in_a_row][: k - len(best)]
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
        version=f"{index.digest}, {num_results}",
    )
