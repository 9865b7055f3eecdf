"""What a turn is worth: L0's verifiable rewards (arXiv 2506.23667), computed from the record of an episode alone.

    r_t      = 0.8 * qa_t + 0.1 * format_t + 0.1 * code_t                          of turn t of n
    qa_t     = 0.9 * exact match + 0.1 * has answer   on the last turn, else 0
    format_t = [turn t is well-formed: exactly one <think> of more than 10 characters, one <code> of more than 5] / n
    code_t   = (1 - errors / outputs) / n;  0 where the cell gave no output

Answers are compared by the SQuAD rules (Rajpurkar et al., arXiv 1606.05250): case, punctuation, articles and spacing do
not count. Where we differ from L0:
  * letters of every script count (L0 keeps [a-z0-9], which makes any two non-Latin answers equal); NFKC and casefold first;
  * an answer that is nothing but articles and punctuation is compared as it stands, instead of equalling every other;
  * an empty answer does not earn "has answer";
  * L0 counts what a cell printed and its traceback as two outputs; we show a cell's output as one text, so that code_t of
    a cell that failed is 0.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from string import punctuation

from l0fast.types import Trajectory

QA_WEIGHT = 0.8
FORMAT_WEIGHT = 0.1
CODE_WEIGHT = 0.1
EXACT_MATCH_WEIGHT = 0.9
"""Within qa."""
HAS_ANSWER_WEIGHT = 0.1
"""Within qa."""

ARTICLES = frozenset(("a", "an", "the"))


def normalize_answer(text: str) -> str:
    """`text` without case, punctuation, articles and extra spacing, in NFKC; never empty unless `text` is blank."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    bare = "".join(c for c in folded if c not in punctuation and not unicodedata.category(c).startswith("P"))
    # what removing a mark has joined may compose anew
    tokens = unicodedata.normalize("NFKC", bare).split()
    return " ".join(token for token in tokens if token not in ARTICLES) or " ".join(folded.split())


def exact_match(answer: str | None, answers: Iterable[str]) -> bool:
    """Whether `answer` is one of the right `answers`, both normalised."""
    return has_answer(answer) and normalize_answer(answer or "") in {normalize_answer(right) for right in answers}


def f1(answer: str | None, answers: Iterable[str]) -> float:
    """Best harmonic mean of token precision and recall over the right `answers`, 0 to 1. Reported, not rewarded."""
    given = normalize_answer(answer or "").split()
    return max((_f1(given, normalize_answer(right).split()) for right in answers), default=0.0)


def _f1(given: list[str], right: list[str]) -> float:
    common = sum((Counter(given) & Counter(right)).values())
    return 2 * common / (len(given) + len(right)) if common else 0.0


def has_answer(answer: str | None) -> bool:
    """Whether anything was answered. White space is nothing."""
    return answer is not None and bool(answer.strip())


def qa_score(answer: str | None, answers: Iterable[str]) -> float:
    """0.9 * exact match + 0.1 * has answer, 0 to 1."""
    return EXACT_MATCH_WEIGHT * exact_match(answer, answers) + HAS_ANSWER_WEIGHT * has_answer(answer)


def code_score(num_errors: int, num_outputs: int) -> float:
    """1 - errors / outputs of one cell, 0 where it gave none. Before the division by the number of turns."""
    return 1 - num_errors / num_outputs if num_outputs else 0.0


def turn_rewards(trajectory: Trajectory) -> tuple[float, ...]:
    """r_t of each turn, as in this file's head. They sum to 1 at most."""
    turns = trajectory.turns
    qa = [0.0] * len(turns)
    if turns:
        qa[-1] = qa_score(trajectory.answer, trajectory.task.answers)
    return tuple(
        QA_WEIGHT * qa_t
        + FORMAT_WEIGHT * turn.well_formed / len(turns)
        + CODE_WEIGHT * code_score(turn.error is not None, bool(turn.output)) / len(turns)
        for qa_t, turn in zip(qa, turns, strict=True)
    )
