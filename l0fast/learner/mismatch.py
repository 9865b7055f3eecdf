"""Do the engine and the learner compute the same policy? Counted over every sampled token of a step, and judged.

With d = policy - sampler, the log-probs of the same tokens under the same weights from two programs, over N tokens:

    mismatch_k1         mean(-d)                      both estimate KL(sampler || policy): Schulman,
    mismatch_k3         mean(exp(d) - d - 1)          "Approximating KL divergence", http://joschu.net/blog/kl-approx.html
    mismatch_max        max |d|
    mismatch_outside    share of ratios exp(d) outside [1/2, 2]
    mismatch_ess        (sum exp(d))^2 / (N sum exp(d)^2): effective sample size, as a share of N; 1 when nothing differs
                        Kong, "A note on importance sampling using standardized weights", 1992

and the same by turn (mismatch_k3/turn_0, ...): what grows with the turn grows with the context. Masked tokens (weight 0)
are in none of it. What is kept are sums, so packs and ranks add up in any order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from l0fast.config import LearnerConfig
from l0fast.errors import LearnerError

TURN_BINS = 8
"""Turns told apart; the last one stands for all later turns too."""
MAX_LOG_RATIO = 20.0
"""d is cut here before exp, so that one wild token leaves the sums finite; mismatch_max shows it whole [nats]."""


class Mismatch:
    """Sums over tokens, by turn. The arrays may be reduced over ranks: `sums` by addition, `maxima` by maximum."""

    def __init__(self) -> None:
        self.sums = np.zeros((TURN_BINS, 6))
        """[turn]: N, and the sums of d, exp(d) - d - 1, outside, exp(d), exp(d)^2. float64."""
        self.maxima = np.zeros(TURN_BINS)
        """[turn]: max |d| [nats]. float64."""

    def add(
        self, policy_logprobs: np.ndarray, sampler_logprobs: np.ndarray, loss_weights: np.ndarray, turns: np.ndarray
    ) -> None:
        """Count tokens in. All [R]: log-probs [nats], weights (0 masks), the turn that sampled each token."""
        counts = loss_weights > 0
        turn = np.minimum(turns[counts], TURN_BINS - 1)
        # what is not finite goes into the sums, where `judge` finds it
        with np.errstate(invalid="ignore"):
            d = policy_logprobs[counts].astype(np.float64) - sampler_logprobs[counts]
            cut = np.minimum(d, MAX_LOG_RATIO)
            ratio = np.exp(cut)
            outside = (ratio < 0.5) | (ratio > 2.0)
            # expm1: d is often 1e-7, where exp(d) - 1 has lost half its digits
            columns = (np.ones_like(d), d, np.expm1(cut) - cut, outside, ratio, ratio * ratio)
            for i, column in enumerate(columns):
                self.sums[:, i] += np.bincount(turn, column, TURN_BINS)
            np.maximum.at(self.maxima, turn, np.abs(d))

    def metrics(self) -> dict[str, float]:
        """The numbers of the module's docstring: of all tokens, then of each turn that was seen. Empty without a token."""
        if not self.sums[:, 0].any():
            return {}
        metrics = _metrics(self.sums.sum(0), self.maxima.max())
        for turn in np.flatnonzero(self.sums[:, 0]):
            name = f"turn_{turn}" if turn < TURN_BINS - 1 else f"turn_{turn}_on"
            of_turn = _metrics(self.sums[turn], self.maxima[turn])
            metrics |= {f"{metric}/{name}": value for metric, value in of_turn.items()}
        return metrics


def _metrics(sums: np.ndarray, maximum: float) -> dict[str, float]:
    n, d, k3, outside, ratio, ratio_squared = sums.tolist()
    return {
        "mismatch_k1": -d / n,
        "mismatch_k3": k3 / n,
        "mismatch_max": float(maximum),
        "mismatch_outside": outside / n,
        # no weight at all (each policy log-prob -inf) is no sample at all
        "mismatch_ess": ratio * ratio / (n * ratio_squared) if ratio_squared else 0.0,
    }


def judge(metrics: Mapping[str, Any], config: LearnerConfig) -> str | None:
    """What a step's mismatch_k3 calls for: nothing (None) or a warning, one sentence.

    A number that is not finite (None in JSON) is a warning: it says nothing of the engine, and the optimizer step guards
    itself against log-probs that are not.

    Args:
        metrics: with mismatch_k3, as `Mismatch.metrics` or the learner's client gives it.

    Raises:
        LearnerError: above `learner.mismatch_stop`.
    """
    if not (config.mismatch_stop or config.mismatch_warn):
        return None
    k3 = metrics["mismatch_k3"]
    if k3 is None or not np.isfinite(k3):
        return (
            "mismatch_k3 is not a finite number: the learner or the engine gave a log-prob that is none; if steps are "
            "skipped from here on, go back to an earlier checkpoint with a lower --learner.lr"
        )
    above = f"mismatch_k3 = {k3:.3g} nats is above learner.mismatch_"
    if 0 < config.mismatch_stop < k3:
        raise LearnerError(
            f"{above}stop = {config.mismatch_stop:g}: the engine does not sample from the policy that the learner trains; "
            "look for weights that did not arrive, another dtype, or another temperature, or raise --learner.mismatch-stop "
            "(0 for never)"
        )
    if 0 < config.mismatch_warn < k3:
        return (
            f"{above}warn = {config.mismatch_warn:g}: the engine and the learner drift apart; compare their dtypes and "
            "attention back ends, or raise --learner.mismatch-warn (0 for never)"
        )
    return None
