"""What a turn is worth: verifiable rewards, computed from the record of an episode, with weights in the recipe.

    r_t      = sum over last-turn rewards of weight x score(answer)             on the last turn, else 0
             + sum over per-turn rewards of weight x score_t / n                 of turn t of n
    L0's     = 0.8 * qa_t + 0.1 * format_t + 0.1 * code_t                        (arXiv 2506.23667), which is the default:
    qa_t     = 0.9 * exact match + 0.1 * has answer   on the last turn, else 0
    format_t = [turn t is well-formed: exactly one <think> of more than 10 characters, one <code> of more than 5] / n
    code_t   = (1 - errors / outputs) / n;  0 where the cell gave no output

Here is what an answer alone decides; what needs a process, a session or a model is in scoring.py. Answers are compared by
the SQuAD rules (Rajpurkar et al., arXiv 1606.05250): case, punctuation, articles and spacing do not count. Where we differ
from L0:
  * letters of every script count (L0 keeps [a-z0-9], which makes any two non-Latin answers equal); NFKC and casefold first;
  * an answer of nothing but articles ("A", a choice) or of nothing but punctuation is compared by them, instead of equalling
    every other;
  * an empty answer does not earn "has answer";
  * L0 counts what a cell printed and its traceback as two outputs; we show a cell's output as one text, so that code_t of
    a cell that failed is 0.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from string import punctuation

import regex

from l0fast.config import RewardConfig
from l0fast.types import Trajectory

REGEX_TIMEOUT_S = 0.2
"""A pattern that backtracks for ever matches nothing [s]."""

ARTICLES = frozenset(("a", "an", "the"))
_NO_PUNCTUATION = str.maketrans("", "", punctuation)


def normalize_answer(text: str) -> str:
    """`text` without case, punctuation, articles and extra spacing, in NFKC; never empty unless `text` is blank."""
    if text.isascii():
        # the same, twenty times faster
        folded = text.lower()
        return _without_articles(folded.translate(_NO_PUNCTUATION).split()) or " ".join(folded.split())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    bare = "".join(c for c in folded if c not in punctuation and not unicodedata.category(c).startswith("P"))
    # what removing a mark has joined may compose anew
    return _without_articles(unicodedata.normalize("NFKC", bare).split()) or " ".join(folded.split())


def _without_articles(tokens: list[str]) -> str:
    """Unless there is nothing else."""
    return " ".join(token for token in tokens if token not in ARTICLES) or " ".join(tokens)


def exact_match(answer: str | None, answers: Iterable[str]) -> bool:
    """Whether `answer` is one of the right `answers`, both normalised."""
    return has_answer(answer) and normalize_answer(answer or "") in {normalize_answer(right) for right in answers}


def f1(answer: str | None, answers: Iterable[str]) -> float:
    """Best harmonic mean of token precision and recall over the right `answers`, 0 to 1."""
    given = normalize_answer(answer or "").split()
    return max((_f1(given, normalize_answer(right).split()) for right in answers), default=0.0)


def _f1(given: list[str], right: list[str]) -> float:
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if common else 0.0


def has_answer(answer: str | None) -> bool:
    """Whether anything was answered. White space is nothing."""
    return answer is not None and bool(answer.strip())


def numeric(answer: str | None, answers: Iterable[str], tolerance: float = 1e-6) -> bool:
    """Whether the last number in `answer` is one of `answers`, up to a relative difference of `tolerance`.

    Thousands separators (1,234 or 1 234), a leading currency sign, percent (12% is 12) and fractions (3/4) are understood.
    """
    given = last_number(answer or "")
    rights = (last_number(right) for right in answers)
    return given is not None and any(
        right is not None and math.isclose(given, right, rel_tol=tolerance, abs_tol=tolerance) for right in rights
    )


_NUMBER = regex.compile(
    r"(?<sign>[-+]?)[$€£¥]?(?<digits>(?:\d{1,3}(?:[,\u202f\u00a0 ]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?<exponent>[eE][-+]?\d+)?"
    r"(?:\s*/\s*(?<over>\d+(?:\.\d+)?))?"
)


def last_number(text: str) -> float | None:
    """The last number that a text holds, None where it holds none."""
    found = None
    # the sign that typesetting has
    for found in _NUMBER.finditer(text.replace("\u2212", "-")):  # noqa: B007
        pass
    if found is None:
        return None
    digits = regex.sub(r"[,\u202f\u00a0 ]", "", found["digits"])
    over = float(found["over"]) if found["over"] else 1.0
    return float(found["sign"] + digits + (found["exponent"] or "")) / over if over else None


def matches(answer: str | None, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns` matches all of `answer`, outer white space aside. A pattern that is none matches nothing."""
    text = (answer or "").strip()
    for pattern in patterns:
        try:
            if text and regex.fullmatch(pattern, text, timeout=REGEX_TIMEOUT_S):
                return True
        except (regex.error, TimeoutError):
            continue
    return False


def code_score(num_errors: int, num_outputs: int) -> float:
    """1 - errors / outputs of one cell, 0 where it gave none. Before the division by the number of turns."""
    return 1 - num_errors / num_outputs if num_outputs else 0.0


def turn_rewards(
    trajectory: Trajectory,
    weights: RewardConfig,
    scores: Mapping[str, float],
    *,
    max_new_tokens: int,
    custom: Iterable[tuple[float, tuple[float, ...]]] = (),
) -> tuple[float, ...]:
    """r_t of each turn, as in this file's head.

    Args:
        scores: of the answer, by reward, each 0 to 1; those that have no weight aren't needed.
        max_new_tokens: longest response of a turn, for "length" [tokens].
        custom: weight, and the score of each turn, of rewards of the user's own.
    """
    turns, n = trajectory.turns, len(trajectory.turns)
    if not n:
        return ()
    of_turn = [
        weights.format * turn.well_formed
        + weights.code * code_score(turn.error is not None, bool(turn.output))
        + weights.length * max(0.0, 1 - len(turn.response_ids) / max_new_tokens)
        for turn in turns
    ]
    rewards = [earned / n for earned in of_turn]
    rewards[-1] += sum(getattr(weights, name) * score for name, score in scores.items())
    for weight, given in custom:
        rewards = [reward + weight * score for reward, score in zip(rewards, given, strict=True)]
    return tuple(rewards)
