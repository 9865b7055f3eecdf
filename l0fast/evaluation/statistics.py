"""How sure a figure is: intervals over questions, pass@k, and whether two runs differ by more than noise. Pure.

mean over questions of each question's mean over samples; its spread over questions gives the interval, because
questions, not samples, are what a benchmark has few of:  mean +- 1.96 std / sqrt(questions)
pass@k = mean over questions of 1 - C(n - c, k) / C(n, k)      Chen et al., arXiv 2107.03374, equation 1
A against B, over the questions both answered: the interval by a paired bootstrap, p by flipping the signs of the differences,
which are as likely either way where A and B are equally good    Efron and Tibshirani 1993, chapters 13 and 15
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    mean: float
    half_width: float
    """Of the 95 % interval; nan for a single question."""
    questions: int


def interval(scores: Mapping[str, Sequence[float]]) -> Interval:
    """Mean and 95 % interval of scores by question, each with its samples. nan where there are none."""
    means = np.array([np.mean(samples) for samples in scores.values() if len(samples)])
    if not len(means):
        return Interval(math.nan, math.nan, 0)
    spread = Z95 * means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Interval(float(means.mean()), float(spread), len(means))


def pass_at_k(correct: Mapping[str, Sequence[bool]], k: int) -> float:
    """Probability that one of `k` samples is right, unbiased; over the questions with at least `k`. nan where none has."""
    estimates = [
        1 - math.comb(len(samples) - sum(samples), k) / math.comb(len(samples), k)
        for samples in correct.values()
        if len(samples) >= k
    ]
    return float(np.mean(estimates)) if estimates else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of A minus B, over the questions that both answered."""

    a: float
    b: float
    questions: int
    low: float
    """The 95 % interval of the difference; nan for a single question."""
    high: float
    p_value: float
    """How often, if A and B were equally good, a difference this large would be seen; two-sided."""

    @property
    def real(self) -> bool:
        """Whether it is more than noise, at 5 %."""
        return self.p_value < 0.05


def compare(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], *, seed: int = 0) -> Difference:
    """Paired, question by question. Raises ValueError where they share none."""
    common = sorted(key for key in a if len(a[key]) and len(b.get(key, ())))
    if not common:
        raise ValueError("they have no question in common")
    mean_a = np.array([np.mean(a[key]) for key in common])
    mean_b = np.array([np.mean(b[key]) for key in common])
    differences = mean_a - mean_b
    rng = np.random.default_rng(seed)
    low = high = math.nan
    if len(common) > 1:
        # in parts: ten thousand resamples of ten thousand questions are 800 MB
        resampled = np.concatenate(
            [rng.choice(differences, (part, len(common))).mean(axis=1) for part in _parts(len(common))]
        )
        low, high = np.quantile(resampled, [0.025, 0.975])
    return Difference(
        a=float(mean_a.mean()),
        b=float(mean_b.mean()),
        questions=len(common),
        low=float(low),
        high=float(high),
        p_value=_sign_flip_p(differences, rng),
    )


def _sign_flip_p(differences: np.ndarray, rng: np.random.Generator) -> float:
    """Two-sided: all flips where they are few, else a sample of them."""
    # a difference of 0 is the same either way
    differences = differences[differences != 0]
    # a bit less: the order of a sum changes its last digits
    observed = abs(differences.sum()) - 1e-9
    num_flips = 2 ** len(differences)
    if num_flips <= RESAMPLES:
        bits = np.arange(num_flips)[:, None] >> np.arange(len(differences)) & 1
        return float((np.abs((2 * bits - 1) @ differences) >= observed).mean())
    as_extreme = sum(
        int((np.abs((2.0 * rng.integers(0, 2, (part, len(differences))) - 1) @ differences) >= observed).sum())
        for part in _parts(len(differences))
    )
    # the flip that was observed is one of them
    return (as_extreme + 1) / (RESAMPLES + 1)


def _parts(length: int) -> list[int]:
    """Of RESAMPLES rows of `length` numbers, as many at once as memory takes."""
    size = max(1, 5_000_000 // length)
    return [min(size, RESAMPLES - start) for start in range(0, RESAMPLES, size)]
