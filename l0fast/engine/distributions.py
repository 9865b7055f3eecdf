"""Lengths and latencies to draw from, as quantile functions: u in [0, 1) -> value.

A caller brings its own uniform numbers, so that who draws when changes nothing (engine/sampling.py).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import Final

Distribution = Callable[[float], float]

_LAST: Final = 1 - 2.0**-25
"""The largest u that a 24-bit uniform number stands for; keeps a quantile finite."""


def exponential(mean: float) -> Distribution:
    return lambda u: -mean * math.log1p(-min(u, _LAST))


def lognormal(median: float, sigma: float) -> Distribution:
    """`sigma` is the standard deviation of the logarithm: 68 % lie within a factor exp(sigma) of the median."""
    standard = NormalDist().inv_cdf
    return lambda u: median * math.exp(sigma * standard(min(max(u, 1 - _LAST), _LAST)))


def uniform(low: float, high: float) -> Distribution:
    return lambda u: low + (high - low) * u


def recorded(values: Iterable[float]) -> Distribution:
    """What was seen, each as likely as the next."""
    ordered: Sequence[float] = sorted(values)
    if not ordered:
        raise ValueError("recorded() got no values: give at least one")
    return lambda u: ordered[int(u * len(ordered))]
