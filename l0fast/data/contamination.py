"""Whether a training question is, or contains, an evaluation question. Pure; memory grows with the evaluation sets alone.

    a question counts as contaminated when its words equal those of an evaluation question, or when it has NGRAM words
    in a row that an evaluation question has, too

Words as the SQuAD rules leave them: case, punctuation and articles don't count. An evaluation question of fewer than NGRAM
words is met by equality alone: five words in a row may be chance ("who was the first president").
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from l0fast.tasks.rewards import normalize_answer

NGRAM = 8
"""Length of a match inside a question [words]."""


def question_key(question: str) -> bytes:
    """Equal for questions that differ in case, punctuation, articles and spacing only."""
    return blake2b(normalize_answer(question).encode(), digest_size=12).digest()


class Contamination:
    """Evaluation questions, remembered by their words and by hashes of what stands in a row in them."""

    def __init__(self, questions: Iterable[str]) -> None:
        self.num_questions = 0
        self._whole: set[str] = set()
        self._words: set[str] = set()
        self._runs: set[int] = set()
        for question in questions:
            self.num_questions += 1
            words = normalize_answer(question).split()
            self._whole.add(" ".join(words))
            if len(words) >= NGRAM:
                self._words.update(words)
                self._runs.update(_hash(words, i) for i in range(len(words) - NGRAM + 1))

    def __contains__(self, question: str) -> bool:
        text = normalize_answer(question)
        if text in self._whole:
            return True
        words = text.split()
        known = 0
        for i, word in enumerate(words):
            # most runs hold a word that no evaluation question has, and need no hash
            known = known + 1 if word in self._words else 0
            if known >= NGRAM and _hash(words, i - NGRAM + 1) in self._runs:
                return True
        return False


def _hash(words: Sequence[str], start: int) -> int:
    text = " ".join(words[start : start + NGRAM])
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
